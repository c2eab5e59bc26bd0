"""A whole picture, drawn by matplotlib in any thread, with or without a desktop."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import matplotlib
from matplotlib import font_manager
from matplotlib.lines import Line2D

from viewer.colours import on_paper
from viewer.drawing.layout import (
    FOOT,
    NAME_SIZE,
    SMALL_SIZE,
    TITLE_SIZE,
    fitted,
    fitted_name,
    fitting_grid,
    is_lowest,
    points,
    text_width,
)
from viewer.drawing.panel import draw_panel
from viewer.panels import chosen_panels, left_out, title_of
from viewer.picture import DrawnPanel
from viewer.text import translate
from viewer.view import ShownRun, View, theme_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 60
"""Limit for one picture: more panels could not be told apart, and drawing them would take all memory."""
_LEGEND_SHARE = 0.3
"""Largest share of the height for the names of the runs."""
_CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Droid Sans Fallback", "Arial Unicode MS",
)  # fmt: skip


@cache
def chinese_font() -> str | None:
    """Name of an installed font that has Chinese characters."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CHINESE_FONTS if name in installed), None)


@cache
def prepare_matplotlib() -> None:
    """Set fonts and other options, once, before the first picture."""
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *filter(None, [chinese_font()])]
    # A dollar in a run's name does not begin a formula.
    matplotlib.rcParams["text.parse_math"] = False
    matplotlib.rcParams["path.simplify"] = True
    # Then it takes other steps, which do as well.
    warnings.filterwarnings("ignore", "AutoDateLocator was unable to pick an appropriate interval")
    # Text stays text, which can be searched and edited.
    matplotlib.rcParams["svg.fonttype"] = "none"


def draw(figure: "Figure", runs: Sequence[ShownRun], view: View) -> list[DrawnPanel]:
    """Draw the chosen panels of the runs into an empty figure.

    Returns:
        the panels with their places. The picture itself comes from the figure's canvas.
    """
    prepare_matplotlib()
    theme = theme_of(view)
    figure.set_facecolor(theme.paper)
    runs = [replace(run, colour=on_paper(run.colour, view.dark)) for run in runs]
    chosen = chosen_panels(runs, view)
    width, height = figure.get_size_inches() * figure.dpi
    unit = figure.dpi / 100
    top = _draw_legend(figure, runs, view, unit) if view.legend else 8 * unit
    if not chosen:
        _draw_what_is_left_out(figure, runs, 0, 0, view, unit)
        text = "Waiting for the first results…" if not any(r.snapshot.tables for r in runs) else "No metric is chosen."
        figure.text(0.5, 0.5, translate(text, view.language), ha="center", va="center", color=theme.faint, fontsize=12)
        return []
    foot = FOOT if left_out(runs, 0, 0, view.language) else 0.0
    shown = chosen[:MOST_PANELS]
    large, titles = [panel.large for panel in shown], [title_of(panel, view.language) for panel in shown]
    grid = fitting_grid(large, titles, (width, height, top), foot, unit)
    _draw_what_is_left_out(figure, runs, len(chosen), len(grid.cells), view, unit)
    drawn = []
    for index, (panel, cell, title) in enumerate(zip(chosen, grid.cells, grid.titles)):
        left, top, right, bottom = box = grid.box(cell)
        axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
        axes.set_title("\n".join(title), loc="left", color=theme.ink, fontsize=TITLE_SIZE, pad=6)
        drawn.append(draw_panel(axes, panel, runs, view, box, is_lowest(cell, grid.cells), index == 0))
    return drawn


def _draw_what_is_left_out(
    figure: "Figure", runs: Sequence[ShownRun], num_panels: int, num_drawn: int, view: View, unit: float
) -> None:
    """Draw a line under the panels, as long as there is room for."""
    found = left_out(runs, num_panels, num_drawn, view.language)
    if not found:
        return
    text = f"{translate('left out', view.language)}: {'; '.join(found)}"
    width, height = figure.get_size_inches() * figure.dpi
    text = fitted(text, SMALL_SIZE, points(width / unit - 24))
    ink = theme_of(view).faint
    figure.text(12 * unit / width, 4 * unit / height, text, color=ink, fontsize=SMALL_SIZE, va="bottom")


def _draw_legend(figure: "Figure", runs: Sequence[ShownRun], view: View, unit: float) -> float:
    """Draw the names of the runs above the panels, and return the height in pixels that they take."""
    if not runs:
        return 8 * unit
    width, height = figure.get_size_inches() * figure.dpi
    room = width / unit - 62
    longest = points(min(max(room / 3 - 60, 200.0), room - 40))
    labels = [fitted_name(run.label, NAME_SIZE, longest) for run in runs]
    longest = max(text_width(label, NAME_SIZE) for label in labels) / 0.72
    columns = max(1, min(len(runs), int((room + 20) / (60 + longest))))
    # A line of matplotlib's is as high as the font and half of its size.
    line = 1.65 * NAME_SIZE / 0.72
    lines = max(1, int(_LEGEND_SHARE * height / unit / line))
    stroke = {"linewidth": 2.5, "markersize": 6, "markeredgewidth": 0}
    handles = [Line2D([], [], color=run.colour, marker=run.mark, **stroke) for run in runs]
    if len(runs) > columns * lines:
        shown = columns * lines - 1
        handles, labels = [*handles[:shown], Line2D([], [], linestyle="")], labels[:shown]
        labels.append(translate("and {} more", view.language).format(len(runs) - shown))
    figure.legend(
        handles, labels, loc="upper left", ncols=columns, frameon=False, fontsize=NAME_SIZE,
        labelcolor=theme_of(view).ink, bbox_to_anchor=(50 * unit / width, 1 - 4 * unit / height), borderaxespad=0,
        handlelength=1.6, labelspacing=0.5,
    )  # fmt: skip
    return (14 + line * -(-len(labels) // columns)) * unit
