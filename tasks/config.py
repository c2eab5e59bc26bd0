"""The tasks and their options. Plain data: importing this does not load torch.

Each task has an entry in TASK_TYPES, by which command lines are judged and messages worded, and a class in
tasks/registry.py, which computes. A task's own options are a group of training.config.Config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from utils.options import OnlyWith

TaskName = Literal["pretrain", "sft", "dpo"]
DPOLossType = Literal["sigmoid", "robust", "hinge", "ipo", "kto_pair", "sppo_hard", "nca_pair"]


@dataclass(frozen=True)
class DPOConfig:
    """DPO."""

    dpo_loss_type: DPOLossType = "sigmoid"
    """Formula of the loss (tasks/dpo.py)."""
    dpo_beta: float = 0.1
    """Strength with which the model is held to the reference."""
    dpo_label_smoothing: float = 0.0
    """sigmoid and robust: share of the pairs that are assumed to be labelled wrongly."""
    reference_free: bool = False
    """Do without a reference model, as if one found all answers equally likely."""

    def check(self) -> None:
        """
        Raises:
            ValueError: the loss has no meaning for this strength or smoothing.
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
    """Flags that count for this task, among those that do not count for all."""
    options: str = ""
    """Group of the configuration with the task's own options, which is checked for this task alone."""
    reads_records: bool = False
    """The data may be raw records, tokenized at the start. As they may be few, the batch is chosen to fit them."""
    teaches_chat: bool = False
    """The model learns to answer: checkpoints carry the chat template and end where an answer ends."""
    needs_weights: bool = False
    """A new model cannot learn this task."""
    mixes_documents: bool = True
    """Documents that share a sample may see each other, with --no-document_mask."""
    rate_of_large: tuple[float, float] | None = None
    """For a model of 1e9 parameters: the learning rate that undoes what the model knows, and a usual one."""

    def unit(self, packing: bool) -> str:
        """Name of a sample: with packing it is a row, of several sequences."""
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
    """Rules for flags that count for some tasks only, one for all flags of the same tasks."""
    groups: dict[tuple[TaskName, ...], list[str]] = {}
    for flag in dict.fromkeys(flag for task in reversed(TASK_TYPES.values()) for flag in task.flags):
        takers = tuple(name for name, task in TASK_TYPES.items() if flag in task.flags)
        groups.setdefault(takers, []).append(flag)
    rules = []
    for takers, flags in groups.items():
        others = [name for name in TASK_TYPES if name not in takers]
        without = f"without --task_type={' or '.join(takers)}"
        otherwise = f"with --task_type={others[0]}" if len(others) == 1 < len(takers) else without
        rules.append(OnlyWith(tuple(flags), partial(_is_one_of, takers), otherwise))
    return tuple(rules)


def _is_one_of(names: tuple[TaskName, ...], options: Mapping[str, Any]) -> bool:
    return options["task_type"] in names


ONLY_WITH = _only_with()
