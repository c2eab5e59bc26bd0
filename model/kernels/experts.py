"""The experts of a mixture: each token passes through K of E gated feed-forward layers (Shazeer et al., 2017; Shazeer,
2020).

    y_n = sum over the experts e of token n of   w_ne D_e (silu(g) u),   [g; u] = W_e x_n

A token's weight is a number, so it may stand on either side of D_e. `sorted` and `grouped` multiply with it first,
D_e h with h = w silu(g) u. Then its gradient needs no output of D_e, which need not be kept:

    dh = D_e^T dy_n      dD_e = dy_n h^T
    dw = dh . (silu(g) u),   du = w dh silu(g),   dg = w dh u s(g) (1 + g (1 - s(g))),   s the logistic function
    dx_n = sum over e of W_e^T [dg; du]      dW_e = [dg; du] x_n^T

No token is dropped, whatever the load. Pairs of token and expert are sorted by expert, so an expert's tokens lie side
by side and are one multiplication (MegaBlocks: Gale et al., 2023). A token then adds up its own K results, in the order
in which they were chosen: no order of additions is left to chance.

An expert without a token has a gradient of zero.

Shapes: N tokens, C hidden size, E experts, I width of an expert, O = 2 I, K experts a token, S = N K pairs of token and
expert in the order of the experts, n pairs of one expert.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import support
from model.kernels.registry import Implementation
from model.kernels.swiglu import swiglu_packed, swiglu_packed_reference

PIECE = 1 << 17
"""Elements that are activated together on a CPU. Their float32 copies stay in a core's cache: of 16 to 1,024 rows of
1,024, pieces of 128 were the fastest, and in bfloat16 took half the time of 1,024."""


def experts_reference(
    x_NC: Tensor, gate_up_EOC: Tensor, down_ECI: Tensor, chosen_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """The definition, expert by expert; (N, C) in x's dtype.

    Args:
        gate_up_EOC: matrices of the gates, and below each that of the ups.
        chosen_NK: experts of each token, all different, int64.
        weights_NK: float32.
    """
    y_NC = x_NC.new_zeros(x_NC.shape, dtype=weights_NK.dtype)
    for expert, (gate_up_OC, down_CI) in enumerate(zip(gate_up_EOC, down_ECI)):
        tokens_n, places_n = (chosen_NK == expert).nonzero(as_tuple=True)
        gate_nI, up_nI = F.linear(x_NC[tokens_n], gate_up_OC).chunk(2, dim=-1)
        out_nC = F.linear(F.silu(gate_nI) * up_nI, down_CI)
        y_NC = y_NC.index_add(0, tokens_n, out_nC * weights_NK[tokens_n, places_n, None])
    return y_NC.to(x_NC.dtype)


def sort_by_expert(chosen_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of token and expert in the order of the experts: (S,) the token of each pair, (N, K) the place of each
    pair in that order, int64; (E,) the end of each expert's pairs, int32."""
    experts_S, order_S = chosen_NK.flatten().sort(stable=True)
    places_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    all_experts = torch.arange(num_experts, device=experts_S.device)
    ends_E = torch.searchsorted(experts_S, all_experts, right=True, out_int32=True)
    return order_S // chosen_NK.shape[1], places_S.view_as(chosen_NK), ends_E


def _groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have tokens, and the places of their pairs."""
    first = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > first:
            yield expert, slice(first, end)
        first = end


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic between the multiplications."""
    return torch.promote_types(dtype, torch.float32)


def _by_place(weights_NK: Tensor, places_NK: Tensor) -> Tensor:
    """Weights (S, 1) of the sorted pairs."""
    return torch.empty_like(weights_NK.flatten()).scatter_(0, places_NK.flatten(), weights_NK.flatten())[:, None]


def _sum_by_token(pairs_SC: Tensor, places_NK: Tensor) -> Tensor:
    """Sum of each token's pairs, (N, C); additions are float32 in low precision."""
    return F.embedding_bag(places_NK, pairs_SC, mode="sum")


