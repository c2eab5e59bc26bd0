"""The pictures: a panel a metric, drawn by matplotlib in any thread, with or without a desktop."""

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib import dates, font_manager, ticker
from matplotlib.lines import Line2D

from runs.history import Snapshot
from viewer.colours import on_paper
from viewer.curves import automatic_weight, band, smooth
from viewer.layout import Cell, arrange, fitted, fitted_name, text_width, wrapped
from viewer.text import translate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X_AXES = ("step", "tokens", "time", "clock")
_CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Droid Sans Fallback", "Arial Unicode MS",
)  # fmt: skip
_GREATEST = 1e300
"""Axes that reach further overflow."""
_MOST_CROSSES = 20
_BETWEEN_RESTARTS, _BETWEEN_SAVES, _BETWEEN_TICKS, _BETWEEN_POINTS = 8, 14, 6, 12
"""Pixels between two marks, at least. What lies closer together appears when one zooms."""
_MARKS_ON_A_CURVE = 6
_RAW_ALPHA = 0.3
_TITLE_SIZE, _NAME_SIZE, _SMALL_SIZE = 9.5, 9, 8
_LEAST_HEIGHT, _TINY = 50, 18
"""Pixels of a panel beside a large one, and of any."""
_FOOT = 16.0
"""Pixels of the line under the panels."""
_LEGEND_SHARE = 0.3
"""Of the height, at most, for the names of the runs."""
MOST_PANELS = 60
"""In a picture; more could not be told apart, and drawing them would take all memory."""
_NEVER_MISSING = ("loss", "grad_norm")
"""A NaN in these was measured; elsewhere it means that a record did not have the metric."""


@dataclass(frozen=True)
class Curve:
    table: str
    metric: str
    name: str = ""
    """Where a panel has several."""
    style: str = "-"
    factor: float = 1.0


@dataclass(frozen=True)
class Panel:
    key: str
    title: str
    curves: tuple[Curve, ...]
    usual: bool = False
    """Shown unless others were chosen."""
    large: bool = False
    by_task: bool = False
    """What is trained decides what values mean, or how large they are: runs of each task get a panel of their own."""
    task: str | None = None
    """Only runs of this one are shown."""


def _both(metric: str, title: str, usual: bool = False, key: str = "", **more: bool) -> Panel:
    curves = (Curve("train", metric, "training"), Curve("valid", metric, "validation", "--"))
    return Panel(key or metric, title, curves, usual, **more)


def _pair(key: str, title: str, prefix: str, usual: bool = False) -> Panel:
    curves = (Curve("train", f"{prefix}/chosen", "chosen"), Curve("train", f"{prefix}/rejected", "rejected", ":"))
    return Panel(key, title, curves, usual)


PANELS = (
    _both("loss", "loss", usual=True, large=True, by_task=True),
    _both("bits_per_byte", "bits per byte", by_task=True),
    Panel("lr", "learning rate", (Curve("train", "lr"),), usual=True, by_task=True),
    Panel("grad_norm", "gradient norm, before clipping", (Curve("train", "grad_norm"),), usual=True),
    Panel("tokens_per_sec", "tokens per second", (Curve("train", "tokens_per_sec"),), usual=True),
    Panel("mfu", "MFU, %", (Curve("train", "mfu", factor=100),), usual=True),
    Panel("mfu_seed", "MFU by llm-zero2all's formula, %", (Curve("train", "mfu_seed", factor=100),)),
    Panel("dt", "seconds a step", (Curve("train", "dt"),)),
    Panel("data_wait", "waiting for data, ms a step", (Curve("train", "data_wait", factor=1000),), usual=True),
    Panel("comm_wait", "communication not hidden, ms a step",
          (Curve("train", "comm_wait", factor=1000),), usual=True),
    Panel("compression", "compression: error left for later", (Curve("compression", "mean_relative_error"),),
          usual=True),
    Panel("compression_ratio", "compression ratio", (Curve("compression", "ratio"),)),
    _pair("rewards", "DPO rewards", "rewards", usual=True),
    _both("rewards/margins", "DPO margin", usual=True, key="margins"),
    _both("rewards/accuracies", "DPO accuracy", usual=True, key="accuracies"),
    _pair("logps", "log-probabilities", "logps"),
    Panel("held_up", "saving: training held up, ms", (Curve("save", "held_up", factor=1000),)),
)  # fmt: skip
_HIDDEN = {"step", "time", "launch", "tokens"}


