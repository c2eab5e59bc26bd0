"""Layout of the parameters in the flat buffers: plain data, no tensors, no collectives.

Buckets are contiguous slices, in reverse order of the parameters' first use in the forward pass. This is roughly the
order in which the backward pass delivers gradients, so bucket 0 is complete first. A tied embedding is first used at
the very beginning, so it belongs to the last bucket.

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
    """Of what this rank holds of it."""
    held: Piece | None = None
    """What it holds of the whole parameter; None: all."""

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
        bucket_size: a bucket is closed as soon as it holds this many elements; 0 puts everything into one bucket.
        world_size: number of ranks over which every bucket splits evenly.
        alignment: multiple of elements at which parameters start and shards are cut.
    """
    if bucket_size < 0:
        raise ValueError(f"bucket_size must be 0 (one bucket) or positive, got {bucket_size}")
    buckets: list[BucketLayout] = []
    slots: list[Slot] = []
    bucket_start = cursor = 0

    def close_bucket() -> None:
        nonlocal slots, bucket_start, cursor
        end = bucket_start + _round_up(cursor - bucket_start, world_size * alignment)
        buckets.append(BucketLayout(len(buckets), bucket_start, end, tuple(slots)))
        slots, bucket_start, cursor = [], end, end

    for parameter in reversed(parameters):
        start = bucket_start + _round_up(cursor - bucket_start, alignment)
        cursor = start + parameter.numel
        slots.append(Slot(parameter, len(buckets), start, cursor))
        if bucket_size and cursor - bucket_start >= bucket_size:
            close_bucket()
    if slots:
        close_bucket()
    return BufferLayout(tuple(buckets))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
