"""The ranks of a run as a mesh, and what they share: plain data, no tensors, no collectives but one in `plan_mesh`.

    pipe      stages of the model, one after the other
    data      copies of the model (or of its parts, if other dimensions cut it), each with its own rows
    context   parts of each row
    tensor    parts of each matrix

Ranks are numbered row by row, tensor fastest, so the ranks that communicate most are neighbours. **Rows depend on the
data rank alone**: order, counts, digests and validation use `data_rank` and `data_size`. All ranks with the same data
rank read the same rows, and only the one whose other coordinates are 0 (`counts`) adds to sums over all ranks.

Two dimensions lie inside data, as neighbours in it share something although each has rows of its own:

    shard     ranks that share one copy of the model (fsdp: all; hsdp: those of a machine); replica numbers the copies
    expert    ranks that share the experts of each layer; expert_replica numbers the copies of these

The size of data is what the others leave of the number of ranks. 16 ranks with tensor 2 and hsdp on machines of 8:

    rank      0  1 | 2  3 | 4  5 | 6  7 || 8  9 | 10 11 | 12 13 | 14 15
    tensor    0  1   0  1   0  1   0  1    0  1    0  1    0  1    0  1
    data      0      1      2      3       4       5       6       7
    shard     0      1      2      3       0       1       2       3
    replica   0                            1
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import gcd, log, prod
from typing import Literal, get_args

from parallel.config import ParallelConfig
from parallel.context import DistContext

Dimension = Literal["pipe", "data", "context", "tensor", "shard", "replica", "expert", "expert_replica"]
_OUTSIDE: tuple[Dimension, ...] = ("pipe", "data", "context", "tensor")
"""The dimensions whose sizes multiply to the number of ranks. The others lie inside data."""
_MOST_PLACES = 6
"""Groups of neighbouring ranks whose places are told."""
_FLAGS = {
    "tensor": "tensor_model_parallel_size",
    "context": "context_parallel_size",
    "pipe": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
}


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the mesh."""

    rank: int
    pipe_size: int = 1
    data_size: int = 1
    context_size: int = 1
    tensor_size: int = 1
    shard_size: int = 1
    """Neighbours in the data dimension that share one copy of the model, each with its own shard."""
    expert_size: int = 1
    """Neighbours in the data dimension that share the experts."""
    machine_size: int = 1
    """Neighbouring ranks between which the network is fast; 1 also where machines have different numbers of ranks."""

    def __post_init__(self):
        assert 0 <= self.rank < self.world_size, self
        assert self.data_size % self.shard_size == self.data_size % self.expert_size == 0, self
        assert self.world_size % self.machine_size == 0, self

    @property
    def world_size(self) -> int:
        return self.pipe_size * self.data_size * self.context_size * self.tensor_size

    @property
    def replica_size(self) -> int:
        """Copies of the model."""
        return self.data_size // self.shard_size

    @property
    def expert_replica_size(self) -> int:
        """Copies of the experts."""
        return self.data_size // self.expert_size

    @property
    def is_data_alone(self) -> bool:
        """Whether all ranks have rows of their own, and each works through the whole model."""
        return self.data_size == self.world_size and self.expert_size == 1

    @property
    def machines(self) -> int:
        return self.world_size // self.machine_size

    @property
    def has_levels(self) -> bool:
        """Whether there are several machines of several ranks."""
        return 1 < self.machine_size < self.world_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor_size % self.context_size

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor_size * self.context_size) % self.data_size

    @property
    def pipe_rank(self) -> int:
        return self.rank // (self.tensor_size * self.context_size * self.data_size)

    @property
    def shard_rank(self) -> int:
        """Number of this rank's shard."""
        return self.data_rank % self.shard_size

    @property
    def replica_rank(self) -> int:
        """Number of the copy of the model that this rank's shard belongs to."""
        return self.data_rank // self.shard_size

    @property
    def expert_rank(self) -> int:
        """Number of this rank's share of the experts."""
        return self.data_rank % self.expert_size

    @property
    def expert_replica_rank(self) -> int:
        """Number of the copy of the experts that this rank's share belongs to."""
        return self.data_rank // self.expert_size

    @property
    def counts(self) -> bool:
        """Whether this rank adds to counts and digests: one rank per data rank does."""
        return self.tensor_rank == self.context_rank == self.pipe_rank == 0

    def size(self, dimension: Dimension) -> int:
        return getattr(self, f"{dimension}_size")

    def rank_in(self, dimension: Dimension) -> int:
        """This rank's coordinate."""
        return getattr(self, f"{dimension}_rank")

    def describe(self) -> str:
        """The sizes of the dimensions, if data is not alone: "data 2 x tensor 2"."""
        sizes = [f"{name} {self.size(name)}" for name in _OUTSIDE if self.size(name) > 1]
        if self.expert_size > 1:
            sizes.append(f"expert {self.expert_size} inside data")
        return "" if self.is_data_alone else " x ".join(sizes)

    def at(self, rank: int) -> "Mesh":
        """Another rank's place."""
        return replace(self, rank=rank)

    def ranks_of(self, dimension: Dimension) -> tuple[int, ...]:
        """Ranks that differ from this one in this dimension alone, and this one, in order of their coordinates."""
        inside_tensor = self.context_size * self.tensor_size
        if dimension in _OUTSIDE:
            strides = {"tensor": 1, "context": self.tensor_size, "data": inside_tensor}
            stride, step = strides.get(dimension, inside_tensor * self.data_size), 1
        else:
            step = {"replica": self.shard_size, "expert_replica": self.expert_size}.get(dimension, 1)
            stride = inside_tensor * step
        first = self.rank - self.rank_in(dimension) * stride
        return tuple(range(first, first + self.size(dimension) * stride, stride))

    def sizes(self) -> dict[str, int]:
        """Sizes of all dimensions, for JSON."""
        return {name: self.size(name) for name in get_args(Dimension)}

    def sharers(self, dimensions: Iterable[Dimension]) -> tuple[int, ...]:
        """Ranks that differ from this one in these dimensions alone, and this one, in order."""
        ranks = {self.rank}
        for dimension in dimensions:
            ranks = {other for rank in ranks for other in self.at(rank).ranks_of(dimension)}
        return tuple(sorted(ranks))