def available(snapshots: Sequence[Snapshot]) -> list[Panel]:
    """The panels that have something to show: the known ones, then one a metric that only these runs have."""
    present = {
        (table, metric)
        for snapshot in snapshots
        for table, columns in snapshot.tables.items()
        for metric in columns
        if metric not in _HIDDEN
    }
    known = {(curve.table, curve.metric) for panel in PANELS for curve in panel.curves}
    found = [panel for panel in PANELS if any((curve.table, curve.metric) in present for curve in panel.curves)]
    others = sorted(metric for table, metric in present - known if table == "train")
    more = sorted((table, metric) for table, metric in present - known if table != "train")
    more = [(table, metric) for table, metric in more if not (table == "valid" and ("train", metric) in present)]
    return [
        *found,
        *(_both(metric, metric) for metric in others),
        *(Panel(f"{table}/{metric}", f"{table}/{metric}", (Curve(table, metric),)) for table, metric in more),
    ]


@dataclass(frozen=True)
class ShownRun:
    label: str
    colour: str
    """Of colours.COLOURS; on dark paper it is drawn lighter."""
    snapshot: Snapshot
    mark: str = ""
    """Of colours.MARKS: stands on its curves."""


@dataclass(frozen=True)
class View:
    """What is shown, and how."""

    panels: tuple[str, ...] = ()
    """Keys; none: the usual ones; only "all": all."""
    x: str = "step"
    """One of X_AXES."""
    log_y: bool = False
    smoothing: float | None = 0.0
    """Weight of `curves.smooth`; None: by the length of each curve."""
    raw: bool = True
    """The measured curve behind a smoothed one."""
    marks: bool = True
    outliers: bool = True
    """The y axis reaches to them."""
    dark: bool = False
    language: str = "en"
    legend: bool = True
    """Names of the runs on top."""
    x_range: tuple[float, float] | None = None
    y_ranges: tuple[tuple[str, tuple[float, float]], ...] = ()
    """(panel, range)."""
    alone: str = ""
    """The key of the panel that has the whole picture for itself."""


@dataclass(frozen=True)
class DrawnCurve:
    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    measured: np.ndarray | None = None
    """What was smoothed to y."""
    mark: str = ""


@dataclass(frozen=True)
class DrawnPanel:
    """Where a panel lies on a picture, and what a cursor over it can read."""

    panel: Panel
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels from the picture's upper left corner."""
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool
    curves: list[DrawnCurve] = field(default_factory=list)


@dataclass(frozen=True)
class _Theme:
    paper: str
    ink: str
    faint: str
    grid: str


_LIGHT = _Theme("#ffffff", "#1f2937", "#6b7280", "#e5e7eb")
_DARK = _Theme("#16181d", "#e5e7eb", "#9ca3af", "#2d3139")


def theme_of(view: View) -> _Theme:
    return _DARK if view.dark else _LIGHT


