"""baichuan: Baichuan 1 and 2 (Yang et al., 2023), with 7 or 13 billion parameters.

    7B     rotary positions    its code reads max_position_embeddings
    13B    ALiBi               its code reads model_max_length alone
    1      vocabulary 64,000   a plain head
    2      vocabulary 125,696  a head whose rows are scaled to length 1

No key names the version. The presence of max_position_embeddings tells 7B from 13B, as the published code requires it
of the one and does not know it for the other. Other programs go by the width (4,096 or 5,120) and the vocabulary, so a
model that contradicts these is neither read nor written. For other vocabularies, normalized_head (a key of ours) says
it.

transformers has no such class. It needs the Python files of a published Baichuan of the same version beside ours, and
their auto_map in config.json.
"""

import re
from collections.abc import Sequence
from typing import Any

from model.config import ModelConfig
from model.families.family import Family, Rule, fused_rows
from model.families.keys import HARMLESS, HARMLESS_AT
from model.families.plain import SILU, SIZES, even_heads, read_sizes, size_keys
from model.families.values import read_value

_POSITIONS = {4096: "rope", 5120: "alibi"}
"""hidden_size of the published models -> their positions."""
_NORMALIZED = {64000: False, 125696: True}
"""vocab_size of the published models -> whether their head is normalized."""
_THETA = 10000.0


class BaichuanFamily(Family):
    """The projections of Q, K and V are one matrix, `W_pack`."""

    model_type = "baichuan"
    architectures = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
    brings_code = True
    free = frozenset({"position_embedding", "normalized_head"})
    usual = {"normalized_head": True, "rms_norm_eps": 1e-6}
    # The last one holds ALiBi's penalties and the triangle of a causal mask.
    passed_over = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|future_mask)$")
    understood = frozenset(SIZES) | {"max_position_embeddings", "model_max_length", "normalized_head"}
    harmless = HARMLESS
    # rope_theta is not read by the published code, and z_loss_weight adds to its loss alone.
    harmless_at = HARMLESS_AT | SILU | {"rope_theta": (_THETA,), "z_loss_weight": (0,)}

    def check(self, values: dict) -> None:
        if values.get("architectures") == ["BaiChuanForCausalLM"] and values.get("max_position_embeddings") is None:
            raise ValueError("max_position_embeddings is missing, which the code of a BaiChuanForCausalLM reads")

    def fields(self, values: dict) -> dict[str, Any]:
        fields = read_sizes(values)
        is_rope = values.get("max_position_embeddings") is not None
        context = read_value(values, "max_position_embeddings" if is_rope else "model_max_length", int, 4096)
        known = _NORMALIZED.get(fields["vocab_size"])
        normalized = read_value(values, "normalized_head", bool, known)
        if normalized is None:
            raise ValueError(
                "vocab_size tells neither Baichuan 1 (64000) nor 2 (125696): add normalized_head, false for a model "
                "like Baichuan 1, true for one like 2"
            )
        fields |= {
            "position_embedding": "rope" if is_rope else "alibi", "normalized_head": normalized,
            "max_position_embeddings": context,
        }  # fmt: skip
        if found := _contradictions(ModelConfig(**fields)):
            raise ValueError(f"{found[0]}: correct max_position_embeddings or normalized_head")
        return fields

    def keys(self, config: ModelConfig) -> dict[str, object]:
        # By the first name, which is that of Baichuan 7B, other programs know rotary positions whatever the width.
        is_rope = config.position_embedding == "rope"
        context = {"max_position_embeddings": config.max_position_embeddings} if is_rope else {}
        return size_keys(config) | context | {
            "architectures": ["BaiChuanForCausalLM" if is_rope else "BaichuanForCausalLM"], "hidden_act": "silu",
            "model_max_length": config.max_position_embeddings, "normalized_head": config.normalized_head,
        }  # fmt: skip

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config) + even_heads(config) + _contradictions(config)
        if config.rope_theta != _THETA and config.position_embedding == "rope":
            found.append(f"rope_theta is {_THETA:.0f} in every baichuan, not {config.rope_theta}")
        return found

    def fused_rules(self, config: ModelConfig, names: Sequence[str]) -> list[Rule]:
        rules = []
        for layer in (f"layers.{number}.self_attn" for number in range(config.num_hidden_layers)):
            ours = [f"{layer}.{part}_proj.weight" for part in "qkv"]
            rules.append(fused_rows(f"{self.prefix}{layer}.W_pack.weight", ours, [config.hidden_size] * 3))
        return rules


def _contradictions(config: ModelConfig) -> list[str]:
    """Reasons why other programs would take a model for another Baichuan."""
    found = []
    positions, normalized = _POSITIONS.get(config.hidden_size), _NORMALIZED.get(config.vocab_size)
    if positions not in (None, config.position_embedding):
        found.append(
            f"position_embedding is {positions} in every baichuan with hidden_size {config.hidden_size}, not "
            f"{config.position_embedding}"
        )
    if normalized not in (None, config.normalized_head):
        found.append(
            f"normalized_head is {normalized} in every baichuan with vocab_size {config.vocab_size}, not "
            f"{config.normalized_head}"
        )
    return found


BAICHUAN = BaichuanFamily()
