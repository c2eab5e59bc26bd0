"""Which source the n-th sample of a mixture comes from: a pure function of n, with exact shares.

A phase of the run has whole weights w_s, which add up to D. After n samples of it, source s has given within one sample
of n w_s / D, for each n. So the j-th sample of s (from 0) has a window of positions, floor(j D / w_s) to
ceil((j + 1) D / w_s) - 1 (Baruah et al., "Proportionate progress", 1996). In each position stands, of the samples
whose windows have begun, the one whose window ends first: if any order keeps all windows, this one does (Liu and
Layland, 1973). After D samples all is as before, so a table of D positions says everything:

    weights 3, 1, 1     table a b a c a | a b a c a | ...     position 7: a, its sample 4

Phases follow one another where the user says so, where a source has no samples left, and where a run was resumed with
another mixture. Each goes on, in every source, where the one before has stopped.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

MOST_PLACES = 1_000_000
"""Length of the longest table."""


def whole_weights(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportions.

    Raises:
        ValueError: a share is negative, none is positive, or they need too large numbers.
    """
    if any(share < 0 for share in shares) or not any(shares):
        raise ValueError(f"shares must not be negative, and one must be positive, got {', '.join(map(str, shares))}")
    common = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * common) for share in shares]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > MOST_PLACES:
        raise ValueError(
            f"shares in the proportions {':'.join(map(str, whole))} repeat only after {sum(whole):,} samples: round "
            f"them to 4 digits, so that this is at most {MOST_PLACES:,}"
        )
    return tuple(whole)


