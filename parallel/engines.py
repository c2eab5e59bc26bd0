"""Engines by name. A new engine is a module with a function that opens it, and a line here."""

from collections.abc import Callable

import torch
from torch import nn

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


def model_cutter(
    config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype
) -> Callable[[nn.Module], None] | None:
    """A function that lets a rank keep its part of a model alone; None: every rank holds the whole model."""
    if config.data_parallel == "auto":
        return None
    from parallel.torch_engines import fsdp

    return lambda model: fsdp.cut(model, config, context, mesh, dtype)
