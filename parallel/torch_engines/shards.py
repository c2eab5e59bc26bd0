"""A model of which each rank holds shards: the cut by FSDP2, and which rows are where.

Rows are cut as by torch.chunk: all ranks have as many as the first one, except the last ones, which may have fewer or
none. So a shard is one contiguous slice of the flat parameter.
"""

import math
import warnings
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.config import ParallelConfig
from parallel.context import DistContext, group_of_one, new_group
from parallel.division import most_rows, rows_of
from parallel.mesh import Dimension, Mesh


class Cuttable(Protocol):
    """The part of the model that FSDP cuts."""

    layers: nn.ModuleList


def cut(model: nn.Module, config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype) -> None:
    """Let every rank keep its rows of the model alone. Collective.

    Args:
        model: its trained parameters in float32, the frozen ones in `dtype`; may be without values, on the meta device.
        dtype: dtype to compute in.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32 if config.grad_reduce_in_fp32 else dtype,
        # Our blocks know which dtypes they want.
        cast_forward_inputs=False,
    )
    offload = OffloadPolicy()
    if config.fsdp_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=context.device.type == "cuda")
    group = _shard_group(config, context, mesh)
    device_mesh = DeviceMesh.from_group(group, context.device.type, mesh_dim_names=("shard",))
    whole = {parameter for parameter in model.parameters() if not is_cut(parameter)}

    def cut_unit(unit: nn.Module, reshard_after_forward: bool) -> None:
        fully_shard(
            unit, mesh=device_mesh, mp_policy=policy, offload_policy=offload, ignored_params=whole,
            reshard_after_forward=reshard_after_forward,
        )  # fmt: skip

    for block in cast(Cuttable, model).layers:
        cut_unit(block, config.reshard_after_forward)
    # torch warns of views among a block's results, in which nothing must be changed in place; nothing is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    # The head computes after the model's own forward pass.
    cut_unit(model, reshard_after_forward=False)


def is_cut(parameter: Tensor) -> bool:
    """Whether a parameter is cut. Frozen vectors stay whole on every rank: they are small, and a rule that is no
    optimizer moves the routers' biases."""
    return parameter.requires_grad or parameter.dim() > 1


def _shard_group(config: ParallelConfig, context: DistContext, mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that share this rank's copy of the model. Collective."""
    if context.grad_group is None:
        return group_of_one(context)
    if mesh.shard_size == mesh.world_size:
        return context.grad_group
    return new_group(context, _sets_of(("shard",), mesh), config.dist_timeout)


COPIES: tuple[Dimension, ...] = ("replica", "context")
"""Ranks that differ in these dimensions hold the same shard, and add their gradients of it."""


def copies_group(config: ParallelConfig, context: DistContext, mesh: Mesh) -> dist.ProcessGroup | None:
    """The ranks that hold the same shard; None: there is one copy. Collective."""
    if len(mesh.sharers(COPIES)) == 1:
        return None
    return new_group(context, _sets_of(COPIES, mesh), config.dist_timeout)


def _sets_of(dimensions: tuple[Dimension, ...], mesh: Mesh) -> list[tuple[int, ...]]:
    """The ranks of each group in these dimensions, in one order."""
    return list(dict.fromkeys(mesh.at(rank).sharers(dimensions) for rank in range(mesh.world_size)))


def give_up_gathered(model: nn.Module) -> None:
    """Give up the weights that a forward pass has left whole: those around the blocks, for the head, and without
    `reshard_after_forward` those of the blocks. Until then the model's parameters are the whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter, or of its gradient: a view."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def first_row(parameter: Tensor, mesh: Mesh) -> int:
    """Number of the first of this rank's rows of a parameter."""
    return rows_of(mesh.shard_rank, mesh.shard_size, len(parameter)).start


def held_rows(parameter: Tensor, mesh: Mesh) -> tuple[Tensor, slice]:
    """The memory of this rank's rows of a parameter, and which rows they are."""
    first = first_row(parameter, mesh) if isinstance(parameter, DTensor) else 0
    rows = local(parameter.detach())
    return rows, slice(first, first + len(rows))


def device_of(parameter: Tensor, config: ParallelConfig, context: DistContext) -> torch.device:
    """Where this rank's rows of a parameter are kept; what is whole on every rank stays beside the model's work."""
    return torch.device("cpu") if config.fsdp_cpu_offload and isinstance(parameter, DTensor) else context.device


def units(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered at once: the last block first, at the end the model itself, which has what lies
    around the blocks."""
    return [*reversed([cast(FSDPModule, block) for block in cast(Cuttable, model).layers]), cast(FSDPModule, model)]


def parameters_by_unit(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Name -> parameter of each unit."""
    blocks = cast(Cuttable, model).layers
    by_block = [
        {f"layers.{number}.{name}": parameter for name, parameter in blocks[number].named_parameters()}
        for number in reversed(range(len(blocks)))
    ]
    in_blocks = {name for block in by_block for name in block}
    around = {name: parameter for name, parameter in model.named_parameters() if name not in in_blocks}
    return [*by_block, around]


def group_of(model: nn.Module) -> dist.ProcessGroup:
    """The ranks that share this rank's copy of the model."""
    return next(p.device_mesh.get_group() for p in model.parameters() if isinstance(p, DTensor))


def padded_size(parameter: Tensor, ranks: int) -> int:
    """Elements that travel where every rank sends as many rows of a parameter as the first one."""
    return most_rows(ranks, len(parameter)) * ranks * math.prod(parameter.shape[1:])
