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


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the mesh."""

    rank: int
    pipe_size: int = 1
    data_size: int = 1
    context_size: int = 1
    tensor_size: int = 1

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
    def counts(self) -> bool:
        """Whether this rank adds to counts and digests: one rank per data rank does."""
        return self.tensor_rank == self.context_rank == self.pipe_rank == 0
