"""Cross entropy of the supervised tokens."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each token, in float32: (..., V), (...) -> (N,) for N tokens; 0 for labels of
    IGNORE_INDEX."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of `cross_entropy` over the supervised tokens.

    A sum, not a mean: the training loop divides by the supervised tokens of the whole global batch.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
