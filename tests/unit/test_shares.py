"""Shares of a mixture's sources: exact in every prefix, and a pure function of the position."""

import random
import time
from fractions import Fraction

import numpy as np
import pytest

from dataset.shares import Phase, plan, schedule_from_json, schedule_to_json, whole_weights


def shares_of(*texts: str) -> list[Fraction]:
    return [Fraction(text) for text in texts]


def random_shares(rng: random.Random) -> list[Fraction]:
    count = rng.randint(1, 7)
    return [Fraction(rng.choice((0, 1, 1, 2, 3, 7, 50, 333, 997)), rng.choice((1, 3, 10))) for _ in range(count)] + [
        Fraction(1)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_every_prefix_is_within_one_sample_of_the_shares(seed: int) -> None:
    shares = random_shares(random.Random(seed))
    schedule = plan([(0, shares)], [None] * len(shares), [0] * len(shares))
    weights, period = whole_weights(shares), schedule.phases[0].period
    length = min(3 * period + 5, 5_000)
    sources, indices = schedule.at(np.arange(length))
    counts = [0] * len(shares)
    for n, (source, index) in enumerate(zip(sources.tolist(), indices.tolist()), 1):
        # Each source's samples come one after the other, from 0.
        assert index == counts[source]
        counts[source] += 1
        assert all(abs(count * period - n * weight) < period for weight, count in zip(weights, counts))
    assert schedule.counts(length) == tuple(counts)


def test_a_million_samples_and_a_far_position() -> None:
    shares = shares_of("0.6", "0.3", "0.1")
    schedule = plan([(0, shares)], [None] * 3, [0] * 3)
    sources, indices = schedule.at(np.arange(1_000_000))
    assert np.bincount(sources).tolist() == [600_000, 300_000, 100_000]
    for source in range(3):
        assert np.array_equal(indices[sources == source], np.arange((sources == source).sum()))
    started = time.perf_counter()
    far, index = schedule.at(np.array([10**9 + 7, 3]))
    # The table has 10 places, whatever the position.
    assert schedule.phases[0].period == 10 and time.perf_counter() - started < 1
    assert far.tolist() == [sources[7], sources[3]]
    assert index.tolist() == [10**8 * [6, 3, 1][sources[7]] + indices[7], indices[3]]


def naive(wishes: list[tuple[int, list[Fraction]]], limits: list[int | None], length: int) -> list[tuple[int, int]]:
    """The stream drawn one by one: phases restart where one is wished for, or a source has just run out."""
    counts, stream, begin, before, weights = [0] * len(limits), [], 0, [0] * len(limits), None
    wished = None
    for position in range(length):
        new = [shares for start, shares in wishes if start <= position][-1]
        left = tuple(0 if limit is not None and count >= limit else share
                     for share, limit, count in zip(new, limits, counts))  # fmt: skip
        if not any(left):
            return stream
        # A source that ran out ends a phase only where its next sample would stand.
        if wished is not new:
            wished, weights, begin, before = new, left, position, list(counts)
        phase = Phase(begin, whole_weights(weights), tuple(before))
        source = int(phase.at(np.array([position]))[0][0])
        if not left[source]:
            weights, begin, before = left, position, list(counts)
            source = int(Phase(begin, whole_weights(weights), tuple(before)).at(np.array([position]))[0][0])
        stream.append((source, counts[source]))
        counts[source] += 1
    return stream


@pytest.mark.parametrize("seed", range(12))
def test_phases_and_limits_equal_a_naive_loop(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 4)
    draw = lambda: [Fraction(rng.randint(0, 5), 10) for _ in range(count - 1)] + [Fraction(1, 10)]  # noqa: E731
    wishes = [(0, draw()), (rng.randint(5, 60), draw()), (rng.randint(61, 100), draw())]
    limits = [rng.choice((None, 7, 20, 33)) for _ in range(count)]
    schedule = plan(wishes, limits, [0] * count)
    expected = naive(wishes, limits, 300)
    assert schedule.end is None or schedule.end == len(expected)
    sources, indices = schedule.at(np.arange(len(expected)))
    assert list(zip(sources.tolist(), indices.tolist())) == expected
    assert schedule_from_json(schedule_to_json(schedule)) == schedule
    for position in (0, 1, min(50, len(expected)), len(expected)):
        assert schedule.counts(position) == tuple(
            sum(source == one for source, _ in expected[:position]) for one in range(count)
        )


def test_a_new_mixture_goes_on_in_every_source() -> None:
    first = plan([(0, shares_of("0.5", "0.5", "0"))], [None] * 3, [0] * 3)
    second = plan([(7, shares_of("0.2", "0", "0.8"))], [None] * 3, first.counts(7))
    before = {tuple(pair) for pair in np.transpose(first.at(np.arange(7))).tolist()}
    after = {tuple(pair) for pair in np.transpose(second.at(np.arange(7, 27))).tolist()}
    assert not before & after
    for source in range(3):
        taken = sorted(index for one, index in before | after if one == source)
        assert taken == list(range(len(taken)))


def test_positions_outside_the_stream() -> None:
    schedule = plan([(0, shares_of("1", "1"))], [3, 5], [0, 0])
    assert schedule.end == 8
    assert sorted(np.transpose(schedule.at(np.arange(8))).tolist()) == [[0, i] for i in range(3)] + [
        [1, i] for i in range(5)
    ]
    assert np.transpose(schedule.at(np.array([8, 1, 10**12]))).tolist()[::2] == [[-1, -1], [-1, -1]]
    later = plan([(5, shares_of("1", "1"))], [None, None], [3, 2])
    with pytest.raises(ValueError, match="position 4 lies before the stream, which begins at 5"):
        later.at(np.array([6, 4]))


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        (shares_of("0.1", "-0.1"), "must not be negative"),
        (shares_of("0", "0"), "one must be positive"),
        (shares_of("0.1234567", "0.8765433"), "round them to 4 digits"),
    ],
)
def test_impossible_shares(shares: list[Fraction], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan([(0, shares)], [None] * 2, [0] * 2)


def test_phases_that_do_not_rise() -> None:
    with pytest.raises(ValueError, match="one after the other"):
        plan([(5, shares_of("1")), (5, shares_of("1"))], [None], [0])
