"""The attention layer: projections, norms of heads, rotary positions, the local filter, the cache, the implementation.

Shapes: B batch, T new tokens, S tokens attended to (T plus what the cache holds), C hidden size, H query heads, K key
and value heads, D head dim.
"""

import torch
from torch import Tensor, nn

from model.attend import Attend, RowShare, attention_mask
from model.config import ModelConfig
from model.dropout import DropoutKey
from model.kernels.attention import attention_by_document, plain_attention, sdpa_masked
from model.linear import Linear, one_by_one
from model.local_filter import LocalFilter
from model.norm import RMSNorm
from model.ops import Ops
from model.paged import PagedStep


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (Ainslie et al., "GQA", 2023).

    Args:
        layer: number of the layer's block, for the cache.
    """

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.config, self.ops, self.layer = config, ops, layer
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.qkv_bias
        self.local_filter = LocalFilter(config, ops) if config.local_filter else None
        self.q_proj = Linear(config.hidden_size, query_size, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=qkv_bias)
        # Norms of each head alone (Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023).
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_BTC: Tensor, attend: Attend, key: DropoutKey | None = None) -> Tensor:
        """Attend from each new token: x (B, T, C) -> (B, T, C)."""
        batch, num_new, _ = x_BTC.shape
        heads = (batch, num_new, -1, self.config.head_dim)
        filtered_BTC = x_BTC if self.local_filter is None else self._filtered(self.local_filter, x_BTC, attend)
        if filtered_BTC is x_BTC:
            projected = one_by_one(x_BTC, self.q_proj, self.k_proj, self.v_proj, key=key)
        else:
            projected = [*one_by_one(filtered_BTC, self.q_proj, self.k_proj, key=key), self.v_proj(x_BTC, key)]
        q_BTHD, k_BTKD, v_BTKD = (x.view(heads) for x in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD = self.q_norm(q_BTHD, None, 0.0, None, 0)[1]
            k_BTKD = self.k_norm(k_BTKD, None, 0.0, None, 0)[1]
        q_BHTD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        if attend.rope is not None:
            q_BHTD, k_BKSD = self.ops.rope(q_BHTD, k_BKSD, *attend.rope, self.config.rope_interleaved)
        if attend.cache is not None:
            k_BKSD, v_BKSD = attend.cache.append(self.layer, k_BKSD, v_BKSD, attend.first_key)
        if attend.step is not None:
            attend.step.append(self.layer, k_BKSD, v_BKSD)
            out_BHTD = self._attended_by_segment(q_BHTD, attend, attend.step)
        elif attend.share is not None:
            out_BHTD = self._attended_in_share(q_BHTD, k_BKSD, v_BKSD, attend, attend.share)
        else:
            out_BHTD = self._attended(q_BHTD, k_BKSD, v_BKSD, attend, key)
        return self.o_proj(out_BHTD.transpose(1, 2).reshape(batch, num_new, -1), key)

    def _filtered(self, local_filter: LocalFilter, x_BTC: Tensor, attend: Attend) -> Tensor:
        """x after the filter, whose first tokens need those of the cache."""
        if attend.step is not None:
            # Each token is a row of its own, after two that are stored.
            earlier_N2C = attend.step.append_states(self.layer, x_BTC)
            return local_filter(x_BTC.transpose(0, 1), earlier_N2C, attend.positions.transpose(0, 1)).transpose(0, 1)
        if attend.cache is None:
            earlier_B2C = x_BTC.new_zeros(len(x_BTC), 2, x_BTC.shape[2])
        else:
            earlier_B2C = attend.cache.append_states(self.layer, x_BTC)
        return local_filter(x_BTC, earlier_B2C, attend.positions)

    def _attended_by_segment(self, q_1HND: Tensor, attend: Attend, step: PagedStep) -> Tensor:
        """Heads' outputs of new tokens of several texts, whose keys and values are stored."""
        out_1HND = torch.empty_like(q_1HND)
        step.attend_singles(self.layer, q_1HND[0], attend.singles, out_1HND[0])
        for number, segment in zip(step.longer, attend.segments):
            k_1KSD, v_1KSD = step.read(self.layer, number, segment.first_key)
            rows = step.rows[number]
            out_1HND[:, :, rows] = self._attended(q_1HND[:, :, rows], k_1KSD, v_1KSD, segment, None)
        return out_1HND

    def _attended_in_share(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, attend: Attend, share: RowShare
    ) -> Tensor:
        """Heads' outputs of this process' positions, which attend to whole rows."""
        if share.ring is not None:
            return share.ring(q_BHTD, k_BKTD, v_BKTD)
        k_BKSD, v_BKSD = share.whole(k_BKTD, v_BKTD)
        outputs = []
        for q, chunk in zip(q_BHTD.chunk(2, dim=2), attend.chunks):
            k, v = (x_BKSD[:, :, chunk.first_key : chunk.end] for x_BKSD in (k_BKSD, v_BKSD))
            outputs.append(self._attended(q, k, v, chunk, None))
        return torch.cat(outputs, dim=2)

    def _attended(
        self, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, attend: Attend, key: DropoutKey | None
    ) -> Tensor:
        """Heads' outputs (B, H, T, D), by the implementation that can serve this `attend`."""
        if self.ops.step_by_step or (self.config.attention_dropout > 0.0 and key is not None):
            mask = attend.mask
            if mask is None:
                mask = attention_mask(q_BHTD.shape[2], k_BKSD.shape[2], None, q_BHTD.device)
            return plain_attention(q_BHTD, k_BKSD, v_BKSD, mask, self.config.attention_dropout, key)
        if attend.key_starts is not None:
            assert self.ops.tails is not None and attend.starts is not None
            return self.ops.tails(
                q_BHTD, k_BKSD, v_BKSD, attend.starts, attend.key_starts, attend.window, attend.slopes
            )  # fmt: skip
        if attend.starts is not None:
            assert self.ops.packed is not None
            return self.ops.packed(q_BHTD, k_BKSD, v_BKSD, attend.starts, attend.window, attend.slopes)
        if attend.is_plainly_causal:
            return self.ops.causal(q_BHTD, k_BKSD, v_BKSD, attend.window, attend.slopes)
        if attend.documents is not None:
            return attention_by_document(q_BHTD, k_BKSD, v_BKSD, attend.documents, attend.mask)
        return sdpa_masked(q_BHTD, k_BKSD, v_BKSD, attend.mask)
