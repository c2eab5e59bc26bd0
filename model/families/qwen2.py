"""qwen2: Qwen 2 and 2.5, a llama with biases on Q, K and V, but not on O.

Its name also tells other programs how to split texts: transformers from 5.8 on, and llama.cpp's converter, then replace
the tokenizer's rules by Qwen's own. So a model with `qkv_bias` and a tokenizer that is not Qwen's is written as a llama
whose fourth bias is zero.
"""

from typing import Any

from model.config import ModelConfig
from model.families.keys import require_full_attention
from model.families.llama import LlamaFamily, common_fields, common_keys
from model.hf_files import shown


class Qwen2Family(LlamaFamily):
    model_type = "qwen2"
    architectures = ("Qwen2ForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM")
    fixed = {"qkv_bias": True}
    free = frozenset({"rope_scaling"})
    names_tokenizer = True
    writes_fourth_bias = False

    def check(self, values: dict) -> None:
        on, layers = values.get("use_sliding_window"), values.get("num_hidden_layers")
        window, first = values.get("sliding_window"), values.get("max_window_layers")
        if on not in (None, False):
            # The first max_window_layers layers have no window.
            beyond = isinstance(first, int) and isinstance(layers, int) and first >= layers
            none = "sliding_window" in values and window is None
            if on is not True or not (beyond or none):
                raise ValueError(
                    f"use_sliding_window = {shown(on)} is not supported: only false is, or a max_window_layers that "
                    f"leaves no layer with a window"
                )
        require_full_attention(values)
        if "num_key_value_heads" not in values:
            # null means as many as query heads; if the key is missing, transformers takes 32.
            raise ValueError("num_key_value_heads is missing")

    def fields(self, values: dict) -> dict[str, Any]:
        # The biases of a qwen2 are fixed, whatever another family's key says.
        return common_fields(values) | {"qkv_bias": True, "attention_bias": False}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return common_keys(config) | {"use_sliding_window": False}


QWEN2 = Qwen2Family()
