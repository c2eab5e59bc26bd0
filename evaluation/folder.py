"""The folder of an evaluation: where it lies, whose figures it may hold, and how they come into it, task by task."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.folder import MANIFEST, is_file_of_rank
from evaluation.results import RESULTS_NAME, Results, read_results, samples_path, write_results, write_samples
from evaluation.task import Outcome
from runs.layout import CKPT_DIR, RUN_MARK, RunPaths
from utils.small_files import parse_json

_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets")
_SAME = ("path", "step", "adapter", "dtype", "weights")


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


def digest_of_weights(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights: of the checksums in its manifest, so that nothing large is read.

    Raises:
        OSError, ValueError: it has no manifest, or a damaged one.
    """
    files = parse_json((checkpoint / MANIFEST).read_bytes())["files"]
    weights = sorted(
        [name, entry["sha256"]]
        for name, entry in files.items()
        if name.endswith(".safetensors") and not is_file_of_rank(name)
    )
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


class EvaluationFolder:
    """Figures of one model, written as soon as a task has them. Others may write their tasks' figures meanwhile:
    another command, or the training that the model is a checkpoint of.

    Args:
        model: as in Results.
        command: which gives these figures.
        replaces: whether figures of another model make way; otherwise they are refused.
    Raises:
        ValueError: there are figures of another model.
        OSError: the folder cannot be read.
    """

    def __init__(self, directory: Path, model: Mapping[str, Any], command: str, replaces: bool = False):
        self._directory, self._model, self._command, self._replaces = directory, model, command, replaces
        self._read()

    def take(self, outcome: Outcome) -> None:
        """Keep a task's figures and samples; those that it had before go.

        Raises:
            ValueError: there are figures of another model by now.
            OSError: the folder cannot be written.
        """
        before, name = self._read(), outcome.result.name
        if outcome.samples:
            write_samples(self._directory, name, outcome.samples)
        else:
            samples_path(self._directory, name).unlink(missing_ok=True)
        tasks = {**before.tasks, name: outcome.result}
        commands = (*(one for one in before.commands if one != self._command), self._command)
        write_results(self._directory, Results(self._model, tasks, versions(), commands))

    def _read(self) -> Results:
        """What is there of this model."""
        if not (self._directory / RESULTS_NAME).exists():
            return Results(self._model)
        found = read_results(self._directory)
        different = [key for key in _SAME if found.model.get(key) != self._model.get(key)]
        if not different:
            return found
        if self._replaces:
            return Results(self._model)
        be = "are others" if different[0] == "weights" else "is another"
        raise ValueError(
            f"{self._directory} holds figures of another model (its {different[0]} {be}): give --output_dir, or move "
            f"the folder away"
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
