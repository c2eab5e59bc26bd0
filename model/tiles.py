"""Experts of passes that always have the same number of rows, see serving/invariant.py."""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe import Experts


def experts_on_all_rows(
    x_NC: Tensor, gate_up_EOC: Tensor, down_ECI: Tensor, chosen_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """experts_reference (model/kernels/experts.py) with one shape for all products: an expert that any token chose
    computes all tokens. A token's sum has its own experts alone, by their numbers."""
    y_NC = x_NC.new_zeros(x_NC.shape, dtype=weights_NK.dtype)
    for expert in chosen_NK.unique().tolist():
        is_chosen_NK = chosen_NK == expert
        gate_NI, up_NI = F.linear(x_NC, gate_up_EOC[expert]).chunk(2, dim=-1)
        out_NC = F.linear(F.silu(gate_NI) * up_NI, down_ECI[expert])
        weight_N1 = weights_NK.where(is_chosen_NK, 0.0).sum(1, keepdim=True)
        y_NC = torch.where(is_chosen_NK.any(1, keepdim=True), y_NC + out_NC * weight_N1, y_NC)
    return y_NC.to(x_NC.dtype)


def compute_experts_on_all_rows(modules: Iterable[nn.Module]) -> None:
    """Let the experts among these modules compute so.

    Raises:
        ValueError: several processes hold them, which exchange tokens.
    """
    for module in modules:
        if isinstance(module, Experts):
            if module.exchange is not None:
                raise ValueError("--batch_invariant cannot be kept if ranks exchange tokens for experts: leave it out")
            module.ops = replace(module.ops, experts=experts_on_all_rows)
