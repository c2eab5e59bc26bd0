"""Time that training waits for communication: the part that overlap does not hide."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel.spans import span


class WaitMeter:
    """Adds up the time that the main thread waits. On CUDA the thread only makes its stream wait, so the stream's time.

    Args:
        enabled: False without other ranks to wait for.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self._on_cuda, self._enabled = device.type == "cuda", enabled
        self._waits: deque[tuple] = deque()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Context for a wait, which shows as `name` in a profile."""
        with span(name):
            if not self._enabled:
                yield
                return
            begin = self._now()
            yield
            self._waits.append((begin, self._now()))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Context whose waits are not counted, as they are not training time."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def take(self) -> float:
        """Seconds waited since the last call. On CUDA, only waits that the GPU has completed; the others count in a
        later call. Does not block."""
        seconds = 0.0
        while self._waits and (not self._on_cuda or self._waits[0][1].query()):
            begin, end = self._waits.popleft()
            seconds += begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

