"""qwen3_moe: a qwen3 with narrow experts, of which each token is sent to many; some of its layers may have none."""

from typing import Any

from model.config import ModelConfig
from model.families.experts import SparseFamily, dense_layers, layers_of, read_alike
from model.families.qwen3 import QWEN3_KINDS, Qwen3Family
from model.families.values import read_int, read_value, require_positive
from model.families.windows import WINDOW_KEYS, read_window, require_window_of_all
from model.hf_files import shown


class Qwen3MoeFamily(SparseFamily):
    model_type = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)
    fixed = Qwen3Family.fixed
    free = SparseFamily.free | {"attention_bias", "sliding_window", "dense_layers", "norm_topk_prob"}
    usual = Qwen3Family.usual | {"num_local_experts": 8, "num_experts_per_tok": 2}
    kinds = QWEN3_KINDS | {"norm_topk_prob": (bool, False), "moe_intermediate_size": (int, 768)}
    understood = SparseFamily.understood | kinds.keys() | WINDOW_KEYS | {
        "num_local_experts", "num_experts", "num_experts_per_tok", "decoder_sparse_step", "mlp_only_layers",
    }  # fmt: skip
    harmless_at = {name: values for name, values in SparseFamily.harmless_at.items() if name != "attention_bias"}
    key_heads = 4

    def check(self, values: dict) -> None:
        # Published folders have max_window_layers, which transformers reads in a qwen3 alone.
        first = values.get("max_window_layers")
        if values.get("use_sliding_window") and first not in (None, 0):
            raise ValueError(
                f"max_window_layers = {shown(first)} is not supported with use_sliding_window: all layers of a "
                f"{self.model_type} have the same window"
            )

    def fields(self, values: dict) -> dict[str, Any]:
        window = read_window(values) if read_value(values, "use_sliding_window", bool, False) else 0
        require_window_of_all(values, window)
        fields = super().fields(values) | {
            "num_local_experts": read_alike(values, ("num_experts", "num_local_experts"), 128),
            "num_experts_per_tok": read_int(values, "num_experts_per_tok", 8), "sliding_window": window,
        }  # fmt: skip
        return fields | {"dense_layers": _dense_layers(values, fields["num_hidden_layers"])}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        # transformers 4 knows num_experts alone, version 5 writes num_local_experts.
        return super().keys(config) | {
            "num_experts": config.num_local_experts, "num_local_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok, "decoder_sparse_step": 1,
            "mlp_only_layers": layers_of(config.dense_layers),
            "use_sliding_window": config.sliding_window > 0, "sliding_window": config.sliding_window or None,
        }  # fmt: skip


def _dense_layers(values: dict, layers: int) -> str:
    """Layers without experts: those of mlp_only_layers, and those that are not a multiple of decoder_sparse_step."""
    step = read_int(values, "decoder_sparse_step", 1)
    require_positive({"decoder_sparse_step": step}, "decoder_sparse_step")
    named = values.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(type(layer) is not int for layer in named):
        raise ValueError(f"mlp_only_layers must be a list of whole numbers, not {shown(named)}")
    # Numbers of layers that do not exist have no meaning.
    return dense_layers(layer for layer in range(layers) if layer in named or (layer + 1) % step)


QWEN3_MOE = Qwen3MoeFamily()
