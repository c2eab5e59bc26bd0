"""What the training loop sees of a task.

    hidden = task.hidden(batch)                            the forward pass, up to the final hidden states
    loss_sum, count, metrics = task.loss(hidden, batch)    what follows it

They are apart because the stages of a pipeline compute the first, and its last one alone the second. `task(batch)` is
one after the other. While a model with experts trains, `layer_losses` goes into the forward pass: the experts' own
losses enter the gradient there, and are no part of the task's loss.

Where several processes share the positions of each row, a batch on the device is its `part_of_rows`. `of_rows` then
makes sums over whole rows, so that all these processes return the same loss.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.sft import PADDING
from model import Decoder
from model.attend import RowShare
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
        input_ids_BT, config, share, mask_BT = batch["input_ids"], self.model.config, self.model.row_share, None
        if "lengths" in batch:
            places_T = torch.arange(batch["positions"].shape[1], device=input_ids_BT.device)
            places_T = places_T if share is None else share.part(places_T, 0)
            mask_BT = places_T < batch["lengths"][:, None]
        return LayerLosses(
            self.row_weights(batch),
            # Filled in on the device, as copying it there would wait.
            torch.full((), scale, dtype=torch.float32, device=input_ids_BT.device),
            mask_BT,
            config.router_aux_loss_coef if config.router_aux_loss == "batch" else 0.0,
            share.add if share is not None else None,
        )

    def row_weights(self, batch: Batch) -> Tensor:
        """Terms that each of the B rows adds to the divisor of the loss, float32: they add up to `count`."""
        return self.of_rows((batch["labels"] != IGNORE_INDEX).sum(1).float())[0]

    def of_rows(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sums over whole rows from those over the positions of this process; their backward pass returns the gradient
        as it is, so each process gets that of its own positions. Where rows are whole anyway, the same tensors."""
        share = self.model.row_share
        if share is None:
            return sums
        # Together, in a dtype that holds them all: a collective costs more than a few numbers.
        total = share.add(torch.cat([value.flatten().double() for value in sums]))
        parts = total.split([value.numel() for value in sums])
        return tuple(part.view(value.shape).to(value.dtype) for part, value in zip(parts, sums))

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


def part_of_rows(batch: Batch, share: RowShare) -> Batch:
    """The part of a batch that one of the processes works on that share the positions of each row.

    input_ids, labels and supervised are those of its positions. positions and document_ids stay whole, padded to a
    width that can be cut, since attention must know them of all keys; so do figures of whole rows, such as lengths.
    """
    width = batch["input_ids"].shape[1]
    added = share.padded(width) - width
    padded = batch | {
        name: F.pad(batch[name], (0, added), value=value)
        for name, value in (("input_ids", 0), ("labels", IGNORE_INDEX), ("positions", 0), ("document_ids", PADDING))
        if name in batch
    }  # fmt: skip
    part = padded | {name: share.part(padded[name], 1) for name in ("input_ids", "labels")}
    if "supervised" in batch:
        chosen = (part["labels"] != IGNORE_INDEX).flatten().nonzero()[:, 0]
        # Without any, a position without a label stands for them: its loss is 0, and so are the head's gradients.
        part["supervised"] = chosen if len(chosen) else chosen.new_zeros(1)
    return part
