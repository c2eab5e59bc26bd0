"""llama: Llama 1 to 3, and all models that are built like them."""

from typing import Any

from model.config import ModelConfig
from model.families.common import BIASES, KINDS, CommonFamily, common_fields, common_keys
from model.families.family import Beside
from model.families.windows import WINDOW_KEYS, require_no_window

_KINDS = KINDS | BIASES


class LlamaFamily(CommonFamily):
    """A model with `qkv_bias` is written with a fourth bias that is zero, and with that key, by which it comes back
    unchanged; see qwen2.py."""

    model_type = "llama"
    # The family follows from model_type. Conversions of early 2023 wrote the last name.
    architectures: tuple[str, ...] = ("LlamaForCausalLM", "Qwen2ForCausalLM", "LLaMAForCausalLM")
    understood = CommonFamily.understood | BIASES.keys() | WINDOW_KEYS
    harmless_at = {name: values for name, values in CommonFamily.harmless_at.items() if name not in BIASES} | {
        "rope_interleaved": (False,), "rope_condense_ratio": (1,), "use_mrope": (False,), "is_llama_config": (True,),
    }  # fmt: skip
    free = frozenset({"attention_bias", "qkv_bias", "mlp_bias", "rope_scaling"})
    writes_fourth_bias = True
    shares_width = True
    """Whether transformers 5 refuses a hidden_size that the heads cannot share, even with a head_dim."""

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config)
        if self.shares_width and config.hidden_size % config.num_attention_heads:
            found.append(
                f"hidden_size is a multiple of num_attention_heads, {config.num_attention_heads}, in every "
                f"{self.model_type}, not {config.hidden_size}"
            )
        return found

    def check(self, values: dict) -> None:
        require_no_window(values)

    def fields(self, values: dict) -> dict[str, Any]:
        fields = common_fields(values, _KINDS)
        if not fields["qkv_bias"]:
            return fields
        if not fields["attention_bias"]:
            raise ValueError("qkv_bias is true and attention_bias is not, which a llama needs for any bias")
        return fields | {"attention_bias": False}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        biases = {"attention_bias": config.attention_bias or config.qkv_bias, "mlp_bias": config.mlp_bias}
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


LLAMA = LlamaFamily()
