"""Next-token prediction: pretraining, and SFT, where only some tokens are supervised."""

import math
from typing import Self

import torch
from torch import Tensor

from model import Decoder
from model.loss import IGNORE_INDEX
from tasks.task import Batch, Loss, Task, select_supervised


class LanguageModelTask(Task):
    """A batch's loss under the model, summed over the supervised tokens.

    Args:
        model, dropout_seed: see Task.
        byte_lengths: int64 (V,), bytes of text that each token stands for.
    """

    count_name = "tokens"

    def __init__(self, model: Decoder, dropout_seed: int, byte_lengths: Tensor):
        super().__init__(model, dropout_seed)
        self.byte_lengths = byte_lengths
        self.sources: tuple[str, ...] = ()
        """Names of a mixture's sources, by the numbers in batch["sources"]: each has a loss of its own in the log."""

    @classmethod
    def build(cls, model: Decoder, dropout_seed: int, byte_lengths: Tensor, options: None) -> Self:
        return cls(model, dropout_seed, byte_lengths)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """While training, only the sources' own."""
        own = [f"{what}/{name}" for what in ("loss", "tokens") for name in self.sources]
        return tuple(own) if self.model.training else ("text_bytes", *own)

    def count(self, batch: Batch) -> int:
        """Supervised tokens."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def loss(self, hidden_BTC: Tensor, batch: Batch) -> Loss:
        """Sum of the supervised tokens' losses in float32, their number, and bytes of their text."""
        labels, hidden = select_supervised(batch, hidden_BTC)
        is_supervised = labels != IGNORE_INDEX
        told = hidden.new_empty(labels.numel(), dtype=torch.float32) if self.sources else None
        sums = [self.model.loss_sum(hidden, labels, self.grad_scale, told), is_supervised.sum()]
        if not self.model.training:
            sums.append(self.byte_lengths[labels[is_supervised]].sum())
        if told is not None:
            sums += self._by_source(told, is_supervised, batch)
        loss_sum, count, *metrics = self.of_rows(*sums)
        return loss_sum, count, dict(zip(self.metric_names, metrics))

    def _by_source(self, losses_N: Tensor, is_supervised: Tensor, batch: Batch) -> list[Tensor]:
        """Sum of the losses of each source, then its supervised tokens: of this process' positions."""
        width = batch["input_ids"].shape[1]
        of_N = batch["sources"].repeat_interleave(width)
        if "supervised" in batch:
            of_N = of_N[batch["supervised"]]
        # Not scatter-add, whose order of additions varies on a GPU.
        mine_SN = (of_N == torch.arange(len(self.sources), device=of_N.device)[:, None]) & is_supervised.flatten()
        return [*torch.where(mine_SN, losses_N.double(), 0.0).sum(1).unbind(), *mine_SN.sum(1).unbind()]

    def figures(self, loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        figures = {"loss": loss_sum / count}
        if "text_bytes" in sums:
            figures["bits_per_byte"] = loss_sum / math.log(2) / sums["text_bytes"]
        for name in self.sources:
            if tokens := sums[f"tokens/{name}"]:
                figures[f"loss/{name}"] = sums[f"loss/{name}"] / tokens
        return figures
