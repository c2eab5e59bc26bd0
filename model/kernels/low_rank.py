"""Frozen matrix multiplications of one input, each with a product of two thin matrices added (LoRA: Hu et al., 2021).

    t_i = x A_i^T,   y_i = x W_i^T + b_i + s t_i B_i^T              W_i (O_i, C), A_i (r, C), B_i (O_i, r)

    dt_i = s dy_i B_i,   dB_i = s dy_i^T t_i,   dA_i = dt_i^T x,   dx = sum over i of (dy_i W_i + dt_i A_i)

W_i and b_i get no gradient. What is added takes 2 r / C of the multiplications' operations, but step by step it would
also read and write every y_i and dx several times, to scale and to add. Here products are scaled as they are computed
and added to the large ones, and all are added to one dx. The matrices A_i are one, [A_1; A_2; ...], since a product
with few columns takes nearly as long as one with a few more. `packed` also joins the W_i, and returns all y_i as one
tensor, with a B that is block-diagonal.

Kept for the backward pass: x, and t_i (N, r).

Shapes: N tokens, C inputs, O_i outputs, O their sum; r rank, R the sum of the ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_linears_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:  # fmt: skip
    """The definition: x (..., C) -> y_i (..., O_i)."""
    plain = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    return [y + scale * F.linear(F.linear(x, a_rC), b_Or) for y, a_rC, b_Or in zip(plain, a, b)]


@torch.library.custom_op("zero2all::low_rank_linears", mutates_args=())
def _sums(
    x_NC: Tensor, t_NR: Tensor, weights: list[Tensor], biases: list[Tensor | None], b: list[Tensor], scale: float
) -> list[Tensor]:
    """y_i (N, O_i). One operator, since recomputation that keeps the results of matrix multiplications would otherwise
    keep the large product beside the sum.

    Args:
        t_NR: all t_i side by side.
    """
    outputs = []
    for weight, bias, b_Or, t_Nr in zip(weights, biases, b, t_NR.split([b_Or.shape[1] for b_Or in b], dim=1)):
        y_NO = torch.mm(x_NC, weight.t()) if bias is None else torch.addmm(bias, x_NC, weight.t())
        outputs.append(y_NO.addmm_(t_Nr, b_Or.t(), alpha=scale))
    return outputs


@_sums.register_fake
def _(
    x_NC: Tensor, t_NR: Tensor, weights: list[Tensor], biases: list[Tensor | None], b: list[Tensor], scale: float
) -> list[Tensor]:
    return [x_NC.new_empty(x_NC.shape[0], weight.shape[0]) for weight in weights]


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, scale: float, packed: bool, count: int, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, a, b, biases = _lists(tensors, count)
        x_NC = x.reshape(-1, x.shape[-1])
        t_NR = torch.mm(x_NC, _joined(a).t())
        ctx.save_for_backward(x, t_NR, *weights, *a, *b)
        ctx.scale, ctx.packed, ctx.count = scale, packed, count
        if packed:
            weights, b = [_joined(weights)], [torch.block_diag(*b)]
            biases = [None if biases[0] is None else _joined(biases)]
        sums = _sums(x_NC, t_NR, weights, biases, b, scale)
        return tuple(y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in sums)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, t_NR, *tensors = ctx.saved_tensors
        weights, a, b = _lists(tensors, ctx.count)
        x_NC, dys_NO = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        large, thin = ([_joined(weights)], [torch.block_diag(*b)]) if ctx.packed else (weights, b)
        dt_NR = _joined([_product(dy_NO, b_Or, ctx.scale) for dy_NO, b_Or in zip(dys_NO, thin)], dim=1)
        dx, of_thin = None, 2 * ctx.count * [None]
        if ctx.needs_input_grad[3]:
            dx_NC = torch.mm(dt_NR, _joined(a))
            for dy_NO, weight in zip(dys_NO, large):
                dx_NC.addmm_(dy_NO, weight)
            dx = dx_NC.view(x.shape)
        if any(ctx.needs_input_grad[4:]):
            of_thin = [*_split(torch.mm(dt_NR.t(), x_NC), a), *_gradients_of_b(dys_NO, t_NR, b, ctx.scale, ctx.packed)]
        return None, None, None, dx, *(ctx.count * [None]), *of_thin, *(ctx.count * [None])


def _gradients_of_b(
    dys_NO: list[Tensor], t_NR: Tensor, b: list[Tensor], scale: float, packed: bool
) -> list[Tensor]:
    ranks = [b_Or.shape[1] for b_Or in b]
    if packed:
        rows = _split(_product(dys_NO[0].t(), t_NR, scale), b)
        return [row_OR.split(ranks, dim=1)[number].contiguous() for number, row_OR in enumerate(rows)]
    return [_product(dy_NO.t(), t_Nr, scale) for dy_NO, t_Nr in zip(dys_NO, t_NR.split(ranks, dim=1))]


def _product(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """scale first second, rounded once."""
    unread = first.new_zeros(())
    return torch.addmm(unread, first, second, beta=0, alpha=scale)


def _lists(tensors: Sequence, count: int) -> list[list]:
    """Lists of `count` tensors each."""
    return [list(tensors[begin : begin + count]) for begin in range(0, len(tensors), count)]


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _split(joined: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each."""
    return joined.split([len(tensor) for tensor in like])


def low_rank_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scale: float, packed: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x (..., C), weights (O_i, C), biases (O_i,) of all or of none, A (r, C), B (O_i, r) -> y_i (..., O_i).

    Args:
        packed: return one tensor (..., O) instead, by one multiplication.
    """
    return _LowRankLinears.apply(scale, packed, len(weights), x, *weights, *a, *b, *biases)
