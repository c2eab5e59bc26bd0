"""The run's results: `reslog.jsonl`, append-only, one JSON object a line.

Every record has "name" ("start", "train", "valid", "save", "save_failed", "compression",
"end") and "time". Each launch appends a "start" record with
the step it begins at; what earlier launches wrote beyond that step is superseded, and `read_reslog` leaves it out.
"""

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST_UNWRITTEN = 10_000
"""Records kept while the disk is full; beyond that, the oldest are lost."""


class ResLog:
    def __init__(self, path: Path):
        """Open for appending. A line that a crash cut off gets its newline first, so that the next one stays whole."""
        torn = False
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
        self._warned = False
        self._unwritten: deque[bytes] = deque(maxlen=_MOST_UNWRITTEN)
        # Unbuffered: what could not be written is kept here, in order.
        self._file = open(path, "ab", buffering=0)
        if torn:
            self._file.write(b"\n")

    def write(self, name: str, **values: object) -> None:
        """Append one record at once. If that fails (a full disk), warn once, and write it together with a later one.
        Non-finite floats become strings for JSON's sake."""
        record = _json_numbers({"name": name, "time": round(time.time(), 3), **values})
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        try:
            while self._unwritten:
                self._append(self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("results cannot be written, and are kept until they can: %s", error)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):
            os.ftruncate(self._file.fileno(), end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


def _records(path: Path) -> Iterator[dict]:
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "name" in record:
                yield record


def count_launches(path: Path) -> int:
    """How many start records the log holds."""
    return sum(record["name"] == "start" for record in _records(path))


def read_reslog(path: Path) -> list[dict]:
    """The records that stand: torn lines are left out, and so is what a later launch superseded.

    A launch that starts at step s goes on from the state after step s: earlier records of steps > s are gone.
    """
    kept: list[dict] = []
    for record in _records(path):
        if record["name"] == "start":
            kept = [r for r in kept if r["name"] == "start" or r.get("step", 0) <= record["step"]]
        kept.append(record)
    return kept


def _json_numbers(value: object) -> object:
    """`value` with its non-finite floats, however deep, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_numbers(inner) for inner in value]
    return value
