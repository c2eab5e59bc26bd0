"""Intervals of time: (start, end), both in the same unit."""

import bisect
import itertools
from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals joined where they meet or overlap, in order; empty ones are left out."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def overlap(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The times that two unions share."""
    found, at = [], 0
    for start, end in a:
        while at < len(b) and b[at][1] <= start:
            at += 1
        while at < len(b) and b[at][0] < end:
            found.append((max(start, b[at][0]), min(end, b[at][1])))
            if b[at][1] > end:
                break
            at += 1
    return found


class Union:
    """Measures how much of a union lies within a window, without looking at each of its intervals.

    Args:
        intervals: a result of `union` or `overlap`.
    """

    def __init__(self, intervals: list[Interval]):
        self._starts = [start for start, _ in intervals]
        self._ends = [end for _, end in intervals]
        self._before = list(itertools.accumulate((end - start for start, end in intervals), initial=0.0))
        """Length of all intervals before each."""

    def within(self, window: Interval) -> float:
        start, end = window
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)
        if first >= last:
            return 0.0
        cut = max(start - self._starts[first], 0.0) + max(self._ends[last - 1] - end, 0.0)
        return self._before[last] - self._before[first] - cut


class LatestEnd:
    """Finds the maximum of ends[first:last] for a series of queries whose `last` never falls, without looking at each
    number for each query."""

    def __init__(self, ends: list[float]):
        self._ends, self._added = ends, 0
        self._places: list[int] = []
        """Rising indices of the numbers that no later one reaches, up to the greatest `last` so far."""

    def between(self, first: int, last: int) -> float:
        for place in range(self._added, last):
            while self._places and self._ends[self._places[-1]] <= self._ends[place]:
                self._places.pop()
            self._places.append(place)
        self._added = max(self._added, last)
        return self._ends[self._places[bisect.bisect_left(self._places, first)]]

