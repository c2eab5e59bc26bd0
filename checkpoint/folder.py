"""Checkpoints: directories `ckpt/step-N/` that are whole or not there.

    python -m utils.checkpoint ls RUN        what there is
    python -m utils.checkpoint verify RUN    read every file and compare its checksum
    python -m utils.checkpoint prune RUN     delete all but those to keep

    .tmp-step-N-ID/       while it is written (checkpoint/saving.py)
      rank-R.done.json    each rank's record of its files: sizes and sha256
    step-N/               after the store's first rank checked the records, wrote the manifest and renamed
      model.safetensors, config.json, tokenizer ...   a Hugging Face folder
      optim-R.safetensors     flat float32 pieces, keyed "parameter name@offset/state"
      comm_hook-R.safetensors what rank R's comm hook remembers, if it does
      trainer_state.json      where the run stands
      manifest.json           every file's size and sha256, written last

They are written by checkpoint/saving.py, and their tensors are named in checkpoint/named.py. What it takes to
resume where nodes share no file system is in `agree_on_checkpoint` and checkpoint/stores.py.

A checkpoint is *broken* if its files can be read and are not what was written: it is named and passed over. It is
*unreadable* if the system refused to read them (EIO, ESTALE, EACCES: a disk, a network file system, a mount). That may
pass: nothing unreadable is ever deleted, and a run that finds nothing else does not start fresh, but ends as a crash,
which is tried again.
"""

import sys

if __name__ == "__main__":
    # Also when it is run by its path, or by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, TypeVar

from checkpoint.stores import Gather, Part, Place, missing_ranks
from runs.layout import CKPT_DIR, EXIT_DIR, MONITOR_DIR, SEEN_MARK, STOP_FILE, RunPaths
from runs.reslog import read_reslog
from utils.arguments import Parser
from utils.files import is_passing, lock_file, sha256_of_file
from utils.paths import a_path, absent, names_in
from utils.small_files import parse_json
from utils.terminal import run_main

logger = logging.getLogger(__name__)

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"
_UNKNOWN = "unknown-"
"""Begins the `save_id` of what has no manifest that says it."""
REPLACED = ".replaced-"
"""Begins the name of a checkpoint whose step is saved again, until that is done."""
_ABANDONED, _ABANDONED_KEPT = "abandoned-", 2
_STEP_DIR, _SET_ASIDE = re.compile(r"step-(\d+)"), re.compile(rf"{_ABANDONED}step-(\d+)-(\d+)")
_REPLACED_STEP = re.compile(rf"{re.escape(REPLACED)}step-(\d+)")
_PAUSES = (0.5, 2.0)
"""Seconds between tries to read what the system refuses: errors of a moment should cost nothing."""
_MOST_LOOKS = 5
"""For a checkpoint to resume from, while each shows something else."""
_LOCK_PATIENCE = 30.0
"""Seconds to wait for a run directory that another process holds: a `prune`, or a rank that is dying."""
_RUNS_NAMED = 3

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, not yet verified."""

    path: Path
    part: Part
    saved_at: float = 0.0
    """Seconds since 1970; 0 if unknown."""
    has_manifest: bool = True
    """Whether its manifest is whole: else it is of no use."""
    unreadable: str | None = None
    """What the system said when its manifest was read, if it said no: what it is worth is not known."""

    @property
    def step(self) -> int:
        return self.part.step

    @property
    def valid_loss(self) -> float | None:
        return self.part.valid_loss


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


class Unreadable(OSError):
    """The system refused to read a checkpoint. Another try may be luckier; what it holds must not be given up."""

    def __str__(self) -> str:
        return self.strerror


def _tried_again(read: Callable[[], _Read]) -> _Read:
    """What `read` returns, tried again after a moment where the system refuses.

    Raises:
        FileNotFoundError: it is not there; at once.
        OSError: it still refuses.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError


def sealed(manifest: dict) -> dict:
    """A manifest with a checksum of its own."""
    return manifest | {"sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _read_manifest(path: Path) -> dict:
    """
    Raises:
        OSError, ValueError: it cannot be read, or is not what was written.
    """
    manifest = parse_json((path / MANIFEST).read_bytes())
    # Manifests of earlier versions have neither.
    if not isinstance(manifest, dict) or ("save_id" in manifest and "sha256" not in manifest):
        raise ValueError("not a manifest")
    if "sha256" in manifest and sealed({k: v for k, v in manifest.items() if k != "sha256"}) != manifest:
        raise ValueError("not what was written")
    return manifest


def find_problem(path: Path, weights_only: bool = False, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint's files, compared with its manifest; None if nothing is.

    Args:
        weights_only: leave out the files of the optimizer and the comm hook, which are most of the bytes.
        only: look at this file alone; that it is not among the checkpoint's is a problem.
    Raises:
        Unreadable: the system refused to read one, several times.
    """
    file = path / MANIFEST
    try:
        files = _tried_again(lambda: _read_manifest(path))["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
        if only is not None:
            files = {only: files[only]} if only in files else {}
            if not files:
                return f"{only} is none of its files"
        for name, (expected_size, expected_sha256) in files.items():
            file = path / name
            if weights_only and is_state_of_ranks(name):
                continue
            size = _tried_again(file.stat).st_size
            if size != expected_size:
                return f"{name} holds {size} bytes instead of {expected_size}"
            if _tried_again(lambda file=file: sha256_of_file(file)) != expected_sha256:
                return f"{name} does not match its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return "it has no manifest" if file.name == MANIFEST else f"{file.name} is missing"
    except OSError as error:
        raise Unreadable(error.errno, f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    return None


def list_checkpoints(ckpt_dir: Path) -> list[Checkpoint]:
    """Committed checkpoints by rising step, unverified; abandoned and unfinished ones are left out.

    One that is being replaced by another save of the same step counts until that one is in its place.

    Raises:
        OSError: the directory cannot be read.
    """
    names = _names_in(ckpt_dir)
    found = {int(match[1]): name for name in names if (match := _STEP_DIR.fullmatch(name))}
    for name in names:
        if match := _REPLACED_STEP.match(name):
            found.setdefault(int(match[1]), name)
    read = (_read_checkpoint(ckpt_dir / name, step) for step, name in sorted(found.items()))
    return [checkpoint for checkpoint in read if checkpoint is not None]


def _names_in(directory: Path) -> list[str]:
    """Names of what is there; none if there is no such directory. (Path.glob and is_dir take a directory that cannot be
    read for an empty one.)

    Raises:
        OSError: it cannot be read.
    """
    try:
        return _tried_again(lambda: os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_checkpoint(path: Path, step: int) -> Checkpoint | None:
    """What its manifest says; of one that is broken or unreadable, the step alone. None: it is no directory, or was
    renamed just now."""
    nothing = Part(step, None, f"{_UNKNOWN}{step}", 1, (0,), False)
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        return Checkpoint(path, nothing, has_manifest=False, unreadable=error.strerror)
    try:
        manifest = _read_manifest(path)
        # Checkpoints of earlier versions lack all but the loss.
        part = Part(
            step, manifest["valid_loss"], manifest.get("save_id", f"{_UNKNOWN}{step}"), manifest.get("world_size", 1),
            tuple(manifest.get("ranks", [0])), manifest.get("sharded", False),
        )  # fmt: skip
        return Checkpoint(path, part, manifest.get("saved_at", 0.0))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Checkpoint(path, nothing, has_manifest=False)
    except OSError as error:
        return Checkpoint(path, nothing, has_manifest=False, unreadable=error.strerror)


_Scored = TypeVar("_Scored", Checkpoint, Part)


def best_first(found: Iterable[_Scored]) -> list[_Scored]:
    """Those that have a validation loss, the lowest in front; of equals the newest."""
    scored = [one for one in found if one.valid_loss is not None and math.isfinite(one.valid_loss)]
    return sorted(scored, key=lambda one: (one.valid_loss, -one.step))


def choose_checkpoint(
    ckpt_dir: Path, which: str = "last", weights_only: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The best valid checkpoint of one store, and a sentence about each broken one that was passed over.

    Args:
        which: "last" (greatest step) or "best" (lowest recorded validation loss).
    Raises:
        Unreadable: the one to take cannot be read. (An older one in its place would be a choice in silence.)
    """
    checkpoints = {c.part.save_id: c for c in list_checkpoints(ckpt_dir)}
    if which == "best":
        _require_readable(checkpoints.values())
    complaints = []
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
        Unreadable: a manifest is: it may be that of the best.
    """
    refused = [f"{c.path / MANIFEST} cannot be read: {c.unreadable}" for c in checkpoints if c.unreadable]
    if refused:
        raise Unreadable(errno.EIO, f"which checkpoint is the best cannot be told: {'; '.join(refused)}")


def newest_with(ckpt_dir: Path, name: str) -> Path | None:
    """Folder of the newest checkpoint in which this file is what was written; None if it is in none.

    Raises:
        Unreadable: it may be in one that cannot be read.
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


def _in_order(parts: Iterable[Part], which: str) -> list[Part]:
    """Those that may be resumed from, the one to try first in front."""
    if which == "best":
        return best_first(parts)
    # Where stores are apart, one may know the save of a step whose manifest another cannot read.
    return sorted(parts, key=lambda p: (-p.step, p.save_id.startswith(_UNKNOWN)))


@dataclass(frozen=True)
class Chosen:
    """A checkpoint to resume from, on all stores together."""

    step: int
    holders: tuple[int, ...]
    """First ranks of the stores that hold a valid part of it."""
    world_size: int
    """Of the launch that wrote it."""
    sharded: bool
    """Whether its parts make up the whole only together."""

    @property
    def name(self) -> str:
        return f"step-{self.step}"


def agree_on_checkpoint(ckpt_dir: Path, which: str, place: Place, gather: Gather) -> tuple[Chosen | None, list[str]]:
    """The checkpoint from which all ranks can resume, and a sentence about each that was passed over. Collective.

    A checkpoint counts where the parts that its stores hold, and whose checksums are right, are the whole. One that is
    unreadable is passed over like a broken one, so that a bad sector does not end a run. If a second one is, it is the
    disk or the mount: then it is better to try again than to go back further and further.

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
    ckpt_dir: Path, which: str, place: Place, gather: Gather
) -> tuple[Chosen | None, list[str], list[str]]:
    """One look at all stores. Collective.

    Returns:
        the checkpoint; a sentence about each that was passed over; what could not be read of those.
    Raises:
        ValueError: the best is asked for, and none has a validation loss.
        Unreadable: what there is cannot be listed, or the best not be told. On all ranks.
    """
    own: dict[str, Checkpoint] = {}

    def list_own() -> list[dict]:
        own.update({c.part.save_id: c for c in list_checkpoints(ckpt_dir)} if place.is_first_of_store else {})
        if which == "best":
            _require_readable(own.values())
        return [asdict(checkpoint.part) for checkpoint in own.values()]

    stores = [[Part(**{**part, "ranks": tuple(part["ranks"])}) for part in parts]
              for parts in _read_on_all(list_own, gather)]  # fmt: skip
    saves = {part.save_id: part for parts in stores for part in parts}
    ordered = _in_order(saves.values(), which)
    if saves and not ordered:
        raise ValueError(f"no checkpoint in {ckpt_dir} has a validation loss: use --resume_from=last")
    complaints, unreadable = [], []
    for save in ordered:
        parts = {rank: part for rank, found in enumerate(stores) for part in found if part.save_id == save.save_id}
        refused = None
        for rank, (problem, passing) in enumerate(gather(_problem_or_refusal(own.get(save.save_id)))):
            if problem is not None:
                del parts[rank]
                how, refused = ("unreadable", problem) if passing else ("broken", refused)
                complaints.append(f"checkpoint {ckpt_dir / f'step-{save.step}'} is {how} and skipped: {problem}"
                                  + ("" if place.shared_by_all else f" (on the node of rank {rank})"))  # fmt: skip
        missing = missing_ranks(parts.values())
        if not missing:
            return Chosen(save.step, tuple(parts), save.world_size, save.sharded), complaints, unreadable
        unreadable += [refused] if refused is not None else []
        if len(unreadable) > 1:
            break
        if parts and not place.shared_by_all:
            complaints.append(
                f"checkpoint step-{save.step} is skipped: no node holds the optimizer state of ranks "
                f"{', '.join(map(str, missing))}"
            )
    return None, complaints, unreadable


def _problem_or_refusal(checkpoint: Checkpoint | None) -> tuple[str | None, bool]:
    """(what is wrong with its files, whether only because the system refused to read them)."""
    try:
        return (find_problem(checkpoint.path), False) if checkpoint is not None else (None, False)
    except Unreadable as error:
        return str(error), True


def _read_on_all(read: Callable[[], object], gather: Gather) -> list:
    """What `read` returns on every rank, in rank order. Collective.

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


def lock_run(out_dir: Path, patience_s: float = _LOCK_PATIENCE) -> BinaryIO:
    """Claim a run directory for this process, until the returned file is closed or the process ends.

    Args:
        patience_s: how long to wait for a process that holds it.
    Raises:
        ValueError: another process, still alive, has it.
    """
    taken = f"another process trains in {out_dir}: stop it first, or choose another --out_dir"
    return lock_file(RunPaths(out_dir).lock, taken, patience_s)


_NOT_OF_A_RUN_YET = (EXIT_DIR, MONITOR_DIR, SEEN_MARK, STOP_FILE, "lost+found", ".nfs", ".snapshot")
"""How names begin that a refused launch, the monitor, ranks that look for each other, who asks a run to stop, or a file
system leave in a directory."""


def prepare_run(out_dir: Path) -> None:
    """Create or reopen a run directory; one process of each store does this.

    Raises:
        ValueError: it cannot be written, or holds something else.
        OSError: it cannot be written now (a full disk).
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if not RunPaths(out_dir).mark.exists():
            refuse_other_things(out_dir)
            # Before anything else: who is killed in between must find his own directory again.
            RunPaths(out_dir).mark.touch()
        RunPaths(out_dir).ckpt_dir.mkdir(exist_ok=True)
    except OSError as error:
        if is_passing(error):
            raise
        raise ValueError(f"--out_dir {out_dir} cannot be written: {error.strerror}") from None


def refuse_other_things(out_dir: Path) -> None:
    """Before anything is written there: an exit record among a corpus's files would be read as one of them.

    Raises:
        ValueError: it holds something, and no run.
        OSError: it cannot be read now.
    """
    is_empty = not out_dir.is_dir() or all(map(_may_precede_a_run, out_dir.iterdir()))
    # Last: a rank that is ahead may have begun the run meanwhile.
    if not is_empty and not RunPaths(out_dir).mark.exists():
        raise ValueError(f"--out_dir {out_dir} holds other things than a run: choose a new or empty directory")


def _may_precede_a_run(path: Path) -> bool:
    # Earlier versions made an empty `ckpt` before the mark.
    return path.name.startswith(_NOT_OF_A_RUN_YET) or (path.name == CKPT_DIR and path.is_dir() and not os.listdir(path))


def open_run(
    out_dir: Path, resume: bool, which: str, place: Place, gather: Gather
) -> tuple[Chosen | None, list[str]]:
    """Find the checkpoint to resume from, in a run directory that is prepared and locked. Collective.

    Returns:
        the checkpoint (None: start fresh), and remarks for the user.
    Raises:
        ValueError: it holds checkpoints and `resume` is off; none of them is whole; those that its log names are
            missing. On all ranks.
        Unreadable: what there is cannot be read now. On all ranks.
    """
    paths = RunPaths(out_dir)
    ckpt_dir = paths.ckpt_dir
    if resume:
        chosen, remarks = agree_on_checkpoint(ckpt_dir, which, place, gather)
        if chosen is not None:
            return chosen, remarks
    elif any(_read_on_all(lambda: bool(list_checkpoints(ckpt_dir)), gather)):
        raise ValueError(f"{out_dir} already holds a run: add --resume to go on, or choose another --out_dir")
    saved = next(filter(None, _read_on_all(lambda: _last_save(paths.reslog), gather)), None)
    if saved is not None:
        raise ValueError(
            f"{ckpt_dir} holds no checkpoint, but {paths.reslog} says that {saved} was saved: bring it back (is a "
            f"disk not mounted?) and give --resume, or choose another --out_dir to begin anew"
        )
    if not resume:
        return None, []
    # Asked once: each look at another run costs a network file system some time.
    beside = _runs_beside(out_dir) if place.is_first_of_store else ""
    return None, [f"no checkpoint in {out_dir}: starting fresh{beside}"]


def _runs_beside(out_dir: Path) -> str:
    """For whoever has mistyped --out_dir: the run that is called alike, or those that there are."""
    parent, name = out_dir.parent, out_dir.name
    beside = [other for other in names_in(parent) if other != name and _has_checkpoints(parent / other)]
    meant = [parent / other for other in get_close_matches(name, beside, 1)]
    if not meant and parent.name:
        # The folder was made by now, so it may be an earlier part that is wrong.
        folders = [other for other in names_in(parent.parent) if _has_checkpoints(parent.parent / other / name)]
        meant = [parent.parent / other / name for other in get_close_matches(parent.name, folders, 1)]
    if meant:
        return f"; if {meant[0]} was meant, stop this run and give --out_dir={meant[0]}"
    shown = ", ".join(str(parent / other) for other in beside[:_RUNS_NAMED])
    more = f" and {len(beside) - _RUNS_NAMED} more" if len(beside) > _RUNS_NAMED else ""
    return f"; runs beside it that can be resumed: {shown}{more}" if beside else ""


def _has_checkpoints(run: Path) -> bool:
    try:
        return any(map(_STEP_DIR.fullmatch, os.listdir(RunPaths(run).ckpt_dir)))
    except OSError:
        return False


def _last_save(reslog: Path) -> str | None:
    """Name of the last checkpoint that the run's log says was saved."""
    try:
        # (os.path.exists takes a file that cannot be looked at for one that is not there.)
        _tried_again(lambda: os.stat(reslog))
    except (FileNotFoundError, NotADirectoryError):
        return None
    saves = [record for record in read_reslog(reslog, names=("start", "save")) if record["name"] == "save"]
    return f"step-{saves[-1]['step']}" if saves else None


def resolve_checkpoint_dir(path: Path) -> Path:
    """A directory with weights, from a run (its newest checkpoint), a checkpoint or a Hugging Face folder.

    Raises:
        ValueError: nothing usable there.
    """
    if not path.exists():
        raise ValueError(absent(path, "give a folder of this machine, as nothing is downloaded"))
    if (path / "config.json").exists():
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
    one = next((each for each in inside if _has_checkpoints(each) or (each / "config.json").exists()), None)
    meant = f": did you mean {one}?" if one else ""
    raise ValueError(f"{path} is neither a run, nor a checkpoint, nor a Hugging Face folder{meant}")


def read_trainer_state(path: Path) -> dict:
    return json.loads((path / TRAINER_STATE).read_text())


def abandon_later(ckpt_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step`, which a resumed run leaves behind, to `abandoned-*`."""
    renamed = []
    for checkpoint in list_checkpoints(ckpt_dir):
        if checkpoint.step > step:
            renamed.append(_set_aside(checkpoint.path))
    return renamed


def _set_aside(path: Path) -> Path:
    target = path.with_name(f"{_ABANDONED}{path.name}-{int(time.time())}")
    os.replace(path, target)
    return target


def doomed_by(
    retention: Retention, checkpoints: Sequence[Checkpoint], just_saved: int | None = None
) -> list[Checkpoint]:
    """Those of `checkpoints` (by rising step) that need not stay.

    An unreadable one stays, whatever it is. A broken one goes once there are as many whole ones after it as are kept.

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
    """Delete the checkpoints that need not stay, and all but the newest of those that were set aside. What cannot be
    read is not deleted, nor is what was to be kept for good, when it was set aside.

    Args:
        just_saved: this step stays.
        spared: names of what was set aside and turned out to be unreadable: not read again. Added to.
    Raises:
        OSError: something cannot be read or deleted now.
    """
    spared = set() if spared is None else spared
    for checkpoint in doomed_by(retention, list_checkpoints(ckpt_dir), just_saved):
        # Out of sight first: a deletion that is cut short must not leave half a checkpoint under its name.
        os.replace(checkpoint.path, checkpoint.path.with_name(f".old-{checkpoint.path.name}-{time.time_ns()}"))
    aside = [match for name in _names_in(ckpt_dir) if (match := _SET_ASIDE.fullmatch(name))]
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
    """As `prune`, where a deletion that does not work now is no reason to end a run."""
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


def delete_leftovers(ckpt_dir: Path) -> None:
    """Delete what killed saves, deletions and launches left; nobody may be writing here. A checkpoint whose successor
    of the same step did not come to its place goes back there."""
    _settle_replaced(ckpt_dir)
    _delete(ckpt_dir, ".old-*", ".tmp-step-*", ".fetched-*")


def _settle_replaced(ckpt_dir: Path) -> None:
    """Delete the checkpoints whose successor of the same step is in its place; bring back those whose is not, or is
    broken."""
    for match in filter(None, map(_REPLACED_STEP.match, _names_in(ckpt_dir))):
        replaced, step = ckpt_dir / match.string, int(match[1])
        place = ckpt_dir / f"step-{match[1]}"
        successor = _read_checkpoint(place, step)
        if successor is not None and successor.has_manifest:
            shutil.rmtree(replaced, ignore_errors=True)
        elif successor is None or successor.unreadable is None:
            if successor is not None:
                _set_aside(place)
            os.replace(replaced, place)


def _delete(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def is_state_of_ranks(name: str) -> bool:
    """Whether a checkpoint's file is one of those that each rank writes for itself."""
    return name.startswith(("optim-", "comm_hook-"))


def is_hook_state(name: str) -> bool:
    return name.startswith("comm_hook-")


def hook_state_rank(name: str) -> int:
    """Whose memory a `comm_hook-R.safetensors` is."""
    return int(name.removeprefix("comm_hook-").removesuffix(".safetensors"))


def _age(seconds: float) -> str:
    """5 s, 3 min, 2.5 h or 4.0 days."""
    for unit, length in (("days", 86400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(seconds, 0):.0f} s"


def _line(checkpoint: Checkpoint) -> str:
    if checkpoint.unreadable:
        return f"{checkpoint.path.name:<14} cannot be read: {checkpoint.unreadable}"
    size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
    loss = f"{checkpoint.valid_loss:.4f}" if checkpoint.valid_loss is not None else "-"
    age = f"{_age(time.time() - checkpoint.saved_at)} ago" if checkpoint.saved_at else "-"
    part = checkpoint.part
    ranks = f"{len(part.ranks)} of {part.world_size} ranks" if len(part.ranks) < part.world_size else (
        f"{part.world_size} rank{'s' if part.world_size > 1 else ''}")  # fmt: skip
    return f"{checkpoint.path.name:<14} {size / 1e6:>10,.1f} MB  valid loss {loss:>8}  {age:>12}  {ranks}"


def _list_command(checkpoints: list[Checkpoint]) -> int:
    for checkpoint in checkpoints:
        print(_line(checkpoint))
    return 0


def _verify_command(checkpoints: list[Checkpoint]) -> int:
    broken = 0
    for checkpoint in checkpoints:
        try:
            problem = find_problem(checkpoint.path)
            verdict = "ok" if problem is None else f"BROKEN: {problem}"
        except Unreadable as error:
            problem = verdict = f"UNREADABLE: {error}"
        broken += problem is not None
        print(f"{_line(checkpoint)}  {verdict}", flush=True)
    return 1 if broken else 0


def _prune_command(run: Path, checkpoints: list[Checkpoint], retention: Retention, dry_run: bool) -> int:
    lock = None if dry_run else lock_run(run, patience_s=0)
    doomed = doomed_by(retention, checkpoints)
    for checkpoint in doomed:
        print(f"{'would delete' if dry_run else 'deleting'} {_line(checkpoint)}")
    if lock is not None:
        prune(RunPaths(run).ckpt_dir, retention)
        delete_leftovers(RunPaths(run).ckpt_dir)
        lock.close()
    print(f"{len(checkpoints) - len(doomed)} of {len(checkpoints)} checkpoints stay")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m utils.checkpoint", description="Look after the checkpoints of a run."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = Retention()
    for name, text in (
        ("ls", "list them"),
        ("verify", "compare every file with its checksum; exit code 1 if one is broken"),
        ("prune", "delete all but those to keep"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", type=a_path, help="run directory (--out_dir of the training)")
        if name == "prune":
            command.add_argument("--keep_last", type=int, default=defaults.keep_last, help="newest ones to keep")
            command.add_argument("--keep_best", type=int, default=defaults.keep_best,
                                 help="ones with the lowest validation loss to keep")  # fmt: skip
            command.add_argument("--keep_every", type=int, default=defaults.keep_every,
                                 help="keep those of steps that are a multiple of this")  # fmt: skip
            command.add_argument("--dry_run", action="store_true", help="only say what would be deleted")
    args = parser.parse_args(argv)
    run = Path(args.run)
    try:
        checkpoints = list_checkpoints(RunPaths(run).ckpt_dir)
        if not RunPaths(run).ckpt_dir.is_dir():
            raise ValueError(f"{run} is no run directory: it has no ckpt folder" if run.exists() else absent(run))
        if args.command == "prune":
            for name, least in (("keep_last", 1), ("keep_best", 0), ("keep_every", 0)):
                if getattr(args, name) < least:
                    raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
            retention = Retention(args.keep_last, args.keep_best, args.keep_every)
            return _prune_command(run, checkpoints, retention, args.dry_run)
        if not checkpoints:
            raise ValueError(f"{run} holds no checkpoint yet")
        return (_list_command if args.command == "ls" else _verify_command)(checkpoints)
    except (ValueError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_main(main, goes_on=True)
