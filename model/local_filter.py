"""The local filter of Yuan 2.0 (Wu et al., 2023): queries and keys are computed from a token and the two before it.

    a_t = W1 [x_{t-1}; x_t] + b1          C -> C / 2
    y_t = W2 [a_{t-1}; a_t] + b2          C / 2 -> C
    out = rms_norm(y + x)

What comes before a document is zero: x_{-1} and a_{-1}. Values are computed from x itself.

Shapes: B batch, T tokens, C hidden size, I inputs, O outputs of a pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.norm import RMSNorm
from model.ops import Ops


class Pairs(nn.Module):
    """A linear layer of each token together with the one before it. The weight has the shape of a convolution over
    tokens in two dimensions, (O, I, 2, 1), as it is stored elsewhere; the earlier token comes first."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 2, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, before_BTI: Tensor, x_BTI: Tensor) -> Tensor:
        """(B, T, O) of the tokens x and those before them."""
        by_place_O2I = self.weight[..., 0].transpose(1, 2)
        return F.linear(torch.cat((before_BTI, x_BTI), dim=-1), by_place_O2I.flatten(1), self.bias)


class LocalFilter(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        size = config.hidden_size
        self.conv1, self.conv2 = Pairs(size, size // 2), Pairs(size // 2, size)
        self.norm = RMSNorm(size, config.rms_norm_eps, ops)

    def forward(self, x_BTC: Tensor, earlier_B2C: Tensor, positions_BT: Tensor) -> Tensor:
        """
        Args:
            earlier_B2C: the two tokens before x in each row; of any value where there are none.
            positions_BT: each token's position in its document, so 0 where one begins.
        """
        # Nothing precedes a document; what precedes its first token is masked for each of the two layers.
        follows_BT1 = (positions_BT > 0)[..., None]
        token_before_follows_B11 = (positions_BT[:, :1] > 1)[..., None]
        x_all = torch.cat((earlier_B2C, x_BTC), dim=1)
        # From the token before the first new one on, since the second layer needs its result.
        has_before = torch.cat((token_before_follows_B11, follows_BT1), dim=1)
        a_all = self.conv1(x_all[:, :-1].where(has_before, 0.0), x_all[:, 1:])
        y_BTC = self.conv2(a_all[:, :-1].where(follows_BT1, 0.0), a_all[:, 1:])
        return self.norm(y_BTC, x_BTC, 0.0, None, 0)[1]
