"""One panel, drawn by matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from viewer.curves import band
from viewer.drawing.axes import dress
from viewer.drawing.marks import explain, mark_events, mark_non_finite
from viewer.panels import Panel, runs_of
from viewer.picture import DrawnCurve, DrawnPanel
from viewer.series import GREATEST, NEVER_MISSING, Series, in_range, series_of, x_range_of, y_range_of
from viewer.text import translate
from viewer.view import ShownRun, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BETWEEN_POINTS = 12
"""Least number of pixels between two points if each is to be marked."""
_MARKS_ON_A_CURVE = 6
_RAW_ALPHA = 0.3


def draw_panel(
    axes: "Axes", panel: Panel, runs: Sequence[ShownRun], view: View, box: tuple, names_x: bool, explains: bool
) -> DrawnPanel:
    axes.set_autoscale_on(False)
    columns = int(box[2] - box[0])
    present = runs_of(panel, runs)
    shown = [
        series_of(run, curve, view) for run in present for curve in panel.curves
        if curve.metric in run.snapshot.tables.get(curve.table, {})
    ]  # fmt: skip
    x_range = view.x_range or x_range_of(present, view)
    log_y = view.log_y and any((found.y > 0).any() for found in shown)
    given = dict(view.y_ranges).get(panel.key)
    y_range = given or y_range_of(shown, x_range, log_y, view)
    if log_y and y_range[0] <= 0:
        y_range = y_range_of(shown, x_range, log_y, view)
    drawn = DrawnPanel(panel, box, x_range, y_range, log_y)
    pixel = (x_range[1] - x_range[0]) / max(columns, 1) * axes.figure.dpi / 100
    # Many curves together are no darker than one: those of ten runs would cover the smoothed curves.
    alpha = _RAW_ALPHA / max(1.0, sum(found.weight > 0 for found in shown) / 1.4)
    for found in shown:
        within = in_range(found.x, x_range)
        x, y, smoothed = found.x[within], found.y[within], found.smoothed[within]
        colour = found.run.colour
        if found.weight > 0 and view.raw:
            _draw_curve(axes, x, y, columns, color=colour, alpha=alpha, linewidth=0.8, zorder=2)
        _draw_main_curve(axes, found, x, smoothed, columns, pixel)
        name = f", {translate(found.curve.name, view.language)}" if found.curve.name and len(panel.curves) > 1 else ""
        measured = y if found.weight > 0 else None
        drawn.curves.append(DrawnCurve(found.run.label + name, colour, x, smoothed, measured, found.run.mark))
        if view.marks and found.curve.metric in NEVER_MISSING:
            mark_non_finite(axes, found.run, x, y)
    if view.marks:
        mark_events(axes, present, view, x_range, pixel)
    dress(axes, view, names_x, (y_range, log_y), x_range)
    kinds = {found.curve.name: found.curve.style for found in shown if found.curve.name}
    explain(axes, kinds if len(kinds) > 1 else {}, runs, view, explains, drawn)
    return drawn


def _draw_main_curve(axes: "Axes", found: Series, x: np.ndarray, y: np.ndarray, columns: int, pixel: float) -> None:
    """Draw the curve that counts: the smoothed one, if there is one.

    Args:
        pixel: length along x of a hundredth of an inch.
    """
    style = {"color": found.run.colour, "linewidth": 1.3, "linestyle": found.curve.style, "zorder": 3}
    # A line through one point cannot be seen.
    is_marked = len(x) == 1 or (found.curve.style == "--" and np.ptp(x) >= _BETWEEN_POINTS * pixel * (len(x) - 1) > 0)
    if is_marked:
        style |= {"marker": found.run.mark or "o", "markersize": 3.5}
    _draw_curve(axes, x, y, columns, as_line=found.weight > 0, **style)
    if found.run.mark and not is_marked:
        at = _evenly(x, y, sum(map(ord, found.run.label)))
        axes.plot(
            x[at], y[at], linestyle="", marker=found.run.mark, markersize=5, color=found.run.colour, zorder=3.5,
            markeredgewidth=0.6, markeredgecolor=axes.figure.get_facecolor(),
        )  # fmt: skip


def _evenly(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """The points of a curve to mark, chosen so that the marks of several curves do not lie on top of each other."""
    finite = np.flatnonzero(np.isfinite(y))
    if not len(finite):
        return finite
    x = x[finite]
    places = (np.arange(_MARKS_ON_A_CURVE) + (seed * 0.6180339887) % 1) / _MARKS_ON_A_CURVE
    after = np.searchsorted(x, x[0] + places * (x[-1] - x[0]))
    return finite[np.unique(np.minimum(after, len(x) - 1))]


def _draw_curve(
    axes: "Axes", x: np.ndarray, y: np.ndarray, columns: int, as_line: bool = False, **style: object
) -> None:
    """Draw a line, or the area that the line would cover where points are dense.

    Args:
        as_line: draw only the middle of dense points.
    """
    y = _clipped(y)
    dense = band(x, y, columns)
    if dense is None:
        axes.plot(x, y, **style)
    elif as_line:
        middle, low, high = dense
        axes.plot(middle, low / 2 + high / 2, **style)
    else:
        axes.fill_between(*dense, **style)


def _clipped(y: np.ndarray) -> np.ndarray:
    return np.clip(np.where(np.isfinite(y), y, np.nan), -GREATEST, GREATEST)
