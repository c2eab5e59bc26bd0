"""Gradients of shards, for an optimizer (parallel/contract.py)."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from parallel.buffer import ParameterSlice
from parallel.collectives import Collectives
from parallel.context import DistContext
from parallel.contract import Named
from parallel.layout import ParameterSpec
from parallel.mesh import Mesh
from parallel.torch_engines.shards import first_row, local, padded_size, parameters_by_unit


class ShardedGradients:
    """Gradients of this rank's rows (parallel/contract.py). A unit is a bucket.

    Args:
        shards: collectives of the ranks that share a copy of the model.
    """

    keeps_scale, is_zeroed_by_step = True, False

    def __init__(
        self, model: nn.Module, context: DistContext, mesh: Mesh, shards: Collectives,
        square: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self._context, self._mesh, self._shards, self._square = context, mesh, shards, square
        self.trained = [
            {name: parameter for name, parameter in unit.items() if parameter.requires_grad}
            for unit in parameters_by_unit(model)
        ]
        self.slices = [[piece for name, p in unit.items() for piece in self._slice(name, p)] for unit in self.trained]

    def _slice(self, name: str, parameter: nn.Parameter) -> list[ParameterSlice]:
        """This rank's rows, if it has some: rows that lie side by side are a flat slice."""
        rows = local(parameter.detach())
        offset = first_row(parameter, self._mesh) * math.prod(parameter.shape[1:])
        return [ParameterSlice(name, offset, tuple(parameter.shape), rows.view(-1))] if rows.numel() else []

    def parameters(self, bucket: int) -> Sequence[Named]:
        return [ParameterSpec(name, tuple(p.shape)) for name, p in self.trained[bucket].items()]

    def sum_of_squares(self, bucket: int) -> Tensor:
        squares = [self._square(grad) for grad in self.take(bucket)]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def over_ranks(self, squares: Tensor) -> Tensor:
        # Every copy of the model has the same sum. All are added, so that NaN in any of them shows.
        return self._context.all_sum(squares) / self._mesh.replica_size

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
