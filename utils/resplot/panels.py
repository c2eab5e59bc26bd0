"""The pictures: a panel a metric, drawn by matplotlib in any thread, with or without a desktop."""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib import dates, font_manager, ticker
from matplotlib.lines import Line2D

from utils.resplot.curves import band, smooth
from utils.resplot.runs import Snapshot
from utils.resplot.text import translate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X_AXES = ("step", "tokens", "time", "clock")
COLOURS = (
    "#3b82f6", "#f97316", "#10b981", "#e11d48", "#8b5cf6", "#a16207", "#ec4899", "#64748b", "#84a616", "#06b6d4",
)  # fmt: skip
_CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Droid Sans Fallback", "Arial Unicode MS",
)  # fmt: skip
_GREATEST = 1e300
"""Axes that reach further overflow."""
_MOST_MARKS, _MOST_CROSSES = 200, 20
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


def _both(metric: str, title: str, usual: bool = False, key: str = "") -> Panel:
    curves = (Curve("train", metric, "training"), Curve("valid", metric, "validation", "--"))
    return Panel(key or metric, title, curves, usual)


def _pair(key: str, title: str, prefix: str, usual: bool = False) -> Panel:
    curves = (Curve("train", f"{prefix}/chosen", "chosen"), Curve("train", f"{prefix}/rejected", "rejected", ":"))
    return Panel(key, title, curves, usual)


