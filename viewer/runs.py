"""A run's results as columns of numbers, kept up to date while its file grows.

One thread feeds lines; others take snapshots at any time and wait for nothing. What a snapshot holds never changes.

A log may hold anything. What is kept of one is bounded, and what that leaves out is said: see Snapshot.left_out. The
work is in proportion to the log's size, whatever it holds: so a launch does not look through all that came before it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from runs.reslog import NON_FINITE, number, parse_record, standing_records

try:
    import orjson
except ImportError:
    orjson = None

_MOST_COLUMNS = 200
"""Of a table; a file with more metrics is not ours."""
_MOST_TABLES = 20
_MOST_LAUNCHES = 200_000
_MOST_CELLS = 1 << 25
"""Numbers, and places of missing ones, in all tables of a run: 256 MiB. A million records of 24 metrics fit."""
_CELLS_A_NUMBER, _FREE_CELLS = 8, 1 << 22
"""Where most places are empty, a small log could fill a large memory: so many places a number, and 32 MiB for all."""
_BATCH_BYTES = 1 << 20
"""Of lines whose records are put into the tables together."""
_ALWAYS = ("step", "time", "launch")
_ORDINAL = "\0"
"""Which of all rows a row was. No metric is called so: see `plain`."""


def plain(text: object, most: int = 200) -> str:
    """One line to show: a file may hold escape sequences, line breaks and text that changes its direction."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:most])


