"""Cross entropy of the supervised tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def head_scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """Scores of the vocabulary, float32: (..., C), (V, C) -> (..., V).

    They are rounded to the inputs' dtype, as in a linear layer. In float16 their gradient is not rounded: for a rare
    token it is a probability of 1e-9 or less, float16 ends at 6e-8, and a loss scale over many tokens helps little.
    """
    if hidden.dtype == torch.float16:
        return _HalfHead.apply(hidden, weight)
    return F.linear(hidden, weight)


class _HalfHead(torch.autograd.Function):
    """A linear layer in float16 whose backward pass takes and multiplies the scores' gradient in float32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(hidden, weight).float()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = (upstream @ weight.float()).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            dweight = upstream.flatten(0, -2).T @ hidden.flatten(0, -2).float()
        return dhidden, dweight


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each token, in float32: (..., V), (...) -> (N,) for N tokens; 0 for labels of
    IGNORE_INDEX."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of `cross_entropy` over the supervised tokens.

    A sum, not a mean: the training loop divides by the supervised tokens of the whole global batch.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
