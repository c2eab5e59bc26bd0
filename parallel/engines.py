"""Engines by name. A new engine is a module with a function that opens it, and a line here."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel import data_parallel
from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.division import Division
from parallel.engine import Engine, EngineParts
from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.stages import Stages


def _open_pipeline(parts: EngineParts) -> Engine:
    from parallel.torch_engines import pipeline

    return pipeline.open_pipeline(parts)


def _open_fsdp(parts: EngineParts) -> Engine:
    # Imported when it is wanted: torch's FSDP takes a while to load.
    from parallel.torch_engines import fsdp

    return fsdp.open_fsdp(parts)


ENGINES: dict[str, Callable[[EngineParts], Engine]] = {
    "naive": data_parallel.open_naive,
    "bucketed": data_parallel.open_bucketed,
    "fsdp": _open_fsdp,
    "pipeline": _open_pipeline,
}
"""Name, see `engine_of` -> the function that opens it."""


def engine_of(config: ParallelConfig) -> str:
    """Name of the engine that the flags choose."""
    if config.pipeline_model_parallel_size > 1:
        return "pipeline"
    return "fsdp" if config.uses_fsdp else config.ddp_impl


def open_engine(parts: EngineParts) -> Engine:
    return ENGINES[engine_of(parts.config)](parts)


Region = tuple[Tensor, tuple[slice, ...]]
"""A view of a rank's memory, and which part of the whole parameter it holds: a slice for each dimension."""


class ModelCutter(Protocol):
    """Lets a rank keep its part of a model alone, which then gets its values part by part."""

    groups: Groups
    division: Division
    """After `cut`: what each rank holds."""

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP cuts it, which wants trained parameters in float32."""

    def cut(self, model: nn.Module) -> None:
        """Cut a model without values, on the meta device, over the ranks. Collective."""

    def regions(self, model: nn.Module) -> Callable[[Tensor], tuple[tuple[int, ...], list[Region]]]:
        """A function of a parameter of a model that was cut: shape of the whole parameter, and what is held here."""

    def device_of(self, parameter: Tensor) -> torch.device:
        """Where this rank's part of a parameter is kept."""

    def together(self, work: Callable[[], object]) -> object:
        """Do a rank's work; if one rank raises a ValueError, all do. Collective."""


def model_cutter(
    config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype, stages: Stages | None = None
) -> ModelCutter | None:
    """What cuts a model over the ranks; None: every rank holds the whole model, and works through all of it.

    Args:
        dtype: dtype to compute in.
        stages: parts of the model, if there is a pipeline.
    """
    if not (config.is_cut or config.has_other_dimensions):
        return None
    from parallel.torch_engines import cutting

    return cutting.Cutter(config, context, mesh, dtype, stages)
