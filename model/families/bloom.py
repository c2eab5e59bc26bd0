"""bloom: BLOOM and BLOOMZ (Le Scao et al., 2022). ALiBi instead of rotary positions, LayerNorm, also of the embedding,
GELU, and biases everywhere."""

import re
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from model.config import ModelConfig
from model.families.family import Family, Rule
from model.families.keys import HARMLESS, HARMLESS_AT, require
from model.families.plain import even_heads, interleaved_rows, require_same
from model.families.values import REQUIRED, read_int, read_values, require_positive
from model.hf_files import shown

_KINDS: dict[str, tuple[type, object]] = {
    "vocab_size": (int, REQUIRED), "initializer_range": (float, 0.02), "hidden_dropout": (float, 0.0),
    "attention_dropout": (float, 0.0), "tie_word_embeddings": (bool, True),
}  # fmt: skip
_TWO_NAMES = {"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
"""Our field, which is also a name of the key -> the key's other name."""
_RENAMED = (
    (r"^embed_tokens\.", "word_embeddings."), (r"^embed_norm\.", "word_embeddings_layernorm."), (r"^norm\.", "ln_f."),
    (r"^layers\.", "h."), (r"\.self_attn\.o_proj\.", ".self_attention.dense."),
    (r"\.mlp\.up_proj\.", ".mlp.dense_h_to_4h."), (r"\.mlp\.down_proj\.", ".mlp.dense_4h_to_h."),
)  # fmt: skip


class BloomFamily(Family):
    """The rows of Q, K and V are one tensor, head by head."""

    model_type = "bloom"
    architectures = ("BloomForCausalLM", "BloomModel")
    fixed = {
        "norm": "layernorm", "embedding_norm": True, "mlp": "gelu", "mlp_bias": True, "attention_bias": True,
        "position_embedding": "alibi",
    }  # fmt: skip
    usual = {"tie_word_embeddings": True}
    renamed = _RENAMED
    prefix = "transformer."
    # A constant triangle.
    passed_over = re.compile(r"(^|\.)self_attention\.scale_mask_softmax\.causal_mask$")
    understood = frozenset(_KINDS) | {"layer_norm_epsilon", "seq_length", "n_inner", "slow_but_exact",
                                      *_TWO_NAMES, *_TWO_NAMES.values()}  # fmt: skip
    # How the original computed the same formulas. offset_alibi shifts all scores of a query, which softmax undoes.
    harmless = HARMLESS | {
        "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add",
        "skip_bias_add_qkv", "offset_alibi",
    }  # fmt: skip
    harmless_at = HARMLESS_AT | {"apply_residual_connection_post_layernorm": (False,)}

    def check(self, values: dict) -> None:
        if read_int(values, "pretraining_tp", 1) > 1:
            # transformers then multiplies slice by slice, and leaves out the biases of both output projections.
            require("slow_but_exact", values.get("slow_but_exact"), (False,))

    def fields(self, values: dict) -> dict[str, Any]:
        merged = values | {ours: _either(values, ours, other) for ours, other in _TWO_NAMES.items()}
        fields: dict[str, Any] = read_values(merged, _KINDS | {name: (int, REQUIRED) for name in _TWO_NAMES})
        require_positive(fields, "vocab_size", *_TWO_NAMES)
        eps = read_values(values, {"layer_norm_epsilon": (float, 1e-5), "seq_length": (int, 2048)})
        width = 4 * fields["hidden_size"]
        if values.get("n_inner") not in (None, width):
            raise ValueError(f"n_inner = {shown(values['n_inner'])} is not supported: only 4 times the hidden size is")
        return fields | {
            "intermediate_size": width, "rms_norm_eps": eps["layer_norm_epsilon"],
            # Positions have no limit; this is the length of the rows that BLOOM was trained with.
            "max_position_embeddings": eps["seq_length"],
        }  # fmt: skip

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return {name: getattr(config, name) for name in _KINDS} | {
            "hidden_size": config.hidden_size, "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads, "layer_norm_epsilon": config.rms_norm_eps,
            "seq_length": config.max_position_embeddings, "apply_residual_connection_post_layernorm": False,
        }  # fmt: skip

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config) + even_heads(config)
        if config.intermediate_size not in (0, 4 * config.hidden_size):
            found.append(f"intermediate_size is 4 hidden_size in every bloom, not {config.intermediate_size}")
        return found

    def new(self, wanted: ModelConfig, given: Set[str]) -> ModelConfig:
        if "intermediate_size" not in given:
            # Not rounded up, as it is in other models.
            wanted = replace(wanted, intermediate_size=4 * wanted.hidden_size)
        return super().new(wanted, given)

    def fused_rules(self, config: ModelConfig, names: Sequence[str]) -> list[Rule]:
        rules = []
        for layer in range(config.num_hidden_layers):
            for kind in ("weight", "bias"):
                ours = tuple(f"layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
                theirs = f"{self.prefix}h.{layer}.self_attention.query_key_value.{kind}"
                rules.append(interleaved_rows(theirs, ours, config.num_attention_heads))
        return rules


def _either(values: dict, name: str, other: str) -> object:
    """The value of a key that has two names. Raises ValueError: neither is there, or they differ."""
    if (value := require_same(values, name, other)) is None:
        raise ValueError(f"{name} (or {other}) is missing")
    return value


BLOOM = BloomFamily()
