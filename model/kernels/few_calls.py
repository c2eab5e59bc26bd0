"""Operations of a model that only serves, in fewer calls of PyTorch: with one row, a call takes longer than its
arithmetic. The results are those of the references, to the bit.

In microseconds, by one thread of an AMD EPYC (Zen 3) that had other work, too; 768 wide, 12 heads:

                                   1 row                 16 rows
                              reference   this      reference   this
    float32    add, norm          27       21           34       29
               rotation           42       26           66       45
    bfloat16   add, norm          31       25           46       41
               rotation           52       32           82       55

Shapes: as in rms_norm.py and rope.py.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from model.dropout import DropoutKey, dropout
from model.kernels.rope import rope_reference
from model.ops import REFERENCE, Ops


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm_reference: x (..., C), weight (C,) -> (..., C) in the weight's dtype."""
    x32 = x.float()
    # What is overwritten is new.
    mean = (x32 * x32).mean(dim=-1, keepdim=True)
    normed = x32 * mean.add_(_constant(eps, x.device)).rsqrt_()
    return normed.to(weight.dtype).mul_(weight)


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    """A tensor, which PyTorch would otherwise make of the number in each call."""
    return torch.tensor(value, dtype=torch.float32, device=device)


def add_rms_norm(
    h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float = 0.0, key: DropoutKey | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """add_rms_norm_reference: (h + dropout(x), rms_norm of that)."""
    h_new = h + dropout(x, dropout_p, key, site)
    return h_new, rms_norm(h_new, weight, eps)


class Rotation:
    """rope_reference of queries and keys together: with x' the heads whose halves have changed places,

        y = x [cos, cos] + x' [-sin, sin]

    It keeps the wide tables, as the layers of a pass bring the same ones.
    """

    def __init__(self) -> None:
        self._narrow: tuple[Tensor, Tensor] | None = None
        self._wide: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        width = q_BHTD.shape[-1]
        if interleaved or 2 * cos.shape[-1] < width:
            return rope_reference(q_BHTD, k_BKTD, cos, sin, interleaved)
        cos_BT1D, sin_BT1D = self._tables(cos, sin)
        x_BTND = torch.cat((q_BHTD.transpose(1, 2), k_BKTD.transpose(1, 2)), dim=2).float()
        rotated_BTND = (x_BTND * cos_BT1D).add_(x_BTND.roll(width // 2, -1).mul_(sin_BT1D)).to(q_BHTD.dtype)
        q_BTHD, k_BTKD = rotated_BTND.split_with_sizes((q_BHTD.shape[1], k_BKTD.shape[1]), dim=2)
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2)

    def _tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self._narrow is None or self._narrow[0] is not cos or self._narrow[1] is not sin:
            wide = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            self._narrow, self._wide = (cos, sin), (wide[0].transpose(1, 2), wide[1].transpose(1, 2))
        assert self._wide is not None
        return self._wide


class UsesOps(Protocol):
    """A module that computes with operations."""

    ops: Ops


def compute_in_few_calls(modules: Iterable[nn.Module]) -> None:
    """Let modules use these in the place of reference operations. They have no gradients after it."""
    ours: dict[str, Any] = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "rope": Rotation()}
    for module in modules:
        if isinstance(ops := getattr(module, "ops", None), Ops):
            plain = [name for name in ours if getattr(ops, name) is getattr(REFERENCE, name)]
            cast(UsesOps, module).ops = replace(ops, **{name: ours[name] for name in plain})
