"""A model of which a process holds a part: its outline is cut, gets memory, and then values part by part."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model import hf
from model.adapters.lora import LoraSpec, attach
from model.config import ModelConfig
from model.decoder import Decoder
from model.filling import Filling, Held


class Cutter(Protocol):
    """Lets a process keep its part of a model alone (parallel/engines.py)."""

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP cuts it, which wants trained parameters in float32."""

    def cut(self, model: nn.Module) -> None: ...

    def regions(
        self, model: nn.Module
    ) -> Callable[[Tensor], tuple[tuple[int, ...], list[tuple[Tensor, tuple[slice, ...]]]]]: ...

    def device_of(self, parameter: Tensor) -> torch.device: ...

    def together(self, work: Callable[[], object]) -> object: ...


def outline_of_part(
    shape: ModelConfig, options: tuple[Any, ...], device: torch.device, dtype: torch.dtype, adapter: LoraSpec | None,
    cutter: Cutter,
) -> Decoder:  # fmt: skip
    """A model with memory for this process' part, without values; it knows which (model/filling.py). Collective.

    Args:
        options: further arguments of Decoder.
    Raises:
        ValueError: the model cannot be cut in this way.
    """
    model = hf.outline(shape, *options)
    if adapter is not None:
        attach(model, adapter, seed=0)
    model.to(dtype)
    for parameter in model.parameters() if cutter.uses_fsdp else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    cutter.cut(model)

    def with_memory(tensor: Tensor) -> Tensor:
        place = cutter.device_of(tensor) if isinstance(tensor, nn.Parameter) else device
        # Some buffers have values, even in an outline.
        return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

    model._apply(with_memory)
    model.tie_weights()
    held = cutter.regions(model)
    model.filling = Filling(lambda parameter: Held(*held(parameter)), dtype)
    return model
