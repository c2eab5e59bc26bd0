"""A sparse model that begins with the weights of a dense one (sparse upcycling: Komatsuzaki et al., 2022).

Each expert begins as a copy of its layer's feed-forward matrices, and the router is new. As long as the experts are
equal, any choice of them gives the dense layer's output, if their weights add up to 1 (norm_topk_prob); then the router
sends different tokens to them, and they learn to differ.

Shapes: E experts, I width of the feed-forward layer, C hidden size.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import hf
from model.config import ModelConfig
from model.decoder import Decoder
from model.families import family_of

_CHOSEN = (
    "num_local_experts", "num_experts_per_tok", "dense_layers", "norm_topk_prob", "router_bias",
    "router_bias_update_rate",
)  # fmt: skip
"""Fields of the sparse model that the dense one says nothing about."""


def is_upcycled(stored: ModelConfig, wanted: ModelConfig) -> bool:
    """Whether a model with experts is to begin with weights without."""
    return wanted.num_local_experts > 0 and not stored.num_local_experts


def sparse_config(dense: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """Configuration of the sparse model: the dense one's, with experts of its width, and a family that has them.

    Args:
        wanted: says how many experts there are, and how tokens are sent to them.
    Raises:
        ValueError: the experts cannot be copies of the dense layer, or no family can hold the model.
    """
    if dense.mlp != "swiglu" or dense.mlp_bias:
        raise ValueError(
            f"--num_local_experts: experts are SwiGLU without bias, and the feed-forward layers of the "
            f"{dense.model_type} to start from are not: they cannot be copied into experts"
        )
    if wanted.moe_intermediate_size not in (0, dense.intermediate_size):
        raise ValueError(
            f"--moe_intermediate_size={wanted.moe_intermediate_size}: experts begin as copies of a layer whose width "
            f"is {dense.intermediate_size}: leave it out"
        )
    if wanted.num_shared_experts:
        raise ValueError(
            "--num_shared_experts: with the weights of a dense model, all of the layer is in the experts that the "
            "router chooses: leave it out"
        )
    chosen: dict[str, Any] = {name: getattr(wanted, name) for name in _CHOSEN}
    own = {"moe_intermediate_size": dense.intermediate_size, "model_type": wanted.model_type}
    sparse = replace(dense, **chosen | own).resolve()
    family: Any = family_of(sparse).model_type
    return replace(sparse, model_type=family)


@torch.no_grad()
def load_upcycled(model: Decoder, directory: str | Path, seed: int) -> None:
    """Set the weights of a sparse model by those of a dense one; see `sparse_config`.

    Args:
        directory: the dense model's folder.
        seed: key of the routers' weights.
    Raises:
        ValueError, OSError: as hf.load_weights.
    """
    dense, new = hf.StoredWeights(directory, hf.read_config(directory)), []
    for name, parameter in model.named_parameters():
        mlp, shape = name.partition(".experts.")[0], model.filling.held(parameter).shape
        if name in dense.outlines:
            model.filling.put(parameter, dense.read_one(name))
        elif name.endswith(".experts.gate_up_proj"):
            gate_IC, up_IC = (dense.read_one(f"{mlp}.{part}_proj.weight") for part in ("gate", "up"))
            model.filling.put(parameter, torch.cat((gate_IC, up_IC)).expand(shape))
        elif name.endswith(".experts.down_proj"):
            model.filling.put(parameter, dense.read_one(f"{mlp}.down_proj.weight").expand(shape))
        else:
            new.append(name)
    model.initialize(seed, new)
