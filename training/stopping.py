"""Requests to stop: who may make one, and when all ranks look.

Ranks can only stop together, so each look is a collective. One comes with what ranks agree on before every step. That
is often enough while steps are short; torchrun, a scheduler or an impatient hand kill a process half a minute after
they have asked it to stop. So within what takes long they look in between, too:

    step            | micro-batch | look | micro-batch | look | micro-batch, whose gradients are reduced | update |
    validation      | batches for 5 s    | look | batches for 5 s    | look | ...

A step in which a request is found is dropped: nothing of it has left its rank, no weight has changed, and its samples
are those of the next step of the resumed run.
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

_ASKED = b"\nstopping: the run saves once it has computed what it is at; a second Ctrl-C ends it without saving\n"
LONG_S = 5.0
"""A step that lasts so long is looked into; a validation is, so often."""
_TELL_EVERY_S = 20.0
"""Between lines that say how far something long is."""


class StopRequest:
    """Handler of SIGTERM, Ctrl-C and a closed terminal: remembers that this rank was asked to stop.

    Args:
        says_so: at once, on the terminal, as the end may be a while away.
    """

    def __init__(self, says_so: bool = False):
        self.requested, self._says_so = False, says_so

    def __call__(self, signum: int, _frame: object) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self._says_so and not self.requested:
            # Past Python's own buffer, in which this handler may have interrupted somebody.
            with suppress(OSError):
                os.write(1, _ASKED)
        self.requested = True


class Stopping:
    """Whether to stop, as this rank was asked and as all ranks agree."""

    def __init__(self, request: StopRequest, run_dir: RunDir, context: DistContext):
        self.request, self._context = request, context
        # Of a store that nodes share, one rank looks.
        self._file = run_dir.stop_file if run_dir.place.is_first_of_store else None

    def asked(self) -> bool:
        """By a signal to this rank, or a file in the run directory."""
        # (Path.exists would end the run where the file cannot be looked at.)
        return self.request.requested or (self._file is not None and os.path.exists(self._file))

    def agreed(self) -> bool:
        """Whether any rank was asked. Collective."""
        return bool(self._context.all_sum(torch.tensor(int(self.asked()))).item())


class Rounds:
    """The looks within a validation, of which every rank does as many rounds of work, one or none in the last.

    How many rounds lie between two looks is agreed on after the first one, from the time that it took.

    Args:
        what: is going on, for people.
        total: rounds.
    """

    def __init__(self, stopping: Stopping, context: DistContext, what: str, total: int):
        self._stopping, self._context, self._teller, self.total = stopping, context, Teller(what), total
        self._started, self._done, self._every = time.perf_counter(), 0, 1

    def stop_after_round(self) -> bool:
        """After each round, on every rank: whether to stop now. Collective."""
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
    """Says from time to time how far something long is."""

    def __init__(self, what: str):
        self._what, self._started = what, time.perf_counter()
        self._told = self._started

    def tell(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done < total and now - self._told > _TELL_EVERY_S:
            self._told = now
            logger.info("%s: %.0f%% after %.0f s", self._what, 100 * done / total, now - self._started)
