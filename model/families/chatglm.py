"""chatglm: ChatGLM2, ChatGLM3 and GLM-4-9B (Team GLM, 2024) with the names of their own code. Rotary positions turn
neighbouring channels of the first half of each head.

`rope_ratio` multiplies the rotary base, except in ChatGLM2-6B-32K, whose code divides positions by it. Nothing in a
folder tells which code it came with. So a ratio is taken for a factor of the base if a model was published with it in
that sense, or if rope_theta says so, too; we write both.

transformers has no such class (its `glm` is the same model with other names). It needs the Python files of a published
ChatGLM3 beside ours, and their auto_map in config.json.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from model.config import ModelConfig
from model.families.family import Beside, Family, Rule, fused_rows
from model.families.keys import HARMLESS, HARMLESS_AT
from model.families.plain import require_same
from model.families.values import REQUIRED, read_value, read_values, require_positive
from model.hf_files import shown

_KINDS: dict[str, tuple[str, type, object]] = {
    "padded_vocab_size": ("vocab_size", int, REQUIRED), "hidden_size": ("hidden_size", int, REQUIRED),
    "ffn_hidden_size": ("intermediate_size", int, REQUIRED), "num_layers": ("num_hidden_layers", int, REQUIRED),
    "num_attention_heads": ("num_attention_heads", int, REQUIRED), "kv_channels": ("head_dim", int, 128),
    "multi_query_group_num": ("num_key_value_heads", int, 1), "seq_length": ("max_position_embeddings", int, 2048),
    "layernorm_epsilon": ("rms_norm_eps", float, 1e-5), "initializer_range": ("initializer_range", float, 0.02),
    "hidden_dropout": ("hidden_dropout", float, 0.0), "attention_dropout": ("attention_dropout", float, 0.0),
    "tie_word_embeddings": ("tie_word_embeddings", bool, False),
}  # fmt: skip
"""Key -> (our field, kind, value if it is missing or null)."""
_SECOND_NAMES = {"padded_vocab_size": "vocab_size", "num_layers": "num_hidden_layers"}
"""Key -> a name of transformers, which newer folders have besides."""
_THETA = 10000.0
_RATIOS = (1, 50, 500, 10000)
"""Factors of the base in ChatGLM3-6B, its versions for 32k and 128k tokens, and GLM-4-9B-Chat-1M."""
_RENAMED = (
    (r"^embed_tokens\.", "embedding.word_embeddings."), (r"^norm\.", "encoder.final_layernorm."),
    (r"^layers\.", "encoder.layers."), (r"\.self_attn\.o_proj\.", ".self_attention.dense."),
    (r"\.mlp\.down_proj\.", ".mlp.dense_4h_to_h."), (r"^lm_head\.", "output_layer."),
)  # fmt: skip


class ChatGLMFamily(Family):
    """Q, K and V are one tensor, gate and up are another."""

    model_type = "chatglm"
    architectures = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
    brings_code = True
    fixed = {"rope_interleaved": True, "partial_rotary_factor": 0.5}
    free = frozenset({"qkv_bias"})
    usual = {"qkv_bias": True}
    renamed = _RENAMED
    prefix = "transformer."
    passed_over = re.compile(r"(^|\.)rotary_pos_emb\.inv_freq$")
    understood = frozenset(_KINDS) | {*_SECOND_NAMES.values(), "add_qkv_bias", "rope_ratio",
                                      "rope_theta", "multi_query_attention"}  # fmt: skip
    # Dtypes, fused kernels, a factor that is divided out again, and a classifier's dropout.
    harmless = HARMLESS | {
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "fp32_residual_connection",
        "classifier_dropout",
    }  # fmt: skip
    # pre_seq_len and prefix_projection belong to an adapter, P-Tuning.
    harmless_at = HARMLESS_AT | {
        "apply_residual_connection_post_layernorm": (False,), "post_layer_norm": (True,), "rmsnorm": (True,),
        "add_bias_linear": (False,), "original_rope": (True,), "quantization_bit": (0,), "pre_seq_len": (0,),
        "prefix_projection": (False,),
    }  # fmt: skip

    def check(self, values: dict) -> None:
        # Otherwise Q, K and V are stored head by head. The published code takes a missing key for false.
        if values.get("multi_query_attention") is not True:
            given = shown(values.get("multi_query_attention"))
            raise ValueError(f"multi_query_attention = {given} is not supported: only true is")
        for name, second in _SECOND_NAMES.items():
            require_same(values, name, second)

    def fields(self, values: dict) -> dict[str, Any]:
        read = read_values(values, {key: (kind, default) for key, (_, kind, default) in _KINDS.items()})
        require_positive(read, "padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_layers",
                         "num_attention_heads", "multi_query_group_num", "kv_channels", "seq_length")  # fmt: skip
        fields = {ours: read[key] for key, (ours, _, _) in _KINDS.items()}
        bias = read_value(values, "add_qkv_bias", bool, False)
        return fields | {"qkv_bias": bias, "rope_theta": _theta(values)}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        ratio = config.rope_theta / _THETA
        # Other programs expect a whole number.
        ratio = int(ratio) if ratio == int(ratio) else ratio
        return {key: getattr(config, ours) for key, (ours, _, _) in _KINDS.items()} | {
            "add_qkv_bias": config.qkv_bias, "add_bias_linear": False,
            "multi_query_attention": True, "rope_ratio": ratio, "rope_theta": config.rope_theta,
            "original_rope": True, "rmsnorm": True, "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
        } | {second: getattr(config, second) for second in _SECOND_NAMES.values()}  # fmt: skip

    def fused_rules(self, config: ModelConfig, names: Sequence[str]) -> list[Rule]:
        query, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        rules = []
        for layer in range(config.num_hidden_layers):
            for ours, theirs, sizes in (
                (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attention.query_key_value",
                 [query, kv, kv]),
                (("mlp.gate_proj", "mlp.up_proj"), "mlp.dense_h_to_4h", [config.intermediate_size] * 2),
            ):  # fmt: skip
                for kind in ("weight", "bias"):
                    parts = [f"layers.{layer}.{part}.{kind}" for part in ours]
                    if parts[0] in names:
                        rules.append(fused_rows(f"{self.prefix}encoder.layers.{layer}.{theirs}.{kind}", parts, sizes))
        return rules

    def besides(self, config: ModelConfig) -> list[Beside]:
        """The head is also written if it is the embedding: the published code has two matrices in any case."""
        return [replace(beside, expected=torch.clone, is_written=True) for beside in super().besides(config)]


def _theta(values: dict) -> float:
    """Base of the rotary positions.

    Raises:
        ValueError: nobody can tell what rope_ratio means.
    """
    ratio: Any = read_value(values, "rope_ratio", float, 1.0)
    if values.get("rope_theta") is None:
        if ratio not in _RATIOS:
            raise ValueError(
                f"rope_ratio = {ratio:g} divides the positions of ChatGLM2-6B-32K, which is not supported, and "
                f"multiplies the rotary base of other models: for one of these, add rope_theta = {_THETA * ratio:g}"
            )
        return _THETA * ratio
    theta: Any = read_value(values, "rope_theta", float, REQUIRED)
    if theta / _THETA != ratio:
        raise ValueError(f"rope_theta = {theta:g} is not {_THETA:g} times rope_ratio = {ratio:g}: correct one of them")
    return theta


CHATGLM = ChatGLMFamily()
