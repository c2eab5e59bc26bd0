"""LoRA (Hu et al., 2021): a layer that adds a product of two thin matrices to a frozen one.

    y = W x + b + s B A dropout(x)          A (r, C), B (O, r); s = alpha / r, or alpha / sqrt(r) with rsLoRA

A begins at random, B at 0, so the model begins as it was. Names are PEFT's: lora_A, lora_B.

Shapes: C inputs, O outputs, r rank.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters.config import ALL_LINEAR, AdapterConfig, names_of
from model.dropout import DropoutKey
from model.linear import Linear
from model.roles import generator_of


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, as its adapter_config.json says it."""

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Ends of the names of adapted layers, or whole names; ("all-linear",) for all linear layers but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole."""
    use_rslora: bool = False
    use_dora: bool = False

    @staticmethod
    def of(config: AdapterConfig) -> "LoraSpec":
        """The adapter that the flags describe."""
        assert config.lora_r is not None
        return LoraSpec(
            config.lora_r, config.lora_alpha, config.lora_dropout, tuple(names_of(config.lora_target_modules)),
            tuple(names_of(config.lora_modules_to_save)), config.use_rslora, config.use_dora,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A linear layer with its addition.

    Args:
        base_layer: frozen; any module that maps (..., C) to (..., O).
        site: number of its dropout in its block.
    """

    def __init__(self, base_layer: Linear, spec: LoraSpec, site: int):
        super().__init__()
        self.spec, self.site, self.scale = spec, site, spec.scale
        self.base_layer = base_layer
        weight = base_layer.weight
        where = {"device": weight.device, "dtype": weight.dtype}
        self.lora_A = nn.Linear(base_layer.in_features, spec.r, bias=False, **where)
        self.lora_B = nn.Linear(spec.r, base_layer.out_features, bias=False, **where)

    def forward(self, x: Tensor, key: DropoutKey | None = None) -> Tensor:
        added = F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight)
        return cast(Tensor, self.base_layer(x)) + self.scale * added


def attach(model: nn.Module, spec: LoraSpec, seed: int) -> None:
    """Freeze a model and put the addition into the chosen layers, with its first values.

    Raises:
        ValueError: a name fits no layer.
    """
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is Linear}
    chosen = list(layers) if spec.targets == (ALL_LINEAR,) else [n for n in layers if n.endswith(spec.targets)]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(layers[name], spec, site=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora_A.weight"):
                # Kaiming's uniform distribution with a = sqrt(5), as nn.Linear and PEFT have it.
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator_of(seed, name)) * (2.0 * bound) - bound
                parameter.copy_(drawn)
            elif name.endswith(".lora_B.weight"):
                parameter.zero_()


def is_adapters(name: str) -> bool:
    """Whether a parameter belongs to an adapter rather than to the model below it."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """Name of a parameter in the model without an adapter."""
    return name.replace(".base_layer.", ".")