@dataclass(frozen=True)
class Phase:
    """A stretch of the stream with constant shares."""

    start: int
    """Its first position."""
    weights: tuple[int, ...]
    """Of each source; 0 for those that give nothing. In their smallest numbers."""
    done: tuple[int, ...]
    """Samples that each source has given before."""

    @property
    def period(self) -> int:
        return sum(self.weights)

    @cached_property
    def table(self) -> np.ndarray:
        """Source of each position of a period, int32 (D,)."""
        period, weights = self.period, self.weights
        table = np.empty(period, np.int32)
        # (Begin of the window, source, number of the sample), and of those that have begun (end, source, number).
        coming = [(0, source, 0) for source, weight in enumerate(weights) if weight]
        begun: list[tuple[int, int, int]] = []
        for position in range(period):
            while coming and coming[0][0] <= position:
                _, source, number = heapq.heappop(coming)
                heapq.heappush(begun, (-(-(number + 1) * period // weights[source]), source, number))
            end, source, number = heapq.heappop(begun)
            assert position < end
            table[position] = source
            if number + 1 < weights[source]:
                heapq.heappush(coming, ((number + 1) * period // weights[source], source, number + 1))
        return table

    @cached_property
    def numbers(self) -> np.ndarray:
        """Which of its source's samples in a period stands in each position, int64 (D,)."""
        numbers = np.empty(self.period, np.int64)
        for source in range(len(self.weights)):
            places = np.flatnonzero(self.table == source)
            numbers[places] = np.arange(len(places))
        return numbers

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, which of its samples from the run's begin) of positions in this phase, both int64."""
        periods, places = np.divmod(positions - self.start, self.period)
        sources = self.table[places].astype(np.int64)
        weights, done = np.array(self.weights, np.int64), np.array(self.done, np.int64)
        return sources, done[sources] + periods * weights[sources] + self.numbers[places]

    def counts(self, position: int) -> tuple[int, ...]:
        """Samples that each source has given before a position of this phase."""
        periods, place = divmod(position - self.start, self.period)
        within = np.bincount(self.table[:place], minlength=len(self.weights)).tolist()
        return tuple(
            done + periods * weight + more for done, weight, more in zip(self.done, self.weights, within, strict=True)
        )

    def position_of(self, source: int, number: int) -> int:
        """Where a source's sample stands, counted from the run's begin."""
        periods, rest = divmod(number - self.done[source], self.weights[source])
        place = int(np.flatnonzero(self.table == source)[rest])
        return self.start + periods * self.period + place

    def to_json(self) -> dict[str, Any]:
        return {"start": self.start, "weights": list(self.weights), "done": list(self.done)}


@dataclass(frozen=True)
class Schedule:
    """The phases of a stream, and where it ends.

    Args:
        phases: the first begins at 0 or at the position that an earlier schedule has left.
        end: position after the last sample; None: it never ends.
    """

    phases: tuple[Phase, ...]
    end: int | None = None

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, which of its samples from the run's begin) of each position, both int64 and of the same shape; -1
        and -1 behind the end.

        Raises:
            ValueError: a position lies before the stream.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and int(positions.min()) < self.phases[0].start:
            raise ValueError(
                f"position {int(positions.min())} lies before the stream, which begins at {self.phases[0].start}"
            )
        numbers = np.searchsorted([phase.start for phase in self.phases], positions, side="right") - 1
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            sources[mine], indices[mine] = self.phases[number].at(positions[mine])
        if self.end is not None:
            sources[positions >= self.end] = indices[positions >= self.end] = -1
        return sources, indices

    def counts(self, position: int) -> tuple[int, ...]:
        """Samples that each source has given before a position, which may be the end."""
        return self.phase_at(position).counts(position)

    def phase_at(self, position: int) -> Phase:
        return self.phases[max(0, bisect_right([phase.start for phase in self.phases], position) - 1)]


def plan(
    wishes: Iterable[tuple[int, Sequence[Fraction]]], limits: Sequence[int | None], done: Sequence[int]
) -> Schedule:
    """The schedule of a mixture.

    Where a source has given as many samples as it may, the others share its part in their own proportions.

    Args:
        wishes: (first position, share of each source), in the order of the positions.
        limits: samples that each source may give in all; None: any number.
        done: samples that each has given before the first position.
    Raises:
        ValueError: shares are impossible, or positions do not rise.
    """
    asked = list(wishes)
    require_rising([start for start, _ in asked])
    for _, shares in asked:
        whole_weights(shares)
    phases: list[Phase] = []
    now = tuple(done)
    for number, (start, shares) in enumerate(asked):
        until = asked[number + 1][0] if number + 1 < len(asked) else None
        position: int | None = start
        while position is not None and (until is None or position < until):
            left = [
                Fraction(0) if limit is not None and given >= limit else share
                for share, limit, given in zip(shares, limits, now, strict=True)
            ]
            if not any(left):
                # A later phase may have shares for a source that has samples left, but there is none up to it.
                return Schedule(tuple(phases), position) if phases else _refuse_empty()
            phase = Phase(position, whole_weights(left), now)
            phases.append(phase)
            position = _first_end(phase, limits, until)
            if position is not None:
                now = phase.counts(position)
    return Schedule(tuple(phases))


def require_rising(starts: Sequence[int]) -> None:
    """
    Raises:
        ValueError: phases do not begin one after the other.
    """
    if any(later <= earlier for earlier, later in zip(starts, starts[1:])):
        raise ValueError(f"phases must begin one after the other, got {', '.join(map(str, starts))}")


def _refuse_empty() -> Schedule:
    raise ValueError("no source of the mixture has a sample left (epochs)")


def _first_end(phase: Phase, limits: Sequence[int | None], until: int | None) -> int | None:
    """Where a phase ends because a source has no sample left, or another phase was wished for; None: never."""
    ends = [
        phase.position_of(source, limit)
        for source, (weight, limit) in enumerate(zip(phase.weights, limits, strict=True))
        if weight and limit is not None
    ]
    if until is not None:
        ends.append(until)
    return min(ends, default=None)


def schedule_from_json(found: Mapping[str, Any]) -> Schedule:
    """What `schedule_to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    phases = tuple(
        Phase(int(phase["start"]), tuple(map(int, phase["weights"])), tuple(map(int, phase["done"])))
        for phase in found["phases"]
    )
    if not phases or any(phase.period < 1 or len(phase.weights) != len(phase.done) for phase in phases):
        raise ValueError("it holds no phases")
    return Schedule(phases, None if found["end"] is None else int(found["end"]))


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    return {"phases": [phase.to_json() for phase in schedule.phases], "end": schedule.end}
