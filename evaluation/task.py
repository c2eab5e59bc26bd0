"""What a task of ours is, how it is run, and what it gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evaluation.asking import Answerer
from evaluation.results import TaskResult


@dataclass(frozen=True)
class Options:
    """How tasks are run."""

    limit: int | None = None
    """Samples of each task, from its first; None: all."""
    num_fewshot: int | None = None
    """Examples before each question; None: as many as the task says."""
    data_dir: Path | None = None
    """Local copies of data sets, see local_data.py. With it, nothing is downloaded."""
    task_dir: Path | None = None
    """Folder with a user's own tasks, as YAML files of lm-eval's form."""
    chat: bool = False
    """Whether questions are put by the model's chat template."""
    system: str = ""
    """With `chat`: what the model is told first."""
    allow_code_execution: bool = False
    """Whether programs that the model wrote are run, in the sandbox."""
    seed: int = 1234
    """By which examples are chosen and answers drawn."""
    texts: Mapping[str, Path] = field(default_factory=dict)
    """Name -> file or folder of a user's own texts, whose bits per byte zero_bits_per_byte gives as well."""


class Outcome(NamedTuple):
    """A task that has ended."""

    result: TaskResult
    samples: Sequence[Mapping[str, Any]]
    """A record for each of its samples."""


class OwnTask(Protocol):
    """A task that needs no data from elsewhere; own/ has them."""

    name: str
    version: str
    needs_writing: bool
    """Whether it says nothing of a model that cannot write. Others leave out the figures that need it."""
    takes_examples: bool
    """Whether it heeds `num_fewshot`."""
    runs_code: bool
    """Whether it says nothing without `allow_code_execution`."""

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: the model cannot be asked this.
        """
