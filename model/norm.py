"""Norms of a sum."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropout import DropoutKey, dropout
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


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (Ba et al., 2016) of a sum x, computed in float32.
    Returns the sum, too."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(
        self, h_BTC: Tensor, x_BTC: Tensor | None, dropout_p: float, key: DropoutKey | None, site: int
    ) -> tuple[Tensor, Tensor]:
        """The pair (h + dropout(x), its norm); with x None nothing is added."""
        if x_BTC is not None:
            h_BTC = h_BTC + dropout(x_BTC, dropout_p, key, site)
        weight, bias = self.weight.float(), self.bias.float()
        return h_BTC, F.layer_norm(h_BTC.float(), weight.shape, weight, bias, self.eps).to(self.weight.dtype)


def new_norm(config: ModelConfig, ops: Ops) -> nn.Module:
    """A norm of the residual stream, of a configuration's kind."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
