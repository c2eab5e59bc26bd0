"""A run's position, and the figures of its last step."""

from dataclasses import dataclass

import torch


@dataclass
class Progress:
    """The run's position, as a checkpoint stores it."""

    step: int = 0
    """Completed optimizer steps."""
    samples_consumed: int = 0
    tokens: int = 0
    """Input tokens read so far."""
    validation_due: bool = False
    """Whether the run was stopped in the validation after this step, which then comes first."""


@dataclass(frozen=True)
class Unlogged:
    """The last step's figures, until they are logged."""

    loss_sum: torch.Tensor
    """This rank's part of the loss, a float64 scalar on the device."""
    metrics: dict[str, torch.Tensor]
    """This rank's part of the task's other sums."""
    count: int
    """Divisor of the loss over the whole global batch: supervised tokens, or pairs."""
    learning_rate: float
    grad_norm: float
    layers: torch.Tensor | None = None
    """This rank's part of what the layers with experts have counted (model/layer_losses.py)."""
