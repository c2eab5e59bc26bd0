"""How long the training waits for communication: the part that no overlap hides."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel.spans import span


class WaitMeter:
    """Adds up for how long the main thread waits; on CUDA, where that only tells its stream to wait, the stream.

    Args:
        enabled: False where there is no other rank to wait for.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self._on_cuda, self._enabled = device.type == "cuda", enabled
        self._waits: deque[tuple] = deque()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Around a wait, which bears `name` in a profile."""
        with span(name):
            if not self._enabled:
                yield
                return
            begin = self._now()
            yield
            self._waits.append((begin, self._now()))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Waits inside are not added: for what is not training time."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def take(self) -> float:
        """Seconds of the waits since the last call. On CUDA of those that the GPU has behind it; the others count in a
        later call, and nothing waits for them here."""
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

