"""Implementations of causal attention with grouped queries. The layer in model/attention.py chooses among them.

Sliding windows and ALiBi reach sdpa and plain as a mask (model/attend.py), the others as numbers: they compute nothing
outside the window.

The documents of a row do not see each other:

    on a CPU        blocked: block by block, skipping the weights between documents (blocked_attention.py)
                    sdpa: document by document if that is less work, otherwise under a mask
    on a GPU        varlen, flash_attn, xformers: one call that knows where documents begin, and computes nothing
                    between them; grouped heads stay grouped
                    sdpa: under a mask, with keys and values copied for each query head

Where a process has a part of each row's queries, they are tails of documents, with earlier keys: varlen and flash_attn
know where both begin, the others take a mask.

Shapes: B batch, T new tokens, S tokens attended to (T plus what the cache holds), H query heads, K key and value
heads, D head dim, N = B T tokens of all rows, M documents.
"""

import importlib.util
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dropout import DropoutKey, attention_dropout
from model.kernels.registry import Implementation, needs_half, needs_package


def _is_read_right(mask: Tensor | None, q_BHTD: Tensor) -> bool:
    """Whether torch reads a mask as it is. Scores of another dtype than the queries' are refused or, beside float64,
    misread in silence (torch 2.13); but CPUs take float32 beside 16 bits."""
    if mask is None or mask.dtype in (torch.bool, q_BHTD.dtype):
        return True
    return mask.dtype == torch.float32 and q_BHTD.dtype.itemsize == 2 and not q_BHTD.is_cuda


def attention_by_document(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, lengths: list[list[int]], mask: Tensor | None = None
) -> Tensor:
    """Causal attention within each document of each row; weights between documents are never computed.

    The CPU's fused kernel computes every weight that a mask then throws away. For a row of 1,024 tokens packed with ten
    documents that is four times the work, in bfloat16 seven times.

    Args:
        mask: of the longest document, see `sdpa_masked`; None: causal.
    """
    assert _is_read_right(mask, q_BHTD)
    rows = []
    for q_HTD, k_KTD, v_KTD, row in zip(q_BHTD, k_BKTD, v_BKTD, lengths):
        documents = zip(*(x.split(row, dim=1) for x in (q_HTD, k_KTD, v_KTD)))
        out = [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], None if mask is None else mask[..., : q.shape[1], : q.shape[1]],
                is_causal=mask is None, enable_gqa=q.shape[0] != k.shape[0],
            )
            for q, k, v in documents
        ]
        rows.append(torch.cat(out, dim=2))
    return torch.cat(rows)


def sdpa_causal(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int = 0, slopes_H: Tensor | None = None
) -> Tensor:
    """Causal attention by torch, which chooses its kernel; grouped heads are not copied."""
    assert not window and slopes_H is None, "sdpa knows windows and ALiBi by a mask"
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD, is_causal=q_BHTD.shape[2] > 1, enable_gqa=q_BHTD.shape[1] != k_BKTD.shape[1]
    )


