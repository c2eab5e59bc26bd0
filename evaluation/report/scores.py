"""Scores of models beside each other: each with its 95% interval, and differences that are more than noise.

Two models that answered the same questions are compared question by question: what is hard for both cancels out, and
the error of the mean difference is smaller than those of the two means (Miller, Adding Error Bars to Evals, 2024).
"""

import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.report.card import Block, Heading, Section, Table, Text
from evaluation.report.run import Run, is_run
from evaluation.report.words import listed, number, short
from evaluation.results import RESULTS_NAME, Figure, Results, TaskResult, mean_figure, read_results, samples_path
from runs.layout import EVAL_DIR
from runs.reslog import number as as_number
from utils.paths import absent

_STEP = re.compile(r"step-(\d{1,15})")
_LONGEST_SAMPLE = 1 << 22
"""Characters of a line; a longer one is passed over."""
_MOST_SAMPLES = 200_000


Figures = Mapping[str, Mapping[str, Figure]]
"""Task -> figure -> value."""


@dataclass(frozen=True)
class Scored:
    """A model's figures."""

    name: str
    directory: Path
    """Where its results and samples lie."""
    results: Results


def evaluations_of(path: Path) -> tuple[dict[int, Scored], list[str]]:
    """Step -> what an evaluation of its checkpoint found; and a sentence for each folder that cannot be read."""
    found, problems = {}, []
    try:
        folders = sorted((path / EVAL_DIR).iterdir())
    except OSError:
        return {}, []
    for folder in folders:
        match = _STEP.fullmatch(folder.name)
        if match and (folder / RESULTS_NAME).exists():
            scored, problem = _read(folder, f"{path.resolve().name}, step {match[1]}")
            problems += problem
            if scored is not None:
                found[int(match[1])] = scored
    return dict(sorted(found.items())), problems


def over_steps(run: Run, evaluations: Mapping[int, Scored]) -> dict[int, Figures]:
    """Step -> figures, by the log and by the folders of evaluations, which count if both have a step."""
    found: dict[int, dict[str, Mapping[str, Figure]]] = {}
    for record in run.records:
        name, step, values = record.get("task"), record.get("step"), record.get("figures")
        if record["name"] == "eval" and isinstance(name, str) and isinstance(values, dict) and step is not None:
            figures = {metric: figure for metric, value in values.items() if (figure := _recorded(value)) is not None}
            found.setdefault(step, {})[name] = figures
    for step, scored in evaluations.items():
        found.setdefault(step, {}).update((name, task.figures) for name, task in scored.results.tasks.items())
    return dict(sorted(found.items()))


def _recorded(value: object) -> Figure | None:
    """A figure of an `eval` record: [value, standard error or null, samples]."""
    if not isinstance(value, list) or len(value) != 3 or (mean := as_number(value[0])) is None:
        return None
    return Figure(mean, as_number(value[1]), value[2] if type(value[2]) is int else 0)


def scored_at(path: Path) -> tuple[Scored | None, list[str]]:
    """The newest figures of a run, or those that lie in a folder.

    Raises:
        ValueError: it is neither.
    """
    if not path.exists():
        raise ValueError(absent(path))
    if (path / RESULTS_NAME).exists():
        return _read(path, _name_of(path))
    found, problems = evaluations_of(path)
    if found:
        return list(found.values())[-1], problems
    if is_run(path) or problems:
        return None, [*problems, f"{short(path)} has no scores: evaluate it with evaluate_model.py"]
    raise ValueError(f"{path} holds no {RESULTS_NAME}: give a run, or a folder that evaluate_model.py wrote")


def _name_of(folder: Path) -> str:
    whole = folder.resolve()
    match = _STEP.fullmatch(whole.name)
    return f"{whole.parent.parent.name}, step {match[1]}" if match and whole.parent.name == EVAL_DIR else whole.name


def _read(folder: Path, name: str) -> tuple[Scored | None, list[str]]:
    try:
        return Scored(name, folder, read_results(folder)), []
    except ValueError as error:
        return None, [str(error)]
    except OSError as error:
        return None, [f"{short(folder / RESULTS_NAME)} cannot be read: {error.strerror}"]


