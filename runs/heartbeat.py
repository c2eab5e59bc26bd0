"""Signs of life, one file a rank, written by the training thread only: another thread's beat would hide a hang."""

import faulthandler
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from runs.layout import RANK_FILES, rank_file, rank_of, stacks_file
from utils.small_files import is_number, is_whole, parse_json, read_small

logger = logging.getLogger(__name__)

PHASES = ("start", "reference", "compile", "step", "validate", "evaluate", "save", "end")
RECORD_BYTES = 512
_LONGEST_RECORD = 1 << 16
_IS_RIGHT: dict[str, Callable[[object], bool]] = {
    "rank": is_whole, "world_size": is_whole, "step": is_whole, "time": is_number, "monotonic": is_number,
    "pid": lambda value: is_whole(value, 1, (1 << 31) - 1), "code": is_whole,
    "phase": lambda value: isinstance(value, str), "launch": lambda value: isinstance(value, str),
}  # fmt: skip
"""Key -> check that its value is right; a reader may rely on these."""


class Heartbeat:
    """One rank's sign of life.

    Args:
        launch: the monitor's name for this launch, by which it tells this launch's records from older ones.
    """

    def __init__(self, directory: Path, rank: int, world_size: int = 1, launch: str = ""):
        directory.mkdir(parents=True, exist_ok=True)
        self._warned = False
        self._identity = {"rank": rank, "world_size": world_size, "pid": os.getpid(), "launch": launch}
        # Overwritten in place, in blocks that are there already: a full disk must not look like a hang.
        self._fd = os.open(directory / rank_file(rank), os.O_RDWR | os.O_CREAT, 0o644)

    def beat(self, phase: str, step: int) -> None:
        """Record that this rank is alive: {rank, world_size, pid, launch, phase, step, time (seconds since 1970),
        monotonic (seconds since this machine started)}. The first failure to write is a warning."""
        assert phase in PHASES
        now = {"phase": phase, "step": step, "time": time.time(), "monotonic": time.monotonic()}
        record = json.dumps(self._identity | now).encode()
        assert len(record) < RECORD_BYTES
        try:
            os.pwrite(self._fd, record.ljust(RECORD_BYTES - 1) + b"\n", 0)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("heartbeats cannot be written any more: %s", error)

    def end(self, step: int, code: int) -> None:
        """The last beat: everything is saved on all ranks, and this one will end with `code`, which is in the record
        from now on. Whatever delays or kills the process after that, the run has reached its goal."""
        self._identity["code"] = code
        self.beat("end", step)


def read_heartbeats(directory: Path) -> list[dict]:
    """The newest record of each rank, in no order; unreadable and malformed ones are left out."""
    records = []
    for path in directory.glob(RANK_FILES):
        try:
            record = parse_json(read_small(path, _LONGEST_RECORD))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and is_whole(record.get("rank")) and record["rank"] == rank_of(path):
            if all(is_right(record[key]) for key, is_right in _IS_RIGHT.items() if key in record):
                records.append(record)
    return records


def write_stacks_on_signal(directory: Path, rank: int) -> None:
    """On SIGUSR1, append the Python stacks of all threads to `directory`/rank-N.stacks, even if the main thread is
    inside a collective that never ends."""
    file = open(directory / stacks_file(rank), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
