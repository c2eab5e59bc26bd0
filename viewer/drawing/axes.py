"""A panel's axes: ticks, labels, grid."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from matplotlib import dates, ticker

from viewer.drawing.layout import SMALL_SIZE
from viewer.formats import duration
from viewer.text import translate
from viewer.view import View, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POWERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def dress(axes: "Axes", view: View, names_x: bool, y: tuple, x_range: tuple[float, float]) -> None:
    theme = theme_of(view)
    most_x, most_y = (72 * size / least for size, least in zip(inches(axes), (40, 20)))
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
    axes.tick_params(colors=theme.faint, labelsize=SMALL_SIZE, length=3, width=0.7)
    axes.grid(True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
        spine.set_linewidth(0.7)
    # The date of a clock's axis stands at its right end.
    if names_x and (view.x != "clock" or most_x > 3):
        axes.set_xlabel(translate(view.x, view.language), color=theme.faint, fontsize=8.5, labelpad=2)


def inches(axes: "Axes") -> tuple[float, float]:
    """Width and height of a panel in inches."""
    box = axes.get_position()
    return tuple(share * size for share, size in zip((box.width, box.height), axes.figure.get_size_inches()))


class _Numbers(ticker.Formatter):
    """Labels of an axis, as short as they can be while they differ: 1.25, 20k, 3e-4."""

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


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) <= 1e-6 * max(abs(value), 1.0)


def _x_ticks(x: str, x_range: tuple[float, float], most: int) -> tuple[ticker.Locator, ticker.Formatter]:
    """Ticks of the x axis and their labels.

    Args:
        most: about how many ticks have room.
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
    # A single step gets one tick: two would stand at fractions of steps, with the same label.
    locator = ticker.MaxNLocator(most, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1)
    return locator, _Numbers() if x == "tokens" else ticker.FuncFormatter(_whole)


def _whole(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value / 1e6:,.6g}M"
