"""What an evaluation found: a folder with one file of figures, and the records of each task's samples.

    results.json            Results, as JSON
    samples-TASK.jsonl      one line a sample: what was asked, what was answered, how it counts
    answers-*.jsonl         the model's answers, by which a killed evaluation goes on (journal.py)

A run has such a folder for each evaluated step, `eval/step-N` (runs/layout.py).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from utils.files import atomic_write

RESULTS_NAME = "results.json"
VERSION = 1
_Z = 1.959964
"""Within so many standard deviations lie 95% of a normal distribution."""


class Figure(NamedTuple):
    """A figure of a task."""

    value: float
    error: float | None
    """Standard error of the mean over the samples; None: unknown."""
    count: int
    """Samples."""
    higher_is_better: bool = True

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval: of a share by Wilson's formula (1927), which stays between 0 and 1 and is not
        empty where all samples are alike; else by the normal distribution."""
        if self.error is None or not math.isfinite(self.error):
            return None
        if not self._is_share:
            return self.value - _Z * self.error, self.value + _Z * self.error
        share, count = self.value, self.count
        middle = share + _Z**2 / (2 * count)
        half = _Z * math.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2)
        whole = 1 + _Z**2 / count
        return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)

    @property
    def _is_share(self) -> bool:
        """Whether it is the mean of samples that are each 0 or 1: these alone have this standard error."""
        if self.error is None or self.count < 2 or not 0.0 <= self.value <= 1.0:
            return False
        return math.isclose(self.error, math.sqrt(self.value * (1 - self.value) / (self.count - 1)), rel_tol=1e-6)


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task, and all that they depend on besides the model."""

    name: str
    figures: Mapping[str, Figure]
    """By the metric's name, "acc" for instance; lm-eval's filters stand after a comma. The first is the main one."""
    version: str = ""
    """Of the task's definition."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """num_fewshot, limit, chat, seed ..., as far as they matter."""
    data: str = ""
    """Fingerprint of the data."""
    seconds: float = 0.0
    group: str = ""
    """Name of the group or tag that it was asked for by, if any: "mmlu"."""


@dataclass(frozen=True)
class Results:
    """Figures of one model."""

    model: Mapping[str, Any]
    """path, step, adapter, dtype, device; "weights", their digest, and "fingerprint", which counts all that decides an
    answer."""
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of packages and of Python."""
    commands: tuple[str, ...] = ()
    """Those that gave the figures, as one would type them."""


def write_results(directory: Path, results: Results) -> Path:
    """Write the figures, at once or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RESULTS_NAME
    # A task's settings may hold what YAML knows and JSON does not, such as a date.
    text = json.dumps({"version": VERSION} | asdict(results), indent=1, ensure_ascii=False, default=str)
    atomic_write(path, text.encode())
    return path


def read_results(directory: Path) -> Results:
    """Figures of a folder.

    Raises:
        ValueError: the file holds something else.
        OSError: there is none, or it cannot be read.
    """
    path = directory / RESULTS_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("version") != VERSION:
            raise ValueError
        tasks = {
            name: TaskResult(**{**task, "figures": {key: Figure(*figure) for key, figure in task["figures"].items()}})
            for name, task in found.pop("tasks").items()
        }
        return Results(tasks=tasks, commands=tuple(found.pop("commands")), **found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} holds no results of this version: move it away, and evaluate again"
        ) from None


def samples_path(directory: Path, task: str) -> Path:
    """Where the records of a task's samples lie. A task of a user may have any name."""
    return directory / f"samples-{quote(task, safe='')}.jsonl"


def write_samples(directory: Path, task: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the records of a task's samples.

    Raises:
        OSError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    atomic_write(samples_path(directory, task), "".join(lines).encode("utf-8", "surrogatepass"), durable=False)


def mean_figure(values: Iterable[float], higher_is_better: bool = True) -> Figure:
    """Mean of a value for each of several independent samples, with its standard error."""
    found = list(values)
    count = len(found)
    mean = math.fsum(found) / count if count else math.nan
    error = None
    if count > 1:
        error = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (count - 1) / count)
    return Figure(mean, error, count, higher_is_better)
