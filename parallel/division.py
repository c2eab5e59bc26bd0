"""What each rank holds of a model that is cut over a mesh, and who sums its gradients: plain data, the same on all
ranks.

    pipe      a rank holds the units of its stages: the embedding, some blocks, the last norm with the head
    tensor    of a matrix its rows or columns (model/roles.py: "column", "row"), of the vocabulary its rows
    expert    of a stack of experts its experts

FSDP then cuts what this leaves, by rows, as torch.chunk does: all ranks have as many as the first one, except the last
ones, which may have fewer or none. What a rank holds of a parameter is a `Piece` of it (checkpoint/named.py), so any
mesh can read any mesh's checkpoint. The pieces of two ranks are equal, or have nothing in common.

A gradient is summed over all ranks that have computed a part of it:

    usual                                          data x context
    experts under expert parallelism               copies of the experts x context
    whole on every rank, used on parts of the      data x context x tensor
    work (`Outline.is_partial`)
    the matrix of a tied embedding, which the      data x context x these stages
    first and the last stage hold

Where several ranks compute the same gradient of the same piece, it counts in the global norm on the first alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from checkpoint.named import Box, Piece
from parallel.mesh import Dimension, Mesh

TensorCut = Literal["column", "row", "vocabulary", "first", "none"]


@dataclass(frozen=True)
class Outline:
    """A parameter of the whole model."""

    shape: tuple[int, ...]
    cut: TensorCut = "none"
    """How tensor parallelism cuts it; "first": the first rank alone holds it, since it is added after the others' sum
    is."""
    joined: int = 1
    """Matrices of one height that lie below one another in it, each of which is cut."""
    is_partial: bool = False
    """Under tensor parallelism: whole on every rank, each of which computes a part of its gradient."""
    is_stack: bool = False
    """Whether it is a stack of experts (E, outputs, inputs)."""
    is_sharded: bool = False
    """Whether FSDP cuts it."""
    is_float32: bool = False
    """Whether it stays in float32, whatever the dtype to compute in: steps of a router's bias are too small for 16
    bits."""


class Held(NamedTuple):
    """What a rank holds of a parameter."""

    piece: Piece
    """Its boxes, in the order of the rank's memory."""
    shape: tuple[int, ...]
    """Shape of the rank's own tensor."""


class Kind(NamedTuple):
    """What decides which ranks share a parameter. A model has few kinds."""

    is_stack: bool
    is_partial: bool
    is_on_all_tensor_ranks: bool
    """Whether all tensor ranks hold it alike."""
    is_sharded: bool
    """Whether FSDP cuts what a rank holds of it by rows."""
    stages: tuple[int, ...]
    """The pipe ranks that hold it."""


def everywhere(name: str) -> tuple[int, ...]:
    """The pipe ranks that hold a parameter where there is no pipeline."""
    return (0,)


