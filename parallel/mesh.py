"""The ranks of a run as a mesh, and what they share.

    pipe      stages of the model, one after the other
    data      copies of the model (or of its parts, if other dimensions cut it), each with its own rows
    context   parts of each row
    tensor    parts of each matrix

Ranks are numbered row by row, tensor fastest, so the ranks that communicate most are neighbours. **Rows depend on the
data rank alone**: order, counts, digests and validation use `data_rank` and `data_size`. All ranks with the same data
rank read the same rows, and only the one whose other coordinates are 0 (`counts`) adds to sums over all ranks.

Today only `data` may be larger than 1.
"""

from dataclasses import dataclass

from parallel.config import ParallelConfig
from parallel.context import DistContext


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

    def __post_init__(self):
        assert 0 <= self.rank < self.world_size, self

    @property
    def world_size(self) -> int:
        return self.pipe_size * self.data_size * self.context_size * self.tensor_size

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
    def counts(self) -> bool:
        """Whether this rank adds to counts and digests: one rank per data rank does."""
        return self.tensor_rank == self.context_rank == self.pipe_rank == 0


def plan_mesh(config: ParallelConfig, context: DistContext) -> Mesh:
    """This rank's place in the mesh that the flags ask for."""
    size = context.world_size
    shards = {"auto": 1, "fsdp": size, "hsdp": config.ranks_per_machine or context.local_world_size}
    return Mesh(context.rank, data_size=size, shard_size=shards[config.data_parallel])
