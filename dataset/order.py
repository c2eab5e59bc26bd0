"""Order of the samples: the n-th sample of a run is a pure function of (seed, n).

Each epoch visits every sample once, in an order given by a keyed permutation of [0, num_samples): a balanced
Feistel network over the smallest power of four that is large enough, with cycle walking (values outside the
range are permuted again until they fall inside; Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Nothing is stored, so memory and seek time do not grow with the data. Scalars and arrays take the same path.
"""

import numpy as np

_ROUNDS = 8


def sample_at(seed: int, n: int | np.ndarray, num_samples: int) -> np.ndarray:
    """Ids of the samples at positions `n` of the run's endless stream.

    Args:
        seed: the run's data seed.
        n: positions >= 0, of any shape.
        num_samples: samples in an epoch, 1 <= num_samples <= 2**62.
    Returns:
        int64 array of n's shape, each value in [0, num_samples).
    Raises:
        ValueError: a position is negative, or num_samples is out of range.
    """
    if not 1 <= num_samples <= 1 << 62:
        raise ValueError(f"an epoch needs between 1 and 2**62 samples, got {num_samples}")
    positions = np.asarray(n, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError("a position in the data stream cannot be negative")
    shape = positions.shape
    positions = positions.reshape(-1)
    epochs, within = np.divmod(positions, num_samples)
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    values = within.astype(np.uint64)
    keys = _mix(epochs.astype(np.uint64) ^ _mix(np.full(1, seed % (1 << 64), np.uint64)))
    todo = np.arange(values.size)
    while todo.size:
        values[todo] = _feistel(values[todo], keys[todo], half_bits)
        todo = todo[values[todo] >= num_samples]
    return values.astype(np.int64).reshape(shape)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permute [0, 4**half_bits): each round maps (left, right) -> (right, left ^ F(right, key, round))."""
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for round_number in range(_ROUNDS):
        round_keys = keys + np.uint64(0x9E3779B97F4A7C15 * (round_number + 1) % (1 << 64))
        left, right = right, left ^ (_mix(right ^ round_keys) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele et al., 2014): every input bit reaches every output bit. uint64, wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
