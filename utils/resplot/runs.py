"""A run's results as columns of numbers, kept up to date while its file grows.

One thread feeds lines; others take snapshots at any time and wait for nothing. What a snapshot holds never changes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from utils.reslog import NON_FINITE, number, parse_record

try:
    import orjson
except ImportError:
    orjson = None

_MOST_COLUMNS = 200
"""Of a table; a file with more metrics is not ours."""
_MOST_TABLES = 20
_KEPT_OF_START = ("task", "world_size", "dtype", "max_iters", "version", "parent_ckpt")


def plain(text: object, most: int = 200) -> str:
    """One line to show: a file may hold escape sequences, line breaks and text that changes its direction."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:most])


class Table:
    """Columns of float64, all of one length; a missing value is NaN."""

    def __init__(self):
        self._columns: dict[str, np.ndarray] = {}
        self.rows = 0

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows; columns that are missing here or there are filled with NaN."""
        count = len(next(iter(columns.values())))
        needed = self.rows + count
        for name in columns:
            if name not in self._columns and len(self._columns) < _MOST_COLUMNS:
                self._columns[name] = np.full(max(needed, 64), math.nan)
        for name, column in self._columns.items():
            if len(column) < needed:
                # A new array: a snapshot may still show the old one.
                column = self._columns[name] = np.concatenate([column[: self.rows], np.full(needed, math.nan)])
            column[self.rows : needed] = columns.get(name, math.nan)
        self.rows = needed

    def keep(self, mask: np.ndarray) -> None:
        """Let the other rows go."""
        if not mask.all():
            self._columns = {name: column[: self.rows][mask] for name, column in self._columns.items()}
            self.rows = int(mask.sum())

    def snapshot(self) -> dict[str, np.ndarray]:
        return {name: column[: self.rows] for name, column in self._columns.items()}


@dataclass(frozen=True)
class Launch:
    step: int
    time: float
    facts: dict[str, object]
    """Of its start record, as they were written; see _KEPT_OF_START."""


@dataclass(frozen=True)
class Snapshot:
    tables: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Name of the records -> metric -> values; "step", "time" and "launch" are among the metrics. Steps never fall."""
    launches: tuple[Launch, ...] = ()
    ended: str = ""
    """Why, if the newest launch has ended."""
    last_time: float = 0.0
    """Of the newest record."""
    skipped_lines: int = 0
    """Complete lines that held no record."""
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
        self._ended, self._last_time, self._skipped, self._greatest_step = "", 0.0, 0, 0

    def clear(self) -> None:
        """Forget all: the file is another one."""
        self._forget()
        self._publish()

    def feed(self, lines: Iterable[bytes]) -> None:
        """Take in complete lines."""
        pending: dict[str, list[dict]] = {}
        for line in lines:
            record = parse_record(line, _decode)
            if record is None:
                self._skipped += bool(line.strip())
                continue
            name = record["name"]
            self._last_time = record["time"]
            if name == "start":
                self._flush(pending)
                self._start(record)
            elif name == "end":
                reason = record.get("reason")
                self._ended = plain(reason) if reason and isinstance(reason, str) else "ended"
            elif record.get("step") is not None:
                self._greatest_step = max(self._greatest_step, record["step"])
                pending.setdefault(name, []).append(record)
        self._flush(pending)
        self._publish()

    def snapshot(self) -> Snapshot:
        return self._published

    def _publish(self) -> None:
        tables = {name: _in_order(table.snapshot()) for name, table in self._tables.items() if table.rows}
        self._published = Snapshot(
            tables, tuple(self._launches), self._ended, self._last_time, self._skipped, self._published.version + 1
        )

    def _start(self, record: dict) -> None:
        if self._greatest_step > record["step"]:
            for table in self._tables.values():
                table.keep(table.snapshot()["step"] <= record["step"])
            self._greatest_step = record["step"]
        facts = {key: record[key] for key in _KEPT_OF_START if key in record}
        self._launches.append(Launch(record["step"], record["time"], facts))
        self._ended = ""

    def _flush(self, pending: dict[str, list[dict]]) -> None:
        for name, records in pending.items():
            name = plain(name)
            if name not in self._tables and len(self._tables) >= _MOST_TABLES:
                continue
            table = self._tables.setdefault(name, Table())
            columns = {"launch": np.full(len(records), max(len(self._launches) - 1, 0), float)}
            for key, found in _by_key(records):
                if key not in ("name", "launch"):
                    values = _numbers(found)
                    if values is not None:
                        columns[plain(key)] = values
            table.append(columns)
        pending.clear()


def _by_key(records: list[dict]) -> Iterator[tuple[str, Sequence[object]]]:
    """Each key of the records with their values, None where one has none. Step and time come first: they must be among
    the columns that a table takes at most."""
    shapes = set(map(tuple, records))
    if len(shapes) == 1:
        # As a run writes them; much faster.
        columns = dict(zip(shapes.pop(), zip(*map(dict.values, records))))
    else:
        columns = {key: [record.get(key) for record in records] for key in chain.from_iterable(shapes)}
    for key in ("step", "time"):
        yield key, columns.pop(key)
    yield from columns.items()


def _decode(line: bytes) -> object:
    """As json.loads, several times as fast where orjson is installed."""
    if orjson is not None:
        try:
            return orjson.loads(line)
        except ValueError:
            pass
    return json.loads(line)


def _in_order(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sorted by step, as they are unless somebody else wrote them."""
    steps = columns["step"]
    if (np.diff(steps) >= 0).all():
        return columns
    order = np.argsort(steps, kind="stable")
    return {name: column[order] for name, column in columns.items()}


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
