"""Next-token prediction."""

from torch import Tensor

from model import Llama
from model.dropout import DropoutKey
from model.loss import IGNORE_INDEX, cross_entropy_sum


class PretrainTask:
    """A batch's loss under the model.

    Args:
        model: gives hidden states and logits.
        dropout_seed: the run's seed; only used while training with dropout.
    """

    def __init__(self, model: Llama, dropout_seed: int):
        self.model, self.dropout_seed = model, dropout_seed
        self.drops = model.config.hidden_dropout > 0.0 or model.config.attention_dropout > 0.0

    @staticmethod
    def supervised(batch: dict[str, Tensor]) -> Tensor:
        """Bool (B, T): the positions that the loss sums over. Known without a forward pass."""
        return batch["labels"] != IGNORE_INDEX

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the supervised tokens' losses in float32, their count, metrics: none here)."""
        key = DropoutKey(self.dropout_seed, batch["row_ids"]) if self.drops and self.model.training else None
        hidden = self.model(batch["input_ids"], batch["positions"], batch.get("document_ids"), dropout_key=key)
        loss_sum = cross_entropy_sum(self.model.logits(hidden), batch["labels"])
        return loss_sum, self.supervised(batch).sum(), {}