class Division:
    """How a model is divided over the ranks.

    Args:
        outlines: name -> each parameter of the whole model, in order.
        stages_of: name -> the pipe ranks that hold a parameter.
    """

    def __init__(
        self, outlines: Mapping[str, Outline], mesh: Mesh,
        stages_of: Callable[[str], Collection[int]] = everywhere,
    ):  # fmt: skip
        self.outlines, self.mesh, self._stages_of = dict(outlines), mesh, stages_of
        self._found: dict[tuple[str, Kind, int], tuple[int, ...]] = {}

    def held(self, name: str, rank: int | None = None) -> Held | None:
        """What a rank (by default this one) holds of a parameter; None: nothing."""
        outline, place = self.outlines[name], self._place(rank)
        if place.pipe_rank not in self._stages_of(name) or (outline.cut == "first" and place.tensor_rank):
            return None
        ranges = [[(0, size)] for size in outline.shape]
        if outline.is_stack:
            ranges[0] = [_part(0, outline.shape[0], place.expert_rank, place.expert_size)]
        if place.tensor_size > 1 and (dim := _tensor_dim(outline)) is not None:
            size = outline.shape[dim] // outline.joined
            starts = range(0, outline.shape[dim], size)
            ranges[dim] = [_part(start, size, place.tensor_rank, place.tensor_size) for start in starts]
        shape = tuple(sum(length for _, length in its) for its in ranges)
        return Held(Piece(name, outline.shape, tuple(_boxes(ranges))), shape)

    def piece(self, name: str, rank: int | None = None) -> Piece | None:
        """What a rank (by default this one) holds of a parameter after FSDP has cut it, too; None: nothing."""
        held, place = self.held(name, rank), self._place(rank)
        if held is None or not self.outlines[name].is_sharded:
            return None if held is None else held.piece
        rows, a_row = rows_of(place.shard_rank, place.shard_size, held.shape[0]), prod(held.shape[1:])
        return held.piece.part(rows.start * a_row, rows.stop * a_row)

    @property
    def is_cut(self) -> bool:
        """Whether a rank may hold less than the whole model."""
        mesh, outlines = self.mesh, self.outlines.values()
        is_sharded = mesh.shard_size > 1 and any(outline.is_sharded for outline in outlines)
        return is_sharded or mesh.pipe_size > 1 or mesh.tensor_size > 1 or mesh.expert_size > 1

    @cached_property
    def alike(self) -> list[tuple[int, ...]]:
        """Sets of ranks that hold the same of every parameter."""
        sets: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.mesh.world_size):
            place = self.mesh.at(rank)
            key = place.pipe_rank, place.tensor_rank, place.expert_rank, place.shard_rank
            sets.setdefault(key, []).append(rank)
        return [tuple(ranks) for ranks in sets.values()]

    def pieces(self, name: str) -> dict[Piece, list[int]]:
        """The pieces that a parameter is cut into -> the ranks that hold it."""
        found: dict[Piece, list[int]] = {}
        for ranks in self.alike:
            piece = self.piece(name, ranks[0])
            if piece is not None and piece.numel:
                found.setdefault(piece, []).extend(ranks)
        return {piece: sorted(ranks) for piece, ranks in found.items()}

    def summed_over(self, name: str, rank: int | None = None) -> tuple[int, ...]:
        """The ranks whose gradients of what a rank holds of a parameter are added."""
        kind = self.kind(name)
        return self._sharers("added", kind, rank, kind.is_partial)

    def counts(self, name: str, rank: int | None = None) -> bool:
        """Whether what a rank holds of a parameter counts in the global norm: of ranks that hold it alike and compute
        the same gradient, only the first does. (Those that add their gradients are another matter.)"""
        return not self.is_copied(name) or self._place(rank).tensor_rank == 0

    def is_copied(self, name: str) -> bool:
        """Whether all tensor ranks hold a parameter alike and compute the same gradient of it."""
        kind = self.kind(name)
        return self.mesh.tensor_size > 1 and kind.is_on_all_tensor_ranks and not kind.is_partial

    def held_alike(self, name: str, rank: int | None = None) -> tuple[int, ...]:
        """The ranks that hold the same piece of a parameter as a rank that holds some of it, before FSDP cuts it."""
        kind = self.kind(name)
        return self._sharers("alike", kind, rank, kind.is_on_all_tensor_ranks)

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that hold the same piece of a parameter as this one, after FSDP has cut it, too."""
        ranks, mesh = self.held_alike(name), self.mesh
        is_sharded = self.outlines[name].is_sharded
        return tuple(rank for rank in ranks if not is_sharded or mesh.at(rank).shard_rank == mesh.shard_rank)

    def kind(self, name: str) -> Kind:
        its = self.outlines[name]
        is_everywhere = _tensor_dim(its) is None and its.cut != "first"
        return Kind(its.is_stack, its.is_partial, is_everywhere, its.is_sharded, tuple(sorted(self._stages_of(name))))

    def _sharers(self, purpose: str, kind: Kind, rank: int | None, over_tensor: bool) -> tuple[int, ...]:
        """The ranks that share a parameter with a rank: its copies, on tensor ranks too if so, on all of its stages."""
        place = self._place(rank)
        key = purpose, kind, place.rank
        if key not in self._found:
            dimensions: list[Dimension] = ["context", "expert_replica" if kind.is_stack else "data"]
            ranks = set(place.sharers([*dimensions, "tensor"] if over_tensor else dimensions))
            if len(kind.stages) > 1:
                ranks = {place.at(other).ranks_of("pipe")[stage] for other in ranks for stage in kind.stages}
            self._found[key] = tuple(sorted(ranks))
        return self._found[key]

    def same_pieces(self) -> tuple[int, ...]:
        """The ranks that hold the same of every parameter as this one."""
        return next(ranks for ranks in self.alike if self.mesh.rank in ranks)

    def sum_sets(self) -> list[tuple[int, ...]]:
        """All sets of ranks that add gradients, on any rank, in one order."""
        # With many ranks, each need not be asked for each name.
        names = {self.kind(name): name for name in self.outlines}
        found: set[tuple[int, ...]] = set()
        for kind, name in names.items():
            seen: set[int] = set()
            for rank in range(self.mesh.world_size):
                if rank not in seen and self.mesh.at(rank).pipe_rank in kind.stages:
                    ranks = self.summed_over(name, rank)
                    seen.update(ranks)
                    found.add(ranks)
        return sorted(found)

    def _place(self, rank: int | None) -> Mesh:
        return self.mesh if rank is None else self.mesh.at(rank)


def most_rows(ranks: int, rows: int) -> int:
    """Number of the first rank's rows under FSDP."""
    return -(-rows // ranks)


def rows_of(rank: int, ranks: int, rows: int) -> range:
    """Numbers of a rank's rows under FSDP."""
    most = most_rows(ranks, rows)
    return range(min(rank * most, rows), min((rank + 1) * most, rows))


def _tensor_dim(outline: Outline) -> int | None:
    """The dimension that tensor parallelism cuts."""
    if outline.cut in ("column", "vocabulary"):
        return int(outline.is_stack)
    return len(outline.shape) - 1 if outline.cut == "row" else None


def _part(start: int, length: int, number: int, count: int) -> tuple[int, int]:
    """Start and length of one of equal parts of a range."""
    assert length % count == 0, (length, count)
    return start + number * (length // count), length // count


def _boxes(ranges: list[list[tuple[int, int]]]) -> Iterator[Box]:
    """Boxes of all combinations of the (start, length) of each dimension, in row-major order."""
    last = max((dim for dim, its in enumerate(ranges) if len(its) > 1), default=0)
    # Before a dimension of several ranges, each index is by itself.
    single = [[(i, 1) for start, n in its for i in range(start, start + n)] for its in ranges[:last]]
    for chosen in product(*single, *ranges[last:]):
        starts, lengths = zip(*chosen) if chosen else ((), ())
        yield Box(starts, lengths)
