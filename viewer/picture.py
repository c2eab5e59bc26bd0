"""A drawn picture under a cursor: which values lie at a place, what can be read there, and which view a zoom or a move
asks for. Places on the picture are in pixels from its upper left corner."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from viewer.formats import value_text, x_text
from viewer.panels import Panel
from viewer.text import translate
from viewer.view import View

Range = tuple[float, float]
_DAYS = (-200_000, 2_000_000)
"""First and last day since 1970; matplotlib has names for these dates and some more."""


@dataclass(frozen=True)
class DrawnCurve:
    """What a cursor can read off a curve."""

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    measured: np.ndarray | None = None
    """The values before smoothing."""
    mark: str = ""


@dataclass(frozen=True)
class DrawnPanel:
    """A panel's place on a picture, and what a cursor over it can read."""

    panel: Panel
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels from the picture's upper left corner."""
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool
    curves: list[DrawnCurve] = field(default_factory=list)


class Reading(NamedTuple):
    """A curve's point beside the cursor."""

    label: str
    colour: str
    mark: str
    x: float
    y: float
    measured: float | None
    """Before smoothing."""


def panel_at(panels: Sequence[DrawnPanel], right: float, down: float) -> DrawnPanel | None:
    """The panel at a place on the picture, if there is one."""
    for panel in panels:
        left, top, end, bottom = panel.box
        if left <= right <= end and top <= down <= bottom:
            return panel
    return None


def ranges(panel: DrawnPanel, view: View) -> tuple[Range, Range]:
    """The ranges of x and y that a view asks for; the picture may still have others."""
    return view.x_range or panel.x_range, dict(view.y_ranges).get(panel.panel.key, panel.y_range)


def scaled(ends: Range, log: bool) -> Range:
    """The ends as an axis counts them: their logarithms, if it is logarithmic."""
    return (math.log10(ends[0]), math.log10(ends[1])) if log and ends[0] > 0 else ends


def unscaled(value: float, log: bool) -> float:
    """The inverse of `scaled`."""
    return 10 ** min(max(value, -305.0), 305.0) if log else value


def values_at(panel: DrawnPanel, view: View, right: float, down: float) -> tuple[float, float]:
    """x and y at a place on the picture."""
    left, top, end, bottom = panel.box
    across_share = (right - left) / (end - left)
    up_share = (bottom - down) / (bottom - top)
    (x0, x1), y = ranges(panel, view)
    y0, y1 = scaled(y, panel.log_y)
    return x0 + across_share * (x1 - x0), unscaled(y0 + up_share * (y1 - y0), panel.log_y)


def across(panel: DrawnPanel, view: View, x: float) -> float | None:
    """How far right an x lies on the picture; None outside of the panel, as panels of other runs have other ranges."""
    left, _, right, _ = panel.box
    x0, x1 = ranges(panel, view)[0]
    share = (x - x0) / (x1 - x0)
    return left + share * (right - left) if 0 <= share <= 1 else None


def place_of(panel: DrawnPanel, view: View, x: float, y: float) -> tuple[float, float] | None:
    """The place of a point on the picture; None outside of the panel."""
    at, y_range = across(panel, view, x), ranges(panel, view)[1]
    if at is None or not math.isfinite(y) or panel.log_y and y <= 0:
        return None
    (y0, y1), (y, _) = scaled(y_range, panel.log_y), scaled((y, y), panel.log_y)
    share = (y - y0) / (y1 - y0)
    return (at, panel.box[3] - share * (panel.box[3] - panel.box[1])) if 0 <= share <= 1 else None


def read_off(panel: DrawnPanel, view: View, x: float) -> list[Reading]:
    """The point nearest to x of each curve that reaches it."""
    found = []
    x0, x1 = ranges(panel, view)[0]
    for curve in panel.curves:
        if not len(curve.x):
            continue
        after = int(np.searchsorted(curve.x, x))
        near = [index for index in (after - 1, after) if 0 <= index < len(curve.x)]
        index = min(near, key=lambda i: abs(curve.x[i] - x))
        if abs(curve.x[index] - x) <= 0.05 * (x1 - x0):
            measured = None if curve.measured is None else float(curve.measured[index])
            at, value = float(curve.x[index]), float(curve.y[index])
            found.append(Reading(curve.label, curve.colour, curve.mark, at, value, measured))
    return found