@cache
def chinese_font() -> str | None:
    """An installed font that has Chinese characters."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CHINESE_FONTS if name in installed), None)


@cache
def prepare_matplotlib() -> None:
    """Once, before the first picture."""
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *filter(None, [chinese_font()])]
    # A dollar in a run's name is no formula.
    matplotlib.rcParams["text.parse_math"] = False
    matplotlib.rcParams["path.simplify"] = True
    # It then takes steps that do, too.
    warnings.filterwarnings("ignore", "AutoDateLocator was unable to pick an appropriate interval")
    # Text stays text, which can be searched and edited.
    matplotlib.rcParams["svg.fonttype"] = "none"


def draw(figure: "Figure", runs: Sequence[ShownRun], view: View) -> list[DrawnPanel]:
    """Draw the chosen panels of the runs into an empty figure.

    Returns:
        where each panel lies. The picture itself comes from the figure's canvas.
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
    foot = _FOOT if left_out(runs, 0, 0, view.language) else 0.0
    grid = _fitting_grid(chosen[:MOST_PANELS], view, (width, height, top), foot, unit)
    _draw_what_is_left_out(figure, runs, len(chosen), len(grid.cells), view, unit)
    drawn = []
    for index, (panel, cell, title) in enumerate(zip(chosen, grid.cells, grid.titles)):
        left, top, right, bottom = box = grid.box(cell)
        axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
        axes.set_title("\n".join(title), loc="left", color=theme.ink, fontsize=_TITLE_SIZE, pad=6)
        drawn.append(_draw_panel(axes, panel, runs, view, box, _is_lowest(cell, grid.cells), index == 0))
    return drawn


@dataclass(frozen=True)
class _Grid:
    """Panels with their titles above; all in pixels."""

    cells: list[Cell]
    titles: list[list[str]]
    """Lines."""
    left: float
    tops: list[float]
    """Of the panels in each row."""
    cell: tuple[float, float]
    """Width and height of a small panel."""
    gap: float
    """Between two columns."""

    def box(self, cell: Cell) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a panel."""
        wide, high = self.cell
        left = self.left + cell.column * (wide + self.gap)
        right = left + cell.columns * (wide + self.gap) - self.gap
        return left, self.tops[cell.row], right, self.tops[cell.row + cell.rows - 1] + high


def _fitting_grid(chosen: list[Panel], view: View, room: tuple[float, float, float], foot: float, unit: float) -> _Grid:
    """Of as many panels as there is room for, but one at least.

    Args:
        room: width, height, and what above is taken.
        foot: taken below, before `unit`, if there is room for all.
    """
    for count in range(len(chosen), 0, -1):
        grid = _grid(chosen[:count], view, (*room, foot * unit), unit)
        if min(grid.cell[0] / 1.7, grid.cell[1]) > _TINY * unit:
            break
        foot = _FOOT
    return grid


def _grid(chosen: list[Panel], view: View, room: tuple[float, float, float, float], unit: float) -> _Grid:
    """
    Args:
        room: width, height, and what above and below is taken.
    """
    width, height, top, foot = room
    left, right, gap_x, gap_y, bottom = (n * unit for n in (58, 24, 66, 34, 42))
    for large in ([panel.large for panel in chosen], [False] * len(chosen)):
        net = (width - left - right) / unit, (height - top - bottom - foot) / unit - 22
        columns, rows, cells = arrange(large, *net, gap_x / unit, gap_y / unit + 22)
        wide = max((width - left - right - gap_x * (columns - 1)) / columns, 20.0)
        titles = []
        for panel, cell in zip(chosen, cells):
            beside = right - 4 * unit if cell.column + cell.columns == columns else gap_x - 14 * unit
            points = _points((cell.columns * (wide + gap_x) - gap_x + beside) / unit)
            titles.append(wrapped(_title(panel, view), _TITLE_SIZE, points))
        above = [22.0 * unit] * rows
        for cell, lines in zip(cells, titles):
            above[cell.row] = max(above[cell.row], (10 + 12 * len(lines)) * unit)
        high = (height - top - bottom - foot - sum(above) - gap_y * (rows - 1)) / rows
        # Where a large panel leaves no room for the others, it is as small as they are.
        if high >= _LEAST_HEIGHT * unit:
            break
    high = max(high, 10.0)
    tops = [top + sum(above[: row + 1]) + row * (high + gap_y) for row in range(rows)]
    return _Grid(cells, titles, left, tops, (wide, high), gap_x)


def _is_lowest(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Whether there is no panel below."""
    columns = set(range(cell.column, cell.column + cell.columns))
    return not any(
        other.row > cell.row and columns & set(range(other.column, other.column + other.columns)) for other in cells
    )