def _pieces(x_nI: Tensor) -> Iterator[slice]:
    """Rows that are activated together."""
    num_rows, width = x_nI.shape
    rows = max(PIECE // width, 1) if x_nI.device.type == "cpu" else num_rows
    return (slice(first, first + rows) for first in range(0, num_rows, rows))


def _activate(gate_up_nO: Tensor, weights_n1: Tensor) -> Tensor:
    """h (n, I), computed in the weights' dtype."""
    h_nI = gate_up_nO.new_empty(len(gate_up_nO), gate_up_nO.shape[1] // 2)
    for rows in _pieces(h_nI):
        gate, up = gate_up_nO[rows].to(weights_n1.dtype).chunk(2, dim=-1)
        h_nI[rows] = F.silu(gate).mul_(up).mul_(weights_n1[rows])
    return h_nI


def _activate_backward(
    dh_nI: Tensor, gate_up_nO: Tensor, weights_n1: Tensor, dweights_n: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient (n, O) of gates and ups, h (n, I) once more); writes that of the weights to dweights."""
    dgate_up_nO, h_nI = torch.empty_like(gate_up_nO), torch.empty_like(dh_nI)
    for rows in _pieces(dh_nI):
        gate, up = gate_up_nO[rows].to(weights_n1.dtype).chunk(2, dim=-1)
        dgate, dup = dgate_up_nO[rows].chunk(2, dim=-1)
        dh, silu = dh_nI[rows].to(weights_n1.dtype), F.silu(gate)
        h = silu * up
        torch.linalg.vecdot(dh, h, out=dweights_n[rows])
        h_nI[rows] = h.mul_(weights_n1[rows])
        dh = dh * weights_n1[rows]
        dup.copy_(silu.mul_(dh))
        dgate.copy_(torch.ops.aten.silu_backward(dh.mul_(up), gate))
    return dgate_up_nO, h_nI


@torch.library.custom_op("zero2all::sorted_experts", mutates_args=())
def _forward(
    x_NC: Tensor, gate_up_EOC: Tensor, down_ECI: Tensor, weights_NK: Tensor, tokens_S: Tensor, places_NK: Tensor,
    ends_E: Tensor, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, gates and ups (S, O) if they are to be kept)."""
    weights_S1 = _by_place(weights_NK, places_NK)
    gate_up_SO, out_SC = _empty_forward(x_NC, gate_up_EOC, tokens_S, keep)
    for expert, pairs in _groups(ends_E):
        kept_nO = gate_up_SO[pairs] if keep else None
        x_nC = x_NC.index_select(0, tokens_S[pairs])
        gate_up_nO = torch.mm(x_nC, gate_up_EOC[expert].t(), out=kept_nO)
        torch.mm(_activate(gate_up_nO, weights_S1[pairs]), down_ECI[expert].t(), out=out_SC[pairs])
    return _sum_by_token(out_SC, places_NK), gate_up_SO


def _empty_forward(x_NC: Tensor, gate_up_EOC: Tensor, tokens_S: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    num_pairs = len(tokens_S)
    return x_NC.new_empty(num_pairs if keep else 0, gate_up_EOC.shape[1]), x_NC.new_empty(num_pairs, x_NC.shape[1])


@_forward.register_fake
def _(x_NC, gate_up_EOC, down_ECI, weights_NK, tokens_S, places_NK, ends_E, keep):
    return torch.empty_like(x_NC), _empty_forward(x_NC, gate_up_EOC, tokens_S, keep)[0]


@torch.library.custom_op("zero2all::sorted_experts_backward", mutates_args=())
def _backward(
    dy_NC: Tensor, x_NC: Tensor, gate_up_EOC: Tensor, down_ECI: Tensor, weights_NK: Tensor, tokens_S: Tensor,
    places_NK: Tensor, ends_E: Tensor, gate_up_SO: Tensor, wants_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dW, dD, dw); without `wants_matrices` dW and dD are empty."""
    weights_S1 = _by_place(weights_NK, places_NK)
    dx_SC, dweights_S = x_NC.new_empty(len(tokens_S), x_NC.shape[1]), torch.empty_like(weights_S1[:, 0])
    dgate_up_EOC, ddown_ECI = _empty_matrices(gate_up_EOC, down_ECI, wants_matrices)
    without_tokens = set(range(len(gate_up_EOC)))
    for expert, pairs in _groups(ends_E):
        without_tokens.discard(expert)
        x_nC, dy_nC = (tensor.index_select(0, tokens_S[pairs]) for tensor in (x_NC, dy_NC))
        dh_nI = torch.mm(dy_nC, down_ECI[expert])
        dgate_up_nO, h_nI = _activate_backward(dh_nI, gate_up_SO[pairs], weights_S1[pairs], dweights_S[pairs])
        torch.mm(dgate_up_nO, gate_up_EOC[expert], out=dx_SC[pairs])
        if wants_matrices:
            torch.mm(dy_nC.t(), h_nI, out=ddown_ECI[expert])
            torch.mm(dgate_up_nO.t(), x_nC, out=dgate_up_EOC[expert])
    if wants_matrices:
        for expert in without_tokens:
            dgate_up_EOC[expert].zero_()
            ddown_ECI[expert].zero_()
    return _sum_by_token(dx_SC, places_NK), dgate_up_EOC, ddown_ECI, dweights_S[places_NK]


def _empty_matrices(gate_up_EOC: Tensor, down_ECI: Tensor, are_wanted: bool) -> tuple[Tensor, Tensor]:
    if not are_wanted:
        return gate_up_EOC.new_empty(0), down_ECI.new_empty(0)
    return torch.empty_like(gate_up_EOC), torch.empty_like(down_ECI)


@_backward.register_fake
def _(dy_NC, x_NC, gate_up_EOC, down_ECI, weights_NK, tokens_S, places_NK, ends_E, gate_up_SO, wants_matrices):
    return torch.empty_like(x_NC), *_empty_matrices(gate_up_EOC, down_ECI, wants_matrices), torch.empty_like(weights_NK)


class _SortedExperts(torch.autograd.Function):
    """The matrices come in reverse, since their gradients arrive in this order: the last used first, as is planned."""

    @staticmethod
    def forward(ctx: Any, x_NC, down_ECI, gate_up_EOC, weights_NK, tokens_S, places_NK, ends_E, keep):
        inputs = x_NC, gate_up_EOC, down_ECI, weights_NK, tokens_S, places_NK, ends_E
        y_NC, gate_up_SO = _forward(*inputs, keep)
        ctx.save_for_backward(*inputs, gate_up_SO)
        return y_NC

    @staticmethod
    def backward(ctx: Any, dy_NC: Tensor):
        wants_matrices = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx_NC, dgate_up_EOC, ddown_ECI, dweights_NK = _backward(dy_NC, *ctx.saved_tensors, wants_matrices)
        matrices = (ddown_ECI, dgate_up_EOC) if wants_matrices else (None, None)
        return dx_NC, *matrices, dweights_NK, None, None, None, None


def sorted_experts(
    x_NC: Tensor, gate_up_EOC: Tensor, down_ECI: Tensor, chosen_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """The same, with one multiplication an expert, on slices of the matrices and of the sorted pairs. Only x and the
    gates and ups are kept for the backward pass. On a GPU, the passes wait for the number of each expert's tokens."""
    order = sort_by_expert(chosen_NK, len(gate_up_EOC))
    weights_NK = weights_NK.to(_wide(x_NC.dtype))
    return _SortedExperts.apply(x_NC, down_ECI, gate_up_EOC, weights_NK, *order, torch.is_grad_enabled())


class _ToPairs(torch.autograd.Function):
    """Tokens (N, C) -> sorted pairs (S, C). Indexing alone would have a backward pass that adds in any order."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, tokens_S: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(places_NK)
        return x_NC.index_select(0, tokens_S)

    @staticmethod
    def backward(ctx: Any, dpairs_SC: Tensor):
        return _sum_by_token(dpairs_SC, *ctx.saved_tensors), None, None


class _ToTokens(torch.autograd.Function):
    """Sorted pairs (S, C) -> sums of each token's pairs (N, C)."""

    @staticmethod
    def forward(ctx: Any, pairs_SC: Tensor, tokens_S: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_S)
        return _sum_by_token(pairs_SC, places_NK)

    @staticmethod
    def backward(ctx: Any, dy_NC: Tensor):
        (tokens_S,) = ctx.saved_tensors
        return dy_NC.index_select(0, tokens_S), None, None


class _ZeroWithoutTokens(torch.autograd.Function):
    """Matrices (E, ..., ...) unchanged; the gradients of experts without tokens become zero. On Blackwell GPUs torch's
    multiplication leaves whatever was in memory there (pytorch issue 172439, open with torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return matrices.view_as(matrices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (ends_E,) = ctx.saved_tensors
        has_none_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return gradient.masked_fill(has_none_E[:, None, None], 0.0), None


def grouped_experts(
    x_NC: Tensor, gate_up_EOC: Tensor, down_ECI: Tensor, chosen_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """The same by torch's grouped matrix multiplication: one launch for all experts, and nothing waits for a GPU."""
    if not len(x_NC):
        # As may happen under expert parallelism. On GPUs, torch's refuses the backward pass of an empty operand, and no
        # multiplication is left (pytorch pull request 192497, open with torch 2.13).
        return sorted_experts(x_NC, gate_up_EOC, down_ECI, chosen_NK, weights_NK)
    tokens_S, places_NK, ends_E = sort_by_expert(chosen_NK, len(gate_up_EOC))
    gate_up_EOC, down_ECI = (_ZeroWithoutTokens.apply(matrices, ends_E) for matrices in (gate_up_EOC, down_ECI))
    x_SC = _ToPairs.apply(x_NC, tokens_S, places_NK)
    gate_up_SO = F.grouped_mm(x_SC, gate_up_EOC.transpose(1, 2), offs=ends_E)
    activate = swiglu_packed if support.available(x_NC.device) else swiglu_packed_reference
    weights_S1 = weights_NK.flatten()[places_NK.flatten().argsort(), None]
    h_SI = (activate(gate_up_SO) * weights_S1).to(x_NC.dtype)
    out_SC = F.grouped_mm(h_SI, down_ECI.transpose(1, 2), offs=ends_E)
    return _ToTokens.apply(out_SC, tokens_S, places_NK)


Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens (R, C), their experts (R, 1), weights (R, 1)) -> (R, C): the work of the experts that are here, by their
numbers among these."""


class Exchange(Protocol):
    """Brings pairs to the processes that hold their experts, and the results back, each with its gradients."""

    def __call__(self, x_SC: Tensor, weights_S: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        """Weighted results of the sorted pairs, (S, C).

        Args:
            counts_E: number of each expert's pairs, int32.
            compute: this process' part in the work on the pairs of all processes.
        """


def exchanged_experts(
    x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor, num_experts: int, exchange: Exchange, compute: Compute
) -> Tensor:
    """The same where each process holds some of the experts. A pair comes to its expert as a token of one expert, and a
    token adds up its own K results as everywhere.

    Args:
        num_experts: those of all processes.
    """
    tokens_S, places_NK, ends_E = sort_by_expert(chosen_NK, num_experts)
    x_SC = _ToPairs.apply(x_NC, tokens_S, places_NK)
    weights_S = _by_place(weights_NK.to(_wide(x_NC.dtype)), places_NK).squeeze(1)
    out_SC = exchange(x_SC, weights_S, ends_E.diff(prepend=ends_E.new_zeros(1)), compute)
    return _ToTokens.apply(out_SC, tokens_S, places_NK)


def _why_not_grouped(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"torch's grouped multiplication is for CUDA devices, not {device.type}"
    if dtype != torch.bfloat16:
        return f"torch's grouped multiplication takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _implementation(name: str, function: Callable, **options: Any) -> Implementation:
    return Implementation("experts", name, lambda: {"experts": function}, **options)


IMPLEMENTATIONS = (
    _implementation("reference", experts_reference, is_plain=True),
    _implementation(
        "grouped", grouped_experts, why_not=_why_not_grouped, is_fastest=lambda device, dtype: device.type == "cuda"
    ),
    _implementation("sorted", sorted_experts, is_fastest=lambda device, dtype: True),
)