class Table:
    """Columns of float64, all of one length; a missing value is NaN. Rows are in the order of their steps, those of one
    step as they came."""

    def __init__(self):
        self._columns = {name: np.empty(64) for name in (*_ALWAYS, _ORDINAL)}
        self._sorted = True
        self._stride, self._added = 1, 0
        self._seen = 0
        """So many rows are in snapshots, which must not change."""
        self.rows = 0
        self.numbers = 0
        """That were put in, in all; of rows that went, a like share is taken off."""
        self.too_many_columns = False
        self.thinned = 0
        """Rows that went to save memory."""

    @property
    def cells(self) -> int:
        return self.rows * len(self._columns)

    @property
    def _room(self) -> int:
        """For more columns."""
        return _MOST_COLUMNS + 1 - len(self._columns)

    def add(self, records: Sequence[dict]) -> None:
        """Append a row a record; of each, the values that are numbers."""
        needed = self.rows + len(records)
        found = self._dense(records) if len(set(map(tuple, records))) == 1 else self._sparse(records)
        found[_ORDINAL] = slice(None), np.arange(self._added, self._added + len(records))
        self._added += len(records)
        for name in found:
            if name not in self._columns:
                column = self._columns[name] = np.empty(len(self._columns["step"]))
                column[: self.rows] = math.nan
        for name, column in self._columns.items():
            if len(column) < needed:
                # Another array, with room: a snapshot may still show the old one.
                column = np.empty(needed + needed // 2)
                column[: self.rows] = self._columns[name][: self.rows]
                self._columns[name] = column
            added = column[self.rows : needed]
            added.fill(math.nan)
            if name in found:
                rows, values = found[name]
                added[rows] = values
                self.numbers += len(values)
        steps = self._columns["step"][max(self.rows - 1, 0) : needed]
        self._sorted = self._sorted and not (np.diff(steps) < 0).any()
        self.rows = needed

    def _dense(self, records: Sequence[dict]) -> dict[str, tuple[slice, np.ndarray]]:
        """Name -> (all rows, values), where all records have the same keys: as a run writes them, and much faster."""
        found: dict[str, tuple[slice, np.ndarray]] = {}
        room = self._room
        for key, values in zip(records[0], zip(*map(dict.values, records))):
            name = plain(key)
            is_new = name not in self._columns and name not in found
            if key == "name" or (column := _numbers(values)) is None:
                continue
            if is_new and not room:
                self.too_many_columns = True
                continue
            room -= is_new
            found[name] = (slice(None), column)
        return found

    def _sparse(self, records: Sequence[dict]) -> dict[str, tuple[list[int], list[float]]]:
        """Name -> (rows, their values): never a look at each key for each record."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        names: dict[str, str] = {}
        room = self._room
        for row, record in enumerate(records):
            for key, value in record.items():
                if key == "name" or (value := number(value)) is None:
                    continue
                name = names.get(key) or names.setdefault(key, plain(key))
                if name not in found:
                    is_new = name not in self._columns
                    if is_new and not room:
                        self.too_many_columns = True
                        continue
                    room -= is_new
                    found[name] = ([], [])
                found[name][0].append(row)
                found[name][1].append(value)
        return found

    def drop_after(self, step: float) -> None:
        """Let the rows of later steps go."""
        if not self.rows:
            return
        self._sort()
        rows = int(np.searchsorted(self._columns["step"][: self.rows], step, "right"))
        if rows == self.rows:
            return
        self.numbers = self.numbers * rows // self.rows
        if rows < self._seen:
            self._take(slice(rows))
        self.rows = rows

    def thin(self) -> None:
        """Let a quarter of the rows go, at least, so that those that stay lie evenly over all that were added. The
        newest stays."""
        self._sort()
        ordinals, before = self._columns[_ORDINAL][: self.rows], self.rows
        stays = np.zeros(before, bool)
        # First from what came since the last time; if that is little, from all.
        while not stays.any() or 4 * stays.sum() > 3 * before + 4:
            stays = ordinals % self._stride == 0
            stays[-1] = True
            self._stride *= 2
        self._stride //= 2
        self._take(np.flatnonzero(stays))
        self.thinned += before - self.rows
        self.numbers = self.numbers * self.rows // before

    def snapshot(self) -> dict[str, np.ndarray]:
        self._sort()
        self._seen = self.rows
        return {name: column[: self.rows] for name, column in self._columns.items() if name != _ORDINAL}

    def _sort(self) -> None:
        """Steps rise unless somebody else wrote the log."""
        if not self._sorted:
            self._take(np.argsort(self._columns["step"][: self.rows], kind="stable"))
            self._sorted = True

    def _take(self, rows: slice | np.ndarray) -> None:
        for name, column in self._columns.items():
            self._columns[name] = column[: self.rows][rows].copy()
        self.rows, self._seen = len(self._columns["step"]), 0


@dataclass(frozen=True, slots=True)
class Launch:
    step: int
    time: float
    max_iters: int | None = None
    """Steps of the whole run, as its start record says."""


@dataclass(frozen=True)
class Snapshot:
    tables: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Name of the records -> metric -> values; "step", "time" and "launch" are among the metrics. Steps never fall."""
    launches: tuple[Launch, ...] = ()
    ended: str = ""
    """Why, if the newest launch has ended."""
    task: str = ""
    """What is trained, as the newest launch says: pretrain, sft, dpo."""
    last_time: float = 0.0
    """Of the newest record."""
    skipped_lines: int = 0
    """Complete lines that held no record."""
    left_out: tuple[tuple[str, tuple], ...] = ()
    """(sentence, what to put into it) for all that the log holds and this does not; nothing about the line that a
    crash cut off just before a launch."""
    version: int = 0
    """Changes when anything does."""
    kept: dict[tuple, object] = field(default_factory=dict, compare=False, repr=False)
    """What panels.py computes once for all panels and drawings."""

    def active_seconds(self, table: str) -> np.ndarray:
        """Time that the run had been going for at each row, the launches laid end to end: no pauses between them, and
        nothing of what was superseded."""
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
        """Tokens read so far at each row: of records that do not say, between those of training that do."""
        rows, train = self.tables[table], self.tables.get("train", {})
        if "tokens" in rows and table == "train":
            return rows["tokens"]
        if "tokens" not in train or not len(train["step"]):
            return np.full(len(rows["step"]), math.nan)
        return np.interp(rows["step"], train["step"], train["tokens"])


class RunData:
    """What is known of one run."""

    def __init__(self):
        self._published = Snapshot()
        self._forget()

    def _forget(self) -> None:
        self._tables: dict[str, Table] = {}
        self._launches: list[Launch] = []
        self._ended, self._task, self._last_time, self._greatest_step = "", "", 0.0, 0
        self._skipped, self._torn, self._was_skipped = 0, 0, False
        self._too_many_tables = self._too_many_launches = False

    def clear(self) -> None:
        """Forget all: the file is another one."""
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
            planned = record.get("max_iters")
            self._launches.append(Launch(record["step"], record["time"], planned if type(planned) is int else None))
        else:
            self._too_many_launches = True

    def _flush(self, batch: list[dict]) -> None:
        """Put records into their tables, without those that launches among them supersede; these do that to what is in
        the tables, too."""
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
                self._tables.setdefault(name, Table()).add(records)
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
        # What a crash cut off is made again by the launch that follows.
        if skipped := self._skipped - self._torn:
            found.append(("lines that hold no record ({:,})", (skipped,)))
        if self._too_many_tables:
            found.append(("kinds of records but the first {}", (_MOST_TABLES,)))
        for name, table in self._tables.items():
            if table.too_many_columns:
                found.append(("metrics of {} but the first {}", (name, _MOST_COLUMNS - len(_ALWAYS))))
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
    """As json.loads, several times as fast where orjson is installed."""
    if orjson is not None:
        try:
            return orjson.loads(line)
        except ValueError:
            pass
    return json.loads(line)


def _numbers(values: Sequence[object]) -> np.ndarray | None:
    """As float64, what is no number as NaN; None if none is one."""
    kinds = set(map(type, values))
    if kinds <= {float, int}:
        with suppress(OverflowError):
            return np.array(values, dtype=np.float64)
    if kinds == {str} and NON_FINITE.keys().isdisjoint(values):
        return None
    found = [number(value) for value in values]
    if all(one is None for one in found):
        return None
    return np.array([math.nan if one is None else one for one in found])
