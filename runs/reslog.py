"""The run's results: `reslog.jsonl`, append-only, one JSON object a line, written at once.

Every record has `name` and `time` (seconds since 1970). Those of a moment in the training have `step`, the number of
completed optimizer steps. Numbers that JSON lacks are the strings "nan", "inf" and "-inf". By name:

    start        a launch begins: version (of this format), attempt, step, samples_consumed, max_iters, world_size,
                 device, flops_per_token, commit, ...
    train        one logged step: loss, lr, grad_norm, tokens, tokens_per_sec, mfu, dt, data_wait, comm_wait,
                 energy_j, ...
    valid        a validation: loss, dt, ...
    sample       a text by the model at a validation: prompt, text
    eval         an evaluation by a task: task, figures (metric -> [value, standard error or null, samples]), seconds,
                 and the first figure's value once more as [GROUP/]TASK/METRIC
    eval_failed  an evaluation that was not begun, or has not come to its end: problem
    compression  the error of PowerSGD's approximation: ratio, mean_relative_error, relative_error (parameter -> error)
    experts      where a step's tokens went: balance_loss, z_loss, entropy, load_highest, load_lowest, entropy_by_layer,
                 load_by_layer (a share for each expert of each layer)
    save, save_failed, end

A launch that starts at step s goes on from the state after step s: the records of earlier launches about later steps
are superseded, and no reader shows it. A crash may leave a torn line, which readers pass over. Readers do not
trust the file: `parse_record` lets nothing through that could harm them, and no reader needs more time than in
proportion to the file's size, whatever it holds.
"""

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

logger = logging.getLogger(__name__)

VERSION = 1
"""Version of the format; a reader that meets a later one shows the records that it knows."""
LONGEST_LINE = 1 << 20
"""Most bytes in a line. A longer one is passed over: no record of a run comes near."""
NON_FINITE = {"nan": math.nan, "NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Strings for the numbers that JSON lacks."""
LARGEST_STEP = 1 << 53
_TAIL_BYTES = 1 << 16
_LATEST_TIME = 1e11
_MOST_UNWRITTEN = 10_000
"""Records kept while the disk is full; beyond that, the oldest are lost."""
_READ_BETWEEN_PASSES = 10_000
"""Records, at least, before superseded ones are looked for again."""


class Receiver(Protocol):
    """Another place for records (runs/sinks.py)."""

    def put(self, record: dict) -> None: ...

    def close(self) -> None: ...


class ResLog:
    """Appends to a run's results.

    Args:
        path: the file; a line that a crash cut off gets its newline first, so that the next one stays whole.
        sinks: receive every record, too; see runs/sinks.py.
    """

    def __init__(self, path: Path, sinks: Receiver | None = None):
        torn = False
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
        self._warned, self._sinks = False, sinks
        self._unwritten: deque[bytes] = deque(maxlen=_MOST_UNWRITTEN)
        # Unbuffered: lines that could not be written are kept in `_unwritten`, in order.
        self._file = open(path, "ab", buffering=0)
        if torn:
            self._file.write(b"\n")

    def write(self, name: str, **values: object) -> None:
        """Append one record at once. If that fails (a full disk), warn once, and write it together with a later one.
        Non-finite floats become strings for JSON's sake."""
        found = {"name": name, "time": round(time.time(), 3), **values}
        record = {key: _json_numbers(value) for key, value in found.items()}
        if self._sinks is not None:
            self._sinks.put(record)
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
        if self._sinks is not None:
            self._sinks.close()


def parse_record(line: bytes, loads: Callable[[bytes], object] = json.loads) -> dict | None:
    """The record in a line, with a valid name, time and (if it has one) step; None if the line holds no such record."""
    if len(line) > LONGEST_LINE:
        return None
    try:
        record = loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return None
    step, moment = record.get("step"), record.get("time")
    if step is None:
        if record["name"] == "start":
            return None
    elif type(step) is not int or not 0 <= step <= LARGEST_STEP:
        return None
    if type(moment) is not int and type(moment) is not float:
        return None
    return record if 0 <= moment <= _LATEST_TIME else None


def number(value: object) -> float | None:
    """A record's value as a number; None if it is not a number, or beyond any float."""
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value) if abs(value) < 1 << 1000 else None
    return NON_FINITE.get(value) if isinstance(value, str) else None


def standing_records(records: list[dict]) -> tuple[list[dict], int]:
    """The records that no later start record among them supersedes, found in one pass from the end; and the lowest step
    that a launch among them began from (LARGEST_STEP if none did)."""
    lowest, kept = LARGEST_STEP, []
    for record in reversed(records):
        step = record.get("step") or 0
        if record["name"] == "start":
            lowest = min(lowest, step)
        elif step > lowest:
            continue
        kept.append(record)
    kept.reverse()
    return kept, lowest


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines without their newlines. A line that is too long is cut, but stays too long: it may have no end."""
    while line := file.readline(LONGEST_LINE + 2):
        yield line.removesuffix(b"\n")
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 2)


def all_records(path: Path) -> Iterator[dict]:
    """The records of all launches, in the order of the file, superseded ones too. Torn lines are left out."""
    with open(path, "rb") as file:
        for line in lines_of(file):
            if line and (record := parse_record(line)) is not None:
                yield record


def newest_values(path: Path, metric: str) -> Iterator[float]:
    """Values of a metric in the last train records, the newest first. Torn lines are passed over. Records far before
    the end are not read, so that a long log costs no more than a short one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("name") == "train":
            value = number(record.get(metric))
            if value is not None:
                yield value


def count_launches(path: Path) -> int:
    """Number of start records in the log."""
    return sum(record["name"] == "start" for record in all_records(path))


def read_reslog(path: Path, names: Collection[str] | None = None) -> list[dict]:
    """The records that stand: torn lines are left out, and so are records that a later launch superseded.

    Args:
        names: names of the wanted records; None: all. The others take no memory.
    """
    found: list[dict] = []
    looked_through = 0
    for record in all_records(path):
        if names is None or record["name"] in names:
            found.append(record)
        elif record["name"] == "start":
            # The records that it supersedes have to go, whether it is wanted itself or not.
            found.append({"name": "start", "step": record["step"]})
        # Not at each start record: there may be as many of those as of the others.
        if len(found) >= 2 * looked_through + _READ_BETWEEN_PASSES:
            found = _standing_and_wanted(found, names)
            looked_through = len(found)
    return _standing_and_wanted(found, names)


def _standing_and_wanted(records: list[dict], names: Collection[str] | None) -> list[dict]:
    standing, _ = standing_records(records)
    return standing if names is None else [record for record in standing if record["name"] in names]


def _json_numbers(value: object) -> object:
    """`value` with its non-finite floats, however deep, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_numbers(inner) for inner in value]
    return value
