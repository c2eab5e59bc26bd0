"""The process groups of the mesh.

    tensor, context, pipe, expert   for the thread that runs the model
    sums of gradients               for the comm stream, one for each set of ranks that adds gradients (division.py)

Each is a group of its own, even if two have the same ranks: then the threads that use them never meet.
"""

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from parallel.context import DistContext
from parallel.mesh import Dimension, Mesh


class Groups:
    """Process groups of the mesh's dimensions. To make one is collective: all ranks must ask for the same ones, in one
    order.

    Args:
        timeout_s: as in `init_context`.
    """

    def __init__(self, context: DistContext, mesh: Mesh, timeout_s: float):
        self.context, self.mesh, self.timeout_s = context, mesh, timeout_s
        self._made: dict[object, dist.ProcessGroup | None] = {}

    def of(self, dimension: Dimension) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in a dimension alone, for the thread that runs the model; None: there is
        no other."""
        return self.among(dimension, [self.mesh.at(rank).ranks_of(dimension) for rank in range(self.mesh.world_size)])

    def among(self, purpose: str, sets: Iterable[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """The set of ranks to which this one belongs; None: it is alone, or in none. Groups of different purposes are
        different ones, even of the same ranks, so that threads do not meet in them.

        Args:
            sets: ranks without a common one; all that any rank belongs to, the same everywhere.
        """
        own = None
        for ranks in dict.fromkeys(sets):
            key = purpose, ranks
            if key not in self._made and len(ranks) > 1:
                assert self.context.grad_group is not None
                backend, timeout = dist.get_backend(self.context.grad_group), timedelta(seconds=self.timeout_s)
                self._made[key] = dist.new_group(list(ranks), timeout=timeout, backend=backend)
            if self.context.rank in ranks:
                own = self._made.get(key)
        return own
