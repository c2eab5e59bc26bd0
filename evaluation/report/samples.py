"""Texts: those that the model wrote along its training, and some of the tasks' samples, good and bad ones."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from evaluation.report.card import Block, Heading, Section, Text, Verbatim
from evaluation.report.run import Run
from evaluation.report.scores import Scored, read_samples, valued
from evaluation.report.words import cut, number

_MOMENTS = 4
"""Steps of which texts are shown: the first, the last, and some between."""
_TEXTS_A_MOMENT = 2
_LONGEST, _LONGEST_PROMPT = 600, 100
"""Characters."""
_MOST_TASKS = 12


def samples(runs: Sequence[Run], scored: Scored | None) -> Section:
    """The section.

    Args:
        scored: what the card's own model answered.
    """
    blocks: list[Block] = []
    for run in runs:
        blocks += _along(run)
    if scored is not None:
        blocks += _of_tasks(scored)
    return Section("Samples", blocks or [Text("No texts were recorded: see --sample_texts, and evaluate the run.")])


def _along(run: Run) -> Iterator[Block]:
    """Texts at some of the steps at which any were written."""
    by_step: dict[int, list[dict]] = {}
    for record in run.records:
        if record["name"] == "sample" and record.get("step") is not None:
            by_step.setdefault(record["step"], []).append(record)
    steps = spread(sorted(by_step), _MOMENTS)
    if steps:
        yield Heading(f"{run.name}: texts along training")
    for step in steps:
        for record in by_step[step][:_TEXTS_A_MOMENT]:
            prompt = cut_start(" ".join(_text(record.get("prompt")).split()), _LONGEST_PROMPT)
            yield Verbatim(cut(_text(record.get("text")), _LONGEST), f"step {step}, after: {prompt}")


def spread(found: Sequence[int], most: int) -> list[int]:
    """The first, the last, and evenly some between."""
    if len(found) <= most:
        return list(found)
    return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]


def cut_start(text: str, most: int) -> str:
    """The end of a text."""
    return text if len(text) <= most else f"[...] {text[-most:]}"


def _of_tasks(scored: Scored) -> Iterator[Block]:
    """A good and a bad sample of each task, by its first figure that has a value for each sample."""
    for name, task in list(scored.results.tasks.items())[:_MOST_TASKS]:
        records = read_samples(scored.directory, name)
        for metric, figure in task.figures.items():
            found = sorted(valued(records, metric).values(), key=lambda one: one[0], reverse=figure.higher_is_better)
            if not found:
                continue
            (most, best), (least, worst) = found[0], found[-1]
            yield Heading(f"{scored.name}: {name}")
            yield Verbatim(shown(best), f"best by {metric}: {number(most)}", "good")
            if least != most:
                yield Verbatim(shown(worst), f"worst by {metric}: {number(least)}", "bad")
            break


def shown(record: dict[str, Any]) -> str:
    """A sample's record, one line a field, long values cut."""
    lines = []
    for key, value in record.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        lines.append(f"{key}: {cut(text, _LONGEST)}")
    return cut("\n".join(lines), 4 * _LONGEST)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
