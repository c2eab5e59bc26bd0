"""The norm of a sum."""

import torch
from torch import Tensor, nn

from model.dropout import DropoutKey
from model.ops import REFERENCE, Ops


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019) of a sum x, computed in float32. Returns the sum,
    too."""

    def __init__(self, size: int, eps: float, ops: Ops = REFERENCE):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.ops = eps, ops

    def forward(
        self, h_BTC: Tensor, x_BTC: Tensor | None, dropout_p: float, key: DropoutKey | None, site: int
    ) -> tuple[Tensor, Tensor]:
        """The pair (h + dropout(x), its norm); with x None nothing is added."""
        if x_BTC is None:
            return h_BTC, self.ops.rms_norm(h_BTC, self.weight, self.eps)
        return self.ops.add_rms_norm(h_BTC, x_BTC, self.weight, self.eps, dropout_p, key, site)
