"""ernie4_5_moe: Ernie 4.5 with experts. Its rotary positions are interleaved, some experts see all tokens, and a bias
has a part in the choice of the others (DeepSeek-V3's, beside a softmax)."""

from collections.abc import Iterable
from typing import Any

import torch

from model.config import ModelConfig
from model.families.common import KINDS
from model.families.experts import SparseFamily, dense_layers, read_alike
from model.families.family import Beside, Rule
from model.families.values import read_int, read_value, require_positive

_BIAS, _THEIR_BIAS = "mlp.router.selection_bias", "mlp.moe_statics.e_score_correction_bias"


class Ernie45MoeFamily(SparseFamily):
    """transformers adds the bias always. So a model without it is written with a bias of zero, and with the key
    moe_use_aux_free of Baidu's programs, by which it comes back unchanged."""

    model_type = "ernie4_5_moe"
    architectures = ("Ernie4_5_MoeForCausalLM",)
    fixed = {"rope_interleaved": True}
    free = SparseFamily.free | {"num_shared_experts", "dense_layers", "router_bias"}
    usual = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 5e5}
    kinds = KINDS | {"tie_word_embeddings": (bool, True), "moe_intermediate_size": (int, 1536)}
    understood = SparseFamily.understood | kinds.keys() | {
        "moe_num_experts", "num_experts", "moe_k", "num_experts_per_tok", "moe_num_shared_experts",
        "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_use_aux_free",
    }  # fmt: skip
    # The places of experts on devices, and a head for further tokens, of which transformers reads nothing either.
    harmless = SparseFamily.harmless | {"moe_capacity", "num_nextn_predict_layers"}
    harmless_at = SparseFamily.harmless_at | {
        "use_bias": (False,), "moe_norm_min": (1e-12,), "moe_gate": ("topk",), "use_rmsnorm": (True,),
    }  # fmt: skip
    key_heads, theta = 4, 5e5
    in_memory = (("mlp.moe_statics.", "mlp.gate.moe_statics."),)

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config)
        if config.num_local_experts and _span_of(config) is None:
            found.append(
                f"dense_layers leaves layers at equal distances, each a multiple of it, in every {self.model_type}, "
                f"not {config.dense_layers}"
            )
        return found

    def fields(self, values: dict) -> dict[str, Any]:
        fields = super().fields(values)
        experts = read_alike(values, ("moe_num_experts", "num_experts"), 64)
        chosen = read_alike(values, ("moe_k", "num_experts_per_tok"), 6)
        if chosen > experts:
            raise ValueError(f"moe_k is {chosen}, more than moe_num_experts {experts}")
        return fields | {
            "num_local_experts": experts, "num_experts_per_tok": chosen,
            "num_shared_experts": read_int(values, "moe_num_shared_experts", 2),
            "dense_layers": _dense_layers(values, fields["num_hidden_layers"]),
            "router_bias": read_value(values, "moe_use_aux_free", bool, True),
        }  # fmt: skip

    def keys(self, config: ModelConfig) -> dict[str, object]:
        span = _span_of(config)
        assert span is not None
        return super().keys(config) | {
            "moe_num_experts": config.num_local_experts, "moe_k": config.num_experts_per_tok,
            "moe_num_shared_experts": config.num_shared_experts, "moe_layer_start_index": span.start,
            "moe_layer_end_index": span[-1], "moe_layer_interval": span.step, "moe_norm_min": 1e-12, "use_bias": False,
            "moe_use_aux_free": config.router_bias,
        }  # fmt: skip

    def their_name(self, name: str) -> str:
        return super().their_name(name).replace("mlp.shared_expert.", "mlp.shared_experts.")

    def rules(self, config: ModelConfig, names: Iterable[str]) -> list[Rule]:
        names = list(names)
        biases = [name for name in names if name.endswith(_BIAS)]
        return super().rules(config, [name for name in names if name not in biases]) + [
            Rule((self.prefix + name.replace(_BIAS, _THEIR_BIAS),), (name,),
                 lambda ours: [ours[0][None]], lambda theirs: [theirs[0][0]])
            for name in biases
        ]  # fmt: skip

    def besides(self, config: ModelConfig) -> list[Beside]:
        """Without `router_bias`, also the bias: it must be zero."""
        found, otherwise = super().besides(config), "that is not zero, while config.json has moe_use_aux_free = false"
        if config.router_bias:
            return found
        layers = [f"layers.{layer}." for layer in range(config.num_hidden_layers) if config.has_experts(layer)]
        return found + [
            Beside(self.prefix + layer + _THEIR_BIAS, f"{layer}mlp.router.weight",
                   lambda weight: weight.new_zeros(1, len(weight), dtype=torch.float32),
                   f"{otherwise}: set that to true", True)
            for layer in layers
        ]  # fmt: skip


def _dense_layers(values: dict, layers: int) -> str:
    """Layers without experts: those outside moe_layer_start_index to moe_layer_end_index (-1: the last), and those that
    are not a multiple of moe_layer_interval."""
    first, last = read_int(values, "moe_layer_start_index", 1), read_int(values, "moe_layer_end_index", -1)
    step = read_int(values, "moe_layer_interval", 1)
    require_positive({"moe_layer_interval": step}, "moe_layer_interval")
    last = layers - 1 if last == -1 else last
    return dense_layers(layer for layer in range(layers) if not first <= layer <= last or (layer + 1) % step)


def _span_of(config: ModelConfig) -> range | None:
    """Layers with experts, if they are those of a start, an end and an interval."""
    sparse = [layer for layer in range(config.num_hidden_layers) if config.has_experts(layer)]
    if not sparse:
        return None
    step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    span = range(sparse[0], sparse[-1] + 1, step)
    return span if list(span) == sparse and (sparse[0] + 1) % step == 0 else None


ERNIE4_5_MOE = Ernie45MoeFamily()
