"""A stream for communication, which runs beside the backward pass in a fixed order.

One interface, two implementations:

    CUDA   a side stream. `submit` makes it wait for all work issued so far on the main stream, then issues the new work
           without blocking the host; `wait` makes the main stream wait for it.
    CPU    one worker thread. `submit` queues the work; `wait` blocks until it is done.

Work starts in the order of submission, so the collectives match if all ranks submit in the same order. This also holds
for work that computes between two collectives, so hooks may do that freely.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Handle(Protocol):
    def wait(self) -> object: ...


class CommStream:
    """Runs work in order. Call `close` at the end; it finishes all submitted work."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, "comm-stream") if device.type != "cuda" else None

    def submit(self, work: Callable[[], Handle | None]) -> Handle:
        """Run `work` on the stream. If it returns a handle (of an asynchronous collective), `wait` covers that too."""
        if self._worker is not None:
            return _ThreadHandle(self._worker.submit(work))
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            inner = work()
            event = self._stream.record_event()
        return _StreamHandle(event, inner, self.device)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._stream is not None:
            self._stream.synchronize()


class _ThreadHandle:
    def __init__(self, future: Future):
        self._future = future

    def wait(self) -> None:
        """Wait until the work is done; re-raises its exception."""
        inner = self._future.result()
        if inner is not None:
            inner.wait()


class _StreamHandle:
    def __init__(self, event: torch.cuda.Event, inner: Handle | None, device: torch.device):
        self._event, self._inner, self._device = event, inner, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        if self._inner is not None:
            self._inner.wait()