def plan_mesh(config: ParallelConfig, context: DistContext) -> Mesh:
    """This rank's place in the mesh that the flags ask for. Collective.

    Raises:
        ValueError: as `plan`; on all ranks.
    """
    places = [(local, size) for local, size in context.gather([context.local_rank, context.local_world_size])]
    return plan(config, context.rank, places)


def plan(config: ParallelConfig, rank: int, places: Sequence[tuple[int, int]]) -> Mesh:
    """A rank's place in the mesh that the flags ask for.

    Args:
        places: each rank's number on its machine, and the number of ranks there.
    Raises:
        ValueError: so many ranks, on such machines, cannot be cut in this way. The sentence names the nearest possible.
    """
    world_size = len(places)
    pipe, context, tensor = _cut(config, world_size)
    data = world_size // (pipe * context * tensor)
    expert = config.expert_model_parallel_size
    if data % expert:
        nearest = _nearest(data, expert)
        raise ValueError(
            f"{data} data ranks cannot share the experts in groups of {expert}: "
            f"--expert_model_parallel_size={nearest} is the nearest possible"
        )
    machine = _machine_size(config, places)
    shards = 1
    if config.data_parallel == "fsdp":
        shards = data
    elif config.data_parallel == "hsdp":
        shards = _shards_of_machine(world_size, machine, context * tensor, places)
    return Mesh(rank, pipe, data, context, tensor, shards, expert, machine or 1)


def _cut(config: ParallelConfig, world_size: int) -> tuple[int, int, int]:
    """Sizes of the dimensions beside data: pipe, context, tensor.

    Raises:
        ValueError: they do not divide the number of ranks.
    """
    asked = {name: getattr(config, _FLAGS[name]) for name in ("pipe", "context", "tensor")}
    ranks = prod(asked.values())
    if world_size % ranks == 0:
        return asked["pipe"], asked["context"], asked["tensor"]
    cut = {name: size for name, size in asked.items() if size > 1}
    divisors = _divisors(world_size)
    possible = (sizes for sizes in product(divisors, repeat=len(cut)) if world_size % prod(sizes) == 0)
    nearest = min(possible, key=lambda sizes: (sum(abs(log(s / a)) for s, a in zip(sizes, cut.values())), sizes))
    told = " x ".join(f"{name} {size}" for name, size in cut.items())
    flags = " ".join(f"--{_FLAGS[name]}={size}" for name, size in zip(cut, nearest) if size != cut[name])
    raise ValueError(
        f"{world_size} processes cannot be cut into {told}: {flags} or {-(-world_size // ranks) * ranks} "
        f"processes are the nearest possible"
    )


def _machine_size(config: ParallelConfig, places: Sequence[tuple[int, int]]) -> int:
    """Neighbouring ranks that share a machine; 0: machines differ in size, or mix ranks that are no neighbours.

    Raises:
        ValueError: --ranks_per_machine does not divide the number of ranks.
    """
    world_size, asked = len(places), config.ranks_per_machine
    if asked:
        if world_size % asked:
            raise ValueError(
                f"--ranks_per_machine={asked}: {world_size} processes are no whole number of such machines: "
                f"--ranks_per_machine={_nearest(world_size, asked)} is the nearest possible"
                if world_size > 1 else f"--ranks_per_machine={asked}, and there is one process: leave it out"
            )
        return asked
    size = places[0][1]
    return size if all(place == (rank % size, size) for rank, place in enumerate(places)) else 0


