"""The feed-forward layers without experts."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropout import DropoutKey
from model.linear import Linear, one_by_one, side_by_side
from model.ops import REFERENCE, Ops


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, 2020).

    Args:
        width: of the layer; intermediate_size if None.
    """

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE, width: int | None = None):
        super().__init__()
        self.ops = ops
        width = config.intermediate_size if width is None else width
        self.gate_proj = Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor, key: DropoutKey | None = None) -> Tensor:
        if self.ops.swiglu_packed is None:
            return self.down_proj(self.ops.swiglu(*one_by_one(x_BTC, self.gate_proj, self.up_proj, key=key)), key)
        gate_and_up = side_by_side(x_BTC, self.gate_proj, self.up_proj, key=key)
        return self.down_proj(self.ops.swiglu_packed(gate_and_up), key)


class GELU(nn.Module):
    """down(gelu(up x)), by the tanh form of GELU (Hendrycks and Gimpel, 2016)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor, key: DropoutKey | None = None) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTC, key), approximate="tanh"), key)


def new_mlp(config: ModelConfig, ops: Ops) -> nn.Module:
    """The layer of a configuration: (B, T, C) -> (B, T, C)."""
    return GELU(config) if config.mlp == "gelu" else SwiGLU(config, ops)
