"""Experts in the folders of Hugging Face: each expert's matrices are tensors of their own, ours are one upon another.

    theirs  experts.0.gate_proj, experts.0.up_proj, experts.1.gate_proj, ...   (I, C) each
    ours    experts.gate_up_proj                                               (E, 2 I, C), the rows of the gate first

Shapes: E experts, I width of an expert, C hidden size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.families.common import CommonFamily
from model.families.family import Rule
from model.families.values import read_int, read_value, require_positive
from model.hf_files import shown

_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class SparseFamily(CommonFamily):
    """The base of families with experts."""

    experts = "mlp.experts.{expert}.{part}.weight"
    """Name of an expert's matrix within its layer."""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The family's names of an expert's matrices."""
    router = "mlp.gate.weight"
    """Name of the router's matrix within its layer."""
    in_memory: tuple[tuple[str, str], ...] = ()
    """Part of a name in the folder, and in the memory of transformers 5."""
    understood = CommonFamily.understood | {"router_aux_loss_coef"}
    harmless = CommonFamily.harmless | {"output_router_logits"}
    free = CommonFamily.free | {"num_local_experts"}

    def fields(self, values: dict) -> dict[str, Any]:
        coefficient = read_value(values, "router_aux_loss_coef", float, 0.001)
        return super().fields(values) | {"router_aux_loss_coef": coefficient}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return super().keys(config) | {
            "router_aux_loss_coef": config.router_aux_loss_coef, "output_router_logits": False,
        }  # fmt: skip

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = [] if config.num_local_experts else [f"num_local_experts is above 0 in every {self.model_type}"]
        return found + super().mismatches(config)

    def their_name(self, name: str) -> str:
        return super().their_name(name).replace("mlp.router.weight", self.router)

    def rules(self, config: ModelConfig, names: Iterable[str]) -> list[Rule]:
        names = list(names)
        stacks = [name for name in names if name.endswith((_GATE_UP, _DOWN))]
        rules = super().rules(config, [name for name in names if name not in stacks])
        return rules + [self._stack(name, config.num_local_experts) for name in stacks]

    def other_rules(self, config: ModelConfig, names: Iterable[str]) -> list[list[Rule]]:
        """transformers 5 has stacks in memory, too; save_pretrained(save_original_format=False) writes them as such."""
        return [[self._as_in_memory(rule) for rule in self.rules(config, names)]]

    def _as_in_memory(self, rule: Rule) -> Rule:
        if rule.ours[0].endswith((_GATE_UP, _DOWN)):
            return Rule((self.prefix + rule.ours[0],), rule.ours)
        theirs = rule.theirs[0]
        for part, other in self.in_memory:
            theirs = theirs.replace(part, other)
        return replace(rule, theirs=(theirs,))

    def _stack(self, name: str, num_experts: int) -> Rule:
        """The rule of all experts' matrices in a layer: their tensors expert by expert, the gate before up."""
        parts = self.parts[:2] if name.endswith(_GATE_UP) else self.parts[2:]
        layer = self.prefix + name.removesuffix(_GATE_UP).removesuffix(_DOWN)
        theirs = [
            layer + self.experts.format(expert=expert, part=part) for expert in range(num_experts) for part in parts
        ]
        return Rule(tuple(theirs), (name,), _apart(len(parts)), _together(len(parts)), theirs_a_row=len(parts))


def _apart(num_parts: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Function from the stack to each expert's matrices."""
    return lambda ours: [part for expert in ours[0] for part in expert.chunk(num_parts)]


def _together(num_parts: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """The inverse."""

    def stack(theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        experts = [torch.cat(list(theirs[at : at + num_parts])) for at in range(0, len(theirs), num_parts)]
        return [torch.stack(experts)]

    return stack


def read_alike(values: Mapping, names: Sequence[str], default: int) -> int:
    """The whole number at any of several names for it.

    Args:
        default: where all are missing.
    Raises:
        ValueError: two of them differ, or it is below 1.
    """
    found = {name: read_int(values, name) for name in names if values.get(name) is not None}
    if len(set(found.values())) > 1:
        told = " and ".join(f"{name} = {shown(value)}" for name, value in found.items())
        raise ValueError(f"{told} mean the same: write the right one everywhere")
    require_positive(found, *found)
    return next(iter(found.values()), default)


def dense_layers(layers: Iterable[int]) -> str:
    """Numbers of layers, as our field has them."""
    return ",".join(map(str, layers))


def layers_of(field: str) -> list[int]:
    """The reverse."""
    return sorted(int(layer) for layer in field.split(",") if layer)
