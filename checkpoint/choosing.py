"""Which checkpoint to take: of one folder, or the one from which all ranks of a run can resume.

The ranks agree on it even if their nodes share no file system; checkpoint/stores.py says how a checkpoint is spread
over them then.
"""

import errno
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint.folder import (
    MANIFEST,
    UNKNOWN_SAVE,
    Checkpoint,
    Unreadable,
    best_first,
    find_problem,
    has_checkpoints,
    holds_weights,
    list_checkpoints,
    step_dir,
)
from checkpoint.stores import Gather, Part, StorePlace, enough_of, missing_ranks
from runs.layout import CKPT_DIR, RunPaths
from utils.paths import absent, names_in

logger = logging.getLogger(__name__)

_MOST_LOOKS = 5
"""How often the ranks look for a checkpoint to resume from while each look finds something else."""


def choose_checkpoint(
    ckpt_dir: Path, which: str = "last", weights_only: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The best valid checkpoint of one store, and a sentence about each broken one that was passed over.

    Args:
        which: "last" (greatest step) or "best" (lowest recorded validation loss).
    Raises:
        Unreadable: the one to take cannot be read. (To take an older one would be a silent choice.)
    """
    checkpoints = {c.part.save_id: c for c in list_checkpoints(ckpt_dir)}
    if which == "best":
        _require_readable(checkpoints.values())
    complaints: list[str] = []
    for part in _in_order([c.part for c in checkpoints.values()], which):
        candidate = checkpoints[part.save_id]
        problem = find_problem(candidate.path, weights_only)
        if problem is None:
            return candidate, complaints
        complaints.append(f"checkpoint {candidate.path} is broken and skipped: {problem}")
    return None, complaints


def _require_readable(checkpoints: Iterable[Checkpoint]) -> None:
    """
    Raises:
        Unreadable: a manifest cannot be read; it may be that of the best.
    """
    refused = [f"{c.path / MANIFEST} cannot be read: {c.unreadable}" for c in checkpoints if c.unreadable]
    if refused:
        raise Unreadable(errno.EIO, f"which checkpoint is the best cannot be told: {'; '.join(refused)}")


def _in_order(parts: Iterable[Part], which: str) -> list[Part]:
    """The parts that a run may resume from, the one to try first in front."""
    if which == "best":
        return best_first(parts)
    # Where stores are apart, one may know the save of a step whose manifest another cannot read.
    return sorted(parts, key=lambda p: (-p.step, p.save_id.startswith(UNKNOWN_SAVE)))


def newest_with(ckpt_dir: Path, name: str) -> Path | None:
    """Folder of the newest checkpoint that holds this file undamaged; None if there is none.

    Raises:
        Unreadable: a checkpoint that may hold it cannot be read.
    """
    refused = None
    for checkpoint in reversed(list_checkpoints(ckpt_dir)):
        try:
            if find_problem(checkpoint.path, only=name) is None:
                return checkpoint.path
        except Unreadable as error:
            refused = error
    if refused is not None:
        raise refused
    return None


def resolve_checkpoint_dir(path: Path) -> Path:
    """A folder with weights: a Hugging Face folder, an adapter's, a checkpoint, or the newest checkpoint of a run.

    Raises:
        ValueError: `path` leads to none of these.
    """
    if not path.exists():
        raise ValueError(absent(path, "give a folder of this machine, as nothing is downloaded"))
    if holds_weights(path):
        if (path / MANIFEST).exists() and (problem := find_problem(path, weights_only=True)):
            raise ValueError(f"checkpoint {path} is broken: {problem}")
        return path
    if RunPaths(path).ckpt_dir.is_dir():
        chosen, complaints = choose_checkpoint(RunPaths(path).ckpt_dir, weights_only=True)
        for complaint in complaints:
            logger.warning(complaint)
        if chosen is not None:
            return chosen.path
        raise ValueError("; ".join(complaints) or f"the run {path} has no checkpoint yet: its first save makes one")
    inside = [path / name for name in names_in(path)]
    if path.name == CKPT_DIR and RunPaths(path.parent).mark.exists():
        inside = [path.parent]
    one = next((each for each in inside if has_checkpoints(each) or holds_weights(each)), None)
    meant = f": did you mean {one}?" if one else ""
    raise ValueError(f"{path} is neither a run, nor a checkpoint, nor a Hugging Face folder{meant}")


@dataclass(frozen=True)
class Chosen:
    """A checkpoint to resume from, in all stores together."""

    step: int
    holders: tuple[int, ...]
    """First ranks of the stores that hold a valid part of it."""
    world_size: int
    """Number of ranks of the launch that wrote it."""
    enough: tuple[int, ...]
    """Those of them that together hold the whole optimizer state."""

    @property
    def name(self) -> str:
        return step_dir(self.step)


def agree_on_checkpoint(
    ckpt_dir: Path, which: str, place: StorePlace, gather: Gather
) -> tuple[Chosen | None, list[str]]:
    """The checkpoint from which all ranks can resume, and a sentence about each that was passed over. Collective.

    A checkpoint counts if the parts with right checksums that its stores hold make up the whole. An unreadable one is
    passed over like a broken one, so that a bad sector does not end a run. If a second one is unreadable, the disk or
    the mount is to blame: then it is better to try again than to go back further and further.

    Raises:
        ValueError: there are checkpoints, but none to resume from.
        Unreadable: what there is cannot be read now. On all ranks.
    """
    before = None
    for _ in range(_MOST_LOOKS):
        chosen, complaints, unreadable = _look_for_checkpoint(ckpt_dir, which, place, gather)
        if not unreadable or unreadable == before:
            break
        # Before steps are done again for it: was it only for that moment?
        before = unreadable
    if chosen is not None:
        return chosen, complaints
    if unreadable:
        raise Unreadable(
            errno.EIO, f"{'; '.join(unreadable)}: nothing was changed; start again once it can be read, or move what "
            f"stays unreadable out of {ckpt_dir}"
        )  # fmt: skip
    if complaints:
        raise ValueError(f"{'; '.join(complaints)}; none is left to resume from: choose another --out_dir")
    return None, []


def _look_for_checkpoint(
    ckpt_dir: Path, which: str, place: StorePlace, gather: Gather
) -> tuple[Chosen | None, list[str], list[str]]:
    """One look at all stores. Collective.

    Returns:
        the checkpoint; a sentence about each that was passed over; a sentence about each of those that is unreadable.
    Raises:
        ValueError: the best is asked for, and none has a validation loss.
        Unreadable: the checkpoints cannot be listed, or the best cannot be told. On all ranks.
    """
    own: dict[str, Checkpoint] = {}

    def list_own() -> list[dict]:
        own.update({c.part.save_id: c for c in list_checkpoints(ckpt_dir)} if place.is_first_of_store else {})
        if which == "best":
            _require_readable(own.values())
        return [asdict(checkpoint.part) for checkpoint in own.values()]

    stores = [
        [Part(**{**part, "ranks": tuple(part["ranks"]), "covers": tuple(part["covers"])}) for part in parts]
        for parts in read_on_all(list_own, gather)
    ]
    saves = {part.save_id: part for parts in stores for part in parts}
    ordered = _in_order(saves.values(), which)
    if saves and not ordered:
        raise ValueError(f"no checkpoint in {ckpt_dir} has a validation loss: use --resume_from=last")
    complaints: list[str] = []
    unreadable: list[str] = []
    for save in ordered:
        parts = {rank: part for rank, found in enumerate(stores) for part in found if part.save_id == save.save_id}
        refused = None
        for rank, (problem, passing) in enumerate(gather(_problem_or_refusal(own.get(save.save_id)))):
            if problem is not None:
                del parts[rank]
                how, refused = ("unreadable", problem) if passing else ("broken", refused)
                complaints.append(f"checkpoint {ckpt_dir / step_dir(save.step)} is {how} and skipped: {problem}"
                                  + ("" if place.shared_by_all else f" (on the node of rank {rank})"))  # fmt: skip
        missing = missing_ranks(parts.values())
        if not missing:
            return Chosen(save.step, tuple(parts), save.world_size, enough_of(parts)), complaints, unreadable
        unreadable += [refused] if refused is not None else []
        if len(unreadable) > 1:
            break
        if parts and not place.shared_by_all:
            complaints.append(
                f"checkpoint {step_dir(save.step)} is skipped: no node holds the optimizer state of ranks "
                f"{', '.join(map(str, missing))}"
            )
    return None, complaints, unreadable


def _problem_or_refusal(checkpoint: Checkpoint | None) -> tuple[str | None, bool]:
    """(problem with its files, whether the problem is only that the system refused to read them)."""
    try:
        return (find_problem(checkpoint.path), False) if checkpoint is not None else (None, False)
    except Unreadable as error:
        return str(error), True


def read_on_all(read: Callable[[], object], gather: Gather) -> list:
    """The results of `read` on every rank, in rank order. Collective.

    Raises:
        Unreadable: the system refused on a rank. On all ranks.
    """
    result = problem = None
    try:
        result = read()
    except OSError as error:
        problem = str(error)
    answers = gather([result, problem])
    for _, problem in answers:
        if problem is not None:
            raise Unreadable(errno.EIO, f"{problem}: nothing was changed; start again once it can be read")
    return [result for result, _ in answers]
