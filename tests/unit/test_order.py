"""The order of samples: a permutation in every epoch, the same wherever one starts, and random enough."""

import math
from collections import Counter

import numpy as np
import pytest

from dataset.order import sample_at

SIZES = [1, 2, 3, 5, 16, 17, 1000, 4097]


def epoch(seed: int, number: int, num_samples: int) -> np.ndarray:
    return sample_at(seed, number * num_samples + np.arange(num_samples), num_samples)


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 1337, 2**63, -5])
def test_every_epoch_is_a_permutation(num_samples: int, seed: int):
    for number in (0, 1, 2, 10**6):
        order = epoch(seed, number, num_samples)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [n for n in SIZES if n >= 16])
def test_epochs_and_seeds_differ(num_samples: int):
    orders = {tuple(epoch(seed, number, num_samples)) for seed in range(6) for number in range(6)}
    assert len(orders) == 36
    # The identity would not be a useful order.
    assert tuple(range(num_samples)) not in orders


@pytest.mark.parametrize("num_samples", SIZES)
def test_scalar_and_array_agree_in_any_shape(num_samples: int):
    positions = np.arange(3 * min(num_samples, 50))
    flat = sample_at(3, positions, num_samples)
    assert flat.tolist() == [int(sample_at(3, n, num_samples)) for n in positions.tolist()]
    assert sample_at(3, 0, num_samples).shape == ()
    assert np.array_equal(sample_at(3, positions.reshape(3, -1), num_samples), flat.reshape(3, -1))
    assert sample_at(3, np.empty(0, np.int64), num_samples).shape == (0,)


@pytest.mark.parametrize("num_samples", SIZES)
def test_positions_across_the_border_of_two_epochs(num_samples: int):
    both = np.concatenate([epoch(9, 4, num_samples), epoch(9, 5, num_samples)])
    for start in {0, num_samples // 2, num_samples - 1}:
        window = 4 * num_samples + start + np.arange(num_samples)
        assert np.array_equal(sample_at(9, window, num_samples), both[start : start + num_samples])


def test_positions_need_no_order_among_themselves():
    positions = np.random.default_rng(0).integers(0, 5000, 300)
    assert np.array_equal(sample_at(2, positions, 777), sample_at(2, np.arange(5000), 777)[positions])


def test_no_table_is_built():
    """A table of 10**10 samples would not fit into memory."""
    num_samples = 10**10
    positions = 10**9 + np.arange(1000)
    order = sample_at(0, positions, num_samples)
    assert 0 <= order.min() and order.max() < num_samples
    assert len(set(order.tolist())) == 1000
    assert int(sample_at(0, 10**9, num_samples)) == order[0]
    largest = sample_at(0, np.asarray([0, 1, 2**62, 2**63 - 1]), 1 << 62)
    assert 0 <= largest.min() and largest.max() < 1 << 62


def test_the_order_is_frozen():
    """A checkpoint holds only a position: with another order, a resumed run would repeat some samples and miss
    others."""
    assert sample_at(1337, np.arange(8), 1000).tolist() == [271, 711, 52, 471, 481, 583, 744, 389]
    assert sample_at(1337, 10**9 + np.arange(4), 10**10).tolist() == [3152852051, 3558812789, 12341701, 4078921412]


@pytest.mark.parametrize(
    ("n", "num_samples", "message"),
    [
        (-1, 10, "negative"),
        (np.asarray([3, -2]), 10, "negative"),
        (0, 0, "samples"),
        (0, -4, "samples"),
        (0, (1 << 62) + 1, "samples"),
    ],
)
def test_bad_arguments(n: int | np.ndarray, num_samples: int, message: str):
    with pytest.raises(ValueError, match=message):
        sample_at(0, n, num_samples)


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_small_sets_see_every_order_about_equally_often(num_samples: int):
    epochs = 12_000
    orders = sample_at(7, np.arange(num_samples * epochs), num_samples).reshape(epochs, num_samples)
    counts = Counter(map(tuple, orders.tolist()))
    kinds = math.factorial(num_samples)
    expected = epochs / kinds
    assert len(counts) == kinds
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    # Mean kinds - 1, variance 2 * (kinds - 1): five standard deviations.
    assert chi_square < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("num_samples", [1000, 4096, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_epoch_looks_random(num_samples: int, seed: int):
    order, identity = epoch(seed, 0, num_samples), np.arange(num_samples)
    tolerance = 5 / math.sqrt(num_samples)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1])

    # |i - order[i]| of a random permutation is a third of the size on average.
    assert abs(np.abs(order - identity).mean() / num_samples - 1 / 3) < tolerance
    assert abs(correlation(order, identity)) < tolerance
    for lag in (1, 2, 16):
        assert abs(correlation(order[:-lag], order[lag:])) < tolerance
    assert abs(correlation(order, epoch(seed, 1, num_samples))) < tolerance
    assert abs(correlation(order, epoch(seed + 1, 0, num_samples))) < tolerance
    # A random permutation has one fixed point on average; ten or more are less likely than one in a million.
    assert (order == identity).sum() < 10
