"""Attention of one query a sequence, whose keys and values are in blocks of a pool (Kwon et al., "PagedAttention",
2023).

    o = softmax(q K^T / sqrt(D) - slope distance) V         over the keys of the sequence, or the last `window` of them

The new token's own key is stored already. Its distance is 0.

A GPU has more multiprocessors than there are sequences and heads, so a sequence's keys are shared out
("Flash-Decoding": Dao et al., 2023). A program has one sequence, one key head with the query heads of its group, and
SPLIT keys:

    m = max s,   l = sum exp(s - m),   a = sum exp(s - m) v

A second kernel adds the parts of a sequence, in order: o = sum_i exp(m_i - m) a_i / sum_i exp(m_i - m) l_i. What a
sequence gets depends on its own keys alone, to the bit, whoever else is in the batch: parts begin at fixed keys.

Memory traffic: each key and value of a sequence once. Arithmetic: products in the dtype of keys and values, with
float32 sums; the weights are rounded to that dtype before they meet the values, as in other fused kernels.

Shapes: N sequences, H query heads, K key and value heads, G = H / K, D head dim, P slots of the pool, M blocks of the
longest sequence, R parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.launch import check_dtypes, constexpr, jit, kernel_op, next_power_of_2, tl
from model.kernels.paged_attention import Single
from model.kernels.registry import Implementation, needs_triton, runs_triton

SPLIT = 256
"""Keys of a part."""
TILE = 64
"""Keys that a program reads at a time."""


class Table(NamedTuple):
    """Sequences with one query each, and where their keys are."""

    rows_N: Tensor | None
    """Places of their tokens among all new ones, int64; None: they are all, in order."""
    blocks_NM: Tensor
    """Blocks of each sequence, int32; any after its last one. Slot n is token n % block_size of block n // block_size.
    """
    lengths_N: Tensor
    """Keys of each sequence, int32, at least 1."""
    longest: int
    """The greatest length."""
    block_size: int
    window: int = 0
    """Latest keys that a query sees, itself among them; 0: all."""
    slopes: Tensor | None = None
    """ALiBi's, float32 (H,); None: no ALiBi."""


def table_of(
    texts: Sequence[Single], num_rows: int, block_size: int, window: int, slopes_H: Tensor | None,
    device: torch.device,
) -> Table:  # fmt: skip
    """The table of a pass; arguments as of `paged_attention.groups_of`."""
    rows = [text.row for text in texts]
    # All but the places of the tokens in one copy to the device: block tables, and the lengths in a last column.
    width = max(len(text.blocks) for text in texts)
    lines = [[*text.blocks, *[0] * (width - len(text.blocks)), text.length] for text in texts]
    all_N = torch.tensor(lines, dtype=torch.int32, device=device)
    rows_N = None if rows == list(range(num_rows)) else torch.tensor(rows, device=device)
    longest = max(text.length for text in texts)
    return Table(rows_N, all_N[:, :-1], all_N[:, -1].contiguous(), longest, block_size, window, slopes_H)


