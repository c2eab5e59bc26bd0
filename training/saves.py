"""The loop's saves: when they are due, and their outcome. saving.py holds a rank's share; checkpoint/ writes it."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from checkpoint.saving import SaveOutcome
from runs.reslog import ResLog
from training import report
from training.build import Built
from training.saving import add_share

logger = logging.getLogger("train")


class Saves:
    """Saves of a run, one in flight at a time. All ranks make the same calls in the same order.

    Args:
        reslog: the results' file, on the first rank alone.
        untimed: context for long work that is not training time.
    """

    def __init__(self, built: Built, reslog: ResLog | None, untimed: Callable[[], AbstractContextManager[None]]):
        self._built, self._saver, self._reslog, self._untimed = built, built.run_dir.saver, reslog, untimed
        # If samples were left out, the checkpoint's position is no longer the run's.
        is_saved = built.run_dir.resumed_from is not None and not built.left_out
        self.saved_step = built.progress.step if is_saved else -1
        """Step of the newest whole checkpoint of this launch; -1: none."""
        self._last_good = built.run_dir.chosen.name if built.run_dir.chosen else None
        self._is_time, self._waiting, self._last_save = False, False, time.monotonic()
        self._poisoned: str | None = None

    def reserve(self) -> None:
        """Reserve memory before the first step."""
        self._saver.reserve(partial(add_share, self._built))

    def signs(self) -> list[int]:
        """This rank's terms of the sums on which all ranks agree at each step; `take_signs` takes the sums."""
        minutes = self._built.config.run.save_interval_minutes
        # Only the first rank's clock counts.
        is_time = self._built.context.is_main and minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes
        return [int(is_time), *map(int, self._saver.signs())]

    def take_signs(self, sums: Sequence[int]) -> None:
        is_time, failed, done = sums
        if failed or done == self._built.context.world_size:
            self._report(self._saver.conclude())
        self._is_time = bool(is_time)

    def are_due(self, needed: bool) -> bool:
        """Whether to save after this step; stays true until `start`, in case a save has to wait.

        Args:
            needed: whether the step is saved in any case: it was validated, or will be evaluated.
        """
        interval = self._built.config.run.save_interval
        self._waiting |= needed or self._is_time or is_due(self._built.progress.step, interval)
        return self._waiting

    def start(self, valid_loss: float | None, prune: bool) -> None:
        """Begin to save the present state, each rank its share. No save may be in flight, and weights must be whole.

        Args:
            prune: whether older checkpoints may be deleted.
        """
        writer = self._saver.begin(self._built.progress.step)
        add_share(self._built, writer)
        self._saver.start(writer, valid_loss, prune=prune)
        self._waiting, self._last_save = False, time.monotonic()

    def settle(self, must: bool = False) -> None:
        """Wait until the save in flight, if any, is whole on all ranks or has failed.

        Raises:
            OSError: with `must`: the save failed (a full disk). Raised on all ranks; earlier checkpoints stay.
            FloatingPointError: the weights are not finite. Raised on all ranks; earlier checkpoints stay.
        """
        if not self._saver.in_flight:
            return
        with self._untimed():
            outcome = self._saver.settle()
        if outcome is not None:
            self._report(outcome)
            self.refuse_poison()
            if must and outcome.problem is not None:
                raise OSError(f"the checkpoint of step {outcome.step} could not be written: {outcome.problem}")

    def _report(self, outcome: SaveOutcome) -> None:
        """Report a save's outcome, on which all ranks agree."""
        if outcome.problem is None:
            self.saved_step, self._last_good = outcome.step, outcome.name
        elif outcome.poisoned:
            self._poisoned = f"the weights of step {outcome.step} are of no use: {outcome.problem}"
        report.report_save(self._reslog, self._built.run_dir.paths.ckpt_dir, outcome)

    def refuse_poison(self) -> None:
        """Stop the run if a save has found non-finite weights.

        Raises:
            FloatingPointError: it has; on all ranks.
        """
        if self._poisoned is not None:
            raise FloatingPointError(self._poisoned)

    def say_last_good(self, why: str) -> None:
        """Warn that the present step is not saved, and name the newest checkpoint."""
        last = f"{self._last_good} stays the newest checkpoint" if self._last_good else "there is no checkpoint yet"
        logger.warning("step %d is not saved: %s; %s", self._built.progress.step, why, last)


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
