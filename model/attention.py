"""Causal self-attention with grouped queries, document masks and a KV cache.

Rows that hold several documents, and how each stays to itself:

    on a CPU        blocked: block by block, skipping what lies between documents (model/blocked_attention.py)
                    sdpa: document by document where that is less work, else under a mask
    on a GPU        varlen, flash_attn, xformers: one call that is told where documents begin, and computes nothing
                    between them; grouped heads stay grouped
                    sdpa: under a mask, with keys and values copied for each query head

Shapes: B batch, T new tokens, S tokens attended to (T plus what the cache holds), H query heads, K key and value
heads, D head dim, N = B T tokens of all rows, M documents.
"""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocked_attention import blocked_attention
from model.config import LlamaConfig
from model.dropout import DropoutKey, attention_dropout

if TYPE_CHECKING:
    from model.ops import Ops


class LayerCache:
    """Keys and values of one layer, written in place up to a fixed length."""

    def __init__(self, keys_BKSD: Tensor, values_BKSD: Tensor):
        self.keys_BKSD, self.values_BKSD = keys_BKSD, values_BKSD

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store T new tokens behind the `length` that are there; returns all keys and values so far."""
        end = length + k_BKTD.shape[2]
        self.keys_BKSD[:, :, length:end] = k_BKTD
        self.values_BKSD[:, :, length:end] = v_BKTD
        return self.keys_BKSD[:, :, :end], self.values_BKSD[:, :, :end]


def causal_mask(num_new: int, num_all: int, document_ids_BT: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query may see, bool (1 or B, 1, T, S): those not after it and in its document."""
    queries = torch.arange(num_all - num_new, num_all, device=device)
    mask = (queries[:, None] >= torch.arange(num_all, device=device))[None, None]
    if document_ids_BT is not None:
        mask = mask & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
    return mask


def document_lengths(document_ids_BT: Tensor) -> list[list[int]] | None:
    """Lengths of each row's documents, where attending document by document costs less than all T x T weights under a
    mask; else None. On the CPU.

    Measured there: a weight under a mask costs as much as 1.4 of plain causal attention, a call as much as 2,500.
    """
    batch, width = document_ids_BT.shape
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_ids_BT]
    weights = sum(length * length for row in lengths for length in row)
    calls = sum(map(len, lengths))
    return lengths if 0.7 * weights + 2500 * calls < batch * width * width else None


def attention_by_document(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, lengths: list[list[int]]) -> Tensor:
    """Causal attention within each document of each row; what lies between documents is never computed.

    The CPU's fused kernel computes every weight that a mask then throws away: of a row of 1,024 packed with ten
    documents that is four times the work, in bfloat16 seven times.
    """
    rows = []
    for q_HTD, k_KTD, v_KTD, row in zip(q_BHTD, k_BKTD, v_BKTD, lengths):
        documents = zip(*(x.split(row, dim=1) for x in (q_HTD, k_KTD, v_KTD)))
        out = [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=q.shape[0] != k.shape[0]
            )
            for q, k, v in documents
        ]
        rows.append(torch.cat(out, dim=2))
    return torch.cat(rows)


def sdpa_causal(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Causal attention by torch, which chooses its kernel; grouped heads are not copied."""
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD, is_causal=q_BHTD.shape[2] > 1, enable_gqa=q_BHTD.shape[1] != k_BKTD.shape[1]
    )


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Where documents begin among the tokens of all rows, and where the last ends: int32 (M + 1,). A row's border is a
    document's, too. On a CPU: on a GPU it would wait for the number of documents."""
    begins = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_full((1,), document_ids_BT.numel()))).to(torch.int32)


def implementation(name: str) -> tuple[Callable, Callable | None]:
    """(causal, packed) attention of a name, see model/ops.py. Both take q (B, H, T, D), k and v (B, K, T, D) and return
    (B, H, T, D); packed also takes the starts of `document_starts`."""
    if name == "varlen":
        return sdpa_causal, _torch_varlen()
    if name == "blocked":
        return blocked_attention, blocked_attention
    if name == "flash_attn":
        return _flash_attention()
    if name == "xformers":
        return _xformers_attention()
    return sdpa_causal, None


def _by_token(*tensors_BHTD: Tensor) -> tuple[Tensor, ...]:
    """(B, H, T, D) -> (N, H, D) each."""
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in tensors_BHTD)


def _by_head(out_NHD: Tensor, batch: int) -> Tensor:
    return out_NHD.unflatten(0, (batch, -1)).transpose(1, 2)


def _torch_varlen() -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 grouped heads need no word.
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def packed(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor) -> Tensor:
        batch, _, width, _ = q_BHTD.shape
        options = {"enable_gqa": q_BHTD.shape[1] != k_BKTD.shape[1]} if grouped else {}
        out_NHD = varlen_attn(
            *_by_token(q_BHTD, k_BKTD, v_BKTD), starts, starts, width, width, window_size=(-1, 0), **options
        )
        return _by_head(out_NHD, batch)

    return packed


