"""Rotary position embedding (Su et al., 2021) of queries and keys in one launch.

With the angle a of a token's position and a pair of channels (i, j):

    y_i = x_i cos a - x_j sin a
    y_j = x_j cos a + x_i sin a

The first R channels of a head are rotated, R being twice the tables' width; the others stay as they are. The pairs are
(i, i + R/2), Hugging Face's usual convention, or interleaved ones, (2i, 2i + 1). The tables may contain a scale.

A rotation's gradient is the rotation back, with the same scale: the same kernel with -sin. Only the tables are kept.
Arithmetic is float32, and float64 if queries or keys are float32 (see launch.py).

Memory traffic: q and k read once and written once, in either pass.

Shapes: B batch, H query heads, K key heads, T tokens, D head dim, R rotated channels of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.kernels.launch import check_dtypes, constexpr, jit, kernel_op, next_power_of_2, tl, work_dtype
from model.kernels.registry import Implementation, needs_package, needs_triton, runs_triton
from model.rope import apply_rope

PAIRS_PER_WARP = 256
"""Eight pairs a thread: two 16-byte loads of bfloat16."""
MAX_WARPS = 16


def rope_reference(
    q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition, in float32; each result in its input's dtype."""
    return apply_rope(q_BHTD, cos, sin, interleaved), apply_rope(k_BKTD, cos, sin, interleaved)


@jit
def _rotate_heads(
    x_ptr, out_ptr, head_stride, channel_stride, cos, sin,
    HEADS: constexpr, BLOCK_H: constexpr, HALF: constexpr, BLOCK_HALF: constexpr, REST: constexpr,
    BLOCK_REST: constexpr, INTERLEAVED: constexpr,
):  # fmt: skip
    """All heads of one token, out contiguous: HALF pairs, then REST channels that are copied."""
    heads, pairs = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    inside = (heads < HEADS) & (pairs < HALF)
    channels, apart = (2 * pairs, 1) if INTERLEAVED else (pairs, HALF)
    source = x_ptr + heads * head_stride + channels * channel_stride
    first = tl.load(source, mask=inside, other=0.0).to(cos.dtype)
    second = tl.load(source + apart * channel_stride, mask=inside, other=0.0).to(cos.dtype)
    target = out_ptr + heads * (2 * HALF + REST) + channels
    tl.store(target, (first * cos - second * sin).to(tl.float32), mask=inside)
    tl.store(target + apart, (second * cos + first * sin).to(tl.float32), mask=inside)
    if REST:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside = (heads < HEADS) & (rest < 2 * HALF + REST)
        kept = tl.load(x_ptr + heads * head_stride + rest * channel_stride, mask=inside, other=0.0)
        tl.store(out_ptr + heads * (2 * HALF + REST) + rest, kept, mask=inside)


@jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, num_tokens,
    q_batch_stride, q_head_stride, q_token_stride, q_channel_stride,
    k_batch_stride, k_head_stride, k_token_stride, k_channel_stride,
    cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride,
    BACK: constexpr, WIDE: constexpr, Q_HEADS: constexpr, K_HEADS: constexpr, BLOCK_Q: constexpr,
    BLOCK_K: constexpr, HALF: constexpr, BLOCK_HALF: constexpr, REST: constexpr, BLOCK_REST: constexpr,
    INTERLEAVED: constexpr,
):  # fmt: skip
    """One token a program; forward, or BACK by the negative angle. WIDE: in float64."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // num_tokens, program % num_tokens
    pairs = tl.arange(0, BLOCK_HALF)
    inside = pairs < HALF
    cos = tl.load(cos_ptr + batch * cos_batch_stride + token * cos_token_stride + pairs, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + batch * sin_batch_stride + token * sin_token_stride + pairs, mask=inside, other=0.0)
    if BACK:
        sin = -sin
    work = tl.float64 if WIDE else tl.float32
    cos, sin = cos.to(work), sin.to(work)
    head_dim = 2 * HALF + REST
    _rotate_heads(
        q_ptr + batch * q_batch_stride + token * q_token_stride, q_out_ptr + program * (head_dim * Q_HEADS),
        q_head_stride, q_channel_stride, cos[None, :], sin[None, :], Q_HEADS, BLOCK_Q, HALF, BLOCK_HALF,
        REST, BLOCK_REST, INTERLEAVED,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + batch * k_batch_stride + token * k_token_stride, k_out_ptr + program * (head_dim * K_HEADS),
        k_head_stride, k_channel_stride, cos[None, :], sin[None, :], K_HEADS, BLOCK_K, HALF, BLOCK_HALF,
        REST, BLOCK_REST, INTERLEAVED,
    )  # fmt: skip


def _empty_rope(
    q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    """Views (B, H, T, D) of (B, T, H, D) memory, which is reshaped to the projections' gradients without a copy."""
    q_out, k_out = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q_BHTD, k_BKTD))
    return q_out, k_out


