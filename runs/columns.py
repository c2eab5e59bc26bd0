"""The numbers of many records as columns of bounded size.

Rows are added while readers hold earlier snapshots, which never change.
"""

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from runs.reslog import NON_FINITE, number
from utils.text import plain

MOST_COLUMNS = 200
"""A file with more metrics is not ours."""
ALWAYS = ("step", "time", "launch")
Cells = dict[str, tuple[slice | list[int], np.ndarray | list[float]]]
"""Name of a column -> (rows, their values)."""
_ORDINAL = "\0"
"""Column with the place of a row among all that were added. No metric has this name: see `plain`."""


class Columns:
    """Columns of float64, all of one length; a missing value is NaN. Rows are in the order of their steps; rows of the
    same step stay in the order in which they came."""

    def __init__(self):
        self._columns = {name: np.empty(64) for name in (*ALWAYS, _ORDINAL)}
        self._sorted = True
        self._stride, self._added = 1, 0
        self._seen = 0
        """Number of rows that snapshots hold; these rows must not change."""
        self.rows = 0
        self.numbers = 0
        """Numbers that were put in; when rows go, a proportional share is subtracted."""
        self.too_many_columns = False
        self.thinned = 0
        """Number of rows that were dropped to save memory."""

    @property
    def cells(self) -> int:
        return self.rows * len(self._columns)

    @property
    def _room(self) -> int:
        """How many more columns may be added."""
        return MOST_COLUMNS + 1 - len(self._columns)

    def add(self, records: Sequence[dict]) -> None:
        """Append one row for each record, with those of its values that are numbers."""
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
                # A new array with spare room: a snapshot may still show the old one.
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

    def _dense(self, records: Sequence[dict]) -> Cells:
        """Name -> (all rows, values), for records that all have the same keys. A run writes them so, and this is much
        faster."""
        found: Cells = {}
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

    def _sparse(self, records: Sequence[dict]) -> Cells:
        """Name -> (rows, their values), without a look at every key for every record."""
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
        return {**found}

    def drop_after(self, step: float) -> None:
        """Drop the rows of later steps."""
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
        """Drop at least a quarter of the rows, so that the remaining ones lie evenly among all that were added. The
        newest row stays."""
        self._sort()
        ordinals, before = self._columns[_ORDINAL][: self.rows], self.rows
        stays = np.zeros(before, bool)
        # Thin what came since the last time first; if that is too little, thin all.
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
        """Sort the rows by step. They are sorted already unless another program wrote the log."""
        if not self._sorted:
            self._take(np.argsort(self._columns["step"][: self.rows], kind="stable"))
            self._sorted = True

    def _take(self, rows: slice | np.ndarray) -> None:
        for name, column in self._columns.items():
            self._columns[name] = column[: self.rows][rows].copy()
        self.rows, self._seen = len(self._columns["step"]), 0


def _numbers(values: Sequence[object]) -> np.ndarray | None:
    """Values as float64; non-numbers become NaN. None if there is no number among them."""
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
