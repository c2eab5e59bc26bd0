"""Copies of tensors in host memory, made while the training goes on."""

from concurrent.futures import Future

import torch
from torch import Tensor

from utils.threads import background_threads


class HostCopies:
    """Copies of tensors in host memory: those of CUDA tensors by a stream of their own into pinned memory, those of
    others by a thread of their own. The memory is kept for the next time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = background_threads(1, "checkpoint-copy")
        self._buffers: dict[str, Tensor] = {}
        # The tensors are kept too: memory that was freed could come back as another tensor's.
        self._taken: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._by_main: torch.cuda.Event | None = None
        self._by_stream: torch.cuda.Event | None = None
        self._by_thread: Future | None = None

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
            self._taken[same] = (tensor, self._buffer(key, tensor))
        return self._taken[same][1].view(tensor.shape)

    def copy_now(self, key: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor whose memory may be used for others after this call. On CUDA it is complete after `wait`.

        Args:
            key: names the buffer; the same at every save.
        """
        buffer = self._buffer(key, tensor)
        # In the order of the main stream: what it is given afterwards cannot overwrite the memory too early.
        buffer.copy_(tensor.reshape(-1), non_blocking=True)
        if tensor.is_cuda:
            self._by_main = torch.cuda.current_stream(self._device).record_event()
        return buffer.view(tensor.shape)

    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() != tensor.numel() or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer

    def end(self) -> None:
        """All tensors are named: copy them in the background. None of them may change before `before_update`."""
        # On CUDA, an offloaded optimizer's state lies in host memory already. It changes all the same while files are
        # written, so it is copied, too.
        by_stream = [pair for pair in self._taken.values() if pair[0].is_cuda]
        by_thread = [pair for pair in self._taken.values() if not pair[0].is_cuda]
        self._by_thread = self._thread.submit(_copy_all, by_thread, False) if by_thread else None
        self._by_stream = None
        if by_stream:
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _copy_all(by_stream, True)
            self._by_stream = self._stream.record_event()

    def before_update(self) -> None:
        """The tensors are about to change. For those on CUDA the main stream waits for the copies, on the device; for
        others the caller waits."""
        if self._by_thread is not None:
            self._by_thread.result()
        if self._by_stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._by_stream)

    def wait(self) -> None:
        """Block until the copies are complete."""
        if self._by_main is not None:
            self._by_main.synchronize()
        if self._by_thread is not None:
            self._by_thread.result()
        if self._by_stream is not None:
            self._by_stream.synchronize()

    def close(self) -> None:
        self._thread.shutdown()


def _copy_all(pairs: list[tuple[Tensor, Tensor]], non_blocking: bool) -> None:
    for tensor, buffer in pairs:
        buffer.copy_(tensor.reshape(-1), non_blocking=non_blocking)