@kernel_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool back) -> (Tensor, Tensor)", _empty_rope
)
def _rope(
    q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty_rope(q_BHTD, k_BKTD, cos, sin, interleaved, back)
    batch, q_heads, num_tokens, head_dim = q_BHTD.shape
    k_heads, half = k_BKTD.shape[1], cos.shape[-1]
    rest = head_dim - 2 * half
    cos_BTP, sin_BTP = (table.squeeze(1).expand(batch, -1, -1) for table in (cos.contiguous(), sin.contiguous()))
    wide = torch.float64 in (work_dtype(q_BHTD.dtype), work_dtype(k_BKTD.dtype))
    block_q, block_k, block_half, block_rest = (next_power_of_2(size) for size in (q_heads, k_heads, half, rest or 1))
    _rope_kernel[(batch * num_tokens,)](
        q_BHTD, k_BKTD, q_out, k_out, cos_BTP, sin_BTP, num_tokens, *q_BHTD.stride(), *k_BKTD.stride(),
        cos_BTP.stride(0), cos_BTP.stride(1), sin_BTP.stride(0), sin_BTP.stride(1), BACK=back, WIDE=wide,
        Q_HEADS=q_heads, K_HEADS=k_heads, BLOCK_Q=block_q, BLOCK_K=block_k, HALF=half, BLOCK_HALF=block_half,
        REST=rest, BLOCK_REST=block_rest, INTERLEAVED=interleaved,
        num_warps=min(max(block_q * block_half // PAIRS_PER_WARP, 1), MAX_WARPS),
    )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rope(q_BHTD, k_BKTD, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx, dq_BHTD: Tensor, dk_BKTD: Tensor):
        return *_rope(dq_BHTD, dk_BKTD, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def rope(
    q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their tokens' angles; returns new tensors of the same shapes and dtypes, contiguous
    when transposed to (B, T, H, D).

    Args:
        q_BHTD, k_BKTD: any strides; H and K may differ.
        cos, sin: float32 (B or 1, 1, T, R / 2), without gradient.
        interleaved: the pairs are (2i, 2i + 1), not (i, i + R/2).
    """
    check_dtypes(q_BHTD, k_BKTD)
    batch, _, num_tokens, head_dim = q_BHTD.shape
    for table in (cos, sin):
        fits = table.shape[1:] == (1, num_tokens, cos.shape[-1]) and 2 * cos.shape[-1] <= head_dim
        if table.dtype != torch.float32 or not fits:
            raise ValueError(
                f"rope needs float32 tables (B or 1, 1, T, R / 2) with R at most the head dim: got "
                f"{tuple(table.shape)} in {table.dtype} for queries {tuple(q_BHTD.shape)}"
            )
    return _Rope.apply(q_BHTD, k_BKTD, cos, sin, interleaved)


def _liger() -> dict[str, Callable]:
    from liger_kernel.ops.rope import LigerRopeFunction

    def rope(
        q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        assert not interleaved and 2 * cos.shape[-1] == q_BHTD.shape[-1], "liger rotates the halves of whole heads"
        # It takes both halves, (B, T, D).
        wide_cos, wide_sin = (torch.cat((table, table), dim=-1)[:, 0].to(q_BHTD.dtype) for table in (cos, sin))
        return LigerRopeFunction.apply(q_BHTD, k_BKTD, wide_cos, wide_sin)

    return {"rope": rope}


IMPLEMENTATIONS = (
    Implementation("rope", "reference", lambda: {"rope": rope_reference}, is_plain=True),
    Implementation("rope", "triton", lambda: {"rope": rope}, needs_triton, runs_triton),
    Implementation(
        "rope", "liger", _liger, needs_package("liger", "liger_kernel"), lacks=frozenset({"interleaved", "partial"})
    ),
)
