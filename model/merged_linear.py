"""Several projections of one input in one matrix multiplication.

    y = x [W_1; W_2; ...]^T = [x W_1^T, x W_2^T, ...]

A wide multiplication uses a GPU better than several narrow ones, and its backward pass adds the input's gradients in
the same go. The weights stay parameters of their own, so their names on disk, their buckets and PowerSGD's matrices are
what they were. They are put side by side for each pass: a copy of 2 bytes an element where the multiplication takes
2 N operations, for N tokens. They are not kept so for the backward pass.

Shapes: N tokens, C inputs, O_i outputs.
"""

import torch
from torch import Tensor


def merged_linear_reference(x: Tensor, *weights: Tensor) -> Tensor:
    """The definition: x (..., C), weights (O_i, C) -> (..., sum of O_i)."""
    return torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], dim=-1)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        x_NC = x.reshape(-1, x.shape[-1])
        return torch.mm(x_NC, torch.cat(weights).t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dy_NO, x_NC = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = torch.mm(dy_NO, torch.cat(weights)).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, *(None for _ in weights)
        dw_OC = torch.mm(dy_NO.t(), x_NC)
        return dx, *dw_OC.split([len(weight) for weight in weights])


def merged_linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x (..., C), weights (O_i, C) -> (..., sum of O_i)."""
    return _MergedLinear.apply(x, *weights)
