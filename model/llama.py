"""The llama-style transformer.

    h = embed(tokens)
    for each block:   h = h + attention(rms_norm(h));   h = h + w_down(silu(w_gate x) * (w_up x)) of x = rms_norm(h)
    logits = head(rms_norm(h))

Shapes: B batch, T tokens, C hidden size, V vocabulary. Modules are defined in the order of their use, which is what
`parallel` plans its buckets by; their names are Hugging Face's without the leading "model.".
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, LayerCache, causal_mask, document_lengths
from model.config import LlamaConfig
from model.dropout import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, DropoutKey, dropout
from model.rope import inverse_frequencies, rope_tables


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(self.weight.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        h_BTC: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None = None,
        cache_length: int = 0,
        key: DropoutKey | None = None,
        documents: list[list[int]] | None = None,
    ) -> Tensor:
        """One block. h stays in its own dtype (float32 with residual_in_fp32), the matmuls run in the weights'."""
        attended = self.self_attn(self.input_layernorm(h_BTC), rope, mask, cache, cache_length, key, documents)
        h_BTC = h_BTC + dropout(attended, self.dropout, key, ATTENTION_OUTPUT)
        fed_forward = self.mlp(self.post_attention_layernorm(h_BTC))
        return h_BTC + dropout(fed_forward, self.dropout, key, FEED_FORWARD_OUTPUT)


class KVCache:
    """Keys and values of every layer for up to `max_length` tokens; `length` says how many are there."""

    def __init__(self, config: LlamaConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.max_length, self.length = max_length, 0
        self.layers = [
            LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]


class Llama(nn.Module):
    """The whole model. Weights are float32 until moved; see `initialize`."""

    def __init__(self, config: LlamaConfig, gradient_checkpointing: bool = False):
        """`config` must be resolved (no zeros left), see LlamaConfig.resolve."""
        super().__init__()
        if not config.vocab_size or not config.max_position_embeddings:
            raise ValueError("the model needs vocab_size and max_position_embeddings: call LlamaConfig.resolve first")
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        # Compiled blocks would be built anew for every other cut of the rows; dropped weights need all of them.
        self.attends_by_document = not config.attention_dropout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """Final hidden states, normed, (B, T, C) in the weights' dtype; `logits` turns them into scores.

        Args:
            input_ids_BT: token ids, int64.
            positions_BT: int64; default 0..T-1, or behind the cache.
            document_ids_BT: int64; tokens attend only within equal ids, which lie side by side. Not together with a
                cache.
            cache: read and extended in place.
            dropout_key: names the dropout masks; without it nothing is dropped.
        """
        batch, num_new = input_ids_BT.shape
        past = cache.length if cache is not None else 0
        if cache is not None and past + num_new > cache.max_length:
            raise ValueError(f"the KV cache holds {cache.max_length} tokens, {past + num_new} were asked of it")
        device = input_ids_BT.device
        if positions_BT is None:
            positions_BT = torch.arange(past, past + num_new, device=device).expand(batch, -1)
        rope = rope_tables(inverse_frequencies(self.config, past + num_new, device), positions_BT)
        mask = documents = None
        if document_ids_BT is not None and self.attends_by_document and not document_ids_BT.is_cuda:
            documents = document_lengths(document_ids_BT)
        if documents is None and (document_ids_BT is not None or (past and num_new > 1)):
            mask = causal_mask(num_new, past + num_new, document_ids_BT, device)

        h_BTC = self.embed_tokens(input_ids_BT)
        if self.config.residual_in_fp32:
            h_BTC = h_BTC.float()
        for index, block in enumerate(self.layers):
            layer_cache = cache.layers[index] if cache is not None else None
            layer_key = dropout_key.for_layer(index) if dropout_key is not None else None
            arguments = (h_BTC, rope, mask, layer_cache, past, layer_key, documents)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                # No generator state to preserve: dropout is a function of its key.
                h_BTC = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BTC = block(*arguments)
        if cache is not None:
            cache.length += num_new
        return self.norm(h_BTC)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) normed hidden states -> (..., V) scores in the weights' dtype."""
        return self.lm_head(hidden)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set the initial weights; a weight depends on the seed and its own name alone, not on the order or device.

        | what                                   | initial value                          | why
        | norms                                  | 1                                      | identity
        | biases                                 | 0                                      |
        | o_proj, down_proj (write the residual) | N(0, initializer_range / sqrt(2 L))    | 2 L additions keep h's scale
        | every other matrix                     | N(0, initializer_range)                | GPT-2 (Radford et al., 2019)
        """
        residual_std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if ("o_proj" in name or "down_proj" in name) else self.config.initializer_range
                digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
