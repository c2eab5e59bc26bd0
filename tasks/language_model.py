"""Next-token prediction: pretraining, and SFT, where only some tokens are supervised."""

import math

from torch import Tensor

from model import Llama
from model.dropout import DropoutKey
from model.loss import IGNORE_INDEX


class LanguageModelTask:
    """A batch's loss under the model, summed over the supervised tokens.

    Args:
        model: gives hidden states and logits.
        dropout_seed: the run's seed; only used while training with dropout.
        byte_lengths: int64 (V,), bytes of text that each token stands for.
    """

    count_name = "tokens"
    uses_prepass = False

    def __init__(self, model: Llama, dropout_seed: int, byte_lengths: Tensor):
        self.model, self.dropout_seed, self.byte_lengths = model, dropout_seed, byte_lengths
        self.grad_scale = 1.0
        """What the loss will be multiplied by before its backward pass: for float16, see Llama.loss_sum. (DPO's loss is
        of log-probabilities, whose gradients come with it.)"""
        self._drops = model.config.hidden_dropout > 0.0 or model.config.attention_dropout > 0.0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Of the sums that a call returns: none while training."""
        return () if self.model.training else ("text_bytes",)

    @staticmethod
    def count(batch: dict[str, Tensor]) -> int:
        """What a batch adds to the divisor of the loss: its supervised tokens. Known without a forward pass."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """(sum of the supervised tokens' losses in float32, their count, sums of metric_names). On a GPU nothing waits
        for the figures."""
        labels, hidden = select_supervised(batch, self.hidden(batch))
        loss_sum, is_supervised = self.model.loss_sum(hidden, labels, self.grad_scale), labels != IGNORE_INDEX
        metrics = {}
        if not self.model.training:
            metrics["text_bytes"] = self.byte_lengths[labels[is_supervised]].sum()
        return loss_sum, is_supervised.sum(), metrics

    def hidden(self, batch: dict[str, Tensor], row_ids: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, C). `row_ids`: of the batch's rows, if they are not the samples."""
        row_ids = batch["row_ids"] if row_ids is None else row_ids
        key = DropoutKey(self.dropout_seed, row_ids) if self._drops and self.model.training else None
        return self.model(
            batch["input_ids"], batch["positions"], batch.get("document_ids"), dropout_key=key,
            document_starts=batch.get("document_starts"),
        )  # fmt: skip

    def units(self, count: float) -> int:
        """How many of `count_name` a divisor of the loss stands for."""
        return int(count)

    @staticmethod
    def figures(loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        """What is logged, from sums over all ranks."""
        figures = {"loss": loss_sum / count}
        if "text_bytes" in sums:
            figures["bits_per_byte"] = loss_sum / math.log(2) / sums["text_bytes"]
        return figures


def select_supervised(batch: dict[str, Tensor], hidden_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """(labels, hidden states) of the positions that `batch["supervised"]` lists, (N,) and (N, C), so that the others
    cost no logits; all of them where nothing is listed."""
    if "supervised" not in batch:
        return batch["labels"], hidden_BTC
    chosen = batch["supervised"]
    return batch["labels"].flatten()[chosen], hidden_BTC.flatten(0, 1).index_select(0, chosen)
