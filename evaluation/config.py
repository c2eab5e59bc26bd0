"""Options of evaluation during training. Plain data: importing this does not load torch."""

import re
from dataclasses import dataclass

from utils.options import OnlyWith, require_not_negative, require_positive


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation."""

    eval_interval: int = 0
    """Steps between evaluations by --eval_tasks; 0: evaluate only at the end."""
    eval_tasks: str = ""
    """Tasks that the checkpoints are evaluated by, with commas between: names that begin with zero_ (zero: all of
    these), and names of lm-eval."""
    eval_limit: int | None = None
    """Samples of each task, from its first; None: all."""
    eval_num_fewshot: int | None = None
    """Examples before each question; None: as many as the task says."""
    eval_data_dir: str = ""
    """Local copies of the tasks' data. With it, nothing is downloaded."""
    eval_task_dir: str = ""
    """Directory of more tasks, YAML files in lm-eval's form."""
    eval_allow_code_execution: bool = False
    """Run programs that the model wrote, in the sandbox."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.eval_tasks.split(",") if name.strip()))

    def check(self) -> None:
        """
        Raises:
            ValueError: a number that has no meaning, or an interval without tasks.
        """
        require_not_negative(self, "eval_interval")
        if self.eval_limit is not None:
            require_positive(self, "eval_limit")
        if self.eval_num_fewshot is not None:
            require_not_negative(self, "eval_num_fewshot")
        if self.eval_interval and not self.names:
            raise ValueError(
                f"--eval_interval={self.eval_interval} evaluates by no task: name some, such as --eval_tasks=zero"
            )


_DETAILS = ("eval_limit", "eval_num_fewshot", "eval_data_dir", "eval_task_dir", "eval_allow_code_execution")
ONLY_WITH = (
    OnlyWith(_DETAILS, lambda f: f["eval_tasks"], "without --eval_tasks"),
    OnlyWith(("eval_tasks", "eval_interval"), lambda f: not f["valid_only"], "with --valid_only"),
)
_OTHERS_FLAG = re.compile(r"--(?=(?:limit|num_fewshot|data_dir|task_dir|allow_code_execution)\b)")


def as_flags_of_training(text: str) -> str:
    """A sentence in which flags have their names here: tasks know those of evaluate_model.py."""
    return _OTHERS_FLAG.sub("--eval_", text)
