"""qwen3: a llama that norms each head's queries and keys. Its heads together may be wider than its stream, and its
layers may have a window."""

from typing import Any

from model.config import ModelConfig
from model.families.common import BIASES, KINDS, CommonFamily
from model.families.windows import WINDOW_KEYS, fields_by_layer, keys_by_layer

QWEN3_KINDS = KINDS | {"attention_bias": BIASES["attention_bias"]}


class Qwen3Family(CommonFamily):
    model_type = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    fixed = {"qk_norm": True}
    free = frozenset({"attention_bias", "sliding_window", "full_attention_layers", "rope_scaling"})
    usual = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
    kinds = QWEN3_KINDS | {"head_dim": (int, 128)}
    understood = CommonFamily.understood | kinds.keys() | WINDOW_KEYS
    harmless_at = {name: values for name, values in CommonFamily.harmless_at.items() if name != "attention_bias"}
    key_heads = 32

    def fields(self, values: dict) -> dict[str, Any]:
        return super().fields(values) | fields_by_layer(values)

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return super().keys(config) | keys_by_layer(config)


QWEN3 = Qwen3Family()
