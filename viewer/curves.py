"""Smoothing, and as many points as a screen can show."""

import numpy as np

WEIGHTS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
"""Weights for `smooth` that the user can choose from."""
_AUTOMATIC_SHARE = 1 / 100
_BLOCK = 128


def automatic_weight(count: int) -> float:
    """The weight for a curve of `count` points: the average reaches over a hundredth of them. Its reach is
    1 / (1 - weight)."""
    return max(weight for weight in WEIGHTS if 1 / (1 - weight) <= max(count * _AUTOMATIC_SHARE, 1.0))


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average, without the bias towards its start (as Adam's, and TensorBoard's):
    s_t = weight s_(t-1) + (1 - weight) y_t, divided by 1 - weight^t. Values that are not finite are skipped and become
    gaps.

    Args:
        values: float64 (N,).
        weight: the weight of the past, 0 <= weight < 1; 0 changes nothing.
    """
    if weight <= 0 or len(values) == 0:
        return values
    finite = np.isfinite(values)
    y = values[finite]
    count = len(y)
    if not count:
        return values
    # A matrix smooths within a block, a loop carries on from block to block: a loop over all points would take long.
    blocks = np.zeros((-(-count // _BLOCK), _BLOCK))
    blocks.reshape(-1)[:count] = y
    distance = np.arange(_BLOCK)[None, :] - np.arange(_BLOCK)[:, None]
    within = np.where(distance >= 0, (1 - weight) * weight ** np.maximum(distance, 0), 0.0)
    sums = blocks @ within
    carried, over_block = [0.0], weight**_BLOCK
    for last in sums[:-1, -1].tolist():
        carried.append(last + carried[-1] * over_block)
    sums += np.array(carried)[:, None] * weight ** np.arange(1, _BLOCK + 1)
    smoothed = np.full(len(values), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        smoothed[finite] = sums.reshape(-1)[:count] / (1 - weight ** np.arange(1, count + 1))
    return smoothed


def band(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Middle x, lowest y and highest y of the points in each column of the screen, where a column has more points than
    it can show. The area between lowest and highest covers what the line would, keeps every spike, and costs no more
    with more points.

    Args:
        x: float64 (N,), finite and never falling.
        y: float64 (N,), NaN for gaps.
        columns: number of the screen's columns from the first x to the last.

    Returns:
        three arrays, NaN where a column has only gaps; None if a line will do.
    """
    if len(x) <= 4 * columns or columns < 1:
        return None
    width = x[-1] - x[0]
    if not width > 0:
        width = 1.0
    column = np.minimum(((x - x[0]) / width * columns).astype(np.int64), columns - 1)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(starts[1:], len(x)) - 1
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    return (x[starts] + x[ends]) / 2, low, high
