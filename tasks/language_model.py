"""Next-token prediction: pretraining, and SFT, where only some tokens are supervised."""

import math
from typing import Self

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

    @classmethod
    def build(cls, model: Decoder, dropout_seed: int, byte_lengths: Tensor, options: None) -> Self:
        return cls(model, dropout_seed, byte_lengths)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """None while training."""
        return () if self.model.training else ("text_bytes",)

    def count(self, batch: Batch) -> int:
        """Supervised tokens."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def loss(self, hidden_BTC: Tensor, batch: Batch) -> Loss:
        """Sum of the supervised tokens' losses in float32, their number, and bytes of their text."""
        labels, hidden = select_supervised(batch, hidden_BTC)
        is_supervised = labels != IGNORE_INDEX
        sums = [self.model.loss_sum(hidden, labels, self.grad_scale), is_supervised.sum()]
        if not self.model.training:
            sums.append(self.byte_lengths[labels[is_supervised]].sum())
        loss_sum, count, *metrics = self.of_rows(*sums)
        return loss_sum, count, dict(zip(self.metric_names, metrics))

    def figures(self, loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        figures = {"loss": loss_sum / count}
        if "text_bytes" in sums:
            figures["bits_per_byte"] = loss_sum / math.log(2) / sums["text_bytes"]
        return figures
