"""qwen2: Qwen 2 and 2.5, a llama with biases on Q, K and V, but not on O, and maybe a window in its later layers.

Its name also tells other programs how to split texts: transformers from 5.8 on, and llama.cpp's converter, then replace
the tokenizer's rules by Qwen's own. So a model with `qkv_bias` and a tokenizer that is not Qwen's is written as a llama
whose fourth bias is zero, if it has no window. Of the other families, none does this (versions 5.8 to 5.24).
"""

from typing import Any

from model.config import ModelConfig
from model.families.common import BIASES, KINDS, common_fields, common_keys, with_key_heads
from model.families.llama import LlamaFamily
from model.families.windows import fields_by_layer, keys_by_layer

_KINDS = KINDS | BIASES


class Qwen2Family(LlamaFamily):
    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM")
    fixed = {"qkv_bias": True}
    free = frozenset({"sliding_window", "full_attention_layers", "rope_scaling"})
    usual = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
    harmless_at = LlamaFamily.harmless_at | {"mlp_bias": (False,)}
    understood = LlamaFamily.understood - {"mlp_bias"}
    names_tokenizer = True
    writes_fourth_bias, shares_width = False, False

    def check(self, values: dict) -> None:
        """Nothing of a llama's."""

    def fields(self, values: dict) -> dict[str, Any]:
        fields = common_fields(with_key_heads(values, 32), _KINDS) | fields_by_layer(values)
        # The biases of a qwen2 are fixed, whatever another family's key says.
        return {**fields, **self.fixed, "attention_bias": False}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return common_keys(config) | keys_by_layer(config)


QWEN2 = Qwen2Family()
