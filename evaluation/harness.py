"""Tasks of lm-eval (the Language Model Evaluation Harness of EleutherAI), answered by a model of ours."""

from collections.abc import Iterator, Sequence

from evaluation.asking import Answerer
from evaluation.task import Options, Outcome


class Prepared:
    """Tasks whose data are there."""

    def run(self) -> Iterator[Outcome]:
        raise NotImplementedError


def prepare(names: Sequence[str], answerer: Answerer, options: Options) -> Prepared:
    """Find the tasks and their data.

    Raises:
        ValueError: lm-eval or data are missing, a task is unknown, or the model cannot be asked it.
    """
    raise ValueError(f"tasks of lm-eval are not there yet: {', '.join(names)}")