def scores(columns: Sequence[Scored]) -> tuple[Section, list[str]]:
    """The section, and a warning for each task whose figures must not be compared as they stand.

    Args:
        columns: the card's own model in front.
    """
    if not columns:
        return Section("Scores", [Text("There are none: evaluate the run with evaluate_model.py, or train it with "
                                       "--eval_tasks.")]), []  # fmt: skip
    names = _unique([scored.name for scored in columns])
    blocks: list[Block] = [
        Text(
            "Each cell: the figure, its 95% interval (of a share by Wilson's formula, else 1.96 standard errors of the "
            "mean), and the number of samples. Arrows show whether higher or lower is better."
        ),
        Table(["task", "figure", *names], list(_rows(columns, parts=False))),
    ]
    if parts := list(_rows(columns, parts=True)):
        blocks.append(Table(["task", "figure", *names], parts, "The figures by kinds of samples", folded=True))
    for name, scored in zip(names, columns):
        empty = {task.name: task.settings.get("reason") for task in scored.results.tasks.values() if not task.figures}
        blocks += [Text(f"{name} has no figures of {task}: {reason or 'no reason is recorded'}.", "note")
                   for task, reason in empty.items()]  # fmt: skip
    warnings = list(_unlike(columns, names))
    if len(columns) > 1:
        rows = list(_differences(columns))
        if rows:
            blocks += [
                Heading(f"Differences to {names[0]}"),
                Text(
                    "The other model minus this one. Where both answered the same questions, they are compared "
                    "question by question; ± is a 95% interval."
                ),
                Table(["task", "figure", *names[1:]], rows),
            ]
    return Section("Scores", blocks), warnings


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _tasks(columns: Sequence[Scored]) -> Iterator[tuple[str, str]]:
    """(task, figure) of all models, in their order."""
    for name in dict.fromkeys(name for scored in columns for name in scored.results.tasks):
        having = [scored.results.tasks[name] for scored in columns if name in scored.results.tasks]
        metrics = dict.fromkeys(metric for task in having for metric in task.figures)
        yield from ((name, metric) for metric in metrics)


def _figure(scored: Scored, task: str, metric: str) -> Figure | None:
    found = scored.results.tasks.get(task)
    return found.figures.get(metric) if found is not None else None


def is_part(metric: str, metrics: Container[str]) -> bool:
    """Whether it is another figure for some of the samples alone: "acc/8" beside "acc"."""
    return "/" in metric and metric.partition("/")[0] in metrics


def _rows(columns: Sequence[Scored], parts: bool) -> Iterator[list[str]]:
    """A row a figure: the parts of figures, or all others."""
    before, having = "", list(_tasks(columns))
    for task, metric in having:
        if is_part(metric, {other for name, other in having if name == task}) != parts:
            continue
        figures = [_figure(scored, task, metric) for scored in columns]
        arrow = "↑" if next(figure for figure in figures if figure is not None).higher_is_better else "↓"
        yield [task if task != before else "", f"{metric} {arrow}", *map(_cell, figures)]
        before = task


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    interval = figure.interval
    around = f" [{number(interval[0])}, {number(interval[1])}]" if interval else " (error unknown)"
    return f"{number(figure.value)}{around}, n={figure.count}"


def _settings(task: TaskResult) -> dict[str, Any]:
    return dict(task.settings) | {"version": task.version, "data": task.data[:12]}


_CHOSEN = ("limit", "num_fewshot", "chat", "system", "seed")
"""Settings that a user gives."""


