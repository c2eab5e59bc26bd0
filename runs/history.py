"""A run's results as columns of numbers, kept up to date while its file grows.

One thread feeds lines; others take snapshots at any time and wait for nothing. A snapshot never changes.

A log may hold anything. Memory is bounded, and Snapshot.left_out says what that leaves out. The work is proportional to
the log's size, whatever it holds: a new launch does not look through everything before it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from runs.columns import ALWAYS, MOST_COLUMNS, Columns
from runs.reslog import parse_record, standing_records
from utils.text import plain

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

_MOST_TABLES = 20
_MOST_LAUNCHES = 200_000
_MOST_CELLS = 1 << 25
"""Limit for the cells in all tables of a run, empty ones included: 256 MiB. A million records of 24 metrics fit."""
_CELLS_A_NUMBER, _FREE_CELLS = 8, 1 << 22
"""Where most cells are empty, a small log could fill a large memory: it may have so many cells for each number, and 32
MiB in any case."""
_BATCH_BYTES = 1 << 20
"""Size of the lines whose records are put into the tables together."""


@dataclass(frozen=True, slots=True)
class LaunchStart:
    """What a start record says of its launch."""

    step: int
    time: float
    max_iters: int | None = None
    """Number of steps of the whole run, according to the start record."""


@dataclass(frozen=True)
class Snapshot:
    """A run's results at one moment."""

    tables: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Kind of record -> metric -> values. "step", "time" and "launch" are among the metrics; steps never fall."""
    launches: tuple[LaunchStart, ...] = ()
    ended: str = ""
    """Why the newest launch has ended; empty while it goes on."""
    task: str = ""
    """The task of the newest launch: pretrain, sft, dpo."""
    last_time: float = 0.0
    """Time of the newest record."""
    skipped_lines: int = 0
    """Number of complete lines that held no record."""
    left_out: tuple[tuple[str, tuple], ...] = ()
    """(sentence, values for its places) for everything in the log that is missing here. A line that a crash cut off
    just before a launch does not count."""
    version: int = 0
    """Changes when anything does."""
    kept: dict[tuple, object] = field(default_factory=dict, compare=False, repr=False)
    """Room for what a reader computes from this snapshot and wants to keep as long."""

    def active_seconds(self, table: str) -> np.ndarray:
        """Seconds for which the run had been going at each row, with the launches laid end to end: the pauses between
        them and the superseded steps do not count."""
        rows = self.tables[table]
        if not self.launches:
            return rows["time"] - rows["time"][:1]
        starts = np.array([launch.time for launch in self.launches])
        lasted = np.zeros(len(starts))
        for columns in self.tables.values():
            launch = columns["launch"].astype(int)
            np.maximum.at(lasted, launch, columns["time"] - starts[launch])
        offsets = np.concatenate([[0.0], np.cumsum(lasted)[:-1]])
        launch = rows["launch"].astype(int)
        return rows["time"] - starts[launch] + offsets[launch]

    def tokens(self, table: str) -> np.ndarray:
        """Tokens read so far at each row. For records that do not say, they are interpolated between train records."""
        rows, train = self.tables[table], self.tables.get("train", {})
        if "tokens" in rows and table == "train":
            return rows["tokens"]
        if "tokens" not in train or not len(train["step"]):
            return np.full(len(rows["step"]), math.nan)
        return np.interp(rows["step"], train["step"], train["tokens"])


class RunHistory:
    """The results of one run, fed line by line."""

    def __init__(self):
        self._published = Snapshot()
        self._forget()

    def _forget(self) -> None:
        self._tables: dict[str, Columns] = {}
        self._launches: list[LaunchStart] = []
        self._ended, self._task, self._last_time, self._greatest_step = "", "", 0.0, 0
        self._skipped, self._torn, self._was_skipped = 0, 0, False
        self._too_many_tables = self._too_many_launches = False

    def clear(self) -> None:
        """Forget everything: the file has been replaced."""
        self._forget()
        self._publish()

    def feed(self, lines: Iterable[bytes]) -> None:
        """Take in complete lines."""
        batch: list[dict] = []
        size = 0
        for line in lines:
            if not line or line.isspace():
                continue
            record = parse_record(line, _decode)
            if record is None:
                self._skipped += 1
                self._was_skipped = True
                continue
            self._take(record, batch)
            self._was_skipped = False
            size += len(line)
            if size > _BATCH_BYTES:
                self._flush(batch)
                batch, size = [], 0
        self._flush(batch)
        self._publish()

    def snapshot(self) -> Snapshot:
        return self._published

    def _take(self, record: dict, batch: list[dict]) -> None:
        name = record["name"]
        self._last_time = record["time"]
        if name == "start":
            self._begin_launch(record)
        elif name == "end":
            reason = record.get("reason")
            self._ended = plain(reason) if reason and isinstance(reason, str) else "ended"
        if name == "start" or name != "end" and record.get("step") is not None:
            record["launch"] = max(len(self._launches) - 1, 0)
            batch.append(record)

    def _begin_launch(self, record: dict) -> None:
        self._ended = ""
        task = record.get("task")
        self._task = plain(task, 20) if isinstance(task, str) else self._task
        self._torn += self._was_skipped
        if len(self._launches) < _MOST_LAUNCHES:
            max_iters = record.get("max_iters")
            max_iters = max_iters if type(max_iters) is int else None
            self._launches.append(LaunchStart(record["step"], record["time"], max_iters))
        else:
            self._too_many_launches = True

    def _flush(self, batch: list[dict]) -> None:
        """Put records into their tables. Records that a launch among them supersedes are left out, and rows that it
        supersedes leave the tables."""
        standing, lowest = standing_records(batch)
        if lowest < self._greatest_step:
            for table in self._tables.values():
                table.drop_after(lowest)
            self._greatest_step = lowest
        by_name: dict[str, list[dict]] = {}
        for record in standing:
            if record["name"] != "start":
                self._greatest_step = max(self._greatest_step, record["step"])
                by_name.setdefault(plain(record["name"]), []).append(record)
        for name, records in by_name.items():
            if name in self._tables or len(self._tables) < _MOST_TABLES:
                self._tables.setdefault(name, Columns()).add(records)
            else:
                self._too_many_tables = True
        self._save_memory()

    def _save_memory(self) -> None:
        tables = self._tables.values()
        while sum(table.cells for table in tables) > self._most_cells():
            largest = max(tables, key=lambda table: table.cells)
            if largest.rows < 16:
                return
            largest.thin()

    def _most_cells(self) -> int:
        return min(_MOST_CELLS, _FREE_CELLS + _CELLS_A_NUMBER * sum(table.numbers for table in self._tables.values()))

    def _left_out(self) -> tuple[tuple[str, tuple], ...]:
        found: list[tuple[str, tuple]] = []
        # The launch after a crash makes the step of the cut-off line again.
        if skipped := self._skipped - self._torn:
            found.append(("lines that hold no record ({:,})", (skipped,)))
        if self._too_many_tables:
            found.append(("kinds of records but the first {}", (_MOST_TABLES,)))
        for name, table in self._tables.items():
            if table.too_many_columns:
                found.append(("metrics of {} but the first {}", (name, MOST_COLUMNS - len(ALWAYS))))
            if table.thinned:
                found.append(("records of {}, evenly ({:,})", (name, table.thinned)))
        if self._too_many_launches:
            found.append(("restarts but the first {:,}", (_MOST_LAUNCHES,)))
        return tuple(found)

    def _publish(self) -> None:
        tables = {name: table.snapshot() for name, table in self._tables.items() if table.rows}
        self._published = Snapshot(
            tables, tuple(self._launches), self._ended, self._task, self._last_time, self._skipped, self._left_out(),
            self._published.version + 1,
        )  # fmt: skip


def _decode(line: bytes) -> object:
    """The value of a line, as json.loads gives it; several times as fast where orjson is installed."""
    if orjson is not None:
        try:
            return orjson.loads(line)
        except ValueError:
            pass
    return json.loads(line)