def told(readings: list[Reading], view: View, x: float) -> tuple[str, list[tuple[Reading, str]]]:
    """The texts beside the cursor: the x of the nearest point, and each curve's value there, the highest first. A value
    that was measured at another x says at which."""
    language = view.language
    unit = view.x if view.x in ("time", "clock") else translate(view.x, language)
    at = min((reading.x for reading in readings), key=lambda place: abs(place - x), default=x)
    heading = x_text(at, unit)
    if any(reading.measured is not None for reading in readings):
        heading += f"   ·   {translate('smoothed (measured)', language)}"
    rows = []
    for reading in sorted(readings, key=lambda reading: -reading.y if reading.y == reading.y else math.inf):
        text = value_text(reading.y)
        if reading.measured is not None:
            text += f" ({value_text(reading.measured)})"
        if reading.x != at:
            text += f"   {translate('at {}', language).format(x_text(reading.x, unit))}"
        rows.append((reading, text))
    return heading, rows


def nearest(
    rows: list[tuple[Reading, str]], height: float, most: int
) -> tuple[list[tuple[Reading, str]], int]:
    """The rows of `told` nearest to the cursor if there is no room for all, and the number of the others.

    Args:
        height: y at the cursor.
    """
    if len(rows) <= most:
        return rows, 0
    # Rows fall: those from `first` on lie below the cursor.
    first = sum(reading.y > height for reading, _ in rows)
    first = min(max(first - most // 2, 0), len(rows) - most)
    return rows[first : first + most], len(rows) - most


def with_ranges(view: View, panel: DrawnPanel, x: Range | None, y: Range | None) -> View | None:
    """The view with other ranges; None if these are too narrow or too wide for floats, or no calendar has such dates.

    Args:
        x, y: None: as before.
    """
    y_ranges = dict(view.y_ranges)
    if y is not None:
        y_ranges[panel.panel.key] = y
    new = replace(view, x_range=x or view.x_range, y_ranges=tuple(y_ranges.items()))
    for low, high in (new.x_range or (0.0, 1.0), *y_ranges.values()):
        size = max(abs(low), abs(high))
        if not (math.isfinite(low) and math.isfinite(high) and 1e-12 * size < high - low < 1e305):
            return None
    if new.x == "clock" and new.x_range and not (_DAYS[0] < new.x_range[0] and new.x_range[1] < _DAYS[1]):
        return None
    return new


def moved(view: View, panel: DrawnPanel, right: float, down: float) -> View | None:
    """The view after a panel's content was moved by some pixels. A small move down or up does not count."""
    left, top, end, bottom = panel.box
    x, y = ranges(panel, view)
    by = -right / (end - left) * (x[1] - x[0])
    y0, y1 = scaled(y, panel.log_y)
    up = down / (bottom - top) * (y1 - y0)
    new_y = (unscaled(y0 + up, panel.log_y), unscaled(y1 + up, panel.log_y))
    return with_ranges(view, panel, (x[0] + by, x[1] + by), new_y if abs(down) > 3 else None)


def zoomed_at(view: View, panel: DrawnPanel, place: tuple[float, float], factor: float, along_y: bool) -> View | None:
    """The view after a zoom that keeps the point at `place` where it is.

    Args:
        factor: new length of the range divided by the old one.
        along_y: zoom along y instead of along x.
    """
    x, y = values_at(panel, view, *place)
    x_range, y_range = ranges(panel, view)
    if not along_y:
        return with_ranges(view, panel, tuple(x + (edge - x) * factor for edge in x_range), None)
    at = scaled((y, y), panel.log_y)[0]
    ends = (at + (edge - at) * factor for edge in scaled(y_range, panel.log_y))
    return with_ranges(view, panel, None, tuple(unscaled(edge, panel.log_y) for edge in ends))
