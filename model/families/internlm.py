"""internlm: InternLM of 2023 (7B, 20B), a llama with biases on Q, K, V and O, or none.

Its rotary positions stand in a key of their own, `rotary`. The published code of today takes a missing one for
{"type": "dynamic", "base": 10000}; that of July 2023 did not yet stretch beyond the context, and is the same below it.

transformers has no such class. It needs the Python files of a published InternLM beside ours, and their auto_map in
config.json.
"""

from typing import Any

from model.config import ModelConfig
from model.families.family import Family
from model.families.keys import HARMLESS, HARMLESS_AT
from model.families.plain import SILU, SIZES, even_heads, read_sizes, size_keys
from model.families.values import REQUIRED, read_value
from model.hf_files import shown

_KINDS = {"origin": "none", "dynamic": "dynamic"}
"""Type of rotary positions -> our name for it."""


class InternLMFamily(Family):
    model_type = "internlm"
    architectures = ("InternLMForCausalLM",)
    brings_code = True
    free = frozenset({"attention_bias", "rope_scaling"})
    usual = {"attention_bias": True, "rms_norm_eps": 1e-6}
    understood = frozenset(SIZES) | {"max_position_embeddings", "num_key_value_heads", "bias", "rotary", "rope_theta"}
    harmless = HARMLESS
    harmless_at = HARMLESS_AT | SILU

    def fields(self, values: dict) -> dict[str, Any]:
        fields = read_sizes(values, max_position_embeddings=(int, 2048)) | _rotary_fields(values)
        heads = read_value(values, "num_key_value_heads", int, fields["num_attention_heads"])
        if heads != fields["num_attention_heads"]:
            # The published code has no such key.
            raise ValueError(f"num_key_value_heads = {heads} is not supported: only num_attention_heads is")
        return fields | {"attention_bias": read_value(values, "bias", bool, True)}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        rotary: dict[str, object] = {"base": config.rope_theta, "type": "origin"}
        if config.rope_scaling == "dynamic":
            rotary |= {"type": "dynamic", "scaling_factor": config.rope_scaling_factor}
        return size_keys(config) | {
            "hidden_act": "silu", "max_position_embeddings": config.max_position_embeddings,
            "bias": config.attention_bias, "rotary": rotary,
            # For programs that take it for a llama.
            "rope_theta": config.rope_theta,
        }  # fmt: skip

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config) + even_heads(config)
        if config.rope_scaling not in _KINDS.values():
            found.append(f"rope_scaling is none or dynamic in every internlm, not {config.rope_scaling}")
        return found


def _rotary_fields(values: dict) -> dict[str, object]:
    """Our fields for rotary positions.

    Raises:
        ValueError: they are of a kind that this model does not have, or a value is wrong.
    """
    rotary = values.get("rotary")
    rotary = {"base": 10000, "type": "dynamic"} if rotary is None else rotary
    if not isinstance(rotary, dict):
        raise ValueError(f"rotary must be a dictionary, not {shown(rotary)}")
    if unknown := rotary.keys() - {"base", "type", "scaling_factor"}:
        raise ValueError(f"rotary holds {shown(min(unknown))}, which is not known here: take it out")
    kind = rotary.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"rotary of type {shown(kind)} is not supported: only {' and '.join(_KINDS)} are")
    theta, factor = read_value(rotary, "base", float, REQUIRED), read_value(rotary, "scaling_factor", float, 1.0)
    outer = read_value(values, "rope_theta", float, theta)
    if outer != theta:
        raise ValueError(f"rope_theta is {outer:g} and rotary has base {theta:g}: write the right one in both places")
    fields = {"rope_theta": theta, "rope_scaling": _KINDS[kind]}
    return fields | ({"rope_scaling_factor": factor} if kind == "dynamic" else {})


INTERNLM = InternLMFamily()