def _unlike(columns: Sequence[Scored], names: Sequence[str]) -> Iterator[str]:
    """Tasks that were not run alike. Tasks that differ in the same way share a sentence."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(task for task, _ in _tasks(columns)):
        given = {
            model: _settings(scored.results.tasks[name])
            for model, scored in zip(names, columns) if name in scored.results.tasks
        }  # fmt: skip
        keys = dict.fromkeys(key for settings in given.values() for key in settings)
        different = [key for key in keys if len({_spelled(settings.get(key)) for settings in given.values()}) > 1]
        if different:
            # What follows from a choice, such as the number of questions left out, explains nothing.
            chosen = [key for key in different if key in _CHOSEN] or different
            told = "; ".join(
                f"{model} with {', '.join(f'{key}={_spelled(settings.get(key))}' for key in chosen)}"
                for model, settings in given.items()
            )
            found.setdefault(told, []).append(name)
    for told, tasks in found.items():
        yield f"the scores of {listed(tasks)} were not measured alike and cannot be compared as they stand: {told}"


def _spelled(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _differences(columns: Sequence[Scored]) -> Iterator[list[str]]:
    ours = columns[0]
    samples: dict[tuple[int, str], list[dict]] = {}

    def samples_of(place: int, task: str) -> list[dict]:
        if (place, task) not in samples:
            samples.clear() if len(samples) > 2 * len(columns) else None
            samples[place, task] = read_samples(columns[place].directory, task)
        return samples[place, task]

    for task, metric in _tasks(columns):
        own = _figure(ours, task, metric)
        if own is None or is_part(metric, ours.results.tasks[task].figures):
            continue
        cells = []
        for place, other in enumerate(columns[1:], 1):
            figure = _figure(other, task, metric)
            if figure is None:
                cells.append("–")
            elif _settings(ours.results.tasks[task]) != _settings(other.results.tasks[task]):
                cells.append("not measured alike")
            else:
                pairs = paired(samples_of(0, task), samples_of(place, task), metric)
                cells.append(compared(own, figure, pairs))
        if any(cell != "–" for cell in cells):
            yield [task, metric, *cells]


def compared(own: Figure, other: Figure, pairs: Sequence[tuple[float, float]]) -> str:
    """The difference in words. It counts where its 95% interval leaves out zero, or where the two intervals do not
    overlap.

    Args:
        pairs: values of the same questions, ours first; empty if they cannot be paired.
    """
    change = other.value - own.value
    if len(pairs) > 1:
        difference = mean_figure([theirs - ours for ours, theirs in pairs])
        # The figure must be the mean of these values: another one, such as a ratio of sums, has another difference.
        if difference.error is not None and math.isclose(difference.value, change, rel_tol=1e-6, abs_tol=1e-9):
            half = 1.96 * difference.error
            counts = abs(change) > half
            if change == half == 0:
                return f"the same ({len(pairs)} pairs)"
            return f"{_signed(change)} ± {number(half)} ({len(pairs)} pairs): {_verdict(own, change, counts)}"
    if own.interval is None or other.interval is None:
        return f"{_signed(change)}, error unknown"
    apart = own.interval[1] < other.interval[0] or other.interval[1] < own.interval[0]
    return f"{_signed(change)}: {_verdict(own, change, apart)}{'' if apart else ', the intervals overlap'}"


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def _verdict(own: Figure, change: float, counts: bool) -> str:
    if not counts:
        return "not beyond noise"
    return "better" if (change > 0) == own.higher_is_better else "worse"


def read_samples(directory: Path, task: str) -> list[dict]:
    """Records of a task's samples, without broken lines; none if there is no such file."""
    found: list[dict] = []
    try:
        with samples_path(directory, task).open("rb") as file:
            while (line := file.readline(_LONGEST_SAMPLE)) and len(found) < _MOST_SAMPLES:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    found.append(record)
    except OSError:
        return []
    return found


def paired(ours: Sequence[dict], theirs: Sequence[dict], metric: str) -> list[tuple[float, float]]:
    """Values of a metric for the questions that both have; none if either lacks a question, or values by questions."""
    own, other = valued(ours, metric), valued(theirs, metric)
    return [(value, other[key][0]) for key, (value, _) in own.items()] if own.keys() == other.keys() else []


def valued(records: Sequence[dict], metric: str) -> dict[str, tuple[float, dict]]:
    """Question -> its value of a metric, and its record. A metric of lm-eval may name a filter after its comma; then a
    record has the filter's name, too. {} if a question has several values."""
    name, _, kind = metric.partition(",")
    found: dict[str, tuple[float, dict]] = {}
    for place, record in enumerate(records):
        if kind and kind != "none" and record.get("filter", kind) != kind:
            continue
        value = record.get(metric, record.get(name))
        value = float(value) if isinstance(value, bool) else as_number(value)
        if value is None or not math.isfinite(value):
            continue
        key = next((str(record[key]) for key in ("doc_id", "id") if key in record), str(place))
        if key in found:
            return {}
        found[key] = value, record
    return found
