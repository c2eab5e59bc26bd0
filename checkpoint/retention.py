"""Which checkpoints stay, and how the others go: out of sight by a rename first, then deleted."""

import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.folder import (
    REPLACED_STEP,
    Checkpoint,
    Unreadable,
    best_first,
    entries_of,
    find_problem,
    list_checkpoints,
    read_checkpoint,
    step_dir,
)
from utils.paths import names_in

logger = logging.getLogger(__name__)

_ABANDONED, _ABANDONED_KEPT = "abandoned-", 2
_SET_ASIDE = re.compile(rf"{_ABANDONED}step-(\d+)-(\d+)")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep_last: int = 2
    """The newest ones."""
    keep_best: int = 2
    """Those with the lowest validation loss."""
    keep_every: int = 0
    """Those of steps that are a multiple of this; 0: none."""

    def keeps_for_good(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0


def doomed_by(
    retention: Retention, checkpoints: Sequence[Checkpoint], just_saved: int | None = None
) -> list[Checkpoint]:
    """Those of `checkpoints` (by rising step) that need not stay.

    An unreadable one always stays. A broken one goes once there are as many whole ones after it as are kept.

    Args:
        just_saved: this step stays, too.
    """
    whole = [c for c in checkpoints if c.has_manifest]
    newest = whole[::-1][: retention.keep_last]
    kept = {c.path for c in [*newest, *best_first(whole)[: retention.keep_best]]}
    enough_from = min((c.step for c in newest), default=0) if len(newest) == retention.keep_last else -1

    def must_stay(c: Checkpoint) -> bool:
        if not c.has_manifest:
            return c.unreadable is not None or c.step > enough_from
        return c.path in kept or c.step == just_saved or retention.keeps_for_good(c.step)

    return [c for c in checkpoints if not must_stay(c)]


def prune(
    ckpt_dir: Path, retention: Retention, just_saved: int | None = None, spared: set[str] | None = None
) -> None:
    """Delete the checkpoints that need not stay, and all but the newest abandoned ones. An abandoned one stays if it
    cannot be read, or was to be kept for good.

    Args:
        just_saved: this step stays.
        spared: names of abandoned ones that turned out to be unreadable: not read again. Added to.
    Raises:
        OSError: something cannot be read or deleted now.
    """
    spared = set() if spared is None else spared
    for checkpoint in doomed_by(retention, list_checkpoints(ckpt_dir), just_saved):
        # Out of sight first: a deletion that is cut short must not leave half a checkpoint under its name.
        os.replace(checkpoint.path, checkpoint.path.with_name(f".old-{checkpoint.path.name}-{time.time_ns()}"))
    aside = [match for name in entries_of(ckpt_dir) if (match := _SET_ASIDE.fullmatch(name))]
    aside = [match for match in aside if not retention.keeps_for_good(int(match[1]))]
    for match in sorted(aside, key=lambda match: (int(match[2]), int(match[1])))[:-_ABANDONED_KEPT]:
        if match[0] not in spared and _can_be_read(ckpt_dir / match[0]):
            shutil.rmtree(ckpt_dir / match[0], ignore_errors=True)
        else:
            spared.add(match[0])
    _delete(ckpt_dir, ".old-*")
    _settle_replaced(ckpt_dir)


def prune_or_warn(
    ckpt_dir: Path, retention: Retention, just_saved: int | None = None, spared: set[str] | None = None
) -> None:
    """`prune`, with a warning if something cannot be deleted now: that is no reason to end a run."""
    try:
        prune(ckpt_dir, retention, just_saved, spared)
    except OSError as error:
        logger.warning("older checkpoints cannot be deleted: %s", error)


def _can_be_read(checkpoint: Path) -> bool:
    """Whether the system lets all of it be read, whole or broken: an unreadable one was set aside in the hope that it
    will be readable again."""
    try:
        find_problem(checkpoint)
    except Unreadable:
        return False
    return True


def abandon_later(ckpt_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond `step`, which a resumed run leaves behind, to `abandoned-*`."""
    return [_set_aside(checkpoint.path) for checkpoint in list_checkpoints(ckpt_dir) if checkpoint.step > step]


def abandoned(ckpt_dir: Path) -> list[str]:
    """Names of the checkpoints that resumed runs left behind, as far as they still lie there."""
    return sorted(name for name in names_in(ckpt_dir) if name.startswith(_ABANDONED))


def _set_aside(path: Path) -> Path:
    target = path.with_name(f"{_ABANDONED}{path.name}-{int(time.time())}")
    os.replace(path, target)
    return target


def delete_leftovers(ckpt_dir: Path) -> None:
    """Delete the leftovers of killed saves, deletions and launches; nobody may be writing here. A checkpoint whose
    replacement of the same step was not finished returns to its place."""
    _settle_replaced(ckpt_dir)
    _delete(ckpt_dir, ".old-*", ".tmp-step-*", ".fetched-*")


def _settle_replaced(ckpt_dir: Path) -> None:
    """Delete the replaced checkpoints whose successor of the same step is in place; bring back those whose successor
    is missing or broken."""
    for match in filter(None, map(REPLACED_STEP.match, entries_of(ckpt_dir))):
        replaced, step = ckpt_dir / match.string, int(match[1])
        in_place = ckpt_dir / step_dir(step)
        successor = read_checkpoint(in_place, step)
        if successor is not None and successor.has_manifest:
            shutil.rmtree(replaced, ignore_errors=True)
        elif successor is None or successor.unreadable is None:
            if successor is not None:
                _set_aside(in_place)
            os.replace(replaced, in_place)


def _delete(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
