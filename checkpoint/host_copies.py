"""Copies of tensors in host memory, made while the training goes on."""

from concurrent.futures import Future

import torch
from torch import Tensor

from utils.threads import background_threads


class HostCopies:
    """Copies of tensors in host memory: on CUDA by a stream of their own into pinned memory, on a CPU by a thread of
    their own. The memory is kept for the next time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = background_threads(1, "checkpoint-copy") if self._stream is None else None
        self._buffers: dict[str, Tensor] = {}
        # The tensors are kept too: memory that was freed could come back as another tensor's.
        self._taken: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._copied: torch.cuda.Event | Future | None = None

    def begin(self) -> None:
        """Forget the copies of the last save: their memory is overwritten from here on."""
        self.wait()
        self._taken.clear()

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """The future copy of a contiguous tensor. Memory that was named before since `begin` gets the same copy again.

        Args:
            key: names the buffer; the same at every save.
        """
        # Weights in float32 are their own main parameters.
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if same not in self._taken:
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() != tensor.numel() or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=self._stream is not None)
                self._buffers[key] = buffer
            self._taken[same] = (tensor, buffer)
        return self._taken[same][1].view(tensor.shape)

    def end(self) -> None:
        """All tensors are named: copy them in the background. None of them may change before `before_update`."""
        if self._thread is not None:
            self._copied = self._thread.submit(self._copy_all, False)
            return
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy_all(True)
        self._copied = self._stream.record_event()

    def _copy_all(self, non_blocking: bool) -> None:
        for tensor, buffer in self._taken.values():
            buffer.copy_(tensor.reshape(-1), non_blocking=non_blocking)

    def before_update(self) -> None:
        """The tensors are about to change. On CUDA the main stream waits for the copies, on the device; on a CPU the
        caller waits."""
        if isinstance(self._copied, Future):
            self._copied.result()
        elif self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        """Block until the copies are complete."""
        if isinstance(self._copied, Future):
            self._copied.result()
        elif self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
