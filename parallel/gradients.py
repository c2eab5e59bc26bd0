"""Gradient sources for an optimizer (contract.py): the buckets of a DDP, or tensors beside the parameters.

On a mesh, all ranks' squares are added. A bucket's count on one rank alone: the first of those that add its gradients,
if what it holds counts (division.py). With ZeRO-1 each of them counts its shard.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from parallel.buffer import SliceWithGrad, sum_of_squares
from parallel.contract import Named
from parallel.ddp import DistributedDataParallel
from parallel.zero1 import Zero1


def square(tensor: Tensor) -> Tensor:
    """Sum of the squares of a tensor's elements, float64 scalar."""
    return sum_of_squares([tensor])


class BucketGradients:
    """Gradients in the buckets of a DDP.

    Args:
        zero1: provides this rank's shards as slices; None: every parameter is one slice.
        square: returns the sum of the squares of a 1-D tensor, float64 scalar.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        zero1: Zero1 | None = None,
        square: Callable[[Tensor], Tensor] = square,
    ):
        self.ddp, self.zero1, self._square = ddp, zero1, square
        self.slices = (zero1 or ddp).slices()
        whole = [{slot.parameter.name: bucket.place(slot) for slot in bucket.slots} for bucket in ddp.buckets]
        self._whole = [[places[piece.name] for piece in pieces] for places, pieces in zip(whole, self.slices)]
        self._own = [
            [slice(place.start + piece.offset, place.start + piece.offset + len(piece.param))
             for place, piece in zip(places, pieces)]
            for places, pieces in zip(self._whole, self.slices)
        ]  # fmt: skip
        self._taken: dict[int, Tensor] = {}

    @property
    def keeps_scale(self) -> bool:
        return self.ddp.hook.keeps_scale

    @property
    def is_zeroed_by_step(self) -> bool:
        # Under ZeRO-1, the other shards of the bucket must be zeroed, too.
        return self.zero1 is None and self.ddp.hook.takes_in_place

    def parameters(self, bucket: int) -> Sequence[Named]:
        return [slot.parameter for slot in self.ddp.buckets[bucket].slots]

    def sum_of_squares(self, bucket: int) -> Tensor:
        its = self.ddp.buckets[bucket]
        if self.ddp.hook.knows_norm:
            squares = self.ddp.hook.sum_of_squares(its)
        else:
            squares = _added(self._square(its.grad[own]) for own in self._own[bucket])
        if self.ddp.sums is None:
            return squares
        is_first = its.collectives is None or its.collectives.rank == 0
        # Times zero, what is not finite still shows.
        return squares * float(its.layout.counts and (self._are_shards or is_first))

    @property
    def _are_shards(self) -> bool:
        """Whether a rank's squares are those of its shard alone."""
        return self.zero1 is not None and not self.ddp.hook.knows_norm

    def over_ranks(self, squares: Tensor) -> Tensor:
        # On a mesh, ranks have different parameters.
        return self.ddp.context.all_sum(squares) if self._are_shards or self.ddp.sums is not None else squares

    def take(self, bucket: int) -> list[Tensor]:
        taken = self._taken[bucket] = self.ddp.hook.take(self.ddp.buckets[bucket])
        return [taken[own] for own in self._own[bucket]]

    def gather(self, bucket: int) -> list[Tensor]:
        taken = self._taken[bucket]
        if self.zero1 is not None:
            self.zero1.gather_updates(bucket, taken)
        return [taken[whole] for whole in self._whole[bucket]]

    def release(self, bucket: int) -> None:
        self.ddp.hook.release(self.ddp.buckets[bucket])


class PlainGradients:
    """Gradients stored with their slices, already summed over all ranks, as NaiveDDP's are."""

    keeps_scale = is_zeroed_by_step = True

    def __init__(self, slices: Sequence[Sequence[SliceWithGrad]], square: Callable[[Tensor], Tensor] = square):
        self.slices, self._square = slices, square

    def parameters(self, bucket: int) -> Sequence[Named]:
        return self.slices[bucket]

    def sum_of_squares(self, bucket: int) -> Tensor:
        return _added(self._square(piece.grad) for piece in self.slices[bucket])

    def over_ranks(self, squares: Tensor) -> Tensor:
        return squares

    def take(self, bucket: int) -> list[Tensor]:
        return [piece.grad for piece in self.slices[bucket]]

    def gather(self, bucket: int) -> list[Tensor]:
        return [piece.whole_grad for piece in self.slices[bucket]]

    def release(self, bucket: int) -> None:
        for piece in self.slices[bucket]:
            piece.grad.zero_()


def _added(parts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.float64) if total is None else total
