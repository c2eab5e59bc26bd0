"""Cross entropy, summed over the supervised tokens."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def cross_entropy_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], in float32; labels of IGNORE_INDEX do not count.

    A sum, not a mean: the training loop divides by the supervised tokens of the whole global batch.
    """
    return F.cross_entropy(
        logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
