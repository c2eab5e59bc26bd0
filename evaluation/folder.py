"""The folder of an evaluation: where it lies, whose figures it may hold, and how they come into it, task by task."""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.results import RESULTS_NAME, Results, TaskResult, read_results, write_results, write_samples
from evaluation.task import Outcome
from runs.layout import CKPT_DIR, RUN_MARK, RunPaths

_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets")
_SAME = ("path", "step", "adapter", "dtype", "fingerprint")


def place_of(checkpoint: Path, step: int | None, adapter: Path | None) -> Path:
    """Folder for the figures of a model: beside the checkpoint of a run, or in out/eval.

    Args:
        checkpoint: of the model, or of the adapter that is evaluated.
        step: of the checkpoint; None: it is a folder.
        adapter: one that is evaluated on another folder's model.
    """
    found = (adapter or checkpoint).absolute()
    run = found.parent.parent
    if step is not None and found.parent.name == CKPT_DIR and (run / RUN_MARK).exists():
        return RunPaths(run).eval_dir(step)
    return Path("out") / "eval" / found.name


class EvaluationFolder:
    """Figures of one model, written as soon as a task has them.

    Args:
        model: as in Results.
        command: which gives these figures.
    Raises:
        ValueError: there are figures of another model.
        OSError: the folder cannot be read.
    """

    def __init__(self, directory: Path, model: Mapping[str, Any], command: str):
        self._directory, self._tasks = directory, dict[str, TaskResult]()
        commands: tuple[str, ...] = ()
        if (directory / RESULTS_NAME).exists():
            before = read_results(directory)
            _require_same(directory, before.model, model)
            self._tasks |= before.tasks
            commands = tuple(one for one in before.commands if one != command)
        self._results = Results(model, self._tasks, versions(), (*commands, command))

    def take(self, outcome: Outcome) -> None:
        """Keep a task's figures and samples; those that it had before go.

        Raises:
            OSError: the folder cannot be written.
        """
        name = outcome.result.name
        if outcome.samples:
            write_samples(self._directory, name, outcome.samples)
        self._tasks[name] = outcome.result
        write_results(self._directory, replace(self._results, tasks=self._tasks))


def _require_same(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the folder holds figures of another model.
    """
    # A checkpoint of a run never changes; training evaluates it, too, and has another digest for it.
    keys = [key for key in _SAME if not (key == "fingerprint" and now.get("step") is not None)]
    different = [key for key in keys if before.get(key) != now.get(key)]
    if different:
        what = {"fingerprint": "weights"}.get(different[0], different[0])
        raise ValueError(
            f"{directory} holds figures of another model (its {what} is another): give --output_dir, or move the "
            f"folder away"
        )


def versions() -> dict[str, str]:
    """Versions of what figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
