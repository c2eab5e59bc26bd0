"""Losses of layers, such as a router's balance, beside the loss of the task.

    total = (sum of the task's terms + sum over rows w_row (c1 L_row + c2 Z_row)) / count

    f_i   = E / (K n) * sum over the row's n real tokens of 1(expert i is chosen)
    P_i   = mean over these tokens of the probability of expert i
    L_row = sum_i f_i P_i                               1 if the load is even (DeepSeek-V3, 2024, equation 17)
    Z_row = mean over these tokens of logsumexp(scores)^2     (ST-MoE: Zoph et al., 2022)

A row's weight w_row is its number of terms of the task's loss, and `count` is the task's divisor. So the total does not
depend on how the global batch was split into micro-batches and over ranks, nor on padding.

A layer adds its loss by `add_loss`, which acts on gradients alone: a stage of a pipeline never sees the loss of the
task. What there is to report leaves the layer as a vector of sums (`router_sums`), an ordinary output, so that a layer
that is computed again in the backward pass is counted once.

Shapes: B rows, T tokens, E experts, K experts a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass
class LayerLosses:
    """What the layers must know in one forward pass to add their own losses, and what they have counted in it."""

    row_weights: Tensor
    """(B,) float32: each row's number of terms of the task's loss."""
    scale: Tensor
    """Float32 scalar: the factor by which the task's sum is multiplied before its backward pass."""
    mask_BT: Tensor | None = None
    """Boolean, True where a token is no padding; None: everywhere."""
    batch_coef: float = 0.0
    """Weight of the balance loss of the whole batch; 0 where each row is balanced by itself."""
    over_row: Callable[[Tensor], Tensor] | None = None
    """If several processes share the positions of each row: sum of a tensor over them, whose backward pass returns the
    gradient as it is."""
    sums: Tensor | None = None
    """After the forward pass: the sums of each layer with experts, float64 (layers, 4 + 2 E), without a gradient."""

    def close(self, hidden_BTC: Tensor, counted: Sequence[Tensor]) -> Tensor:
        """Take the sums of all layers with experts; returns the final hidden states, behind which the balance loss of
        the batch lies, if there is one."""
        self.sums = torch.stack(list(counted)).detach()
        if not self.batch_coef:
            return hidden_BTC
        # It is not divided by the number of the task's terms, and the batch is the whole global batch.
        scale = self.scale * self.row_weights.sum()
        return add_loss(hidden_BTC, self.batch_coef * balance_of_batch(counted), scale)


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return dy, scale.to(ctx.dtype), None


