"""Layout of the parameters in the flat buffers: plain data, no tensors, no collectives.

Buckets are contiguous slices, in reverse order of the parameters' first use in the forward pass. This is roughly the
order in which the backward pass delivers gradients, so bucket 0 is complete first. A tied embedding is first used at
the very beginning, so it belongs to the last bucket.

A bucket holds parameters alone whose gradients are added by the same ranks, and of which other ranks compute the same
gradients, or not (division.py). Where there are several such kinds, several buckets fill at the same time; their order
is that in which their last parameters arrive. Ranks of one kind have its parameters in the same order, so no two ranks
wait for each other in different buckets. Ranks with the same gradients have them in the same places: the order in which
a collective adds depends on the place, and so would the last bits.

    buffer   | bucket 0                       | bucket 1                 | ...
             | lm_head | norm | layers.3 ...  | layers.2 ... | padding   |

Within its bucket, every parameter starts at a multiple of `alignment` elements, and every bucket's length is a multiple
of world_size * alignment. So it splits into equal, aligned shards, and each shard cuts a parameter at a multiple of
`alignment` elements from the parameter's start: optimizers that keep blocks of state ask for no less than a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from checkpoint.named import Piece

ALIGNMENT = 64
"""Usual alignment in elements: 128 bytes in bf16, 256 in fp32."""


@dataclass(frozen=True)
class ParameterSpec:
    name: str
    shape: tuple[int, ...]
    """Shape of what this rank holds of it."""
    held: Piece | None = None
    """What it holds of the whole parameter; None: all."""
    summed_over: tuple[int, ...] | None = None
    """The ranks that add its gradients; None: all."""
    is_copied: bool = False
    """Whether other ranks hold it alike and compute the same gradient without adding it."""
    counts: bool = True
    """Whether it counts in the global norm: of copies, only the first does."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """A parameter's place: elements [start, end) of the buffer, in bucket number `bucket`."""

    parameter: ParameterSpec
    bucket: int
    start: int
    end: int


@dataclass(frozen=True)
class BucketLayout:
    """A bucket's place: elements [start, end) of the buffer, padding included, and its slots."""

    index: int
    start: int
    end: int
    slots: tuple[Slot, ...]

    @property
    def summed_over(self) -> tuple[int, ...] | None:
        """The ranks that add its gradients; None: all."""
        return self.slots[0].parameter.summed_over

    @property
    def counts(self) -> bool:
        """Whether its gradients count in the global norm."""
        return self.slots[0].parameter.counts


@dataclass(frozen=True)
class BufferLayout:
    buckets: tuple[BucketLayout, ...]

    @property
    def numel(self) -> int:
        return self.buckets[-1].end if self.buckets else 0

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for bucket in self.buckets for slot in bucket.slots)


def plan_layout(
    parameters: Sequence[ParameterSpec], bucket_size: int, world_size: int, alignment: int = ALIGNMENT
) -> BufferLayout:
    """Plan the buffers.

    Args:
        parameters: in order of first use in the forward pass.
        bucket_size: a bucket is closed as soon as it holds this many elements; 0 puts all of a kind into one bucket.
        world_size: number of all ranks. Every bucket splits evenly over the ranks that add its gradients.
        alignment: multiple of elements at which parameters start and shards are cut.
    """
    if bucket_size < 0:
        raise ValueError(f"bucket_size must be 0 (one bucket) or positive, got {bucket_size}")
    buckets: list[BucketLayout] = []
    start = 0
    for parts in _fill(parameters, bucket_size, alignment):
        slots = []
        end = start
        for parameter in parts:
            first = start + _round_up(end - start, alignment)
            end = first + parameter.numel
            slots.append(Slot(parameter, len(buckets), first, end))
        ranks = world_size if parts[0].summed_over is None else len(parts[0].summed_over)
        end = start + _round_up(end - start, ranks * alignment)
        buckets.append(BucketLayout(len(buckets), start, end, tuple(slots)))
        start = end
    return BufferLayout(tuple(buckets))


def _fill(parameters: Sequence[ParameterSpec], bucket_size: int, alignment: int) -> list[list[ParameterSpec]]:
    """The parameters of each bucket, in order of the buckets' last gradients."""
    filling: dict[tuple[tuple[int, ...] | None, bool], list[ParameterSpec]] = {}
    ends: dict[tuple[tuple[int, ...] | None, bool], int] = {}
    full: list[list[ParameterSpec]] = []
    for parameter in reversed(parameters):
        kind = parameter.summed_over, parameter.is_copied
        filling.setdefault(kind, []).append(parameter)
        ends[kind] = _round_up(ends.get(kind, 0), alignment) + parameter.numel
        if bucket_size and ends[kind] >= bucket_size:
            full.append(filling.pop(kind))
            del ends[kind]
    arrival = {parameter.name: number for number, parameter in enumerate(reversed(parameters))}
    return sorted([*full, *filling.values()], key=lambda parts: arrival[parts[-1].name])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
