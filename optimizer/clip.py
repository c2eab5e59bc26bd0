"""The global gradient norm, in float64.

float64 makes the result independent, to far below float32's resolution, of how the gradients are cut into slices: so
the clipping factor, rounded to float32, is the same bits for every layout of the buffers (all but surely: two float64
values would have to lie on both sides of a float32 rounding border).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 18
"""Elements squared at once on a CPU: two megabytes in float64, which stay in the cache."""


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements, float64 scalar on the tensors' device."""
    total: Tensor | None = None
    for tensor in tensors:
        if tensor.device.type == "cuda":
            part = torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
        else:
            part = torch.zeros((), dtype=torch.float64)
            for chunk in tensor.split(_CHUNK):
                wide = chunk.double()
                part += torch.dot(wide, wide)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.float64) if total is None else total


def clip_factor(grad_norm: float, max_norm: float) -> float:
    """What gradients are multiplied by so that their norm is at most max_norm; 1 if max_norm is 0 (no clipping)."""
    return min(1.0, max_norm / grad_norm) if max_norm > 0.0 and grad_norm > 0.0 else 1.0
