"""Exit codes, and the records that survive torchrun, which turns every child's code into 1."""

import time
from collections.abc import Iterable
from pathlib import Path

from runs.layout import RANK_FILES, rank_file, rank_of
from utils.files import atomic_write_json
from utils.small_files import is_number, is_whole, parse_json, read_small

OK = 0
CRASH = 1
WRONG_INPUT = 2
"""The command or the data is wrong; retrying cannot help."""
STOPPED = 75
"""Stopped on request, after saving."""
_LONGEST_RECORD = 1 << 20
"""Most bytes in a record."""


class StopRequested(Exception):
    """All ranks have agreed to stop, and there was nothing to save yet."""


def write_exit_record(
    directory: Path, rank: int, code: int, reason: str, step: int | None, **more: object
) -> None:
    """Leave {rank, code, reason, step, time (seconds since 1970)} and `more` in `directory`/rank-N.json."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {"rank": rank, "code": code, "reason": reason, "step": step, "time": time.time(), **more}
    atomic_write_json(directory / rank_file(rank), record)


def clear_gone_ranks(directory: Path, world_size: int) -> None:
    """Remove the records of ranks that a launch with more of them had; one process does this for all."""
    for path in directory.glob(RANK_FILES):
        rank = rank_of(path)
        if rank is not None and rank >= world_size:
            path.unlink()


def clear_exit_record(directory: Path, rank: int) -> None:
    """Remove this rank's record of an earlier launch, before anything can go wrong in this one."""
    try:
        (directory / rank_file(rank)).unlink(missing_ok=True)
    except OSError:
        # If the directory is at fault, opening the run will say so.
        return


def read_exit_records(directory: Path, world_size: int | None = None) -> list[dict]:
    """The records of the last launch, in rank order; `world_size` leaves out those of ranks that it did not have. An
    incomplete record counts as missing, as if its rank had died before it could leave one."""
    records = filter(None, map(_read_record, directory.glob(RANK_FILES)))
    return sorted((r for r in records if world_size is None or r["rank"] < world_size), key=lambda r: r["rank"])


def _read_record(path: Path) -> dict | None:
    try:
        record = parse_json(read_small(path, _LONGEST_RECORD))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not is_whole(record.get("rank")) or record["rank"] != rank_of(path):
        return None
    is_right = (
        is_whole(record.get("code"), -(1 << 31), 1 << 31) and isinstance(record.get("reason"), str)
        and "step" in record and (record["step"] is None or is_whole(record["step"])) and is_number(record.get("time"))
    )  # fmt: skip
    return record if is_right else None


def is_told_by_lower_rank(directory: Path, rank: int, reason: str, launch: str, patience_s: float = 1.0) -> bool:
    """Whether a rank below this one has ended for the same reason, so that it need not be told again. Waits a moment
    for that.

    Args:
        launch: the present launch, as its records have it: those of others do not count.
    """
    until = time.monotonic() + patience_s
    while rank > 0:
        for record in read_exit_records(directory, rank):
            if record["reason"] == reason and record.get("launch") == launch:
                return True
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return False


def verdict(codes: Iterable[int], world_size: int) -> int:
    """Exit code of the whole job, from the codes that its ranks left: any 2 is 2, all 75 is 75, all 0 is 0, anything
    else is a crash. A rank that left no code crashed."""
    codes = list(codes)
    if WRONG_INPUT in codes:
        return WRONG_INPUT
    for code in (STOPPED, OK):
        if codes == [code] * world_size:
            return code
    return CRASH
