"""From samples' records to a task's result.

A record says what was asked and answered, and how it counts: {"length": 8, "question": ..., "acc": 1.0}. A figure is
the mean of such a field over the records that have it, so that anybody can check it.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.results import Figure, TaskResult, mean_figure
from evaluation.task import Options, Outcome, OwnTask

Record = dict[str, Any]


def fingerprint(data: object) -> str:
    """Digest of plain data, such as questions."""
    return hashlib.sha256(json.dumps(data, ensure_ascii=True).encode()).hexdigest()[:16]


def figures_of(
    samples: Sequence[Mapping[str, Any]], metric: str, part: str = "", higher_is_better: bool = True
) -> dict[str, Figure]:
    """Mean of a field of the samples, over all and for each value of the field `part`: "acc", "acc/8", "acc/16"."""
    # In the order of all samples, those left out included, so that parts stand from small to large.
    values: dict[str, list[float]] = {metric: []}
    values.update((f"{metric}/{sample[part]}", []) for sample in samples if part)
    for sample in samples:
        if metric in sample:
            values[metric].append(sample[metric])
            if part:
                values[f"{metric}/{sample[part]}"].append(sample[metric])
    return {name: mean_figure(found, higher_is_better) for name, found in values.items() if found}


def too_long(context: int) -> str:
    """Why a question was left out."""
    return f"longer than the model's context of {context} tokens"


def outcome(
    task: OwnTask, options: Options, begun: float, figures: Mapping[str, Figure], samples: Sequence[Record], data: str,
    **settings: Any,
) -> Outcome:  # fmt: skip
    """What a task gives.

    Args:
        begun: when it began, by time.monotonic.
        data: fingerprint of its questions.
        settings: what else the figures depend on. `chance` has the values of those metrics that guessing would give;
            `left_out` is the number of questions that could not be asked; `reason` says why there are no figures.
    """
    left_out = sum("left_out" in sample for sample in samples)
    if left_out:
        settings["left_out"] = left_out
        if left_out == len(samples):
            settings["reason"] = f"each question is {samples[0]['left_out']}"
    settings |= {"limit": options.limit, "chat": options.chat}
    result = TaskResult(task.name, dict(figures), task.version, settings, data, time.monotonic() - begun)
    return Outcome(result, samples)