def _flash_attention() -> tuple[Callable, Callable]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def causal(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD)), causal=True).transpose(1, 2)

    def packed(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor) -> Tensor:
        batch, _, width, _ = q_BHTD.shape
        out_NHD = flash_attn_varlen_func(
            *_by_token(q_BHTD, k_BKTD, v_BKTD), starts, starts, width, width, causal=True
        )
        return _by_head(out_NHD, batch)

    return causal, packed


def _xformers_attention() -> tuple[Callable, Callable]:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    def grouped(x_BTKD: Tensor, num_heads: int) -> Tensor:
        """(B, T, K, D) -> (B, T, K, H / K, D) without a copy: how xformers writes grouped heads."""
        per_group = num_heads // x_BTKD.shape[2]
        return x_BTKD[:, :, :, None].expand(-1, -1, -1, per_group, -1)

    def attend(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias: object) -> Tensor:
        heads, groups = q_BTHD.shape[2], k_BTKD.shape[2]
        if heads == groups:
            return memory_efficient_attention(q_BTHD, k_BTKD, v_BTKD, attn_bias=bias)
        q = q_BTHD.unflatten(2, (groups, heads // groups))
        k, v = grouped(k_BTKD, heads), grouped(v_BTKD, heads)
        return memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)

    def causal(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        return attend(*(x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD)), LowerTriangularMask()).transpose(1, 2)

    def packed(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor) -> Tensor:
        batch = q_BHTD.shape[0]
        bias = BlockDiagonalCausalMask.from_seqlens(starts.diff().tolist())
        out_1NHD = attend(*(x[None] for x in _by_token(q_BHTD, k_BKTD, v_BKTD)), bias)
        return _by_head(out_1NHD[0], batch)

    return causal, packed


def repeat_heads(x_BKSD: Tensor, num_heads: int) -> Tensor:
    """Copy each of K heads so often that there are H, side by side: (B, K, S, D) -> (B, H, S, D)."""
    return x_BKSD.repeat_interleave(num_heads // x_BKSD.shape[1], dim=1)


def plain_attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor, dropout_p: float, key: DropoutKey | None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, step by step: the reference, and the only path with attention dropout."""
    k_BHSD, v_BHSD = repeat_heads(k_BKSD, q_BHTD.shape[1]), repeat_heads(v_BKSD, q_BHTD.shape[1])
    scores_BHTS = (q_BHTD @ k_BHSD.transpose(-1, -2)).float() / math.sqrt(q_BHTD.shape[-1])
    weights_BHTS = scores_BHTS.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights_BHTS = attention_dropout(weights_BHTS, dropout_p, key)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, ops: "Ops"):
        super().__init__()
        self.config, self.ops = config, ops
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        x_BTC: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
        key: DropoutKey | None = None,
        documents: list[list[int]] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, hidden_size) -> the same shape.

        Args:
            mask: bool (1 or B, 1, T, S); None where causal says it all, or where `documents` or `starts` do.
            documents: lengths of each row's documents.
            starts: where they begin, see `document_starts`.
        """
        batch, num_new, _ = x_BTC.shape
        heads = (batch, num_new, -1, self.config.head_dim)
        q_BHTD, k_BKSD, v_BKSD = (
            project(x_BTC).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTD, k_BKSD = self.ops.rope(q_BHTD, k_BKSD, *rope)
        if cache is not None:
            k_BKSD, v_BKSD = cache.append(k_BKSD, v_BKSD, cache_length)
        drops = self.config.attention_dropout > 0.0 and key is not None
        if drops or self.ops.is_plain:
            full_mask = causal_mask(num_new, k_BKSD.shape[2], None, x_BTC.device) if mask is None else mask
            out_BHTD = plain_attention(q_BHTD, k_BKSD, v_BKSD, full_mask, self.config.attention_dropout, key)
        elif starts is not None:
            out_BHTD = self.ops.packed(q_BHTD, k_BKSD, v_BKSD, starts)
        elif mask is None and cache is None and documents is None:
            out_BHTD = self.ops.causal(q_BHTD, k_BKSD, v_BKSD)
        elif documents is not None:
            out_BHTD = attention_by_document(q_BHTD, k_BKSD, v_BKSD, documents)
        else:
            if mask is not None and k_BKSD.is_cuda:
                # No fused CUDA kernel takes grouped heads together with a mask: it would be the one that stores all
                # T x S weights.
                k_BKSD, v_BKSD = repeat_heads(k_BKSD, q_BHTD.shape[1]), repeat_heads(v_BKSD, q_BHTD.shape[1])
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD,
                k_BKSD,
                v_BKSD,
                attn_mask=mask,
                is_causal=mask is None and num_new > 1,
                enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
            )
        return self.o_proj(out_BHTD.transpose(1, 2).reshape(batch, num_new, -1))