def _shards_of_machine(world_size: int, machine: int, inside: int, places: Sequence[tuple[int, int]]) -> int:
    """Data ranks that share a copy of the model under hsdp.

    Args:
        machine: ranks of a machine; 0: it is not the same number everywhere.
        inside: ranks that share a data rank, and are neighbours.
    Raises:
        ValueError: machines differ, there is only one, or one has not got several data ranks.
    """
    if not machine:
        sizes = [size for local, size in places if local == 0]
        common = gcd(*(size for _, size in places))
        regroup = f"--ranks_per_machine={common} or " if common > 1 else ""
        raise ValueError(
            f"--data_parallel=hsdp needs machines with equally many processes, numbered machine by machine, and these "
            f"have {' + '.join(map(str, sizes))}: give {regroup}--data_parallel=fsdp"
        )
    if machine == world_size:
        half = _nearest(world_size, world_size // 2)
        regroup = f" (or --ranks_per_machine={half}, for copies on parts of it)" if half > 1 else ""
        raise ValueError(
            f"--data_parallel=hsdp keeps a copy of the model on each machine, and all {world_size} processes are on "
            f"one: give --data_parallel=fsdp{regroup}"
            if world_size > 1 else
            "--data_parallel=hsdp keeps a copy of the model on each of several machines, and there is one process: "
            "leave it out"
        )  # fmt: skip
    if machine % inside or machine == inside:
        raise ValueError(
            f"--data_parallel=hsdp shares a copy of the model among the data ranks of a machine, and a machine of "
            f"{machine} process{'es' if machine > 1 else ''} has not got several: give --data_parallel=fsdp, or auto "
            f"if the model fits on one"
        )
    return machine // inside


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(number: int, size: int) -> int:
    """The divisor of a number that is nearest to a size."""
    return min(_divisors(number), key=lambda n: (abs(n - size), n))


def places(mesh: Mesh, hosts: Sequence[str]) -> str:
    """Who is where, and has what of the model, in a few words for any number of ranks.

    Args:
        hosts: each rank's.
    """
    ranks = [mesh.at(rank) for rank in range(mesh.world_size)]
    has_shards = mesh.shard_size > 1

    def place(its: Mesh) -> tuple:
        return hosts[its.rank], its.replica_rank if has_shards and mesh.is_data_alone else 0, its.pipe_rank

    runs = [list(run) for _, run in groupby(ranks, key=place)]
    text = _sizes(mesh)
    if mesh.machines > 1 and mesh.machine_size > 1:
        text += f", {mesh.machines} machines of {mesh.machine_size} ranks"
    told = [_place(run, hosts[run[0].rank]) for run in runs]
    return "; ".join([text, *(told if len(told) <= _MOST_PLACES else [*told[: _MOST_PLACES - 2], "...", told[-1]])])


def _sizes(mesh: Mesh) -> str:
    """The dimensions: "2 pipe ranks x 4 data ranks x 2 tensor ranks"."""
    copies = f"{mesh.replica_size} cop{'ies' if mesh.replica_size > 1 else 'y'}"
    shards = f" x {mesh.shard_size} shards" if mesh.shard_size > 1 else ""
    if mesh.is_data_alone:
        return f"{copies} of the model" + (shards or ", one a rank")
    sizes = {"pipe ranks": mesh.pipe_size, "data ranks": mesh.data_size, "context ranks": mesh.context_size,
             "tensor ranks": mesh.tensor_size}  # fmt: skip
    text = " x ".join(f"{size} {what}" for what, size in sizes.items() if size > 1)
    if mesh.expert_size > 1:
        text += f", of which each {mesh.expert_size} share the experts"
    return text + (f", which hold the model as {copies}{shards}" if shards else "")


def _place(run: list[Mesh], host: str) -> str:
    """Neighbouring ranks on one host: "ranks 4-7 on b: shards 0-3 of copy 1"."""

    def numbers(what: str, first: int, last: int) -> str:
        return f"{what} {first}" if first == last else f"{what}s {first}-{last}"

    first, last = run[0], run[-1]
    text = f"{numbers('rank', first.rank, last.rank)} on {host}"
    if first.pipe_size > 1:
        return f"{text}: pipe rank {first.pipe_rank}"
    if first.shard_size == 1 or not first.is_data_alone:
        return text
    text += f": {numbers('shard', first.shard_rank, last.shard_rank)}"
    return text + (f" of copy {first.replica_rank}" if first.replica_size > 1 else "")
