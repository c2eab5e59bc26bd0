"""The feed-forward layer."""

from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear, side_by_side
from model.ops import REFERENCE, Ops


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE):
        super().__init__()
        self.ops = ops
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.ops.swiglu_packed is None:
            return self.down_proj(self.ops.swiglu(self.gate_proj(x_BTC), self.up_proj(x_BTC)))
        return self.down_proj(self.ops.swiglu_packed(side_by_side(x_BTC, self.gate_proj, self.up_proj)))
