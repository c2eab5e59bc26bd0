"""aquila: Aquila and Aquila 2 (BAAI, 2023), a llama with another name.

transformers has no such class. It needs the Python files of a published Aquila 2 beside ours, and their auto_map in
config.json.
"""

from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import HARMLESS, HARMLESS_AT
from model.families.plain import SILU, SIZES, even_heads, read_sizes, size_keys
from model.families.rope import ROPE_KEYS, rope_fields, rope_keys

_SCALINGS = ("none", "linear", "dynamic")
"""Kinds of rotary positions that the published code knows."""


class AquilaFamily(Family):
    model_type = "aquila"
    architectures = ("AquilaForCausalLM", "AquilaModel")
    brings_code = True
    free = frozenset({"rope_scaling"})
    usual = {"rms_norm_eps": 1e-6}
    understood = frozenset(SIZES) | ROPE_KEYS | {"num_key_value_heads", "max_position_embeddings"}
    harmless = HARMLESS
    harmless_at = HARMLESS_AT | SILU

    def fields(self, values: dict) -> dict[str, Any]:
        sizes = read_sizes(values, num_key_value_heads=(int, 0), max_position_embeddings=(int, 2048))
        fields = sizes | rope_fields(values)
        if fields["rope_scaling"] not in _SCALINGS:
            name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
            raise ValueError(f"{name} of type {fields['rope_scaling']} is not supported: no aquila has it")
        return fields

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return {"hidden_act": "silu"} | rope_keys(config) | size_keys(config) | {
            "num_key_value_heads": config.num_key_value_heads,
            "max_position_embeddings": config.max_position_embeddings,
        }  # fmt: skip

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config) + even_heads(config, grouped=True)
        if config.rope_scaling not in _SCALINGS:
            found.append(f"rope_scaling is none, linear or dynamic in every aquila, not {config.rope_scaling}")
        return found


AQUILA = AquilaFamily()