def choose(found: list[Panel], view: View) -> list[Panel]:
    """Those that the view names, else the usual ones."""
    if not view.panels:
        return [panel for panel in found if panel.usual]
    if view.panels == ("all",):
        return found
    return [panel for panel in found if panel.key in view.panels]


def chosen_panels(runs: Sequence[ShownRun], view: View) -> list[Panel]:
    """Those that the view shows of these runs: one a task where that matters; one alone, if it is there."""
    chosen = choose(available([run.snapshot for run in runs]), view)
    found = [part for panel in chosen for part in _parts(panel, runs)]
    return [panel for panel in found if panel.key == view.alone] or found


def runs_of(panel: Panel, runs: Sequence[ShownRun]) -> list[ShownRun]:
    """Those that have something to show in a panel."""
    return [
        run for run in runs
        if panel.task in (None, _task_of(run.snapshot))
        and any(curve.metric in run.snapshot.tables.get(curve.table, {}) for curve in panel.curves)
    ]  # fmt: skip


def _parts(panel: Panel, runs: Sequence[ShownRun]) -> list[Panel]:
    tasks = list(dict.fromkeys(_task_of(run.snapshot) for run in runs_of(panel, runs))) if panel.by_task else []
    if len(tasks) < 2:
        return [panel]
    order = {task: place for place, task in enumerate(_TASKS)}
    tasks.sort(key=lambda task: (order.get(task, len(order)), task))
    return [replace(panel, key=f"{panel.key} ({task})", task=task) for task in tasks]


_TASKS = {"pretrain": "pretraining", "sft": "SFT", "dpo": "DPO"}


def _task_of(snapshot: Snapshot) -> str:
    """What is trained; of a log that does not say, what its metrics tell."""
    return snapshot.task or ("dpo" if "rewards/margins" in snapshot.tables.get("train", {}) else "pretrain")


def _title(panel: Panel, view: View) -> str:
    text = translate(panel.title, view.language)
    if panel.task is None:
        return text
    return translate("{}, {}", view.language).format(text, translate(_TASKS.get(panel.task, panel.task), view.language))


def _points(pixels: float) -> float:
    """As text is measured, before `unit`: a hundred pixels are an inch, of which there are 72."""
    return 0.72 * pixels


def left_out(runs: Sequence[ShownRun], num_panels: int, num_drawn: int, language: str) -> list[str]:
    """All that the runs' logs hold and the drawn ones of these panels do not, a sentence each."""
    found = [
        (f"{run.label}: " if len(runs) > 1 else "") + text
        for run in runs
        for text in left_out_of(run.snapshot, language)
    ]  # fmt: skip
    if num_panels > num_drawn:
        found.append(translate("panels but the first {}", language).format(num_drawn))
    return found


def left_out_of(snapshot: Snapshot, language: str) -> list[str]:
    return [translate(text, language).format(*values) for text, values in snapshot.left_out]


def _draw_what_is_left_out(
    figure: "Figure", runs: Sequence[ShownRun], num_panels: int, num_drawn: int, view: View, unit: float
) -> None:
    """A line under the panels, as long as there is room."""
    found = left_out(runs, num_panels, num_drawn, view.language)
    if not found:
        return
    text = f"{translate('left out', view.language)}: {'; '.join(found)}"
    width, height = figure.get_size_inches() * figure.dpi
    text = fitted(text, _SMALL_SIZE, _points(width / unit - 24))
    ink = theme_of(view).faint
    figure.text(12 * unit / width, 4 * unit / height, text, color=ink, fontsize=_SMALL_SIZE, va="bottom")


