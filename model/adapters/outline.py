"""An adapter by itself: the outline of its model, in which only what the adapter brings has values.

So it can be looked at, put into a model or merged into weights without a second copy of the model.
"""

from pathlib import Path

import torch
from torch import nn

from model import hf
from model.adapters import folder, lora
from model.adapters.tokens import WITH_ROWS
from model.config import ModelConfig
from model.decoder import Decoder
from model.linear import Head

AROUND = (lora.LoraLinear, *WITH_ROWS)
"""Layers that an adapter puts around a model's own, which is their base_layer."""


def read_adapter(
    directory: Path, config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The outline of a model with an adapter.

    Args:
        directory: the adapter's folder.
        config: the model's, without the adapter.
        device: of the adapter's tensors.
        dtype: of the adapter's tensors; None: that in the folder.
    Raises:
        ValueError: it is no adapter's folder, or no adapter of such a model.
        OSError: a disk or a network fails, and may be back later.
    """
    model = hf.outline(folder.grown(config, directory))
    lora.attach(model, folder.read_spec(directory, model), seed=0)
    tensors = folder.read_tensors(directory, model)
    # Copies: what is read lies in the mapped file, whose changes would reach it, and at any multiple of 8 bytes, where
    # some products round otherwise.
    values = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(values, strict=False, assign=True)
    if isinstance(model.lm_head, Head):
        model.tie_weights()
    return model


def brought(model: Decoder) -> dict[str, nn.Module]:
    """Path -> module of what an adapter brings in its outline: layers around others, and modules that were trained
    whole."""
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, AROUND)}
    inside = tuple(f"{path}." for path in adapted)
    whole = {
        path: module
        for path, module in model.named_modules()
        if path not in adapted and not path.startswith(inside) and _has_values(module)
    }
    return adapted | whole


def _has_values(module: nn.Module) -> bool:
    return any(not parameter.is_meta for parameter in module.parameters(recurse=False))