PANELS = (
    _both("loss", "loss", usual=True),
    _both("bits_per_byte", "bits per byte"),
    Panel("lr", "learning rate", (Curve("train", "lr"),), usual=True),
    Panel("grad_norm", "gradient norm, before clipping", (Curve("train", "grad_norm"),), usual=True),
    Panel("tokens_per_sec", "tokens per second", (Curve("train", "tokens_per_sec"),), usual=True),
    Panel("mfu", "MFU, %", (Curve("train", "mfu", factor=100),), usual=True),
    Panel("mfu_seed", "MFU by llm-zero2all's formula, %", (Curve("train", "mfu_seed", factor=100),)),
    Panel("dt", "seconds a step", (Curve("train", "dt"),)),
    Panel("data_wait", "waiting for data, ms a step", (Curve("train", "data_wait", factor=1000),), usual=True),
    Panel("comm_wait", "communication that was not hidden, ms a step",
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
    snapshot: Snapshot


@dataclass(frozen=True)
class View:
    """What is shown, and how."""

    panels: tuple[str, ...] = ()
    """Keys; none: the usual ones; only "all": all."""
    x: str = "step"
    """One of X_AXES."""
    log_y: bool = False
    smoothing: float = 0.0
    """Of `curves.smooth`."""
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


@dataclass(frozen=True)
class DrawnCurve:
    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray


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
    chosen = choose(available([run.snapshot for run in runs]), view)
    width, height = figure.get_size_inches() * figure.dpi
    unit = figure.dpi / 100
    top = _draw_legend(figure, runs, view, unit) if view.legend else 8 * unit
    foot = _draw_what_is_left_out(figure, runs, len(chosen), view, unit)
    chosen = chosen[:MOST_PANELS]
    if not chosen:
        text = "Waiting for the first results…" if not any(r.snapshot.tables for r in runs) else "No metric is chosen."
        figure.text(0.5, 0.5, translate(text, view.language), ha="center", va="center", color=theme.faint, fontsize=12)
        return []
    columns = _grid_columns(len(chosen), width / max(height, 1.0))
    rows = -(-len(chosen) // columns)
    left, right, gap_x, gap_y, title, bottom = (n * unit for n in (58, 24, 66, 34, 22, 42 + foot))
    cell_w = max((width - left - right - gap_x * (columns - 1)) / columns, 20.0)
    cell_h = max((height - top - bottom - title * rows - gap_y * (rows - 1)) / rows, 20.0)
    drawn = []
    for index, panel in enumerate(chosen):
        row, column = divmod(index, columns)
        x0 = left + column * (cell_w + gap_x)
        y0 = top + title + row * (cell_h + title + gap_y)
        axes = figure.add_axes((x0 / width, 1 - (y0 + cell_h) / height, cell_w / width, cell_h / height))
        is_lowest = index + columns >= len(chosen)
        drawn.append(_draw_panel(axes, panel, runs, view, (x0, y0, x0 + cell_w, y0 + cell_h), is_lowest, index == 0))
    return drawn


def choose(found: list[Panel], view: View) -> list[Panel]:
    """Those that the view names, else the usual ones."""
    if not view.panels:
        return [panel for panel in found if panel.usual]
    if view.panels == ("all",):
        return found
    return [panel for panel in found if panel.key in view.panels]


def left_out(runs: Sequence[ShownRun], num_panels: int, language: str) -> list[str]:
    """All that the runs' logs hold and these panels do not, a sentence each."""
    found = [
        (f"{run.label}: " if len(runs) > 1 else "") + text
        for run in runs
        for text in left_out_of(run.snapshot, language)
    ]  # fmt: skip
    if num_panels > MOST_PANELS:
        found.append(translate("panels but the first {}", language).format(MOST_PANELS))
    return found


def left_out_of(snapshot: Snapshot, language: str) -> list[str]:
    return [translate(text, language).format(*values) for text, values in snapshot.left_out]


def _draw_what_is_left_out(
    figure: "Figure", runs: Sequence[ShownRun], num_panels: int, view: View, unit: float
) -> float:
    """A line under the panels, as long as there is room; how much room it takes, before `unit`."""
    found = left_out(runs, num_panels, view.language)
    if not found:
        return 0.0
    text = f"{translate('left out', view.language)}: {'; '.join(found)}"
    width, height = figure.get_size_inches() * figure.dpi
    # In points, as text is: a hundred pixels are an inch, of which there are 72.
    room = (width / unit - 24) * 0.72
    if _text_width(text, 8) > room:
        ends = itertools.accumulate(_text_width(c, 8) for c in text)
        text = text[: sum(end <= room - 8 for end in ends)] + "…"
    figure.text(12 * unit / width, 4 * unit / height, text, color=theme_of(view).faint, fontsize=8, va="bottom")
    return 16.0


def _grid_columns(count: int, aspect: float) -> int:
    """So that panels are about one and a half times as wide as high."""
    return min(range(1, count + 1), key=lambda n: abs(math.log(aspect / n * -(-count // n) / 1.6)))


def _draw_legend(figure: "Figure", runs: Sequence[ShownRun], view: View, unit: float) -> float:
    """The runs' names over the panels; the pixels that they take."""
    if not runs:
        return 8 * unit
    width, height = figure.get_size_inches() * figure.dpi
    handles = [Line2D([], [], color=run.colour, linewidth=2.5) for run in runs]
    longest = max(len(run.label) + sum(ord(c) > 0x2E80 for c in run.label) for run in runs)
    columns = max(1, min(len(runs), int(width / unit / (52 + 8 * longest))))
    figure.legend(
        handles, [run.label for run in runs], loc="upper left", ncols=columns, frameon=False, fontsize=9,
        labelcolor=theme_of(view).ink, bbox_to_anchor=(50 * unit / width, 1 - 4 * unit / height), borderaxespad=0,
        handlelength=1.6,
    )  # fmt: skip
    return (14 + 17 * -(-len(runs) // columns)) * unit


def _draw_panel(
    axes: "Axes", panel: Panel, runs: Sequence[ShownRun], view: View, box: tuple, names_x: bool, explains: bool
) -> DrawnPanel:
    axes.set_autoscale_on(False)
    columns = int(box[2] - box[0])
    curves = [
        (run, curve, *_values(run.snapshot, curve, view))
        for run in runs
        for curve in panel.curves
        if curve.metric in run.snapshot.tables.get(curve.table, {})
    ]
    shown = [(run, curve, x, y, _smoothed(run.snapshot, curve, view, y)) for run, curve, x, y in curves]
    present = [run for run in runs if any(run is found for found, *_ in curves)]
    x_range = view.x_range or _x_range(present, view)
    log_y = view.log_y and any((y > 0).any() for *_, y, _ in shown)
    given = dict(view.y_ranges).get(panel.key)
    y_range = given or _y_range(shown, x_range, log_y, view)
    if log_y and y_range[0] <= 0:
        y_range = _y_range(shown, x_range, log_y, view)
    drawn = DrawnPanel(panel, box, x_range, y_range, log_y)
    for run, curve, x, y, smoothed in shown:
        within = _in_range(x, x_range)
        x, y, smoothed = x[within], y[within], smoothed[within]
        if _weight(curve, view) > 0 and view.raw:
            _draw_curve(axes, x, y, columns, color=run.colour, alpha=0.25, linewidth=0.8, zorder=2)
        # A line through one point cannot be seen.
        is_marked = len(x) == 1 or (curve.style == "--" and len(x) <= 60)
        points = {"marker": "o", "markersize": 3.5} if is_marked else {}
        _draw_curve(
            axes, x, smoothed, columns, color=run.colour, linewidth=1.3, linestyle=curve.style, zorder=3, **points
        )
        name = run.label + (f", {translate(curve.name, view.language)}" if curve.name and len(panel.curves) > 1 else "")
        drawn.curves.append(DrawnCurve(name, run.colour, x, smoothed))
        if view.marks and curve.metric in _NEVER_MISSING:
            _mark_non_finite(axes, run, x, y)
    if view.marks:
        _mark_events(axes, present, view, x_range)
    _dress(axes, panel, view, names_x, (y_range, log_y), x_range)
    kinds = {curve.name: curve.style for _, curve, *_ in shown if curve.name}
    _explain(axes, kinds if len(kinds) > 1 else {}, runs, view, explains, drawn)
    return drawn


def _draw_curve(axes: "Axes", x: np.ndarray, y: np.ndarray, columns: int, **style: object) -> None:
    y = _clipped(y)
    dense = band(x, y, columns)
    if dense is None:
        axes.plot(x, y, **style)
    else:
        axes.fill_between(*dense, **style)


def _smoothed(snapshot: Snapshot, curve: Curve, view: View, y: np.ndarray) -> np.ndarray:
    """Kept with the snapshot: zooming draws the same curves again and again."""
    weight = _weight(curve, view)
    if weight <= 0:
        return y
    key = ("smoothed", curve, view.x)
    kept = snapshot.kept.get(key)
    if kept is None or kept[0] != weight:
        kept = snapshot.kept[key] = (weight, smooth(y, weight))
    return kept[1]


def _weight(curve: Curve, view: View) -> float:
    """Validation is exact: only what is measured on a batch is noisy."""
    return view.smoothing if curve.table == "train" and curve.metric not in ("lr",) else 0.0


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


def _y_range(shown: list, x_range: tuple[float, float], log_y: bool, view: View) -> tuple[float, float]:
    parts = []
    for _, curve, x, y, smoothed in shown:
        within = _in_range(x, x_range)
        hides_raw = _weight(curve, view) > 0 and not view.raw
        found = smoothed[within] if hides_raw else y[within]
        found = found[np.isfinite(found)]
        parts.append(found[found > 0] if log_y else found)
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


def _mark_events(axes: "Axes", runs: Sequence[ShownRun], view: View, x_range: tuple[float, float]) -> None:
    """Restarts as lines, checkpoints and validations as ticks on the x axis; of all runs in one piece each, as each
    piece costs time."""
    transform = axes.get_xaxis_transform()
    places, colours = _within(x_range, ((run, restarts(run.snapshot, view.x)) for run in runs))
    if len(places):
        axes.vlines(
            places, 0, 1, transform=transform, colors=colours, linestyles=[(0, (4, 3))], linewidth=0.9, alpha=0.7,
            zorder=1,
        )  # fmt: skip
    for table, marker, size in (("save", "^", 20.0), ("valid", "|", 25.0)):
        having = [run for run in runs if table in run.snapshot.tables]
        places, colours = _within(x_range, ((run, _x_of(run.snapshot, table, view.x)) for run in having))
        if len(places):
            axes.scatter(
                places, np.full(len(places), 0.012), s=size, c=colours, marker=marker, transform=transform, alpha=0.8,
                linewidth=0.8, zorder=4, clip_on=False,
            )  # fmt: skip


def _within(
    x_range: tuple[float, float], found: Iterable[tuple[ShownRun, Sequence[float]]]
) -> tuple[np.ndarray, list[str]]:
    """The places that are shown, of each run not too many, and the colour of each."""
    places, colours = [np.empty(0)], []
    for run, at in found:
        at = np.asarray(at, dtype=float)
        at = at[(at >= x_range[0]) & (at <= x_range[1])]
        at = at[:: -(-len(at) // _MOST_MARKS) or 1]
        places.append(at)
        colours += [run.colour] * len(at)
    return np.concatenate(places), colours


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


def _dress(axes: "Axes", panel: Panel, view: View, names_x: bool, y: tuple, x_range: tuple[float, float]) -> None:
    theme = theme_of(view)
    (low, high), log_y = y
    axes.set_facecolor(theme.paper)
    axes.set_xlim(*x_range)
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        decades = math.log10(high / low)
        fine = ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=9)
        axes.yaxis.set_major_locator(fine if decades > 0.5 else ticker.MaxNLocator(5))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(_Numbers(log_y))
    locator, formatter = _x_ticks(view.x, x_range)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
    if view.x == "clock":
        axes.xaxis.get_offset_text().set(size=8, color=theme.faint, visible=names_x)
    axes.tick_params(colors=theme.faint, labelsize=8, length=3, width=0.7)
    axes.grid(True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
        spine.set_linewidth(0.7)
    axes.set_title(translate(panel.title, view.language), loc="left", color=theme.ink, fontsize=9.5, pad=6)
    if names_x:
        axes.set_xlabel(translate(view.x, view.language), color=theme.faint, fontsize=8.5, labelpad=2)


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
    widths = [_text_width(text, 8) + 23 for text in labels]
    box = axes.get_position()
    wide, high = (share * 72 for share in (box.width, box.height) * axes.figure.get_size_inches())
    if sum(widths) + _text_width(axes.get_title(loc="left"), 9.5) + 10 <= wide:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(labels)}
    else:
        place = {"loc": _emptiest_corner(drawn, (max(widths) + 4) / wide, (11.5 * len(labels) + 4) / high)}
    axes.legend(
        handles.values(), labels, fontsize=8, frameon=False, labelcolor=ink, handlelength=1.6, handletextpad=0.4,
        borderaxespad=0.2, labelspacing=0.3, columnspacing=0.8, **place,
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


def _text_width(text: str, size: float) -> float:
    """In points, roughly: Chinese characters are as wide as high, others about half as wide."""
    return size * sum(1.0 if ord(c) > 0x2E80 else 0.52 for c in text)


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


def _x_ticks(x: str, x_range: tuple[float, float]) -> tuple[ticker.Locator, ticker.Formatter]:
    span = x_range[1] - x_range[0]
    if x == "clock":
        zone = datetime.now().astimezone().tzinfo
        locator = dates.AutoDateLocator(tz=zone, minticks=3, maxticks=6)
        return locator, dates.ConciseDateFormatter(locator, tz=zone)
    if x == "time":
        steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
        step = next((s for s in steps if span / s <= 6), 86400 * max(1, math.ceil(span / 6 / 86400)))
        step = step if span >= 3 else span / 4 or 1.0
        return ticker.MultipleLocator(step), ticker.FuncFormatter(lambda seconds, _: duration(seconds))
    # Of a single step one tick: two would be fractions of steps, with the same number.
    locator = ticker.MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1)
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