def _draw_legend(figure: "Figure", runs: Sequence[ShownRun], view: View, unit: float) -> float:
    """The runs' names over the panels; the pixels that they take."""
    if not runs:
        return 8 * unit
    width, height = figure.get_size_inches() * figure.dpi
    room = width / unit - 62
    longest = _points(min(max(room / 3 - 60, 200.0), room - 40))
    labels = [fitted_name(run.label, _NAME_SIZE, longest) for run in runs]
    longest = max(text_width(label, _NAME_SIZE) for label in labels) / 0.72
    columns = max(1, min(len(runs), int((room + 20) / (60 + longest))))
    # matplotlib's lines: the font's height and half of its size.
    line = 1.65 * _NAME_SIZE / 0.72
    lines = max(1, int(_LEGEND_SHARE * height / unit / line))
    stroke = {"linewidth": 2.5, "markersize": 6, "markeredgewidth": 0}
    handles = [Line2D([], [], color=run.colour, marker=run.mark, **stroke) for run in runs]
    if len(runs) > columns * lines:
        shown = columns * lines - 1
        handles, labels = [*handles[:shown], Line2D([], [], linestyle="")], labels[:shown]
        labels.append(translate("and {} more", view.language).format(len(runs) - shown))
    figure.legend(
        handles, labels, loc="upper left", ncols=columns, frameon=False, fontsize=_NAME_SIZE,
        labelcolor=theme_of(view).ink, bbox_to_anchor=(50 * unit / width, 1 - 4 * unit / height), borderaxespad=0,
        handlelength=1.6, labelspacing=0.5,
    )  # fmt: skip
    return (14 + line * -(-len(labels) // columns)) * unit


@dataclass(frozen=True)
class _Shown:
    run: ShownRun
    curve: Curve
    x: np.ndarray
    y: np.ndarray
    smoothed: np.ndarray
    weight: float


def _draw_panel(
    axes: "Axes", panel: Panel, runs: Sequence[ShownRun], view: View, box: tuple, names_x: bool, explains: bool
) -> DrawnPanel:
    axes.set_autoscale_on(False)
    columns = int(box[2] - box[0])
    present = runs_of(panel, runs)
    shown = [
        _shown(run, curve, view) for run in present for curve in panel.curves
        if curve.metric in run.snapshot.tables.get(curve.table, {})
    ]  # fmt: skip
    x_range = view.x_range or _x_range(present, view)
    log_y = view.log_y and any((found.y > 0).any() for found in shown)
    given = dict(view.y_ranges).get(panel.key)
    y_range = given or _y_range(shown, x_range, log_y, view)
    if log_y and y_range[0] <= 0:
        y_range = _y_range(shown, x_range, log_y, view)
    drawn = DrawnPanel(panel, box, x_range, y_range, log_y)
    pixel = (x_range[1] - x_range[0]) / max(columns, 1) * axes.figure.dpi / 100
    # Many together no darker than one: those of ten runs would cover the smoothed curves.
    alpha = _RAW_ALPHA / max(1.0, sum(found.weight > 0 for found in shown) / 1.4)
    for found in shown:
        within = _in_range(found.x, x_range)
        x, y, smoothed = found.x[within], found.y[within], found.smoothed[within]
        colour = found.run.colour
        if found.weight > 0 and view.raw:
            _draw_curve(axes, x, y, columns, color=colour, alpha=alpha, linewidth=0.8, zorder=2)
        _draw_main_curve(axes, found, x, smoothed, columns, pixel)
        name = f", {translate(found.curve.name, view.language)}" if found.curve.name and len(panel.curves) > 1 else ""
        measured = y if found.weight > 0 else None
        drawn.curves.append(DrawnCurve(found.run.label + name, colour, x, smoothed, measured, found.run.mark))
        if view.marks and found.curve.metric in _NEVER_MISSING:
            _mark_non_finite(axes, found.run, x, y)
    if view.marks:
        _mark_events(axes, present, view, x_range, pixel)
    _dress(axes, view, names_x, (y_range, log_y), x_range)
    kinds = {found.curve.name: found.curve.style for found in shown if found.curve.name}
    _explain(axes, kinds if len(kinds) > 1 else {}, runs, view, explains, drawn)
    return drawn


def _shown(run: ShownRun, curve: Curve, view: View) -> _Shown:
    x, y = _values(run.snapshot, curve, view)
    weight = _weight(curve, view, len(y))
    return _Shown(run, curve, x, y, _smoothed(run.snapshot, curve, view, y, weight), weight)


def _draw_main_curve(axes: "Axes", found: _Shown, x: np.ndarray, y: np.ndarray, columns: int, pixel: float) -> None:
    """
    Args:
        pixel: of 100 to an inch, along x.
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
    """Which points of a curve to mark, so that those of several do not lie on top of each other."""
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
    """
    Args:
        as_line: of dense points the middle only, instead of all that they cover.
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


def _smoothed(snapshot: Snapshot, curve: Curve, view: View, y: np.ndarray, weight: float) -> np.ndarray:
    """Kept with the snapshot: zooming draws the same curves again and again."""
    if weight <= 0:
        return y
    key = ("smoothed", curve, view.x)
    kept = snapshot.kept.get(key)
    if kept is None or kept[0] != weight:
        kept = snapshot.kept[key] = (weight, smooth(y, weight))
    return kept[1]


def _weight(curve: Curve, view: View, count: int) -> float:
    """Validation is exact: only what is measured on a batch is noisy."""
    if curve.table != "train" or curve.metric == "lr":
        return 0.0
    return automatic_weight(count) if view.smoothing is None else view.smoothing


def _values(snapshot: Snapshot, curve: Curve, view: View) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a curve; x is finite and never falls."""
    columns = snapshot.tables[curve.table]
    y = columns[curve.metric] * curve.factor
    x = _x_of(snapshot, curve.table, view.x)
    usable = np.abs(x) <= _GREATEST
    if curve.metric not in _NEVER_MISSING:
        usable &= np.isfinite(y)
    if not usable.all():
        x, y = x[usable], y[usable]
    if (np.diff(x) < 0).any():
        # A clock that was set back, or a count of tokens that fell.
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    return x, y


def _x_of(snapshot: Snapshot, table: str, x: str) -> np.ndarray:
    """Of each row of a table. Kept with the snapshot: every panel asks for it several times."""
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


def _in_range(x: np.ndarray, x_range: tuple[float, float]) -> slice:
    """With one point on each side, so that lines reach the edge."""
    first, last = np.searchsorted(x, x_range[0], "left"), np.searchsorted(x, x_range[1], "right")
    return slice(max(int(first) - 1, 0), int(last) + 1)


def _clipped(y: np.ndarray) -> np.ndarray:
    return np.clip(np.where(np.isfinite(y), y, np.nan), -_GREATEST, _GREATEST)


def _x_range(runs: list[ShownRun], view: View) -> tuple[float, float]:
    """All that the runs have, so that what happened at one moment stands one below the other in all panels of a run."""
    found = [_x_of(run.snapshot, table, view.x) for run in runs for table in run.snapshot.tables]
    found = [x[np.abs(x) <= _GREATEST] for x in found]
    ends = [(x.min(), x.max()) for x in found if len(x)]
    if not ends:
        return (0.0, 1.0)
    low, high = min(first for first, _ in ends), max(last for _, last in ends)
    pad = (high - low) * 0.01 or max(0.5, 1e-9 * abs(high))
    return (float(low - pad), float(high + pad))


def _y_range(shown: list[_Shown], x_range: tuple[float, float], log_y: bool, view: View) -> tuple[float, float]:
    parts = []
    for found in shown:
        within = _in_range(found.x, x_range)
        values = found.smoothed[within] if found.weight > 0 and not view.raw else found.y[within]
        values = values[np.isfinite(values)]
        parts.append(values[values > 0] if log_y else values)
    values = np.clip(np.concatenate(parts or [np.empty(0)]), -_GREATEST, _GREATEST)
    if not len(values):
        return (0.1, 1.0) if log_y else (0.0, 1.0)
    low, high = (values.min(), values.max()) if view.outliers else np.percentile(values, (1, 99))
    if log_y:
        low, high = (math.log10(max(end, 1 / _GREATEST)) for end in (low, high))
        pad = (high - low) * 0.05 or 0.1
        return (10 ** max(low - pad, -305), 10 ** min(high + pad, 305))
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return (float(low - pad), float(high + pad))


def _mark_non_finite(axes: "Axes", run: ShownRun, x: np.ndarray, y: np.ndarray) -> None:
    bad = x[~np.isfinite(y)]
    if len(bad):
        bad = bad[:: -(-len(bad) // _MOST_CROSSES)]
        axes.plot(
            bad, np.full(len(bad), 0.98), transform=axes.get_xaxis_transform(), linestyle="", marker="x", markersize=6,
            markeredgewidth=1.6, color=run.colour, zorder=5,
        )  # fmt: skip


def _mark_events(
    axes: "Axes", runs: Sequence[ShownRun], view: View, x_range: tuple[float, float], pixel: float
) -> None:
    """Restarts as lines, checkpoints and validations as ticks on the x axis; of all runs in one piece each, as each
    piece costs time."""
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
        found = ((run, _x_of(run.snapshot, table, view.x)) for run in having)
        places, colours = _apart(x_range, found, least * pixel)
        if len(places):
            axes.scatter(
                places, np.full(len(places), 0.012), s=size, c=colours, marker=marker, transform=transform, alpha=0.8,
                linewidth=0.8, zorder=4, clip_on=False,
            )  # fmt: skip


def _apart(
    x_range: tuple[float, float], found: Iterable[tuple[ShownRun, Sequence[float]]], least: float
) -> tuple[np.ndarray, list[str]]:
    """The places that are shown, those of all runs so far apart that each can be seen, and the colour of each. The last
    one is always among them."""
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


def restarts(snapshot: Snapshot, x: str) -> list[float]:
    """Where on the x axis each launch but the first begins."""
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
    return np.where(before > 0, _x_of(snapshot, "train", x)[before - 1], 0.0).tolist()


def _dress(axes: "Axes", view: View, names_x: bool, y: tuple, x_range: tuple[float, float]) -> None:
    theme = theme_of(view)
    most_x, most_y = (72 * size / least for size, least in zip(_inches(axes), (40, 20)))
    (low, high), log_y = y
    axes.set_facecolor(theme.paper)
    axes.set_xlim(*x_range)
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        decades = math.log10(high / low)
        fine = ticker.LogLocator(
            subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=min(max(int(1.8 * most_y), 2), 9)
        )
        axes.yaxis.set_major_locator(fine if decades > 0.5 else ticker.MaxNLocator(5))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(min(max(int(most_y), 2), 8), steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(_Numbers(log_y))
    locator, formatter = _x_ticks(view.x, x_range, min(max(int(most_x), 1), 6))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
    if view.x == "clock":
        axes.xaxis.get_offset_text().set(size=8, color=theme.faint, visible=names_x)
    axes.tick_params(colors=theme.faint, labelsize=_SMALL_SIZE, length=3, width=0.7)
    axes.grid(True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
        spine.set_linewidth(0.7)
    # The date of a clock's axis stands at its right end.
    if names_x and (view.x != "clock" or most_x > 3):
        axes.set_xlabel(translate(view.x, view.language), color=theme.faint, fontsize=8.5, labelpad=2)


def _inches(axes: "Axes") -> tuple[float, float]:
    """Width and height of a panel."""
    box = axes.get_position()
    return tuple(share * size for share, size in zip((box.width, box.height), axes.figure.get_size_inches()))


def _explain(
    axes: "Axes", kinds: dict[str, str], runs: Sequence[ShownRun], view: View, marks: bool, drawn: DrawnPanel
) -> None:
    """What the line styles mean; in the first panel, the marks too."""
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
    # Beside the title, where no curve is; inside if the panel is too narrow for that.
    widths = [text_width(text, _SMALL_SIZE) + 23 for text in labels]
    wide, high = (72 * size for size in _inches(axes))
    title = max(text_width(line, _TITLE_SIZE) for line in axes.get_title(loc="left").split("\n"))
    if sum(widths) + title + 10 <= wide:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(labels)}
    elif max(widths) > 0.8 * wide or 11.5 * len(labels) > 0.6 * high:
        return
    else:
        place = {"loc": _emptiest_corner(drawn, (max(widths) + 4) / wide, (11.5 * len(labels) + 4) / high)}
    axes.legend(
        handles.values(), labels, fontsize=_SMALL_SIZE, frameon=False, labelcolor=ink, handlelength=1.6,
        handletextpad=0.4, borderaxespad=0.2, labelspacing=0.3, columnspacing=0.8, **place,
    )  # fmt: skip


def _emptiest_corner(drawn: DrawnPanel, width: float, height: float) -> str:
    """Where the curves pass least through a box of these shares of the panel. matplotlib's own search, loc="best", is
    slow and does not see the bands of dense curves."""
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


class _Numbers(ticker.Formatter):
    """Labels of an axis, as short as they can be told apart: 1.25, 20k, 3e-4."""

    def __init__(self, log: bool = False):
        self._log, self._places = log, []

    def set_locs(self, locs: Sequence[float]) -> None:
        self._places = [float(at) for at in locs]

    def __call__(self, value: float, _position: int | None = None) -> str:
        greatest = abs(value) if self._log else max(map(abs, self._places), default=abs(value))
        power, letter = next((p for p in _POWERS if greatest >= max(p[0], 1e4)), (1.0, ""))
        if value == 0:
            return "0"
        if not 1e-3 <= greatest < 1e15:
            mantissa, _, exponent = f"{value:.2e}".partition("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        places = [value] if self._log else self._places
        digits = next((d for d in range(8) if all(_is_whole(at / power * 10**d) for at in places)), 8)
        return f"{value / power:.{digits}f}{letter}"


_POWERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) <= 1e-6 * max(abs(value), 1.0)


def _x_ticks(x: str, x_range: tuple[float, float], most: int) -> tuple[ticker.Locator, ticker.Formatter]:
    """
    Args:
        most: ticks that have room, about.
    """
    span = x_range[1] - x_range[0]
    if x == "clock":
        zone = datetime.now().astimezone().tzinfo
        locator = dates.AutoDateLocator(tz=zone, minticks=min(2, most), maxticks=max(most, 2))
        return locator, dates.ConciseDateFormatter(locator, tz=zone)
    if x == "time":
        steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
        step = next((s for s in steps if span / s <= most), 86400 * max(1, math.ceil(span / most / 86400)))
        step = step if span >= 3 else span / min(4, most) or 1.0
        return ticker.MultipleLocator(step), ticker.FuncFormatter(lambda seconds, _: duration(seconds))
    # Of a single step one tick: two would be fractions of steps, with the same number.
    locator = ticker.MaxNLocator(most, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1)
    return locator, _Numbers() if x == "tokens" else ticker.FuncFormatter(_whole)


def _whole(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value / 1e6:,.6g}M"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if seconds < 60:
        return f"{sign}{seconds:.3g} s"
    minutes = round(seconds / 60) if seconds >= 600 else seconds / 60
    if minutes < 60:
        return f"{sign}{round(minutes, 1):g} min"
    parts = [(int(minutes // 1440), "d"), (int(minutes % 1440 // 60), "h"), (int(minutes % 60), "min")]
    first = next(index for index, (count, _) in enumerate(parts) if count)
    return sign + " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count)


def value_text(value: float) -> str:
    """A measured value beside the cursor."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def x_text(value: float, x: str) -> str:
    """A place on the x axis beside the cursor."""
    if x == "time":
        return duration(value)
    if x == "clock":
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value * 86400))
        except (ValueError, OverflowError, OSError):
            return "?"
    return f"{x} {value:,.0f}"


def without_zoom(view: View) -> View:
    return replace(view, x_range=None, y_ranges=())
