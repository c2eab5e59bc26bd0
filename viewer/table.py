"""The table of runs: the texts in its columns, and the order of its rows."""

import math
from collections.abc import Sequence

from runs.history import Snapshot
from utils.text import plain
from viewer.formats import duration
from viewer.panels import left_out_of
from viewer.sources.labels import in_order
from viewer.sources.run import Run
from viewer.state import State
from viewer.text import translate

COLUMNS = ("run", "state", "step", "loss", "validation", "rate", "time left", "where")
STATE_COLOURS = {"running": "#10b981", "stalled": "#f59e0b", "no connection": "#e11d48"}
"""Colours of some states; the others are drawn faint."""
_TEXT_COLUMNS = {COLUMNS.index(name) for name in ("run", "state", "where")}

Sorting = tuple[int, bool]
"""A column, and whether its values fall."""


def texts_of(run: Run, name: str, state: State, language: str) -> tuple[str, ...]:
    """A run's text for each of COLUMNS."""
    of = f" / {state.max_iters:,}" if state.max_iters is not None else ""
    rate = f"{state.tokens_per_sec:,.0f} tokens/s" if math.isfinite(state.tokens_per_sec) else ""
    where = f"{run.target.host}:{run.path}" if run.target else run.path
    return (
        name, translate(state.kind, language) + (f": {state.detail}" if state.detail else ""),
        f"{state.step:,}{of}" if state.step is not None else "", _figure(state.loss), _figure(state.valid_loss),
        rate, duration(state.seconds_left) if math.isfinite(state.seconds_left) else "", plain(where),
    )  # fmt: skip


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def left_out_text(run: Run, snapshot: Snapshot, language: str) -> str:
    """What the viewer does not show of a run, in one or several lines; empty if it shows everything."""
    found = left_out_of(snapshot, language)
    lines = [f"{translate('left out', language)}: {'; '.join(found)}"] if found else []
    if run.health.config_problem:
        lines.append(translate("its settings cannot be read: {}", language).format(run.health.config_problem))
    return "\n".join(lines)


def order_of(texts: Sequence[tuple[str, ...]], states: Sequence[State], sorting: Sorting | None) -> list[int]:
    """The rows' numbers, sorted by a column; rows without a value come last.

    Args:
        sorting: None: in the order in which the runs were named.
    """
    numbers = range(len(texts))
    if sorting is None:
        return list(numbers)
    column, falls = sorting

    def value(number: int) -> object:
        state = states[number]
        found = (
            None, None, state.step, state.loss, state.valid_loss, state.tokens_per_sec, state.seconds_left, None
        )[column]  # fmt: skip
        if column in _TEXT_COLUMNS:
            return in_order(texts[number][column])
        return None if found is None or math.isnan(found) else found

    values = {number: value(number) for number in numbers}
    having = sorted((n for n in numbers if values[n] is not None), key=values.get, reverse=falls)
    return [*having, *(n for n in numbers if values[n] is None)]


def next_sorting(before: Sorting | None, column: int) -> Sorting | None:
    """The order after a click on a column: rising, then falling, then the order in which the runs were named."""
    return {(column, False): (column, True), (column, True): None}.get(before, (column, False))