def attend_table_reference(q_NHD: Tensor, keys_KPD: Tensor, values_KPD: Tensor, table: Table) -> Tensor:
    """The definition, sequence by sequence; see `attend_table`."""
    outputs = []
    for q_HD, blocks_M, length in zip(q_NHD, table.blocks_NM, table.lengths_N.tolist()):
        first = max(length - table.window, 0) if table.window else 0
        keys = torch.arange(first, length, device=q_NHD.device)
        slots = blocks_M[keys // table.block_size] * table.block_size + keys % table.block_size
        bias = None
        if table.slopes is not None:
            bias = (-table.slopes[:, None, None] * (length - 1 - keys)).to(q_NHD.dtype)[None]
        k_1KSD, v_1KSD = (x_KPD[None, :, slots] for x_KPD in (keys_KPD, values_KPD))
        out_1H1D = F.scaled_dot_product_attention(q_HD[None, :, None], k_1KSD, v_1KSD, bias, enable_gqa=True)
        outputs.append(out_1H1D[0, :, 0])
    return torch.stack(outputs)


@jit
def _attend_part_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, lengths_ptr, slopes_ptr, max_ptr, sum_ptr, out_ptr, scale,
    q_stride, q_head_stride, slot_stride, head_stride, table_stride, num_parts,
    BLOCK_SIZE: constexpr, WINDOW: constexpr, ALIBI: constexpr, GROUP: constexpr, BLOCK_G: constexpr, DIM: constexpr,
    BLOCK_D: constexpr, SPLIT: constexpr, TILE: constexpr,
):  # fmt: skip
    """One part of a sequence's keys, for the query heads of one key head."""
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    length = tl.load(lengths_ptr + row)
    first = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    begin = (first // SPLIT + part) * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    places, channels, tile = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    heads, is_head, is_channel = kv_head * GROUP + places, places < GROUP, channels < DIM
    q = tl.load(
        q_ptr + row * q_stride + heads[:, None] * q_head_stride + channels[None, :],
        mask=is_head[:, None] & is_channel[None, :], other=0.0,
    )  # fmt: skip
    slopes = tl.load(slopes_ptr + heads, mask=is_head, other=0.0) if ALIBI else tl.zeros((BLOCK_G,), tl.float32)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    mixed = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(begin, end, TILE):
        keys = start + tile
        is_seen = (keys >= first) & (keys < end)
        block = tl.load(blocks_ptr + row * table_stride + keys // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slots = block * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = slots[:, None] * slot_stride + kv_head * head_stride + channels[None, :]
        is_there = is_seen[:, None] & is_channel[None, :]
        k = tl.load(k_ptr + offsets, mask=is_there, other=0.0)
        v = tl.load(v_ptr + offsets, mask=is_there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if ALIBI:
            scores -= slopes[:, None] * (length - 1 - keys)[None, :].to(tl.float32)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        # A tile before the window has no key that is seen: -inf less -inf would be NaN.
        now = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - shift[:, None])
        rescale = tl.exp(largest - shift)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = now
    place = (row * num_heads + heads) * num_parts + part
    tl.store(max_ptr + place, largest, mask=is_head)
    tl.store(sum_ptr + place, total, mask=is_head)
    tl.store(
        out_ptr + place[:, None] * DIM + channels[None, :], mixed, mask=is_head[:, None] & is_channel[None, :]
    )  # fmt: skip


@jit
def _add_parts_kernel(
    max_ptr, sum_ptr, mixed_ptr, lengths_ptr, out_ptr, num_parts, num_heads,
    WINDOW: constexpr, DIM: constexpr, BLOCK_D: constexpr, SPLIT: constexpr,
):  # fmt: skip
    """Output of one head of one sequence: its parts, added up in order."""
    place = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + place // num_heads)
    first = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    own_parts = (length - 1) // SPLIT - first // SPLIT + 1
    channels = tl.arange(0, BLOCK_D)
    is_channel = channels < DIM
    largest = tl.load(max_ptr + place * num_parts)
    total = tl.load(sum_ptr + place * num_parts)
    mixed = tl.load(mixed_ptr + place * num_parts * DIM + channels, mask=is_channel, other=0.0)
    for part in range(1, own_parts):
        its_largest = tl.load(max_ptr + place * num_parts + part)
        now = tl.maximum(largest, its_largest)
        old, new = tl.exp(largest - now), tl.exp(its_largest - now)
        its_mixed = tl.load(mixed_ptr + (place * num_parts + part) * DIM + channels, mask=is_channel, other=0.0)
        total = total * old + tl.load(sum_ptr + place * num_parts + part) * new
        mixed = mixed * old + its_mixed * new
        largest = now
    tl.store(out_ptr + place * DIM + channels, (mixed / total).to(out_ptr.dtype.element_ty), mask=is_channel)


def _empty_like_queries(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, lengths: Tensor, slopes: Tensor | None, block_size: int,
    window: int, num_parts: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@kernel_op(
    "paged_decoding(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor lengths, Tensor? slopes, int block_size, "
    "int window, int num_parts) -> Tensor", _empty_like_queries,
)  # fmt: skip
def _paged_decoding(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, lengths: Tensor, slopes: Tensor | None, block_size: int,
    window: int, num_parts: int,
) -> Tensor:  # fmt: skip
    num_rows, num_heads, dim = q.shape
    kv_heads = len(k)
    largest, total = q.new_empty(2, num_rows, num_heads, num_parts, dtype=torch.float32).unbind(0)
    mixed = q.new_empty(num_rows, num_heads, num_parts, dim, dtype=torch.float32)
    out = _empty_like_queries(q, k, v, blocks, lengths, slopes, block_size, window, num_parts)
    # Products of matrices need at least 16 rows and columns.
    block_d = max(next_power_of_2(dim), 16)
    block_g = max(next_power_of_2(num_heads // kv_heads), 16)
    _attend_part_kernel[(num_rows, kv_heads, num_parts)](
        q, k, v, blocks, lengths, lengths if slopes is None else slopes, largest, total, mixed, 1 / math.sqrt(dim),
        q.stride(0), q.stride(1), k.stride(1), k.stride(0), blocks.stride(0), num_parts, BLOCK_SIZE=block_size,
        WINDOW=window, ALIBI=slopes is not None, GROUP=num_heads // kv_heads, BLOCK_G=block_g, DIM=dim,
        BLOCK_D=block_d, SPLIT=SPLIT, TILE=TILE, num_warps=4,
    )  # fmt: skip
    _add_parts_kernel[(num_rows * num_heads,)](
        largest, total, mixed, lengths, out, num_parts, num_heads, WINDOW=window, DIM=dim, BLOCK_D=block_d,
        SPLIT=SPLIT, num_warps=1,
    )  # fmt: skip
    return out


def num_parts_of(longest: int, window: int = 0) -> int:
    """Number of parts for sequences of at most so many keys."""
    parts = -(-longest // SPLIT)
    # A window may begin with the last key of a part.
    return min(parts, (window - 2) // SPLIT + 2) if window else parts


def attend_table(q_NHD: Tensor, keys_KPD: Tensor, values_KPD: Tensor, table: Table) -> Tensor:
    """Heads' outputs (N, H, D) of one query a sequence, contiguous.

    Args:
        q_NHD: channels side by side in memory.
        keys_KPD, values_KPD: of all slots of the pool, strided alike.
    """
    check_dtypes(q_NHD, keys_KPD, values_KPD)
    assert keys_KPD.stride() == values_KPD.stride() and keys_KPD.stride(2) == q_NHD.stride(2) == 1
    num_parts = num_parts_of(table.longest, table.window)
    return _paged_decoding(
        q_NHD, keys_KPD, values_KPD, table.blocks_NM, table.lengths_N, table.slopes, table.block_size, table.window,
        num_parts,
    )  # fmt: skip


IMPLEMENTATIONS = (
    # Texts in groups, by matrix products of torch: paged_attention.py.
    Implementation("paged_decoding", "groups", lambda: {"paged": None}, is_plain=True),
    Implementation("paged_decoding", "reference", lambda: {"paged": attend_table_reference}),
    Implementation("paged_decoding", "triton", lambda: {"paged": attend_table}, needs_triton, runs_triton),
)
