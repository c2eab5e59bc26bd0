"""llama: Llama 1 to 3, and all models that are built like them."""

from typing import Any

from model.config import ModelConfig
from model.families.family import Beside, Family
from model.families.keys import HARMLESS_AT, require_full_attention
from model.families.rope import ROPE_KEYS, rope_fields, rope_keys
from model.families.values import REQUIRED, read_values, require_positive
from model.hf_files import shown

KINDS: dict[str, tuple[type, object]] = {
    "vocab_size": (int, REQUIRED), "hidden_size": (int, REQUIRED), "intermediate_size": (int, REQUIRED),
    "num_hidden_layers": (int, REQUIRED), "num_attention_heads": (int, REQUIRED), "num_key_value_heads": (int, 0),
    "head_dim": (int, 0), "max_position_embeddings": (int, REQUIRED), "rms_norm_eps": (float, REQUIRED),
    "initializer_range": (float, 0.02), "attention_dropout": (float, 0.0), "tie_word_embeddings": (bool, False),
    "attention_bias": (bool, False), "qkv_bias": (bool, False),
}  # fmt: skip
"""Key that has the name of our field -> (kind, value if it is missing or null). ModelConfig.resolve checks ranges."""
_WRITTEN = [name for name in KINDS if name not in ("attention_bias", "qkv_bias")]
WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
"""Keys of attention within a window."""


class LlamaFamily(Family):
    """A model with `qkv_bias` is written with a fourth bias that is zero, and with that key, by which it comes back
    unchanged; see qwen2.py."""

    model_type = "llama"
    # The family follows from model_type. Conversions of early 2023 wrote the last name.
    architectures: tuple[str, ...] = ("LlamaForCausalLM", "Qwen2ForCausalLM", "LLaMAForCausalLM")
    understood = frozenset(KINDS) | ROPE_KEYS | WINDOWS
    harmless_at = HARMLESS_AT | {
        "hidden_act": ("silu", "swish"), "mlp_bias": (False,), "bias": (False,),
        "rope_interleaved": (False,), "rope_condense_ratio": (1,), "use_mrope": (False,), "is_llama_config": (True,),
    }  # fmt: skip
    free = frozenset({"attention_bias", "qkv_bias", "rope_scaling"})
    writes_fourth_bias = True

    def check(self, values: dict) -> None:
        # transformers cuts a llama's cache by sliding_window alone, whatever use_sliding_window says.
        if (window := values.get("sliding_window")) is not None:
            raise ValueError(f"sliding_window = {shown(window)} is not supported: a llama has none")
        if (on := values.get("use_sliding_window")) not in (None, False):
            raise ValueError(f"use_sliding_window = {shown(on)} is not supported: only false is")
        require_full_attention(values)

    def fields(self, values: dict) -> dict[str, Any]:
        fields = common_fields(values)
        if not fields["qkv_bias"]:
            return fields
        if not fields["attention_bias"]:
            raise ValueError("qkv_bias is true and attention_bias is not, which a llama needs for any bias")
        return fields | {"attention_bias": False}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        biases = {"attention_bias": config.attention_bias or config.qkv_bias, "mlp_bias": False}
        return common_keys(config) | biases | ({"qkv_bias": True} if config.qkv_bias else {})

    def besides(self, config: ModelConfig) -> list[Beside]:
        """With `qkv_bias`, also the biases that a llama has and the model does not have: they must be zero."""
        otherwise = "that is not zero, while config.json has qkv_bias: take that key out, to have a bias of all four"
        layers = [f"layers.{layer}" for layer in range(config.num_hidden_layers if config.qkv_bias else 0)]
        return super().besides(config) + [
            Beside(self.their_name(f"{layer}.self_attn.o_proj.bias"), f"{layer}.input_layernorm.weight",
                   lambda scale: scale.new_zeros(scale.shape), otherwise, self.writes_fourth_bias)
            for layer in layers
        ]  # fmt: skip


def common_fields(values: dict) -> dict[str, Any]:
    """Our fields, from the keys of llama and of families like it."""
    fields = read_values(values, KINDS) | rope_fields(values)
    require_positive(fields, "vocab_size", "max_position_embeddings", "intermediate_size")
    return fields


def common_keys(config: ModelConfig) -> dict[str, object]:
    """Keys that llama and families like it write."""
    shape: dict[str, object] = {name: getattr(config, name) for name in _WRITTEN}
    return {"hidden_act": "silu"} | rope_keys(config) | shape


LLAMA = LlamaFamily()
