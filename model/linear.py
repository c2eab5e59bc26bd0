"""Linear layers. Nothing outside this file multiplies with a layer's weight, so an adapter, four-bit weights or a
tensor-parallel shard can take the place of a layer.

Several projections of one input can be one matrix multiplication:

    y = x [W_1; W_2; ...]^T = [x W_1^T, x W_2^T, ...]

A wide multiplication uses a GPU better than several narrow ones, and its backward pass also adds up the input's
gradients. The weights remain separate parameters, so their names on disk, their buckets and PowerSGD's matrices stay as
they are. Each pass copies them side by side: 2 bytes an element, while the multiplication takes 2 N operations an
element for N tokens. The copy is not kept for the backward pass.

Shapes: N tokens, C inputs, O_i outputs, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropout import DropoutKey
from model.kernels import linear_cross_entropy
from model.kernels.linear_cross_entropy import Exchange
from model.ops import Ops


class Linear(nn.Linear):
    """y = x W^T + b."""

    def forward(self, x: Tensor, key: DropoutKey | None = None) -> Tensor:
        """(..., C) -> (..., O). `key` names the dropout masks of a layer that has some, such as an adapted one."""
        return F.linear(x, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """W (O, C). A layer that stores it in another form computes it here."""
        return self.weight

    def product(self, x: Tensor) -> Tensor:
        """x W^T, for which the backward pass keeps no computed W."""
        return F.linear(x, self.weight)


class SharesInput(nn.Module):
    """A layer in the place of a Linear that can save work where several of its kind have one input."""

    def together(
        self, x: Tensor, layers: Sequence[nn.Module], key: DropoutKey | None, packed: bool = False
    ) -> list[Tensor] | None:
        """Outputs (..., O_i) of layers of its class, or with `packed` a single one (..., sum of O_i); None: these
        layers save nothing."""
        raise NotImplementedError


def side_by_side(x: Tensor, *layers: nn.Module, key: DropoutKey | None = None) -> Tensor:
    """Several layers of one input, (..., C) -> (..., sum of O_i), in one multiplication if they are plain."""
    weights = [cast(Linear, layer).weight for layer in layers if type(layer) is Linear and layer.bias is None]
    if len(weights) == len(layers):
        return merged_linear(x, *weights)
    if isinstance(first := layers[0], SharesInput) and all(type(layer) is type(first) for layer in layers):
        if (packed := first.together(x, layers, key, packed=True)) is not None:
            return packed[0]
    return torch.cat(one_by_one(x, *layers, key=key), dim=-1)


def one_by_one(x: Tensor, *layers: nn.Module, key: DropoutKey | None = None) -> list[Tensor]:
    """Several layers of one input: (..., C) -> (..., O_i) each."""
    outputs: dict[nn.Module, Tensor] = {}
    sharing = [layer for layer in layers if isinstance(layer, SharesInput)]
    # An adapted layer and a packed one save nothing together.
    sharing = [layer for layer in sharing if type(layer) is type(sharing[0])]
    if len(sharing) > 1 and (shared := sharing[0].together(x, sharing, key)) is not None:
        outputs = dict(zip(sharing, shared))
    return [outputs[layer] if layer in outputs else layer(x, key) for layer in layers]


class Head(Linear):
    """The output projection: scores of the vocabulary, and losses and log-probabilities that need not keep them."""

    def __init__(self, hidden_size: int, vocab_size: int, ops: Ops):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.ops = ops

    def share_vocabulary(self, first: int, exchange: Exchange) -> None:
        """Compute losses and log-probabilities from the rows of some entries of the vocabulary, together with the ranks
        that hold the others. Every one of these ranks gets the whole result, and a part of the gradient of hidden
        states, which are to be added.

        Args:
            first: entry of the vocabulary that the first row is for.
        """
        functions = linear_cross_entropy.on_shards(first, exchange)
        self.ops = replace(self.ops, loss_sum=functions["loss_sum"], token_logprobs=functions["token_logprobs"])

    def rows(self) -> Tensor:
        """The matrix (V, C) that hidden states are multiplied with."""
        return self.scaled(self.weight)

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows (n, C) of the weight, as hidden states are multiplied with them."""
        return rows

    def forward(self, hidden: Tensor, key: DropoutKey | None = None) -> Tensor:
        """Scores (..., V) of hidden states (..., C)."""
        return F.linear(hidden, self.rows())

    def loss_sum(
        self, hidden: Tensor, labels: Tensor, grad_scale: float = 1.0, told: Tensor | None = None
    ) -> Tensor:
        """Sum of the supervised tokens' cross entropies, a float32 scalar.

        Args:
            hidden: (..., C) normed hidden states.
            labels: (...) int64.
            grad_scale: the factor by which the sum will be multiplied before its backward pass; float16 needs to know
                it beforehand.
            told: float32, one place for each label, filled with its loss, without gradient: 0 where not supervised.
        """
        return self.ops.loss_sum(hidden, self.rows(), labels, grad_scale=grad_scale, told=told)

    def token_logprobs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of each label, float32 (N,); 0 for labels that are not supervised."""
        return self.ops.token_logprobs(hidden, self.rows(), labels)


class NormalizedHead(Head):
    """A head whose rows have length 1 (Baichuan 2: Yang et al., 2023): scores depend on a row's direction, not on how
    often its token was seen."""

    def scaled(self, rows: Tensor) -> Tensor:
        return F.normalize(rows.float(), dim=-1).to(rows.dtype)


def new_head(config: ModelConfig, ops: Ops) -> Head:
    """The head of a configuration."""
    kind = NormalizedHead if config.normalized_head else Head
    return kind(config.hidden_size, config.vocab_size, ops)


def merged_linear_reference(x: Tensor, *weights: Tensor) -> Tensor:
    """The definition: x (..., C), weights (O_i, C) -> (..., sum of O_i)."""
    return torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], dim=-1)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        # Frozen weights do not need it.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *weights)
        x_NC = x.reshape(-1, x.shape[-1])
        return torch.mm(x_NC, torch.cat(weights).t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dx = torch.mm(dy_NO, torch.cat(weights)).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, *(None for _ in weights)
        dw_OC = torch.mm(dy_NO.t(), x.reshape(-1, x.shape[-1]))
        return dx, *dw_OC.split([len(weight) for weight in weights])


def merged_linear(x: Tensor, *weights: Tensor) -> Tensor:
    """Several projections in one multiplication: x (..., C), weights (O_i, C) -> (..., sum of O_i)."""
    return _MergedLinear.apply(x, *weights)