def add_loss(y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """y unchanged; its backward pass is that of a total to which scale * loss was added. (Megatron-LM and DeepSpeed add
    their balance losses in this way.)

    Args:
        y: a tensor through which the gradient of the task's loss will pass.
        loss: scalar.
        scale: scalar without a gradient.
    """
    return _AddLoss.apply(y, loss, scale)


BALANCE, Z, ENTROPY, TOKENS, LOAD = range(5)
"""Places in the vector of a layer's sums, float64 (4 + 2 E,), over the real tokens of all rows:

    BALANCE         sum over rows of w_row L_row; 0 with router_aux_loss=batch
    Z               sum over rows of w_row Z_row
    ENTROPY         sum over tokens of the entropy of their probabilities, in nats
    TOKENS          number of tokens
    LOAD ...        E numbers of tokens that were sent to each expert
    LOAD + E ...    E sums over tokens of the probability of each expert; with router_aux_loss=batch with a gradient
"""


def router_sums(scores_BTE: Tensor, probs_BTE: Tensor, chosen_BTK: Tensor, losses: LayerLosses, by_row: bool) -> Tensor:
    """The vector of sums; its first two elements have a gradient, and so have the last E if `by_row` is False.

    Args:
        scores_BTE: float32 scores of the router.
        probs_BTE: their softmax.
        chosen_BTK: experts of each token, int64.
        by_row: balance the load of each row.
    """
    num_experts, num_chosen = probs_BTE.shape[-1], chosen_BTK.shape[-1]
    # No sum by index, whose order of additions is left to chance on a GPU.
    sent_BTE = torch.zeros_like(probs_BTE).scatter(-1, chosen_BTK, 1.0)
    entropy_BT = -torch.special.xlogy(probs_BTE.detach(), probs_BTE.detach()).sum(-1)
    z_BT = scores_BTE.logsumexp(-1).square()
    if losses.mask_BT is not None:
        mask_BT = losses.mask_BT.to(probs_BTE.dtype)
        sent_BTE, probs_BTE = sent_BTE * mask_BT[..., None], probs_BTE * mask_BT[..., None]
        entropy_BT, z_BT = entropy_BT * mask_BT, z_BT * mask_BT
        tokens_B = mask_BT.sum(1)
    else:
        tokens_B = probs_BTE.new_full((len(probs_BTE),), probs_BTE.shape[1])
    load_BE, sums_BE, entropy_B, z_B = sent_BTE.sum(1), probs_BTE.sum(1), entropy_BT.sum(1), z_BT.sum(1)
    if losses.over_row is not None:
        of_row = losses.over_row(torch.cat((load_BE, sums_BE, torch.stack((entropy_B, z_B, tokens_B), 1)), 1))
        load_BE, sums_BE, rest_B3 = of_row.split([load_BE.shape[1], load_BE.shape[1], 3], 1)
        entropy_B, z_B, tokens_B = rest_B3.unbind(1)
    # A row of padding alone has sums of 0.
    per_token_B = 1.0 / tokens_B.clamp(min=1.0)
    balance_B = (load_BE * sums_BE).sum(1) * per_token_B.square() * (num_experts / num_chosen)
    if not by_row:
        balance_B = torch.zeros_like(balance_B)
    else:
        sums_BE = sums_BE.detach()
    weights_B = losses.row_weights.to(probs_BTE.dtype)
    parts = [weights_B * balance_B, weights_B * z_B * per_token_B, entropy_B, tokens_B]
    return torch.cat([torch.stack([part.double().sum() for part in parts]), load_BE.double().sum(0),
                      sums_BE.double().sum(0)])  # fmt: skip


def sums_length(config: ModelConfig) -> int:
    """Length of a layer's vector of sums."""
    return LOAD + 2 * config.num_local_experts


def load_of(sums: Tensor) -> Tensor:
    """Tokens that were sent to each expert, (layers, E), from the sums of these layers."""
    return sums[:, LOAD:].chunk(2, dim=1)[0]


def balance_of_batch(sums: Sequence[Tensor]) -> Tensor:
    """transformers' balance loss of a batch, from the sums of all its layers with experts: E sum_i f_i P_i, where f_i
    and P_i are means over all tokens and layers, and the f_i add up to K."""
    total = torch.stack(list(sums)).sum(0)
    load_E, probs_E = total[LOAD:].chunk(2)
    return len(load_E) * (load_E.detach() * probs_E).sum() / total[TOKENS].detach().clamp(min=1.0).square()


def router_figures(sums: Tensor, count: float, config: ModelConfig) -> dict[str, Any]:
    """Figures of a step for the log, from the sums of all its rows.

    Args:
        sums: (layers with experts, 4 + 2 E).
        count: divisor of the task's loss.
    Returns:
        balance_loss: mean over layers, before its coefficient; 1 if the load is even.
        z_loss: mean over layers, before its coefficient.
        entropy: mean over layers of the tokens' mean entropy, in nats; entropy_by_layer: of each layer.
        load_highest, load_lowest: tokens of the busiest and of the idlest expert of any layer, as a multiple of the
            mean; load_by_layer: share of each layer's tokens that each expert got.
    """
    by_layer = sums[:, ENTROPY] / sums[:, TOKENS]
    load_LE = load_of(sums)
    share_LE = load_LE / load_LE.sum(1, keepdim=True)
    balance = sums[:, BALANCE].mean() / count
    if config.router_aux_loss == "batch":
        balance = balance_of_batch(list(sums)) / config.num_experts_per_tok
    return {
        "balance_loss": balance.item(), "z_loss": (sums[:, Z].mean() / count).item(),
        "entropy": by_layer.mean().item(),
        "load_highest": (share_LE.max() * share_LE.shape[1]).item(),
        "load_lowest": (share_LE.min() * share_LE.shape[1]).item(),
        "entropy_by_layer": [_short(value) for value in by_layer.tolist()],
        "load_by_layer": [[_short(value) for value in shares] for shares in share_LE.tolist()],
    }  # fmt: skip


def _short(value: float) -> float:
    """Four digits: there may be thousands of these in a record."""
    return float(f"{value:.4g}")
