"""Marks on a panel for restarts, checkpoints, validations and values that are not finite; the legend of lines and
marks."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from viewer.drawing.axes import inches
from viewer.drawing.layout import SMALL_SIZE, TITLE_SIZE, text_width
from viewer.picture import DrawnPanel
from viewer.series import restarts, x_of
from viewer.text import translate
from viewer.view import ShownRun, View, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CROSSES = 20
_BETWEEN_RESTARTS, _BETWEEN_SAVES, _BETWEEN_TICKS = 8, 14, 6
"""Least number of pixels between two marks. Marks that lie closer together appear when one zooms."""


def mark_non_finite(axes: "Axes", run: ShownRun, x: np.ndarray, y: np.ndarray) -> None:
    bad = x[~np.isfinite(y)]
    if len(bad):
        bad = bad[:: -(-len(bad) // _MOST_CROSSES)]
        axes.plot(
            bad, np.full(len(bad), 0.98), transform=axes.get_xaxis_transform(), linestyle="", marker="x", markersize=6,
            markeredgewidth=1.6, color=run.colour, zorder=5,
        )  # fmt: skip


def mark_events(
    axes: "Axes", runs: Sequence[ShownRun], view: View, x_range: tuple[float, float], pixel: float
) -> None:
    """Draw restarts as lines, checkpoints and validations as ticks on the x axis. Each kind is one piece for all runs,
    as each piece costs time."""
    transform = axes.get_xaxis_transform()
    found = ((run, restarts(run.snapshot, view.x)) for run in runs)
    places, colours = _apart(x_range, found, _BETWEEN_RESTARTS * pixel)
    if len(places):
        axes.vlines(
            places, 0, 1, transform=transform, colors=colours, linestyles=[(0, (4, 3))], linewidth=0.9, alpha=0.7,
            zorder=1,
        )  # fmt: skip
    for table, marker, size, least in (("save", "^", 20.0, _BETWEEN_SAVES), ("valid", "|", 25.0, _BETWEEN_TICKS)):
        having = [run for run in runs if table in run.snapshot.tables]
        found = ((run, x_of(run.snapshot, table, view.x)) for run in having)
        places, colours = _apart(x_range, found, least * pixel)
        if len(places):
            axes.scatter(
                places, np.full(len(places), 0.012), s=size, c=colours, marker=marker, transform=transform, alpha=0.8,
                linewidth=0.8, zorder=4, clip_on=False,
            )  # fmt: skip


def _apart(
    x_range: tuple[float, float], found: Iterable[tuple[ShownRun, Sequence[float]]], least: float
) -> tuple[np.ndarray, list[str]]:
    """The places to mark, so far apart that each can be seen, and the colour of each. The last place is always among
    them."""
    places, owners, colours = [np.empty(0)], [np.empty(0, int)], []
    for run, at in found:
        at = np.asarray(at, dtype=float)
        at = at[(at >= x_range[0]) & (at <= x_range[1])]
        places.append(at)
        owners.append(np.full(len(at), len(colours)))
        colours.append(run.colour)
    places, owners = np.concatenate(places), np.concatenate(owners)
    order = np.argsort(-places, kind="stable")
    places, owners = places[order], owners[order]
    before_end, stays, index = -places, [], 0
    while index < len(places):
        stays.append(index)
        index = max(int(np.searchsorted(before_end, before_end[index] + least, "left")), index + 1)
    return places[stays], [colours[owner] for owner in owners[stays]]


def explain(
    axes: "Axes", kinds: dict[str, str], runs: Sequence[ShownRun], view: View, marks: bool, drawn: DrawnPanel
) -> None:
    """Draw the legend of the line styles; in the first panel, also that of the marks."""
    ink = theme_of(view).faint
    handles = {
        name: Line2D([], [], color=ink, linestyle=style, linewidth=1.3, marker="o" * (style == "--"), markersize=3.5)
        for name, style in kinds.items()
    }
    if view.marks and marks:
        if any(len(run.snapshot.launches) > 1 for run in runs):
            handles["restart"] = Line2D([], [], color=ink, linestyle=(0, (4, 3)), linewidth=0.9)
        if any("save" in run.snapshot.tables for run in runs):
            handles["checkpoint"] = Line2D([], [], color=ink, linestyle="", marker="^", markersize=4.5)
        losses = [run.snapshot.tables.get("train", {}).get("loss", np.empty(0)) for run in runs]
        if not all(np.isfinite(loss).all() for loss in losses):
            handles["not finite"] = Line2D([], [], color=ink, linestyle="", marker="x", markersize=6)
    if not handles:
        return
    labels = [translate(name, view.language) for name in handles]
    # It stands beside the title, where no curve is, or inside if the panel is too narrow for that.
    widths = [text_width(text, SMALL_SIZE) + 23 for text in labels]
    wide, high = (72 * size for size in inches(axes))
    title = max(text_width(line, TITLE_SIZE) for line in axes.get_title(loc="left").split("\n"))
    if sum(widths) + title + 10 <= wide:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(labels)}
    elif max(widths) > 0.8 * wide or 11.5 * len(labels) > 0.6 * high:
        return
    else:
        place = {"loc": _emptiest_corner(drawn, (max(widths) + 4) / wide, (11.5 * len(labels) + 4) / high)}
    axes.legend(
        handles.values(), labels, fontsize=SMALL_SIZE, frameon=False, labelcolor=ink, handlelength=1.6,
        handletextpad=0.4, borderaxespad=0.2, labelspacing=0.3, columnspacing=0.8, **place,
    )  # fmt: skip


def _emptiest_corner(drawn: DrawnPanel, width: float, height: float) -> str:
    """The corner in which a box of these shares of the panel covers the least of the curves. matplotlib's own search,
    loc="best", is slow and does not see the bands of dense curves."""
    grid = np.linspace(0.0, 1.0, 65)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.log10 if drawn.log_y else np.asarray
        low, high = scale(np.array(drawn.y_range))
        passed = [np.interp(drawn.x_range[0] + grid * np.ptp(drawn.x_range), curve.x, curve.y, np.nan, np.nan)
                  for curve in drawn.curves if len(curve.x)]  # fmt: skip
        levels = np.array([(scale(y) - low) / (high - low) for y in passed]).reshape(-1, len(grid))
        upper, lower = levels >= 1 - height, levels <= height
    right, left = grid >= 1 - width, grid <= width
    corners = {
        "upper right": upper & right, "upper left": upper & left, "lower left": lower & left,
        "lower right": lower & right,
    }  # fmt: skip
    return min(corners, key=lambda corner: int(corners[corner].sum()))
