"""Lets a rank keep its part of a model alone: what each dimension of the mesh does to a model without values.

    pipe       drops the units of other stages                          chain.py
    tensor     replaces matrices by their rows or columns, and sums     tensor.py
    expert     keeps some experts of each layer, and exchanges tokens   expert.py
    context    cuts rows of tokens, and gathers keys and values         context_parallel.py
    shard      FSDP cuts by rows what is left                           shards.py
"""

from collections.abc import Callable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from checkpoint.named import Piece
from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.division import Division, Outline, TensorCut, everywhere
from parallel.engines import Region
from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.stages import Stages
from parallel.torch_engines import chain, context_parallel, expert, shards, tensor


class Role(Protocol):
    """What parallelism wants to know of a parameter's role (model/roles.py)."""

    cut: TensorCut
    joined: int
    is_partial: bool
    is_stack: bool
    is_between: bool


class Cuttable(Protocol):
    """The part of the model that is cut."""

    def named_parameters(self) -> object: ...

    def roles(self) -> Mapping[str, Role]: ...


class Cutter:
    """A ModelCutter (parallel/engines.py) over all dimensions of the mesh.

    Args:
        dtype: dtype to compute in.
        stages: parts of the model, if there is a pipeline.
    """

    def __init__(
        self, config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype,
        stages: Stages | None = None,
    ):  # fmt: skip
        self.config, self.context, self.mesh, self.dtype, self.stages = config, context, mesh, dtype, stages
        self.groups = Groups(context, mesh, config.dist_timeout)
        self.division: Division

    def cut(self, model: nn.Module) -> None:
        # Of the whole model: before anything of it is gone.
        stages_of = everywhere if self.stages is None else chain.stages_of(model, self.stages)
        self.division = Division(whole_outlines(model, self.config), self.mesh, stages_of)
        expert.check(self.division)
        if self.mesh.tensor_size > 1:
            tensor.check(model, self.mesh, self.config.sequence_parallel)
        if self.stages is not None:
            chain.cut(model, self.stages, self.mesh, self.groups, self.dtype)
        if self.mesh.tensor_size > 1:
            tensor.cut(model, self.config, self.context, self.mesh, self.groups, self.division)
        if self.mesh.expert_size > 1:
            expert.cut(model, self.division, self.groups)
        if self.mesh.context_size > 1:
            context_parallel.cut(model, self.config, self.context, self.mesh, self.groups, self.dtype)
        if self.config.uses_fsdp:
            shards.cut(model, self.config, self.context, self.mesh, self.dtype)

    def regions(self, model: nn.Module) -> Callable[[Tensor], tuple[tuple[int, ...], list[Region]]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def held(parameter: Tensor) -> tuple[tuple[int, ...], list[Region]]:
            piece, memory = self.piece_of(names[id(parameter)]), shards.local(parameter.detach())
            regions = [
                (view, tuple(slice(start, start + n) for start, n in zip(box.start, box.length)))
                for box, view in piece.parts_of(memory) if box.numel
            ]  # fmt: skip
            return piece.shape, regions

        return held

    def piece_of(self, name: str) -> Piece:
        """What of a parameter is held here, after all cuts."""
        piece = self.division.piece(name)
        assert piece is not None, name
        return piece

    @property
    def uses_fsdp(self) -> bool:
        return self.config.uses_fsdp

    def device_of(self, parameter: Tensor) -> torch.device:
        return shards.device_of(parameter, self.config, self.context)

    def together(self, work: Callable[[], object]) -> object:
        return self.context.gather_from(work)


def whole_outlines(model: nn.Module, config: ParallelConfig) -> dict[str, Outline]:
    """Name -> each parameter of a model that is whole, before anything cuts it."""
    roles = cast(Cuttable, model).roles()

    def outline(role: Role, parameter: Tensor) -> Outline:
        is_partial = role.is_partial or (role.is_between and config.sequence_parallel)
        is_sharded = config.uses_fsdp and shards.is_cut(parameter)
        # (Under FSDP, what trains is in float32, too, but is gathered in the dtype to compute in.)
        is_float32 = parameter.dtype == torch.float32 and not parameter.requires_grad
        return Outline(
            tuple(parameter.shape), role.cut, role.joined, is_partial, role.is_stack, is_sharded, is_float32
        )

    return {name: outline(roles[name], parameter) for name, parameter in model.named_parameters()}
