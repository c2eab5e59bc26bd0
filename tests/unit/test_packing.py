"""Best-fit decreasing against a search through all rows."""

import numpy as np
import pytest

from dataset.packing import pack


def naive_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Look at every row for every sequence. Among rows with equally little room, take the one changed last."""
    rows: list[list[int]] = []
    room: list[int] = []
    changed: list[int] = []
    for time, number in enumerate(sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[number]]
        if fitting:
            best = min(fitting, key=lambda row: (room[row], -changed[row]))
        else:
            best = len(rows)
            rows.append([])
            room.append(capacity)
            changed.append(time)
        rows[best].append(number)
        room[best] -= lengths[number]
        changed[best] = time
    return rows


def random_lengths(seed: int) -> tuple[list[int], int]:
    """Many short and few long lengths, as in conversations; with some seeds all equal, or all long."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.choice([1, 2, 7, 64, 100, 1000]))
    low, high = sorted(rng.integers(1, capacity + 1, 2).tolist())
    skew = rng.choice([1, 3])
    lengths = low + (rng.random(rng.integers(0, 300)) ** skew * (high - low + 1)).astype(int)
    return lengths.tolist(), capacity


@pytest.mark.parametrize("seed", range(60))
def test_rows_equal_a_naive_search(seed: int):
    lengths, capacity = random_lengths(seed)
    rows = pack(np.array(lengths, np.int64), capacity)
    assert [row.tolist() for row in rows] == naive_pack(lengths, capacity)


@pytest.mark.parametrize("seed", range(60, 100))
def test_each_sequence_once_and_no_row_too_full(seed: int):
    lengths, capacity = random_lengths(seed)
    rows = pack(np.array(lengths, np.int64), capacity)
    assert sorted(number for row in rows for number in row.tolist()) == list(range(len(lengths)))
    assert all(len(row) and sum(lengths[number] for number in row) <= capacity for row in rows)
    # As few rows as the tokens allow, and never two rows that would fit into one.
    assert len(rows) >= -(-sum(lengths) // capacity)
    filled = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(rows) < 2 or filled[0] + filled[1] > capacity


def test_same_lengths_give_the_same_rows():
    """The type of the lengths must not matter: the n-th sample of a run must not depend on where the lengths came
    from."""
    lengths, capacity = np.random.default_rng(3).integers(1, 40, 200).tolist(), 64
    expected = [row.tolist() for row in pack(np.array(lengths, np.int64), capacity)]
    for kind in (np.int64, np.int32, np.uint16):
        rows = pack(np.array(lengths, kind), capacity)
        assert [row.tolist() for row in rows] == expected
        assert all(row.dtype == np.int64 for row in rows)


def test_lengths_are_left_alone():
    lengths = np.array([3, 1, 2])
    pack(lengths, 4)
    assert lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "lengths, capacity, expected",
    [
        ([], 8, []),
        ([5], 8, [[0]]),
        ([8, 8, 8], 8, [[0], [1], [2]]),
        ([1] * 5, 2, [[0, 1], [2, 3], [4]]),
        # The 3 goes beside the 5, where least room is left, not into the first row.
        ([4, 5, 3, 4], 8, [[1, 2], [0, 3]]),
        # First fit would put the 2 after the 6; best fit keeps room 4 for the last one.
        ([6, 4, 2, 4], 8, [[0, 2], [1, 3]]),
        # Among several rows with the same room, the one that got it last.
        ([5, 5, 3], 8, [[0], [1, 2]]),
    ],
)
def test_by_hand(lengths: list[int], capacity: int, expected: list[list[int]]):
    assert [row.tolist() for row in pack(np.array(lengths, np.int64), capacity)] == expected


@pytest.mark.parametrize(
    "lengths, complaint",
    [([3, 9], "not 3 to 9"), ([0, 3], "not 0 to 3"), ([-1], "not -1 to -1"), ([100], "not 100 to 100")],
)
def test_sequences_that_fit_no_row_are_refused(lengths: list[int], complaint: str):
    """No sequence may be cut or lost."""
    with pytest.raises(ValueError, match=f"1 to 8 positions can be packed, {complaint}$"):
        pack(np.array(lengths), 8)


def test_real_sizes_are_packed_without_a_search():
    """A search through all rows would take minutes for so many sequences."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1025, 50_000)
    rows = pack(lengths, 1024)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(50_000))
    filled = np.array([lengths[row].sum() for row in rows])
    assert filled.max() <= 1024
    # With lengths so evenly spread, hardly any room is left.
    assert filled.mean() > 0.99 * 1024
