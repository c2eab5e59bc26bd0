"""Requests to stop: their sources, and the moments at which all ranks look for one.

Ranks can only stop together, so each look is a collective. Before every step, it is part of the agreement between
ranks. That is often enough while steps are short; but torchrun, a scheduler or an impatient user kills a process half a
minute after the request. So ranks also look within long steps and validations:

    step            | micro-batch | look | micro-batch | look | micro-batch, whose gradients are reduced | update |
    validation      | batches for 5 s    | look | batches for 5 s    | look | ...

A step in which a request is found is dropped: nothing of it has left its rank, no weight has changed, and the resumed
run's next step takes its samples.
"""

import logging
import os
import signal
import time
from contextlib import suppress

import torch

from parallel import DistContext
from training.run_dir import RunDir

logger = logging.getLogger("train")

_NOTICE = b"\nstopping: the run saves after the work in progress; a second Ctrl-C ends it without saving\n"
LONG_S = 5.0
"""Ranks look within steps that last at least this long, and after this much of a validation."""
_TELL_EVERY_S = 20.0
"""Time between lines on the progress of long work."""


class StopRequest:
    """Handler of SIGTERM, Ctrl-C and a closed terminal: remembers a request to stop this rank.

    Args:
        says_so: print a notice at once, as the end may be a while away.
    """

    def __init__(self, says_so: bool = False):
        self.requested, self._says_so = False, says_so

    def __call__(self, signum: int, _frame: object) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self._says_so and not self.requested:
            # Bypass Python's own buffer: this handler may have interrupted a write to it.
            with suppress(OSError):
                os.write(1, _NOTICE)
        self.requested = True


class Stopping:
    """Requests to stop, on this rank and on all ranks.

    Args:
        looks_for_file: False if the launch is not the training run that a file in its directory speaks to.
    """

    def __init__(self, request: StopRequest, run_dir: RunDir, context: DistContext, looks_for_file: bool = True):
        self.request, self._context = request, context
        # If nodes share a store, only one rank looks there.
        looks = looks_for_file and run_dir.place.is_first_of_store
        self._file = run_dir.paths.stop_file if looks else None

    def asked(self) -> bool:
        """Whether a signal to this rank, or a file in the run directory, requests a stop."""
        # (Path.exists would end the run if the file's status cannot be read.)
        return self.request.requested or (self._file is not None and os.path.exists(self._file))

    def agreed(self) -> bool:
        """Whether any rank has a request. Collective."""
        return bool(self._context.all_sum(torch.tensor(int(self.asked()))).item())


class Rounds:
    """Looks for a request within a validation. Every rank does as many rounds; the last may hold no work for it.

    The number of rounds between two looks is agreed on after the first round, from its duration.

    Args:
        what: name of the work, for people.
        total: number of rounds.
    """

    def __init__(self, stopping: Stopping, context: DistContext, what: str, total: int):
        self._stopping, self._context, self._teller, self.total = stopping, context, Teller(what), total
        self._started, self._done, self._every = time.perf_counter(), 0, 1

    def stop_after_round(self) -> bool:
        """Whether to stop now; call it after each round, on every rank. Collective."""
        self._done += 1
        self._teller.tell(self._done, self.total)
        if self._done == self.total or self._done % self._every:
            return False
        if self._done == 1:
            seconds = torch.tensor(time.perf_counter() - self._started, dtype=torch.float64)
            mean = self._context.all_sum(seconds).item() / self._context.world_size
            self._every = max(1, int(LONG_S / mean))
        return self._stopping.agreed()


class Teller:
    """Logs the progress of long work from time to time."""

    def __init__(self, what: str):
        self._what, self._started = what, time.perf_counter()
        self._last = self._started

    def tell(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done < total and now - self._last > _TELL_EVERY_S:
            self._last = now
            logger.info("%s: %.0f%% after %.0f s", self._what, 100 * done / total, now - self._started)
