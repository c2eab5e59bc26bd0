"""A run directory at the beginning of a launch: claimed, prepared, and searched for a checkpoint to resume from."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from checkpoint.choosing import Chosen, agree_on_checkpoint, read_on_all
from checkpoint.folder import has_checkpoints, list_checkpoints, read_patiently, step_dir
from checkpoint.stores import Gather, StorePlace
from runs.layout import CKPT_DIR, EXIT_DIR, MONITOR_DIR, SEEN_MARK, STOP_FILE, RunPaths
from runs.reslog import read_reslog
from utils.files import is_passing, lock_file
from utils.paths import names_in

_LOCK_PATIENCE = 30.0
"""Seconds to wait for a run directory that another process holds: a `prune`, or a rank that is dying."""
_RUNS_NAMED = 3
_NOT_OF_A_RUN_YET = (EXIT_DIR, MONITOR_DIR, SEEN_MARK, STOP_FILE, "lost+found", ".nfs", ".snapshot")
"""Beginnings of names that may be in a directory before a run: left by a refused launch, by the monitor, by ranks that
look for each other, by a user who asks a run to stop, or by a file system."""


def lock_run(out_dir: Path, patience_s: float = _LOCK_PATIENCE) -> BinaryIO:
    """Claim a run directory for this process, until the returned file is closed or the process ends.

    Args:
        patience_s: how long to wait for a process that holds it.
    Raises:
        ValueError: another process, still alive, has it.
    """
    taken = f"another process trains in {out_dir}: stop it first, or choose another --out_dir"
    return lock_file(RunPaths(out_dir).lock, taken, patience_s)


def prepare_run(out_dir: Path) -> None:
    """Create or reopen a run directory; one process of each store does this.

    Raises:
        ValueError: it cannot be written, or holds something else.
        OSError: it cannot be written now (a full disk).
    """
    paths = RunPaths(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if not paths.mark.exists():
            refuse_other_things(out_dir)
            # First of all: a launch that is killed after this must recognise its own directory.
            paths.mark.touch()
        _make_or_keep(paths.ckpt_dir)
    except OSError as error:
        if is_passing(error):
            raise
        raise ValueError(f"--out_dir {out_dir} cannot be written: {error.strerror}") from None


def _make_or_keep(directory: Path) -> None:
    """Make a directory unless it is there. mkdir with exist_ok would also look at it, and a file system that refuses to
    show it for a while would pass for one that cannot be written; who reads it waits."""
    try:
        directory.mkdir()
    except FileExistsError:
        if os.path.isfile(directory):
            raise


def refuse_other_things(out_dir: Path) -> None:
    """Refuse a directory that holds something other than a run, before anything is written there: an exit record among
    a corpus's files would be read as one of them.

    Raises:
        ValueError: it holds something, and no run; or it is a file.
        OSError: it cannot be read now.
    """
    if out_dir.is_file():
        raise ValueError(f"--out_dir {out_dir} is a file: choose a new or empty directory")
    is_empty = not out_dir.is_dir() or all(map(_may_precede_a_run, out_dir.iterdir()))
    # Looked at last: a rank that is ahead may have begun the run meanwhile.
    if not is_empty and not RunPaths(out_dir).mark.exists():
        raise ValueError(f"--out_dir {out_dir} holds other things than a run: choose a new or empty directory")


def _may_precede_a_run(path: Path) -> bool:
    # Earlier versions made an empty `ckpt` before the mark.
    is_empty_ckpt = path.name == CKPT_DIR and path.is_dir() and not os.listdir(path)
    return path.name.startswith(_NOT_OF_A_RUN_YET) or is_empty_ckpt


def open_run(
    out_dir: Path, resume: bool, which: str, place: StorePlace, gather: Gather
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
    if resume:
        chosen, remarks = agree_on_checkpoint(paths.ckpt_dir, which, place, gather)
        if chosen is not None:
            return chosen, remarks
    elif any(read_on_all(lambda: bool(list_checkpoints(paths.ckpt_dir)), gather)):
        raise ValueError(f"{out_dir} already holds a run: add --resume to go on, or choose another --out_dir")
    saved = next(filter(None, read_on_all(lambda: _last_save(paths.reslog), gather)), None)
    if saved is not None:
        raise ValueError(
            f"{paths.ckpt_dir} holds no checkpoint, but {paths.reslog} says that {saved} was saved: bring it back (is "
            f"a disk not mounted?) and give --resume, or choose another --out_dir to begin anew"
        )
    if not resume:
        return None, []
    # Asked by one rank only: each look at another run costs a network file system some time.
    beside = _runs_beside(out_dir) if place.is_first_of_store else ""
    return None, [f"no checkpoint in {out_dir}: starting fresh{beside}"]


def _runs_beside(out_dir: Path) -> str:
    """Help for a mistyped --out_dir: the run with a similar name, or the runs that there are."""
    parent, name = out_dir.parent, out_dir.name
    beside = [other for other in names_in(parent) if other != name and has_checkpoints(parent / other)]
    meant = [parent / other for other in get_close_matches(name, beside, 1)]
    if not meant and parent.name:
        # The folder was made by now, so it may be an earlier part that is wrong.
        folders = [other for other in names_in(parent.parent) if has_checkpoints(parent.parent / other / name)]
        meant = [parent.parent / other / name for other in get_close_matches(parent.name, folders, 1)]
    if meant:
        return f"; if {meant[0]} was meant, stop this run and give --out_dir={meant[0]}"
    shown = ", ".join(str(parent / other) for other in beside[:_RUNS_NAMED])
    more = f" and {len(beside) - _RUNS_NAMED} more" if len(beside) > _RUNS_NAMED else ""
    return f"; runs beside it that can be resumed: {shown}{more}" if beside else ""


def _last_save(reslog: Path) -> str | None:
    """Name of the last checkpoint that the run's log records as saved."""
    try:
        # (os.path.exists takes a file that cannot be looked at for one that is not there.)
        read_patiently(lambda: os.stat(reslog))
    except (FileNotFoundError, NotADirectoryError):
        return None
    saves = [record for record in read_reslog(reslog, names=("start", "save")) if record["name"] == "save"]
    return step_dir(saves[-1]["step"]) if saves else None
