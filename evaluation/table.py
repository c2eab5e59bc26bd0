"""Figures as a table of text."""

from collections.abc import Iterable

from evaluation.results import Figure, TaskResult

_HEADER = ("task", "examples", "metric", "value", "", "questions")


def table_of(results: Iterable[TaskResult]) -> str:
    """A line for each figure: its value, and half of its 95% confidence interval behind "±"."""
    rows = [_HEADER]
    for result in results:
        examples = result.settings.get("num_fewshot")
        shown = (result.name, "" if examples is None else str(examples))
        for metric, figure in result.figures.items():
            rows.append((*shown, metric, number(figure.value), _error(figure), f"{figure.count:,}"))
            shown = ("", "")
        if not result.figures:
            rows.append((*shown, f"none: {result.settings.get('reason', 'it found nothing')}", "", "", ""))
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if place in (0, 2, 4) else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(row, widths))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def figures_of(result: TaskResult) -> str:
    """The figures of a task in a line."""
    found = (f"{metric} {number(figure.value)} {_error(figure)}".rstrip() for metric, figure in result.figures.items())
    return ", ".join(found) or str(result.settings.get("reason", "it found nothing"))


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _error(figure: Figure) -> str:
    interval = figure.interval
    return "" if interval is None else f"± {number(interval[1] - figure.value)}"
