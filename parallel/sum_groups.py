"""Which ranks of a mesh add gradients, as collectives for the buckets (division.py says who adds what).

Sets of ranks overlap: under sequence parallelism on 2 x 2 ranks (data x tensor), a matrix is added by the ranks of its
tensor rank, a norm by all four:

    rank        0    1    2    3
    matrices    a    b    a    b      groups {0, 2} and {1, 3}
    norms       c    c    c    c      group  {0, 1, 2, 3}

All of them belong to the comm stream, which works through the buckets one after the other.
"""

from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from parallel.collectives import Collectives
from parallel.context import Levels
from parallel.division import Division
from parallel.groups import Groups
from parallel.layout import ParameterSpec


class SumGroups:
    """The groups in which this rank adds gradients. To make it is collective.

    Args:
        division: what each rank holds of the model.
        everyone: collectives of all ranks.
        needs_levels: whether sums on two levels need groups of their own, as on GPUs.
    """

    def __init__(self, division: Division, groups: Groups, everyone: Collectives, needs_levels: bool):
        self._division, self._everyone = division, everyone
        self._collectives: dict[tuple[int, ...], Collectives] = {}
        rank, all_ranks = division.mesh.rank, tuple(range(division.mesh.world_size))
        for ranks in division.sum_sets():
            if ranks == all_ranks:
                self._collectives[ranks] = everyone
                continue
            # Every rank makes every group, in this order.
            group = groups.among("sums", [ranks])
            size = ranks_on_a_machine(ranks, division.mesh.machine_size)
            levels = levels_among(groups, "sums", ranks, size) if needs_levels and 1 < size < len(ranks) else None
            if rank in ranks:
                self._collectives[ranks] = Collectives(group, size if group is not None else 1, levels)

    def of(self, ranks: tuple[int, ...] | None) -> Collectives:
        """Collectives of a set of ranks to which this one belongs; None: of all."""
        return self._everyone if ranks is None else self._collectives[ranks]

    def spec(self, name: str, shape: tuple[int, ...]) -> ParameterSpec:
        """What the layout of the buckets needs to know of a parameter.

        Args:
            shape: of what this rank holds of it.
        """
        held = self._division.held(name)
        assert held is not None and held.shape == shape, (name, held, shape)
        division = self._division
        return ParameterSpec(
            name, shape, held.piece, division.summed_over(name), division.is_copied(name), division.counts(name)
        )


def ranks_on_a_machine(ranks: Sequence[int], machine_size: int) -> int:
    """How many of some ranks are on each machine; 1: not equally many.

    Args:
        machine_size: neighbouring ranks of the run that share a machine.
    """
    counts = set(Counter(rank // machine_size for rank in ranks).values())
    return counts.pop() if len(counts) == 1 else 1


def levels_among(groups: Groups, purpose: str, ranks: tuple[int, ...], size: int) -> Levels | None:
    """Groups for collectives of some ranks on two levels; None: this rank is not among them. Collective.

    Args:
        purpose: as in `Groups.among`.
        size: how many of them are on each machine.
    """
    inside = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    between = [ranks[number::size] for number in range(size)]
    return _both(groups.among(f"{purpose} inside", inside), groups.among(f"{purpose} between", between))


def _both(inside: dist.ProcessGroup | None, between: dist.ProcessGroup | None) -> Levels | None:
    return None if inside is None or between is None else Levels(inside, between)
