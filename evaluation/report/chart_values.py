"""Some values of a chart, as a table and in a sentence: for Markdown, and for readers who do not see the curves."""

import math
from bisect import bisect_right

from evaluation.report.card import Chart, Series, Table
from evaluation.report.words import number

_ROWS = 8


def table_of(chart: Chart) -> Table:
    """Values of the curves at some places that lie evenly among the points of the longest. A curve that has no point
    there shows the one before. Curves that another one smooths are left out."""
    shown = [series for series in chart.series if series.style != "faint"] or list(chart.series)
    longest = max(shown, key=lambda series: len(series.points))
    places = [x for x, _ in longest.points]
    last = len(places) - 1
    chosen = sorted({places[round(row * last / (_ROWS - 1))] for row in range(_ROWS)}) if last > 0 else places
    rows = [[f"{x:,.0f}", *(_at(series, x) for series in shown)] for x in chosen]
    return Table([chart.x_name, *(series.name for series in shown)], rows)


def _at(series: Series, x: float) -> str:
    before = bisect_right(series.points, x, key=lambda point: point[0])
    if not before:
        return "–"
    value = number(series.points[before - 1][1])
    if series.spread:
        low, high = series.spread[before - 1]
        return value if low == high else f"{value} [{number(low)}, {number(high)}]"
    return value


def sentence_of(chart: Chart) -> str:
    """What the curves do, for a screen reader."""
    told = []
    for series in chart.series:
        points = [(x, y) for x, y in series.points if math.isfinite(y)]
        if points and series.style != "faint":
            (first, begins), (last, ends) = points[0], points[-1]
            told.append(
                f"{series.name}: {number(begins)} at {chart.x_name} {first:,.0f}, {number(ends)} at {last:,.0f}, "
                f"between {number(min(y for _, y in points))} and {number(max(y for _, y in points))}"
            )
    return "; ".join(told)
