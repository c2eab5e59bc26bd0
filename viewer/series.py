"""The numbers of a panel: x and y of its curves, measured and smoothed, and the ranges of its axes."""

import math
from dataclasses import dataclass

import numpy as np

from runs.history import Snapshot
from viewer.curves import automatic_weight, smooth
from viewer.panels import Curve
from viewer.view import ShownRun, View

GREATEST = 1e300
"""Largest absolute value on an axis; beyond it, axes overflow."""
NEVER_MISSING = ("loss", "grad_norm")
"""Metrics whose NaNs were measured; in other metrics a NaN means that a record lacks the metric."""


@dataclass(frozen=True)
class Series:
    """A curve of one run."""

    run: ShownRun
    curve: Curve
    x: np.ndarray
    y: np.ndarray
    smoothed: np.ndarray
    """y itself where `weight` is 0."""
    weight: float
    """Weight for `curves.smooth`."""


def series_of(run: ShownRun, curve: Curve, view: View) -> Series:
    x, y = _values(run.snapshot, curve, view)
    weight = _weight(curve, view, len(y))
    return Series(run, curve, x, y, _smoothed(run.snapshot, curve, view, y, weight), weight)


def _smoothed(snapshot: Snapshot, curve: Curve, view: View, y: np.ndarray, weight: float) -> np.ndarray:
    """The smoothed values. They are kept with the snapshot, as zooming draws the same curves again and again."""
    if weight <= 0:
        return y
    key = ("smoothed", curve, view.x)
    kept = snapshot.kept.get(key)
    if kept is None or kept[0] != weight:
        kept = snapshot.kept[key] = (weight, smooth(y, weight))
    return kept[1]


def _weight(curve: Curve, view: View, count: int) -> float:
    """The weight of smoothing. Only metrics that are measured on a batch are noisy; validation is exact."""
    if curve.table not in ("train", "experts") or curve.metric == "lr":
        return 0.0
    return automatic_weight(count) if view.smoothing is None else view.smoothing


def _values(snapshot: Snapshot, curve: Curve, view: View) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a curve; x is finite and never falls."""
    columns = snapshot.tables[curve.table]
    y = columns[curve.metric] * curve.factor
    x = x_of(snapshot, curve.table, view.x)
    usable = np.abs(x) <= GREATEST
    if curve.metric not in NEVER_MISSING:
        usable &= np.isfinite(y)
    if not usable.all():
        x, y = x[usable], y[usable]
    if (np.diff(x) < 0).any():
        # A clock that was set back, or a count of tokens that fell.
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    return x, y


def x_of(snapshot: Snapshot, table: str, x: str) -> np.ndarray:
    """x of each row of a table. It is kept with the snapshot, as every panel asks for it several times.

    Args:
        x: one of view.X_AXES.
    """
    key = ("x", table, x)
    found = snapshot.kept.get(key)
    if found is None:
        found = snapshot.kept[key] = _compute_x(snapshot, table, x)
    return found


def _compute_x(snapshot: Snapshot, table: str, x: str) -> np.ndarray:
    if x == "step":
        return snapshot.tables[table]["step"]
    if x == "tokens":
        return snapshot.tokens(table)
    if x == "time":
        return snapshot.active_seconds(table)
    return snapshot.tables[table]["time"] / 86400.0


def in_range(x: np.ndarray, x_range: tuple[float, float]) -> slice:
    """The points within a range, and one on each side, so that lines reach the edge."""
    first, last = np.searchsorted(x, x_range[0], "left"), np.searchsorted(x, x_range[1], "right")
    return slice(max(int(first) - 1, 0), int(last) + 1)


def x_range_of(runs: list[ShownRun], view: View) -> tuple[float, float]:
    """The range of all that the runs have. So all panels of a run have one range, and the same moment stands at the
    same place in each."""
    found = [x_of(run.snapshot, table, view.x) for run in runs for table in run.snapshot.tables]
    found = [x[np.abs(x) <= GREATEST] for x in found]
    ends = [(x.min(), x.max()) for x in found if len(x)]
    if not ends:
        return (0.0, 1.0)
    low, high = min(first for first, _ in ends), max(last for _, last in ends)
    pad = (high - low) * 0.01 or max(0.5, 1e-9 * abs(high))
    return (float(low - pad), float(high + pad))


def y_range_of(shown: list[Series], x_range: tuple[float, float], log_y: bool, view: View) -> tuple[float, float]:
    """The range of the values within `x_range`, with some room above and below."""
    parts = []
    for found in shown:
        within = in_range(found.x, x_range)
        values = found.smoothed[within] if found.weight > 0 and not view.raw else found.y[within]
        values = values[np.isfinite(values)]
        parts.append(values[values > 0] if log_y else values)
    values = np.clip(np.concatenate(parts or [np.empty(0)]), -GREATEST, GREATEST)
    if not len(values):
        return (0.1, 1.0) if log_y else (0.0, 1.0)
    low, high = (values.min(), values.max()) if view.outliers else np.percentile(values, (1, 99))
    if log_y:
        low, high = (math.log10(max(end, 1 / GREATEST)) for end in (low, high))
        pad = (high - low) * 0.05 or 0.1
        return (10 ** max(low - pad, -305), 10 ** min(high + pad, 305))
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return (float(low - pad), float(high + pad))


def restarts(snapshot: Snapshot, x: str) -> list[float]:
    """Places on the x axis where the launches after the first begin."""
    if "train" not in snapshot.tables:
        return []
    key = ("restarts", x)
    if key not in snapshot.kept:
        snapshot.kept[key] = _compute_restarts(snapshot, x)
    return snapshot.kept[key]


def _compute_restarts(snapshot: Snapshot, x: str) -> list[float]:
    if x == "clock":
        return [launch.time / 86400.0 for launch in snapshot.launches[1:]]
    if x == "step":
        return [float(launch.step) for launch in snapshot.launches[1:]]
    launches = snapshot.tables["train"]["launch"]
    before = np.searchsorted(launches, np.arange(1, len(snapshot.launches)), "left")
    return np.where(before > 0, x_of(snapshot, "train", x)[before - 1], 0.0).tolist()
