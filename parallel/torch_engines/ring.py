"""Ring attention: keys and values go from rank to rank, and no rank holds those of a whole row (Liu et al., "Ring
attention with blockwise transformers for near-infinite context", 2023). The ring is torch's, which is experimental.

    forward    c rounds: attend to the keys and values that are here, while they travel on to the next rank; what the
               rounds give is merged by the logarithms of the softmax's sums
    backward   the same again, and the gradients of keys and values travel along until they are home

With B rows of T positions, c ranks, K key heads of D channels, and e bytes an element, on each rank:

    bytes sent a layer   forward    2 B K D e T (c - 1) / c, as much as a gather
                         backward   the same, and gradients in float32: 2 B K D 4 T
    memory               keys and values of 3 T / c positions at a time, instead of T

So it saves memory, not bytes; and the transfer of a round hides under the attention of another. It knows only causal
attention within rows of one document.

On a GPU the kernel is flash attention, for 16 bits. On a CPU it is torch's fused one, for tests.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

_aten = torch.ops.aten


class Ring:
    """Causal attention over rows whose positions a group's ranks share: of 2 c chunks, rank r has r and 2 c - 1 - r."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        # By default torch would gather all keys and values at once.
        torch_ring.set_rotate_method("alltoall")

    def attend(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Heads' outputs (B, H, T, D) of this rank's T positions; K divides H."""
        return _RingAttention.apply(self._group, q_BHTD, k_BKTD, v_BKTD)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        q_BHTD = q_BHTD.contiguous()
        out_BHTD, sums_BHT, *random = torch_ring._templated_ring_attention(
            group, 2, cast(Any, _attend), q_BHTD, k_BKTD, v_BKTD, is_causal=True
        )
        ctx.group = group
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, out_BHTD, sums_BHT, *random)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, up_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTD, k_BKTD, v_BKTD, out_BHTD, sums_BHT, *random = ctx.saved_tensors
        gradients = torch_ring._templated_ring_attention_backward(
            ctx.group, 2, cast(Any, _attend_backward), up_BHTD.contiguous(), "grad_out", q_BHTD, k_BKTD, v_BKTD,
            out_BHTD, sums_BHT, is_causal=True, random=random,
        )  # fmt: skip
        return None, *gradients[:3]


def _attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """Outputs, logarithms of the softmax's sums, and the generator's state, which nothing uses without dropout."""
    key, value = _repeated(key, query), _repeated(value, query)
    if not query.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)
    out, sums, *_, seed, offset, _ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)
    return out, sums, seed, offset


def _attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool,
    random: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a round's queries, keys and values."""
    arguments = grad_out, query, _repeated(key, query), _repeated(value, query), out, logsumexp
    if query.is_cuda:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            *arguments, None, None, query.shape[2], key.shape[2], 0.0, is_causal, *random
        )
    else:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, 0.0, is_causal)
    return dq, _summed(dk, key), _summed(dv, value)


def _repeated(x_BKTD: Tensor, query: Tensor) -> Tensor:
    """Each of K heads as often as queries share it: (B, H, T, D). Only the K heads travel."""
    return x_BKTD.repeat_interleave(query.shape[1] // x_BKTD.shape[1], dim=1)


def _summed(dx_BHTD: Tensor, x_BKTD: Tensor) -> Tensor:
    """Gradient (B, K, T, D) of heads that were repeated."""
    return dx_BHTD.unflatten(1, (x_BKTD.shape[1], -1)).sum(2)
