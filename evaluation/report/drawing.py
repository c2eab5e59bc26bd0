"""A chart as inline SVG: axes with ticks, a legend, and a description for screen readers. Colours are the page's."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import count

from evaluation.report.card import Chart, Series
from evaluation.report.chart_values import sentence_of
from evaluation.report.words import on_a_line

WIDTH, HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 14, 12, 40
_LEGEND_LINE, _SHORT_NAME = 20, 20
"""Height of a line in the legend; characters of names of which two stand in a line."""
COLOURS = 4
"""Number of colours that the page's style has."""


def drawn(chart: Chart, number: int) -> str:
    """The SVG element.

    Args:
        number: of this chart on the page, for names that nobody else has.
    """
    x_range, y_range = _x_range(chart), _y_range(chart.series)
    legend = list(zip(chart.series, _colours(chart.series)))
    in_a_line = 2 if all(len(series.name) <= _SHORT_NAME for series in chart.series) else 1
    height = HEIGHT + _LEGEND_LINE * -(-len(legend) // in_a_line)
    frame = _Frame(x_range, y_range)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="chart-{number}-name chart-{number}-says">',
        f'<title id="chart-{number}-name">{text(chart.title)}</title>',
        f'<desc id="chart-{number}-says">{text(sentence_of(chart))}</desc>',
        *_axes(chart, frame),
        *(f'<line class="mark" x1="{frame.x(at)}" x2="{frame.x(at)}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
          for at in chart.marks if x_range[0] <= at <= x_range[1]),
    ]  # fmt: skip
    for series, colour in legend:
        parts += _dots(series, colour, frame) if series.style == "dots" else [_line(series, colour, frame)]
    parts += [part for place, one in enumerate(legend) for part in _legend_entry(one, *divmod(place, in_a_line))]
    return "\n".join([*parts, "</svg>"])


def text(value: str) -> str:
    """A text as content of an element or value of an attribute."""
    return escape(on_a_line(value), quote=True)


class _Frame:
    """From values to places on the paper. Values beyond the range lie at its edge."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]):
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        return self._place(value, self.x_range, _LEFT, WIDTH - _RIGHT)

    def y(self, value: float) -> float:
        return self._place(value, self.y_range, HEIGHT - _BOTTOM, _TOP)

    def _place(self, value: float, ends: tuple[float, float], first: float, last: float) -> float:
        at = (min(max(value, ends[0]), ends[1]) - ends[0]) / (ends[1] - ends[0])
        return round(first + at * (last - first), 1)


def _x_range(chart: Chart) -> tuple[float, float]:
    places = [x for series in chart.series for x, _ in series.points]
    low, high = min(places), max(places)
    return (low, high) if high > low else (low - 1, high + 1)


def _y_range(found: Sequence[Series]) -> tuple[float, float]:
    """The range of all values with some room; of curves that another one smooths, without the rarest."""
    values: list[float] = []
    for series in found:
        own = sorted(y for _, y in series.points if math.isfinite(y))
        rarest = len(own) // 50 if series.style == "faint" else 0
        values += own[rarest : len(own) - rarest]
        values += [end for spread in series.spread for end in spread if math.isfinite(end)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    # A quantity that is never negative, such as a loss, has no axis below zero.
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers within a range, evenly apart by 1, 2, 2.5 or 5 times a power of ten."""
    size = (high - low) / most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= size * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, step: float) -> str:
    """A tick's number, as short as tells it from its neighbours."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and size >= 1e4:
            return f"{value / unit:.6g}{name}"
    if 0 < size < 1e-3:
        # Wider labels would reach the axis' name.
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    # Sums of steps end in ...0001.
    return f"{round(value, max(0, 2 - math.floor(math.log10(step)))):g}"


def _axes(chart: Chart, frame: _Frame) -> Iterator[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    places = ticks(*frame.y_range, 5)
    for value in places:
        y = frame.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        label = text(tick_label(value, places[1] - places[0] if len(places) > 1 else 1.0))
        yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>'
    places = ticks(*frame.x_range, 6)
    for value in places:
        label = text(tick_label(value, places[1] - places[0] if len(places) > 1 else 1.0))
        yield f'<text class="tick" x="{frame.x(value)}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
        yield f'<line class="axis" x1="{frame.x(value)}" x2="{frame.x(value)}" y1="{bottom}" y2="{bottom + 4}"/>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
    centre, middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
    yield f'<text class="tick" x="{centre}" y="{bottom + 34}" text-anchor="middle">{text(chart.x_name)}</text>'
    yield (
        f'<text class="tick" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{text(chart.y_name)}'
        f"</text>"
    )


def _colours(found: Sequence[Series]) -> Iterator[int]:
    """Number of each series' colour: a faint one shares that of the next, which smooths it."""
    numbers, current = count(), -1
    was_faint = False
    for series in found:
        current = current if was_faint else next(numbers) % COLOURS
        was_faint = series.style == "faint"
        yield current


def _line(series: Series, colour: int, frame: _Frame) -> str:
    """A curve as one path, with a new beginning after each gap."""
    path, is_down = [], False
    for x, y in series.points:
        if not math.isfinite(y):
            is_down = False
            continue
        path.append(f"{'L' if is_down else 'M'}{frame.x(x)} {frame.y(y)}")
        is_down = True
    if len(path) == 1:
        x, y = path[0][1:].split()
        return f'<circle class="dot c{colour}" cx="{x}" cy="{y}" r="3.5"/>'
    return f'<path class="curve {series.style} c{colour}" d="{"".join(path)}"/>'


def _dots(series: Series, colour: int, frame: _Frame) -> Iterator[str]:
    yield _line(series._replace(style="line"), colour, frame)
    for place, (x, y) in enumerate(series.points):
        if not math.isfinite(y):
            continue
        if series.spread:
            low, high = series.spread[place]
            yield (
                f'<line class="curve c{colour}" x1="{frame.x(x)}" x2="{frame.x(x)}" y1="{frame.y(low)}" '
                f'y2="{frame.y(high)}"/>'
            )
        yield f'<circle class="dot c{colour}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3.5"/>'


def _legend_entry(entry: tuple[Series, int], line: int, column: int) -> Iterator[str]:
    series, colour = entry
    x, y = _LEFT + column * (WIDTH - _LEFT) // 2, HEIGHT + 8 + line * _LEGEND_LINE
    style = "line" if series.style == "dots" else series.style
    yield f'<path class="curve {style} c{colour}" d="M{x} {y}h24"/>'
    if series.style == "dots":
        yield f'<circle class="dot c{colour}" cx="{x + 12}" cy="{y}" r="3.5"/>'
    yield f'<text class="tick" x="{x + 30}" y="{y + 4}">{text(series.name[:40])}</text>'
