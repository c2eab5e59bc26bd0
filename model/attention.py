"""Causal self-attention with grouped queries, document masks and a KV cache.

Shapes: B batch, T new tokens, S tokens attended to (T plus what the cache holds), H query heads, K key and value
heads, D head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LlamaConfig
from model.dropout import ATTENTION_WEIGHTS, DropoutKey, dropout
from model.rope import apply_rope


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
    weights_BHTS = dropout(weights_BHTS, dropout_p, key, ATTENTION_WEIGHTS)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
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
    ) -> Tensor:
        """x (B, T, hidden_size) -> the same shape.

        Args:
            mask: bool (1 or B, 1, T, S); None where causal says it all, or where `documents` does.
            documents: lengths of each row's documents.
        """
        batch, num_new, _ = x_BTC.shape
        heads = (batch, num_new, -1, self.config.head_dim)
        q_BHTD = apply_rope(self.q_proj(x_BTC).view(heads).transpose(1, 2), *rope)
        k_BKSD = apply_rope(self.k_proj(x_BTC).view(heads).transpose(1, 2), *rope)
        v_BKSD = self.v_proj(x_BTC).view(heads).transpose(1, 2)
        if cache is not None:
            k_BKSD, v_BKSD = cache.append(k_BKSD, v_BKSD, cache_length)
        if self.config.attention_dropout > 0.0 and key is not None:
            full_mask = causal_mask(num_new, num_new, None, x_BTC.device) if mask is None else mask
            out_BHTD = plain_attention(q_BHTD, k_BKSD, v_BKSD, full_mask, self.config.attention_dropout, key)
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
