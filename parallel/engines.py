"""Engines by name. A new engine is a module with a function that opens it, and a line here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel import data_parallel
from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.engine import Engine, EngineParts
from parallel.mesh import Mesh


def _open_fsdp(parts: EngineParts) -> Engine:
    # Imported when it is wanted: torch's FSDP takes a while to load.
    from parallel.torch_engines import fsdp

    return fsdp.open_fsdp(parts)


ENGINES: dict[str, Callable[[EngineParts], Engine]] = {
    "naive": data_parallel.open_naive,
    "bucketed": data_parallel.open_bucketed,
    "fsdp": _open_fsdp,
}
"""Name, see `engine_of` -> the function that opens it."""


def engine_of(config: ParallelConfig) -> str:
    """Name of the engine that the flags choose."""
    return config.ddp_impl if config.data_parallel == "auto" else "fsdp"


def open_engine(parts: EngineParts) -> Engine:
    return ENGINES[engine_of(parts.config)](parts)


class ModelCutter(NamedTuple):
    """Lets a rank keep its part of a model alone, which then gets its values part by part."""

    cut: Callable[[nn.Module], None]
    """Cuts a model without values, on the meta device, over the ranks."""
    held: Callable[[Tensor], tuple[Tensor, slice]]
    """A parameter -> the memory of this rank's rows, and which rows they are."""
    device_of: Callable[[Tensor], torch.device]
    """A parameter -> where this rank's rows of it are kept."""
    together: Callable[[Callable[[], object]], object]
    """Does a rank's work; if one rank raises a ValueError, all do."""


def model_cutter(
    config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype
) -> ModelCutter | None:
    """What cuts a model over the ranks; None: every rank holds the whole model."""
    if config.data_parallel == "auto":
        return None
    from parallel.torch_engines import shards

    return ModelCutter(
        lambda model: shards.cut(model, config, context, mesh, dtype),
        lambda parameter: shards.held_rows(parameter, mesh),
        lambda parameter: shards.device_of(parameter, config, context),
        context.gather_from,
    )
