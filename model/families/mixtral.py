"""mixtral: a mistral whose feed-forward layers are experts of the same width, two of which each token is sent to."""

from typing import Any

from model.config import ModelConfig
from model.families.experts import SparseFamily, read_alike
from model.families.values import read_int
from model.families.windows import read_window, require_window_of_all


class MixtralFamily(SparseFamily):
    model_type = "mixtral"
    architectures = ("MixtralForCausalLM",)
    free = SparseFamily.free | {"sliding_window"}
    usual = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
    understood = SparseFamily.understood | {
        "num_local_experts", "num_experts", "num_experts_per_tok", "sliding_window", "layer_types",
    }  # fmt: skip
    # Noise on the router's inputs while it learns.
    harmless_at = SparseFamily.harmless_at | {"router_jitter_noise": (0.0,)}
    key_heads, theta = 8, 1e6
    experts, parts = "block_sparse_moe.experts.{expert}.{part}.weight", ("w1", "w3", "w2")
    router, in_memory = "block_sparse_moe.gate.weight", (("block_sparse_moe.", "mlp."),)

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config)
        if config.moe_intermediate_size not in (0, config.intermediate_size):
            found.append(
                f"moe_intermediate_size is intermediate_size, {config.intermediate_size}, in every mixtral, not "
                f"{config.moe_intermediate_size}"
            )
        return found

    def fields(self, values: dict) -> dict[str, Any]:
        window = read_window(values, 0)
        require_window_of_all(values, window)
        return super().fields(values) | {
            "num_local_experts": read_alike(values, ("num_local_experts", "num_experts"), 8),
            "num_experts_per_tok": read_int(values, "num_experts_per_tok", 2), "sliding_window": window,
        }  # fmt: skip

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return super().keys(config) | {
            "num_local_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok,
            "router_jitter_noise": 0.0, "sliding_window": config.sliding_window or None,
        }  # fmt: skip


MIXTRAL = MixtralFamily()
