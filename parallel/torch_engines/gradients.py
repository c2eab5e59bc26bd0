"""Gradients of shards, for an optimizer (parallel/contract.py)."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.buffer import ParameterSlice
from parallel.collectives import Collectives
from parallel.context import DistContext
from parallel.contract import Named
from parallel.division import Division, Held
from parallel.layout import ParameterSpec
from parallel.torch_engines.shards import COPIES, first_row, local, padded_size, parameters_by_unit


class ShardedGradients:
    """Gradients of this rank's rows (parallel/contract.py). A unit is a bucket.

    FSDP sums over the ranks with other rows of tokens. What tensor parallelism leaves whole, but lets each rank compute
    a part of, is also summed over the tensor ranks, once a step (`sum_parts`).

    Args:
        division: what each rank holds before FSDP cuts it.
        shards: collectives of the ranks that share a copy of the model.
    """

    keeps_scale, is_zeroed_by_step = True, False

    def __init__(
        self, model: nn.Module, context: DistContext, division: Division, shards: Collectives,
        square: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self._context, self._division, self._shards, self._square = context, division, shards, square
        self._mesh = division.mesh
        self.trained = [
            {name: parameter for name, parameter in unit.items() if parameter.requires_grad}
            for unit in parameters_by_unit(model)
        ]
        self.slices = [[piece for name, p in unit.items() for piece in self._slice(name, p)] for unit in self.trained]

    def _slice(self, name: str, parameter: nn.Parameter) -> list[ParameterSlice]:
        """This rank's rows, if it has some: rows that lie side by side are a flat slice."""
        rows = local(parameter.detach())
        offset = first_row(parameter, self._mesh) * math.prod(parameter.shape[1:])
        held = self._held(name, parameter)
        return [ParameterSlice(name, offset, held.shape, rows.view(-1), held=held.piece)] if rows.numel() else []

    def _held(self, name: str, parameter: nn.Parameter) -> Held:
        held = self._division.held(name)
        assert held is not None and held.shape == tuple(parameter.shape), (name, held, parameter.shape)
        return held

    def parameters(self, bucket: int) -> Sequence[Named]:
        trained = self.trained[bucket].items()
        return [ParameterSpec(name, tuple(p.shape), self._held(name, p).piece) for name, p in trained]

    def sum_parts(self, group: dist.ProcessGroup | None) -> None:
        """Sum the gradients of which each tensor rank has computed a part.

        Args:
            group: the tensor ranks; None: there is one.
        """
        parts = [
            local(cast(Tensor, parameter.grad)) for unit in self.trained for name, parameter in unit.items()
            if self._division.outlines[name].is_partial
        ]  # fmt: skip
        if group is None or not parts:
            return
        flat = torch.cat([part.reshape(-1) for part in parts]).to(self._context.device)
        dist.all_reduce(flat, group=group)
        for part, summed in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(summed.view_as(part))

    def sum_of_squares(self, bucket: int) -> Tensor:
        squares = [self._counted(piece.name, self._square(grad))
                   for piece, grad in zip(self.slices[bucket], self.take(bucket))]  # fmt: skip
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def _counted(self, name: str, squares: Tensor) -> Tensor:
        is_elsewhere = self._division.outlines[name].is_partial and self._mesh.tensor_rank > 0
        # Times zero, what is not finite still shows.
        return squares if self._division.counts(name) and not is_elsewhere else squares * 0.0

    def over_ranks(self, squares: Tensor) -> Tensor:
        # Every copy of the model has the same sum. All are added, so that NaN in any of them shows.
        return self._context.all_sum(squares) / len(self._mesh.sharers(COPIES))

    def take(self, bucket: int) -> list[Tensor]:
        grads = [local(cast(Tensor, p.grad)) for p in self.trained[bucket].values()]
        return [grad.view(-1) for grad in grads if grad.numel()]

    def gather(self, bucket: int) -> list[Tensor]:
        gathered = [(local(cast(Tensor, p.grad)), self._gather(p)) for p in self.trained[bucket].values()]
        return [whole for grad, whole in gathered if grad.numel()]

    def _gather(self, parameter: nn.Parameter) -> Tensor:
        """The whole gradient, 1-D: every rank sends as many rows as the first one has."""
        own = local(cast(Tensor, parameter.grad)).view(-1)
        padded = own.new_zeros(padded_size(parameter, self._mesh.shard_size))
        self._shards.shard(padded)[: len(own)] = own
        self._shards.all_gather(padded)
        return padded[: parameter.numel()]

    def release(self, bucket: int) -> None:
        for parameter in self.trained[bucket].values():
            parameter.grad = None

    def without_gradient(self) -> list[str]:
        """Names of the parameters that got no gradient."""
        return [name for unit in self.trained for name, parameter in unit.items() if parameter.grad is None]

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose summed gradients are not finite in this rank's rows."""
        grads = {name: local(cast(Tensor, p.grad)) for unit in self.trained for name, p in unit.items()}
        are_finite = torch.stack([torch.isfinite(grad).all() for grad in grads.values()]).tolist()
        return [name for name, is_finite in zip(grads, are_finite) if not is_finite]
