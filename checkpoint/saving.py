"""Saving checkpoints while the training goes on.

    main thread    step | forward, backward | optimizer | step | step | step ...
    copy thread         | copy ............ |
    save thread                             | write, flush, checksum, done-record | manifest, rename |

The state is copied into host memory, which each save uses again, under the next forward and backward pass: these only
read it. So a save holds up the training for the rest of the copy at most. One save is in flight at a time. The save
thread issues no collectives; the main threads agree on the outcome of a save by way of the values that they exchange at
every step anyway. Until then older checkpoints stay. Weights that are not finite do not become a checkpoint: the save
thread checks them before it writes.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError

from checkpoint.folder import step_dir
from checkpoint.host_copies import HostCopies
from checkpoint.retention import Retention, prune_or_warn
from checkpoint.stores import Gather, StorePlace
from checkpoint.writing import POLL_SECONDS, CheckpointWriter, NonFiniteWeights
from utils.threads import background_threads

logger = logging.getLogger(__name__)

_CLOSING_SECONDS = 2.0
"""How long a process that is about to end still waits for the parts of other ranks."""


@dataclass(frozen=True)
class SaveOutcome:
    """The outcome of a save, as all ranks agreed on it."""

    step: int
    name: str
    """Name of the checkpoint's directory."""
    seconds: float
    """Time from its beginning until it was whole on disk here."""
    held_up: float
    """Seconds of them that the training waited."""
    problem: str | None
    """Why it failed: nothing of it is left; earlier checkpoints are."""
    poisoned: bool = False
    """Whether it failed because weights are not finite."""


@dataclass(frozen=True)
class _Save:
    """A save in flight."""

    writer: CheckpointWriter
    ended: "Future[float]"
    """When this rank's part was done (time.perf_counter)."""


class CheckpointSaver:
    """Saves one checkpoint after the other, each in the background. All ranks call all methods in the same order.

    Args:
        launch: a name that all ranks of this launch share, and no other launch.
        background: False: write from the tensors' own memory, and wait; needs no memory for copies.
        gather: every rank's (JSON-like) value on every rank.
    """

    def __init__(
        self,
        ckpt_dir: Path,
        place: StorePlace,
        launch: str,
        device: torch.device,
        retention: Retention,
        background: bool,
        gather: Gather,
    ):
        self._ckpt_dir, self._place, self._launch, self._gather = ckpt_dir, place, launch, gather
        self.retention, self.background = retention, background
        self._copies = HostCopies(device) if background else None
        self._thread = background_threads(1, "checkpoint-save")
        self._count = 0
        self._prune_after = True
        self._spared: set[str] = set()
        self._save: _Save | None = None
        self._give_up = Event()
        self._closing_since: float | None = None
        self._began = self._held_up = 0.0

    @property
    def in_flight(self) -> bool:
        return self._save is not None

    def begin(self, step: int) -> CheckpointWriter:
        """A writer to add this rank's share to; then `start`. No other save may be in flight: `settle` first."""
        assert self._save is None
        self._began = time.perf_counter()
        self._count += 1
        if self._copies is not None:
            self._copies.begin()
        return CheckpointWriter(self._ckpt_dir, step, self._place, f"{self._launch}-{self._count}", self._copies)

    def start(self, writer: CheckpointWriter, valid_loss: float | None, prune: bool = True) -> None:
        """All is added: write it, then delete the checkpoints that need not stay. Without `background`, the caller has
        to `settle` before anything changes."""
        self._prune_after = prune
        if self._copies is not None:
            self._copies.end()
        self._give_up.clear()
        self._held_up = time.perf_counter() - self._began
        self._save = _Save(writer, self._thread.submit(self._write, writer, valid_loss))

    def prune(self, just_saved: int) -> None:
        """Delete the checkpoints that need not stay, in the background: abandoned ones are read for that."""
        if self._place.is_first_of_store:
            self._thread.submit(prune_or_warn, self._ckpt_dir, self.retention, just_saved, self._spared)

    def wait_for_prune(self) -> None:
        """Wait until the checkpoints that need not stay are deleted."""
        self._thread.submit(lambda: None).result()

    def reserve(self, add_share: Callable[[CheckpointWriter], None]) -> None:
        """Take the memory for the copies now, so that the first save is as short as the others."""
        if self._copies is not None:
            self._copies.begin()
            add_share(CheckpointWriter(self._ckpt_dir, 0, self._place, "", self._copies))
            self._copies.end()

    def before_update(self) -> None:
        """The tensors that were added to a save in flight are about to change."""
        if self._copies is not None:
            started = time.perf_counter()
            self._copies.before_update()
            self._held_up += time.perf_counter() - started

    def _write(self, writer: CheckpointWriter, valid_loss: float | None) -> float:
        """In the save thread; returns the time at its end (time.perf_counter)."""
        writer.make_directory()
        writer.write_files()
        writer.finish()
        if self._place.is_first_of_store:
            writer.commit(valid_loss, self._may_give_up)
        return time.perf_counter()

    def _may_give_up(self) -> bool:
        closing = self._closing_since
        return self._give_up.is_set() or (closing is not None and time.monotonic() > closing + _CLOSING_SECONDS)

    def signs(self) -> tuple[bool, bool]:
        """(failed here, done here) of the save in flight. The ranks exchange this, and `conclude` together once one has
        failed or all are done."""
        if self._save is None or not self._save.ended.done():
            return False, False
        failed = self._save.ended.exception() is not None
        return failed, not failed

    def settle(self) -> SaveOutcome | None:
        """Wait for the save in flight, and return its outcome; None if there is none. Issues collectives."""
        if self._save is None:
            return None
        started = time.perf_counter()
        while True:
            signs = self._gather(self.signs())
            if any(failed for failed, _ in signs) or all(done for _, done in signs):
                break
            time.sleep(POLL_SECONDS)
        self._held_up += time.perf_counter() - started
        return self.conclude()

    def conclude(self) -> SaveOutcome:
        """All ranks know that a rank has failed, or that all are done: agree on the outcome, and clean up. Issues
        collectives.

        Raises:
            Exception: the error in this rank's save thread, if it is not about the disk.
        """
        assert self._save is not None
        save = self._save
        self._give_up.set()
        error = save.ended.exception()
        own_problem = f"rank {self._place.rank}: {error}" if error is not None else None
        answers = self._gather([own_problem, isinstance(error, NonFiniteWeights)])
        problems, poisoned = [p for p, _ in answers if p is not None], any(poisoned for _, poisoned in answers)
        seconds = 0.0 if error is not None else save.ended.result() - self._began
        self._save = None
        if problems and self._place.is_first_of_store:
            save.writer.revert()
        if error is not None and not isinstance(error, (OSError, SafetensorError, NonFiniteWeights)):
            raise error
        step = save.writer.step
        if not problems and self._prune_after:
            self.prune(step)
        return SaveOutcome(step, step_dir(step), seconds, self._held_up, "; ".join(problems) or None, poisoned)

    def close(self) -> None:
        """Let a save in flight finish, unless parts of other ranks are missing and do not come."""
        self._closing_since = time.monotonic()
        self._thread.shutdown()
        if self._copies is not None:
            self._copies.close()
