"""Figures as a table of text."""

from collections.abc import Iterable

from evaluation.results import Figure, TaskResult

_HEADER = ("task", "examples", "metric", "value", "95%", "questions")


def table_of(results: Iterable[TaskResult]) -> str:
    """A line for each figure: its value and 95% confidence interval, which need not have the value in its middle. Below
    it, what was left out."""
    rows, notes = [_HEADER], []
    for result in results:
        examples = result.settings.get("num_fewshot")
        shown = (result.name, "" if examples is None else str(examples))
        for metric, figure in result.figures.items():
            rows.append((*shown, metric, number(figure.value), _interval(figure), f"{figure.count:,}"))
            shown = ("", "")
        if result.figures and (left_out := result.settings.get("left_out")):
            notes.append(f"{result.name}: questions left out, as they are longer than the model's context: {left_out}")
        if not result.figures:
            rows.append((*shown, f"none: {result.settings.get('reason', 'it found nothing')}", "", "", ""))
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if place in (0, 2, 4) else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(row, widths))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *notes])


def figures_of(result: TaskResult) -> str:
    """The figures of a task in a line, without those of its parts."""
    found = []
    for metric, figure in result.figures.items():
        if "/" not in metric:
            interval = _interval(figure)
            found.append(f"{metric} {number(figure.value)}" + (f" (95%: {interval})" if interval else ""))
    if found and (left_out := result.settings.get("left_out")):
        found.append(f"left out {left_out} that are longer than the context")
    return ", ".join(found) or str(result.settings.get("reason", "it found nothing"))


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _interval(figure: Figure) -> str:
    interval = figure.interval
    return "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"
