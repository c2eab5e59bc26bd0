"""The feed-forward layer with experts: a router sends each token to a few of many (Shazeer et al., 2017).

    p = softmax(W_r x)                            in float32, over all E experts
    chosen = the K experts of highest p + b       b: the bias for the choice, if there is one
    w_e = p_e, or p_e / (sum of the chosen)       norm_topk_prob
    y = sum over chosen e of w_e expert_e(x)  +  shared_expert(x)

No token is dropped and no expert is padded: an expert takes the tokens that are sent to it, however many.

The bias evens the load without a loss (Wang et al., "Auxiliary-loss-free load balancing strategy for
mixture-of-experts", 2024; DeepSeek-V3). It has no gradient; a rule moves it after each step. The losses are in
layer_losses.py.

Shapes: B batch, T tokens of a row, N = B T, C hidden size, E experts, K experts a token, I width of an expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropout import DropoutKey
from model.kernels.experts import Exchange, exchanged_experts
from model.layer_losses import BALANCE, LayerLosses, Z, add_loss, router_sums
from model.mlp import SwiGLU
from model.ops import REFERENCE, Ops


class Router(nn.Module):
    """Choice of experts, and their weights."""

    selection_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_chosen, self.normalizes = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_local_experts, config.hidden_size))
        bias = nn.Parameter(torch.zeros(config.num_local_experts), requires_grad=False) if config.router_bias else None
        self.register_parameter("selection_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move the parameters; the bias keeps its dtype. Its steps are too small for bfloat16: 0.001 beside 0.5."""
        bias = self._parameters.pop("selection_bias")
        super()._apply(fn, recurse)
        if bias is not None:
            device = fn(bias.detach()).device
            moved = torch.empty_like(bias, device=device) if bias.is_meta else bias.detach().to(device)
            bias = nn.Parameter(moved, requires_grad=False)
        self._parameters["selection_bias"] = bias
        return self

    @torch.no_grad()
    def rebalance(self, load_E: Tensor, rate: float) -> None:
        """Move the bias of each expert by `rate` up or down, if fewer or more tokens than the mean were sent to it
        (Wang et al., 2024, algorithm 1). Only the signs count, so a load of any precision gives the same bits."""
        assert self.selection_bias is not None
        steps_E = rate * torch.sign(load_E.mean() - load_E)
        self.selection_bias.add_(steps_E.to(self.selection_bias))

    def forward(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores and their softmax (N, E), the chosen experts (N, K), int64, and their weights (N, K); float32."""
        # Not in bfloat16, whose rounded scores would often be equal (Switch Transformer: Fedus et al., 2021).
        wide = torch.promote_types(x_NC.dtype, torch.float32)
        scores_NE = F.linear(x_NC.to(wide), self.weight.to(wide))
        probs_NE = scores_NE.softmax(dim=-1)
        ranked_NE = probs_NE.detach() if self.selection_bias is None else probs_NE.detach() + self.selection_bias
        chosen_NK = ranked_NE.topk(self.num_chosen, dim=-1).indices
        weights_NK = probs_NE.gather(1, chosen_NK)
        if self.normalizes:
            # With a bias, all chosen probabilities may vanish; the bound is transformers' for Ernie.
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return scores_NE, probs_NE, chosen_NK, weights_NK


class Experts(nn.Module):
    """The matrices of all experts of a layer, one upon another; or, with an `exchange`, of those that this process
    holds, to which it then brings the tokens of all processes."""

    exchange: Exchange | None = None

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE):
        """
        Raises:
            ValueError: torch's grouped multiplication cannot take rows of these widths.
        """
        super().__init__()
        self.ops = ops
        self.num_experts = config.num_local_experts
        """Number of the experts of all processes."""
        num, width, hidden = config.num_local_experts, config.moe_intermediate_size, config.hidden_size
        if ops.names["experts"] == "grouped" and (hidden % 8 or width % 8):
            raise ValueError(
                f"--experts_kernel=grouped needs hidden_size and moe_intermediate_size that are multiples of 8, not "
                f"{hidden} and {width}: give --experts_kernel=sorted"
            )
        self.gate_up_proj = nn.Parameter(torch.zeros(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.zeros(num, hidden, width))

    def forward(self, x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        if self.exchange is None:
            return self._compute(x_NC, chosen_NK, weights_NK)
        return exchanged_experts(x_NC, chosen_NK, weights_NK, self.num_experts, self.exchange, self._compute)

    def _compute(self, x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return self.ops.experts(x_NC, self.gate_up_proj, self.down_proj, chosen_NK, weights_NK)


class SparseMLP(nn.Module):
    """The layer: router, experts, and an expert for all tokens if there is one."""

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE):
        super().__init__()
        self.balances_rows = config.router_aux_loss == "row"
        self.balance_weight, self.z_weight = config.router_aux_loss_coef, config.router_z_loss_coef
        self.router = Router(config)
        self.experts = Experts(config, ops)
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_expert = SwiGLU(config, ops, shared_width) if shared_width else None

    def forward(
        self, x_BTC: Tensor, losses: LayerLosses | None = None, key: DropoutKey | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(y, the sums of layer_losses.router_sums; None without losses). With router_aux_loss=batch the sums have a
        gradient, and balance_of_batch turns those of all layers into the loss."""
        scores_NE, probs_NE, chosen_NK, weights_NK = self.router(x_BTC.flatten(0, 1))
        y_BTC = self.experts(x_BTC.flatten(0, 1), chosen_NK, weights_NK).view_as(x_BTC)
        if self.shared_expert is not None:
            y_BTC = y_BTC + self.shared_expert(x_BTC, key)
        if losses is None:
            return y_BTC, None
        scores_BTE, probs_BTE, chosen_BTK = (x.unflatten(0, x_BTC.shape[:2]) for x in (scores_NE, probs_NE, chosen_NK))
        sums = router_sums(scores_BTE, probs_BTE, chosen_BTK, losses, self.balances_rows)
        y_BTC = add_loss(y_BTC, self.balance_weight * sums[BALANCE] + self.z_weight * sums[Z], losses.scale)
        return y_BTC, sums.detach() if self.balances_rows else sums
