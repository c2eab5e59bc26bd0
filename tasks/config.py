"""The tasks and their options. Plain data: importing this loads no torch.

A task has an entry in TASK_TYPES, which is what judging a command line and speaking of the task need, and a class in
tasks/registry.py, which computes. Options of its own are a group of training.config.Config.
"""

from dataclasses import dataclass, fields
from typing import Literal

from utils.options import OnlyWith

TaskName = Literal["pretrain", "sft", "dpo"]
DPOLossType = Literal["sigmoid", "robust", "hinge", "ipo", "kto_pair", "sppo_hard", "nca_pair"]


@dataclass(frozen=True)
class DPOConfig:
    """DPO."""

    dpo_loss_type: DPOLossType = "sigmoid"
    """Formula of the loss (tasks/dpo.py)."""
    dpo_beta: float = 0.1
    """How strongly the model is held to the reference."""
    dpo_label_smoothing: float = 0.0
    """sigmoid and robust: share of the pairs that are taken to be labelled wrongly."""
    reference_free: bool = False
    """As if the reference model found all answers equally likely."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a strength or a smoothing that the loss has no meaning for.
        """
        if self.dpo_beta <= 0:
            raise ValueError(f"dpo_beta must be positive, got {self.dpo_beta}")
        if not 0.0 <= self.dpo_label_smoothing < 0.5:
            raise ValueError(f"dpo_label_smoothing must be at least 0 and below 0.5, got {self.dpo_label_smoothing}")
        if self.dpo_label_smoothing and self.dpo_loss_type not in ("sigmoid", "robust"):
            raise ValueError(
                f"dpo_label_smoothing has no meaning for --dpo_loss_type={self.dpo_loss_type}: leave it out"
            )


@dataclass(frozen=True)
class TaskType:
    """What is known of a task before anything is built."""

    dataset: Literal["pretrain", "sft", "dpo"]
    """Kind of pretokenized data that it reads, see dataset/opening.py."""
    flags: tuple[str, ...]
    """Flags that count for it, of those that do not count for every task."""
    options: str = ""
    """Group of the configuration that is checked for this task alone."""
    reads_records: bool = False
    """Its data may be raw records, tokenized at the start; so few that the batch is chosen to fit them."""
    teaches_chat: bool = False
    """The model learns to answer: checkpoints carry the chat template and end where an answer ends."""
    needs_weights: bool = False
    """A new model cannot learn it."""
    mixes_documents: bool = True
    """Documents of a sample may see each other."""
    rate_of_large: tuple[float, float] | None = None
    """For a model of 1e9 parameters: the learning rate that undoes what the model knows, and a usual one."""

    def unit(self, packing: bool) -> str:
        """What one sample is called: with packing, a row of several."""
        return "rows" if packing and "packing" in self.flags else "samples"


TASK_TYPES: dict[TaskName, TaskType] = {
    "pretrain": TaskType("pretrain", ("document_mask",)),
    "sft": TaskType(
        "sft", ("packing", "sft_loss", "user_name", "assistant_name", "document_mask"), reads_records=True,
        teaches_chat=True, mixes_documents=False, rate_of_large=(1e-4, 2e-5),
    ),
    "dpo": TaskType(
        "dpo", (*(item.name for item in fields(DPOConfig)), "max_prompt_len", "prompt_truncation_mode", "user_name",
                "assistant_name"),
        options="dpo", reads_records=True, teaches_chat=True, needs_weights=True, rate_of_large=(1e-5, 5e-7),
    ),
}  # fmt: skip


def _only_with() -> tuple[OnlyWith, ...]:
    """Flags that count for some tasks only, those that the same tasks take together."""
    groups: dict[tuple[TaskName, ...], list[str]] = {}
    for flag in dict.fromkeys(flag for task in reversed(TASK_TYPES.values()) for flag in task.flags):
        takers = tuple(name for name, task in TASK_TYPES.items() if flag in task.flags)
        groups.setdefault(takers, []).append(flag)
    rules = []
    for takers, flags in groups.items():
        others = [name for name in TASK_TYPES if name not in takers]
        without = f"without --task_type={' or '.join(takers)}"
        otherwise = f"with --task_type={others[0]}" if len(others) == 1 < len(takers) else without
        rules.append(OnlyWith(tuple(flags), lambda f, takers=takers: f["task_type"] in takers, otherwise))
    return tuple(rules)


ONLY_WITH = _only_with()
