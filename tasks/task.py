"""What the training loop sees of a task.

    hidden = task.hidden(batch)                            the forward pass, up to the final hidden states
    loss_sum, count, metrics = task.loss(hidden, batch)    what follows it

They are apart because the stages of a pipeline compute the first, and its last one alone the second. `task(batch)` is
one after the other. While a model with experts trains, `layer_losses` goes into the forward pass: the experts' own
losses enter the gradient there, and are no part of the task's loss.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from model import Decoder
from model.dropout import DropoutKey
from model.layer_losses import LayerLosses
from model.loss import IGNORE_INDEX

Batch = dict[str, Tensor]
Loss = tuple[Tensor, Tensor | int, dict[str, Tensor]]
"""(Sum of the losses of a batch, their count, sums of `metric_names`). On a GPU nothing waits for these figures."""


class Task(ABC):
    """
    Args:
        model: gives hidden states and logits.
        dropout_seed: the run's seed; only used while training with dropout.
    """

    count_name: str
    """What `units` counts."""
    uses_prepass = False
    """Whether the loss must know something of the whole global batch beforehand, see `prepass`."""
    uses_reference = False
    """Whether batches must hold log-probabilities under a reference model, see tasks/reference.py."""

    def __init__(self, model: Decoder, dropout_seed: int):
        self.model, self.dropout_seed = model, dropout_seed
        self.grad_scale = 1.0
        """What the loss will be multiplied by before its backward pass: for float16, see Decoder.loss_sum."""
        self._has_experts = any(map(model.config.has_experts, range(model.config.num_hidden_layers)))

    @classmethod
    @abstractmethod
    def build(cls, model: Decoder, dropout_seed: int, byte_lengths: Tensor, options: Any) -> Self:
        """
        Args:
            byte_lengths: int64 (V,), bytes of text that each token stands for.
            options: the group of the configuration that the task's entry in tasks/config.py names; None without one.
        """

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Names of the sums that `loss` returns at present: they may differ between training and validation."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Terms that a batch adds to the divisor of the loss, known without a forward pass."""

    @abstractmethod
    def loss(self, hidden_BTC: Tensor, batch: Batch) -> Loss: ...

    @abstractmethod
    def figures(self, loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        """Figures to log, "loss" among them, from sums over all ranks."""

    def layer_losses(self, batch: Batch, scale: float) -> LayerLosses | None:
        """What the layers need to add their own losses to a batch's; None if the model has no experts.

        Args:
            scale: factor on the sum of the task's losses in the backward pass.
        """
        if not self._has_experts:
            return None
        input_ids_BT, config, mask_BT = batch["input_ids"], self.model.config, None
        if "lengths" in batch:
            places_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
            mask_BT = places_T < batch["lengths"][:, None]
        return LayerLosses(
            self.row_weights(batch),
            # Filled in on the device, as copying it there would wait.
            torch.full((), scale, dtype=torch.float32, device=input_ids_BT.device),
            mask_BT,
            config.router_aux_loss_coef if config.router_aux_loss == "batch" else 0.0,
        )

    def row_weights(self, batch: Batch) -> Tensor:
        """Terms that each of the B rows adds to the divisor of the loss, float32: they add up to `count`."""
        return (batch["labels"] != IGNORE_INDEX).sum(1).float()

    def hidden(
        self, batch: Batch, losses: LayerLosses | None = None, units: range | None = None,
        entering: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Final hidden states (B, T, C).

        Args:
            losses: `layer_losses` of the batch; None: only the task's loss counts.
            units, entering: to run some units of the model alone, see Decoder.forward.
        """
        key = DropoutKey(self.dropout_seed, self.row_ids(batch)) if self.model.drops and self.model.training else None
        return self.model(
            batch["input_ids"], batch["positions"], batch.get("document_ids"), dropout_key=key,
            document_starts=batch.get("document_starts"), losses=losses, units=units, entering=entering,
        )  # fmt: skip

    def row_ids(self, batch: Batch) -> Tensor:
        """Number of each of the B rows in the run, by which dropout is drawn."""
        return batch["row_ids"]

    def __call__(self, batch: Batch, losses: LayerLosses | None = None) -> Loss:
        return self.loss(self.hidden(batch, losses), batch)

    def prepass(self, batch: Batch) -> Tensor:
        """A batch's part of what the loss needs to know of the global batch before any gradient: a tensor to be summed
        over all micro-batches and ranks, then given to `take_prepass`."""
        raise NotImplementedError

    def take_prepass(self, sums: Tensor) -> None:
        raise NotImplementedError

    def units(self, count: float) -> int:
        """How many of `count_name` a divisor of the loss stands for."""
        return int(count)


def select_supervised(batch: Batch, hidden_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """(labels, hidden states) of the positions that `batch["supervised"]` lists, (N,) and (N, C), so that the others
    cost no logits; all of them where nothing is listed."""
    if "supervised" not in batch:
        return batch["labels"], hidden_BTC
    chosen = batch["supervised"]
    return batch["labels"].flatten()[chosen], hidden_BTC.flatten(0, 1).index_select(0, chosen)
