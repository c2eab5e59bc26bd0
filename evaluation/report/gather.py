"""From a run directory to its card."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.audited import audited
from evaluation.report.card import Card, Facts
from evaluation.report.commands import commands
from evaluation.report.cost import cost, where_the_time_went
from evaluation.report.curves import curves
from evaluation.report.faults import faults, state_of
from evaluation.report.launches import spent_by
from evaluation.report.run import Run, ancestors_of, read_run
from evaluation.report.samples import samples
from evaluation.report.scores import Scored, evaluations_of, over_steps, scored_at, scores
from evaluation.report.trained import trained_on
from evaluation.report.words import duration, moment, number


def gather(path: Path, beside: Sequence[Path] = (), title: str = "", with_audit: bool = True) -> Card:
    """The card of a run.

    Args:
        beside: other runs, or folders with results, whose scores stand beside this run's.
        with_audit: whether the data are read to audit the run, which takes as long as reading them.
    Raises:
        ValueError: the run is none, or what stands beside it is neither a run nor a folder with results.
    """
    run = read_run(path)
    before, where_it_began = ancestors_of(run)
    runs = [run, *before]
    remarks = [problem for one in runs for problem in one.problems]
    evaluations: dict[Path, dict[int, Scored]] = {}
    for one in runs:
        evaluations[one.path], problems = evaluations_of(one.path)
        remarks += problems
    own = [list(found.values())[-1] for found in evaluations.values() if found]
    others, problems = _beside(beside, {one.path.resolve() for one in runs if evaluations[one.path]})
    remarks += problems
    columns = [*own, *others]
    score_section, warnings = scores(columns)
    audit_section, verdict = audited(runs, with_audit)
    sections = [
        trained_on(runs, where_it_began),
        curves(runs, {one.path: over_steps(one, evaluations[one.path]) for one in runs}),
        score_section,
        samples(runs, own[0] if evaluations[path] else None),
        cost(runs),
        where_the_time_went(runs),
        faults(runs),
        audit_section,
        commands(runs, columns),
    ]
    return Card(
        title or f"Report card: {run.name}",
        f"Made {moment(time.time())} by python -m evaluation.report",
        [*dict.fromkeys([*remarks, *warnings])],
        Facts(_summary(run, verdict)),
        sections,
    )


def _beside(paths: Sequence[Path], known: set[Path]) -> tuple[list[Scored], list[str]]:
    """Figures of other models. Those that the card shows anyway are not shown twice."""
    found, problems = [], []
    for path in paths:
        scored, told = scored_at(path)
        if path.resolve() in known:
            continue
        problems += told
        if scored is not None:
            found.append(scored)
    return found, problems


def _summary(run: Run, verdict: str) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    step, steps = run.last("train", "step"), run.start.get("max_iters", run.derived.get("max_iters"))
    facts = [("state", state_of(run))]
    if step is not None:
        facts.append(("step", f"{step:,.0f}" + (f" of {steps:,}" if type(steps) is int else "")))
    if (tokens := run.last("train", "tokens")) is not None and math.isfinite(tokens):
        facts.append(("tokens read", f"{tokens:,.0f}"))
    for metric, word in (("loss", "loss"), ("bits_per_byte", "bits per byte"), ("rewards/accuracies", "accuracy")):
        if (value := run.last("valid", metric)) is not None:
            facts.append((f"validation {word}", number(value)))
    if run.launches:
        launches = len(run.launches)
        told = f"{duration(spent_by(list(run.launches)).wall)}, {launches} launch{'es' if launches > 1 else ''}"
        facts.append(("wall time", told))
    return [*facts, ("audit", verdict)]
