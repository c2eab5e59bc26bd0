"""The feed-forward layers without experts."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear, side_by_side
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

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.ops.swiglu_packed is None:
            return self.down_proj(self.ops.swiglu(self.gate_proj(x_BTC), self.up_proj(x_BTC)))
        return self.down_proj(self.ops.swiglu_packed(side_by_side(x_BTC, self.gate_proj, self.up_proj)))


class GELU(nn.Module):
    """down(gelu(up x)), by the tanh form of GELU (Hendrycks and Gimpel, 2016)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTC), approximate="tanh"))


def new_mlp(config: ModelConfig, ops: Ops) -> nn.Module:
    """The layer of a configuration: (B, T, C) -> (B, T, C)."""
    return GELU(config) if config.mlp == "gelu" else SwiGLU(config, ops)
