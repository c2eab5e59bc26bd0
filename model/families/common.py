"""What most families share: RMSNorm, rotary positions and SwiGLU, with transformers' names for all of it."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import HARMLESS_AT
from model.families.rope import ROPE_KEYS, THETA, rope_fields, rope_keys
from model.families.values import REQUIRED, read_values, require_positive

Kinds = dict[str, tuple[type, object]]
"""Key that has the name of our field -> (kind, transformers' value if it is missing or null)."""
KINDS: Kinds = {
    "vocab_size": (int, REQUIRED), "hidden_size": (int, REQUIRED), "intermediate_size": (int, REQUIRED),
    "num_hidden_layers": (int, REQUIRED), "num_attention_heads": (int, REQUIRED), "num_key_value_heads": (int, 0),
    "head_dim": (int, 0), "max_position_embeddings": (int, REQUIRED), "rms_norm_eps": (float, REQUIRED),
    "initializer_range": (float, 0.02), "attention_dropout": (float, 0.0), "tie_word_embeddings": (bool, False),
}  # fmt: skip
"""The keys of all these families. A folder must state its shape; transformers would take that of some known model.
ModelConfig.resolve checks ranges."""
BIASES: Kinds = {"attention_bias": (bool, False), "qkv_bias": (bool, False), "mlp_bias": (bool, False)}
"""Keys of biases, in families that may have them."""


def common_fields(values: Mapping, kinds: Kinds = KINDS, theta: float = THETA) -> dict[str, Any]:
    """Our fields, from a folder's keys.

    Args:
        kinds: keys of the family that have our names.
        theta: base of the rotary positions where none is named.
    """
    fields = read_values(values, kinds) | rope_fields(dict(values), theta)
    require_positive(fields, "vocab_size", "max_position_embeddings", "intermediate_size")
    return fields


def common_keys(config: ModelConfig, kinds: Kinds = KINDS) -> dict[str, object]:
    """The reverse."""
    return {"hidden_act": "silu"} | rope_keys(config) | {name: getattr(config, name) for name in kinds}


def with_key_heads(values: Mapping, usual: int) -> Mapping:
    """The keys, with transformers' num_key_value_heads if it is missing. null means as many as query heads."""
    return {"num_key_value_heads": usual} | dict(values)


class CommonFamily(Family):
    """The base of such families."""

    kinds = KINDS
    """Keys that have our names, and their values where they are missing."""
    theta = THETA
    """Base of the rotary positions where a folder names none."""
    key_heads = 0
    """Number of key heads where a folder names none; 0: as many as query heads."""
    understood = frozenset(KINDS) | ROPE_KEYS
    harmless_at = HARMLESS_AT | {"hidden_act": ("silu", "swish"), "bias": (False,)} | {key: (False,) for key in BIASES}
    free: frozenset[str] = frozenset({"rope_scaling"})

    def fields(self, values: dict) -> dict[str, Any]:
        return common_fields(with_key_heads(values, self.key_heads), self.kinds, self.theta)

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return common_keys(config, self.kinds)
