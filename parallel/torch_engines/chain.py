"""The stages of a model that a rank holds, and forward passes that go through the stages of all ranks in a chain:

    rank 0   | stage 0 | send ....................... | receive | stage 2 | send ...
    rank 1             | receive | stage 1 | send ...                     | receive | stage 3 | loss, log-probabilities

This serves validation, text samples and generation. pipeline.py trains, with schedules that keep all stages busy.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.spans import span
from parallel.stages import Stages


class ModelConfig(Protocol):
    hidden_size: int
    residual_in_fp32: bool


class Cuttable(Protocol):
    """What a pipeline needs of a model (model/decoder.py)."""

    config: ModelConfig
    relay: Any

    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, nn.Parameter]]: ...

    def keep(self, units: Collection[int]) -> None: ...


def cut(model: nn.Module, stages: Stages, mesh: Mesh, groups: Groups, dtype: torch.dtype) -> None:
    """Let a rank keep its stages of a model alone, through which forward passes then go in a chain.

    Args:
        dtype: dtype to compute in.
    """
    own = cast(Cuttable, model)
    group = groups.of("pipe")
    assert group is not None
    own.keep([unit for stage in stages.stages_of(mesh.pipe_rank) for unit in stages.units(stage)])
    own.relay = Chain(stages, mesh, group, torch.float32 if own.config.residual_in_fp32 else dtype)


def stages_of(model: nn.Module, stages: Stages) -> Callable[[str], tuple[int, ...]]:
    """A function of a parameter's name: the pipe ranks that hold it. Those of all layers that share it, such as
    embedding and head.

    Args:
        model: whole.
    """
    ranks = {
        name: tuple(sorted({stages.rank_of_unit(unit) for unit in units}))
        for name, units in units_of(model, stages.num_units).items()
    }
    return ranks.__getitem__


def units_of(model: nn.Module, num_units: int) -> dict[str, set[int]]:
    """Name -> the units that use a parameter, which may have several names: several layers may share it.

    Args:
        num_units: of the whole model.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in cast(Cuttable, model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: {_unit_of(other, num_units) for other in shared} for shared in names.values() for name in shared}


def _unit_of(name: str, num_units: int) -> int:
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 1
    return 0 if first.startswith("embed_") else num_units - 1


class Chain:
    """Forward passes without a backward pass: stage after stage (a Relay of model/decoder.py).

    Args:
        group: the ranks that hold the stages.
        dtype: of what travels between stages.
    """

    def __init__(self, stages: Stages, mesh: Mesh, group: dist.ProcessGroup, dtype: torch.dtype):
        self._stages, self._own_rank, self._group, self._dtype = stages, mesh.pipe_rank, group, dtype
        self._ranks = mesh.ranks_of("pipe")
        self._returns = True

    @contextmanager
    def one_way(self) -> Iterator[None]:
        """Context in which the last stage keeps its results, and the others get zeros: so nobody waits for them."""
        before, self._returns = self._returns, False
        try:
            yield
        finally:
            self._returns = before

    def through(self, run: Callable[[range, Tensor | None], Tensor], like: Callable[[], Tensor]) -> Tensor:
        hidden: Tensor | None = None
        device = like().device
        for stage in self._stages.stages_of(self._own_rank):
            if stage and self._rank_of(stage - 1) != self._own_rank:
                hidden = self._receive(self._rank_of(stage - 1), device)
            hidden = run(self._stages.units(stage), hidden)
            if stage + 1 < self._stages.num_stages and self._rank_of(stage + 1) != self._own_rank:
                self._send(hidden, self._rank_of(stage + 1))
        if self._has_last:
            assert hidden is not None
            return hidden
        return like().zero_()

    def from_last(self, compute: Callable[[], Tensor] | None, like: Callable[[], Tensor]) -> Tensor:
        result = like().zero_() if compute is None else compute()
        if self._returns:
            result = result.contiguous()
            with span("results of the last stage"):
                dist.broadcast(result, self._ranks[self._rank_of(self._stages.num_stages - 1)], group=self._group)
        return result

    @property
    def _has_last(self) -> bool:
        return self._rank_of(self._stages.num_stages - 1) == self._own_rank

    def _rank_of(self, stage: int) -> int:
        return self._stages.rank_of(stage)

    def _send(self, hidden: Tensor, pipe_rank: int) -> None:
        # The next rank may not know the shape: parts of a row are cut over other dimensions of the mesh.
        shape = torch.tensor(hidden.shape, device=hidden.device)
        with span("to the next stage"):
            dist.send(shape, self._ranks[pipe_rank], group=self._group)
            dist.send(hidden.contiguous(), self._ranks[pipe_rank], group=self._group)

    def _receive(self, pipe_rank: int, device: torch.device) -> Tensor:
        shape = torch.empty(3, dtype=torch.int64, device=device)
        with span("wait for the stage before"):
            dist.recv(shape, self._ranks[pipe_rank], group=self._group)
            hidden = torch.empty(shape.tolist(), dtype=self._dtype, device=device)
            dist.recv(hidden, self._ranks[pipe_rank], group=self._group)
        return hidden
