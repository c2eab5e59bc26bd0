"""The curves of a run: what its log and its evaluations recorded over its steps, in as many points as a page needs."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from evaluation.report.card import Block, Chart, Heading, Section, Series, Text
from evaluation.report.run import Run
from evaluation.report.scores import Figures
from viewer.curves import automatic_weight, smooth

MOST_POINTS = 300
"""Of a curve: no screen shows more, and a page should stay small."""
_MOST_TASKS = 24
_PANELS = (
    ("Loss", "loss", (("train", "loss", "training"), ("valid", "loss", "validation"))),
    ("Learning rate", "learning rate", (("train", "lr", "learning rate"),)),
    ("Speed", "tokens per second", (("train", "tokens_per_sec", "tokens per second"),)),
    ("Gradient norm, before clipping", "norm", (("train", "grad_norm", "gradient norm"),)),
    ("Rewards", "reward", (("train", "rewards/chosen", "chosen"), ("train", "rewards/rejected", "rejected"))),
    ("Accuracy of the rewards", "share of the pairs",
     (("train", "rewards/accuracies", "training"), ("valid", "rewards/accuracies", "validation"))),
    ("Margin of the rewards", "reward",
     (("train", "rewards/margins", "training"), ("valid", "rewards/margins", "validation"))),
)  # fmt: skip
"""(title, name of the y axis, (table, metric, name of the curve), ...)"""


def curves(runs: list[Run], evaluations: Mapping[Path, Mapping[int, Figures]]) -> Section:
    """The section.

    Args:
        evaluations: path of a run -> step -> what was found there.
    """
    blocks: list[Block] = []
    for run in runs:
        charts = [*_of_the_log(run), *_of_evaluations(run, evaluations.get(run.path, {}))]
        if charts or len(runs) == 1:
            blocks.append(Heading(run.name))
        blocks += charts
    if not any(isinstance(block, Chart) for block in blocks):
        blocks = [Text("There are no records to draw.")]
    else:
        blocks.insert(0, Text("Steps that a later launch did again are left out. A vertical line is a new launch."))
    return Section("Curves", blocks)


def _of_the_log(run: Run) -> Iterator[Chart]:
    restarts = [float(launch.first_step) for launch in run.launches[1:]]
    for title, y_name, wanted in _PANELS:
        series: list[Series] = []
        for table, metric, name in wanted:
            series += _series(run, table, metric, name)
        if series:
            yield Chart(title, "step", y_name, series, restarts)


def _series(run: Run, table: str, metric: str, name: str) -> list[Series]:
    columns = run.snapshot.tables.get(table, {})
    if metric not in columns or not np.isfinite(columns[metric]).any():
        return []
    x, y = columns["step"], np.where(np.abs(columns[metric]) < 1e30, columns[metric], math.nan)
    if table == "valid":
        return [Series(name, thinned(x, y), "dashed")]
    weight = 0.0 if metric == "lr" else automatic_weight(len(y))
    if weight == 0:
        return [Series(name, thinned(x, y))]
    return [Series(f"{name}, each step", thinned(x, y), "faint"), Series(name, thinned(x, smooth(y, weight)))]


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points of a curve: of each of many equal stretches the lowest and the highest, so that every
    spike stays. NaN are gaps, of which one point a stretch stays if it holds nothing else."""
    if len(x) <= most:
        return list(zip(x.tolist(), y.tolist()))
    kept: list[int] = []
    bounds = np.linspace(0, len(x), most // 2 + 1).astype(int)
    for begin, end in zip(bounds, bounds[1:]):
        part = y[begin:end]
        if np.isnan(part).all():
            kept.append(int(begin))
        else:
            kept += sorted({int(begin + np.nanargmin(part)), int(begin + np.nanargmax(part))})
    return [(float(x[place]), float(y[place])) for place in kept]


def _of_evaluations(run: Run, by_step: Mapping[int, Figures]) -> Iterator[Chart]:
    """Main figure of each task over the steps, with its 95% interval; of runs evaluated at one step alone, the table of
    scores says all."""
    found: dict[tuple[str, str], list[tuple[int, float, tuple[float, float]]]] = {}
    for step, tasks in by_step.items():
        for name, figures in tasks.items():
            for metric, figure in list(figures.items())[:1]:
                interval = figure.interval or (figure.value, figure.value)
                found.setdefault((name, metric), []).append((step, figure.value, interval))
    for (name, metric), points in list(found.items())[:_MOST_TASKS]:
        if len(points) > 1:
            series = Series(
                metric, [(float(step), value) for step, value, _ in points], "dots", [spread for *_, spread in points]
            )
            yield Chart(name, "step", metric, [series])