def sdpa_masked(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by torch under a mask, or with a cache.

    Args:
        mask: keys that are seen, bool (1 or B, 1, T, S), or what is added to scores, (1 or B, H, T, S); None: causal if
            there are several queries, all keys if there is one.
    """
    assert _is_read_right(mask, q_BHTD)
    if q_BHTD.shape[2] == 1:
        return _single_query(q_BHTD, k_BKSD, v_BKSD, mask)
    if mask is not None and k_BKSD.is_cuda:
        # No fused CUDA kernel takes grouped heads together with a mask: torch would fall back to the kernel that
        # stores all T x S weights.
        k_BKSD, v_BKSD = repeat_heads(k_BKSD, q_BHTD.shape[1]), repeat_heads(v_BKSD, q_BHTD.shape[1])
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None and q_BHTD.shape[2] > 1,
        enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
    )  # fmt: skip


def _single_query(q_BH1D: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    """The same for one query a row. The heads of a group are like queries of one head, so each key is read once."""
    batch, groups = k_BKSD.shape[:2]
    q_BKGD, heads = q_BH1D.reshape(batch, groups, -1, q_BH1D.shape[-1]), q_BH1D.shape[1]
    if mask is not None and mask.shape[1] == heads:
        mask = mask.unflatten(1, (groups, -1)).squeeze(3)
    if not q_BKGD.is_cuda:
        # CPUs multiply a vector in float32 four times as fast as in bfloat16, the conversion included.
        q_BKGD, k_BKSD, v_BKSD = (x.float() if x.dtype.itemsize == 2 else x for x in (q_BKGD, k_BKSD, v_BKSD))
    return F.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=mask).reshape(q_BH1D.shape).to(q_BH1D.dtype)


def _by_token(*tensors_BHTD: Tensor) -> tuple[Tensor, ...]:
    """(B, H, T, D) -> (N, H, D) each."""
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in tensors_BHTD)


def _by_head(out_NHD: Tensor, batch: int) -> Tensor:
    return out_NHD.unflatten(0, (batch, -1)).transpose(1, 2)


def _torch_varlen() -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 grouped heads need no argument.
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    # Its arguments depend on torch's version, and its results on its arguments.
    attend: Any = varlen_attn

    def packed(
        q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor, window: int = 0, slopes_H: Tensor | None = None
    ) -> Tensor:
        assert slopes_H is None, "varlen lacks ALiBi"
        return tails(q_BHTD, k_BKTD, v_BKTD, starts, starts, window, slopes_H)

    def tails(
        q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, starts: Tensor, key_starts: Tensor, window: int = 0,
        slopes_H: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert slopes_H is None, "varlen lacks ALiBi"
        batch, heads, width, _ = q_BHTD.shape
        options = {"enable_gqa": heads != k_BKSD.shape[1]} if grouped else {}
        out_NHD = attend(
            *_by_token(q_BHTD, k_BKSD, v_BKSD), starts, key_starts, width, k_BKSD.shape[2],
            window_size=(window - 1, 0), **options,
        )  # fmt: skip
        return _by_head(out_NHD, batch)

    def causal(
        q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int = 0, slopes_H: Tensor | None = None
    ) -> Tensor:
        if not window:
            return sdpa_causal(q_BHTD, k_BKTD, v_BKTD, window, slopes_H)
        batch, _, width, _ = q_BHTD.shape
        starts = torch.arange(0, batch * width + 1, width, dtype=torch.int32, device=q_BHTD.device)
        return packed(q_BHTD, k_BKTD, v_BKTD, starts, window, slopes_H)

    return {"causal": causal, "packed": packed, "tails": tails, "by_mask": False}


def _flash_attention() -> dict[str, Any]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def options(window: int, slopes_H: Tensor | None) -> dict[str, Any]:
        found: dict[str, Any] = {"causal": True}
        # How many keys before and after itself a query sees.
        found |= {"window_size": (window - 1, 0)} if window else {}
        return found | ({"alibi_slopes": slopes_H} if slopes_H is not None else {})

    def causal(
        q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int = 0, slopes_H: Tensor | None = None
    ) -> Tensor:
        by_time = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
        return flash_attn_func(*by_time, **options(window, slopes_H)).transpose(1, 2)

    def packed(
        q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor, window: int = 0, slopes_H: Tensor | None = None
    ) -> Tensor:
        return tails(q_BHTD, k_BKTD, v_BKTD, starts, starts, window, slopes_H)

    def tails(
        q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, starts: Tensor, key_starts: Tensor, window: int = 0,
        slopes_H: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        batch, _, width, _ = q_BHTD.shape
        out_NHD = flash_attn_varlen_func(
            *_by_token(q_BHTD, k_BKSD, v_BKSD), starts, key_starts, width, k_BKSD.shape[2],
            **options(window, slopes_H),
        )  # fmt: skip
        return _by_head(out_NHD, batch)

    return {"causal": causal, "packed": packed, "tails": tails, "by_mask": False}


def _xformers_attention() -> dict[str, Any]:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    def grouped(x_BTKD: Tensor, num_heads: int) -> Tensor:
        """(B, T, K, D) -> (B, T, K, H / K, D) without a copy: how xformers writes grouped heads."""
        per_group = num_heads // x_BTKD.shape[2]
        return x_BTKD[:, :, :, None].expand(-1, -1, -1, per_group, -1)

    def attend(bias: object, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        heads, groups = q_BTHD.shape[2], k_BTKD.shape[2]
        if heads == groups:
            return memory_efficient_attention(q_BTHD, k_BTKD, v_BTKD, attn_bias=bias)
        q = q_BTHD.unflatten(2, (groups, heads // groups))
        k, v = grouped(k_BTKD, heads), grouped(v_BTKD, heads)
        return memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)

    def causal(
        q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int = 0, slopes_H: Tensor | None = None
    ) -> Tensor:
        assert not window and slopes_H is None, "xformers lacks windows and ALiBi"
        return attend(LowerTriangularMask(), *(x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))).transpose(1, 2)

    def packed(
        q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor, window: int = 0, slopes_H: Tensor | None = None
    ) -> Tensor:
        assert not window and slopes_H is None, "xformers lacks windows and ALiBi"
        batch = q_BHTD.shape[0]
        bias = BlockDiagonalCausalMask.from_seqlens(starts.diff().tolist())
        out_1NHD = attend(bias, *(x[None] for x in _by_token(q_BHTD, k_BKTD, v_BKTD)))
        return _by_head(out_1NHD[0], batch)

    return {"causal": causal, "packed": packed}


def repeat_heads(x_BKSD: Tensor, num_heads: int) -> Tensor:
    """Repeat each of K heads H / K times, side by side: (B, K, S, D) -> (B, H, S, D)."""
    return x_BKSD.repeat_interleave(num_heads // x_BKSD.shape[1], dim=1)


def plain_attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor, dropout_p: float, key: DropoutKey | None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, step by step: the reference, and the only path with attention dropout. The mask is as
    in `sdpa_masked`."""
    k_BHSD, v_BHSD = repeat_heads(k_BKSD, q_BHTD.shape[1]), repeat_heads(v_BKSD, q_BHTD.shape[1])
    scores_BHTS = (q_BHTD @ k_BHSD.transpose(-1, -2)).float() / math.sqrt(q_BHTD.shape[-1])
    is_bool = mask.dtype == torch.bool
    scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf")) if is_bool else scores_BHTS + mask.float()
    weights_BHTS = scores_BHTS.softmax(dim=-1)
    weights_BHTS = attention_dropout(weights_BHTS, dropout_p, key)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


def _varlen_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen"
    return needs_half("varlen", dtype)


def _flash_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return needs_package("flash_attn", "flash_attn")(device, dtype) or needs_half("flash_attn", dtype)


IMPLEMENTATIONS = (
    Implementation("attention", "sdpa", lambda: {"causal": sdpa_causal}, is_plain=True),
    Implementation("attention", "plain", lambda: {"step_by_step": True}),
    Implementation(
        "attention", "varlen", _torch_varlen, _varlen_why_not, is_fastest=lambda device, dtype: device.type == "cuda",
        lacks=frozenset({"alibi"}),
    ),
    Implementation("attention", "flash_attn", _flash_attention, _flash_why_not),
    Implementation(
        "attention", "xformers", _xformers_attention, needs_package("xformers", "xformers"),
        lacks=frozenset({"window", "alibi"}),
    ),
)  # fmt: skip
