"""The tasks and their options. Plain data: importing this loads no torch."""

from dataclasses import dataclass
from typing import Literal

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
