"""Exit codes, and the records that survive torchrun, which turns every child's code into 1."""

import json
from collections.abc import Iterable
from pathlib import Path

from utils.files import atomic_write_json

OK = 0
CRASH = 1
WRONG_INPUT = 2
"""The command or the data is wrong: retrying cannot help."""
STOPPED = 75
"""Stopped on request, after saving."""


def write_exit_record(directory: Path, rank: int, code: int, reason: str, step: int | None) -> None:
    """Leave {rank, code, reason, step} in `directory`/rank-N.json."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / f"rank-{rank}.json", {"rank": rank, "code": code, "reason": reason, "step": step})


def clear_exit_record(directory: Path, rank: int, world_size: int) -> None:
    """Remove this rank's record of an earlier launch; the last rank also removes those of ranks that are gone."""
    for path in directory.glob("rank-*.json"):
        number = int(path.stem.removeprefix("rank-"))
        if number == rank or (rank == world_size - 1 and number >= world_size):
            path.unlink(missing_ok=True)


def read_exit_records(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank-*.json"))]


def verdict(codes: Iterable[int]) -> int:
    """What the job as a whole did, from its ranks' codes: any 2 is 2, all 75 is 75, all 0 is 0, else a crash."""
    codes = list(codes)
    if WRONG_INPUT in codes:
        return WRONG_INPUT
    if codes and all(code == STOPPED for code in codes):
        return STOPPED
    return OK if codes and all(code == OK for code in codes) else CRASH
