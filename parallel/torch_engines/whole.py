"""Whole parameters of a model that FSDP has cut, each on the ranks that ask for it.

A gather would give every rank everything: for a checkpoint, where each of N ranks writes its part of the parameters, N
times what it needs. So each rank sends its rows of a parameter to those alone that want it, a block at a time:

    rank 0 wants a        [a rows 0-1] [b rows 0-1]                 [a rows 0-3]
    rank 1 wants b        [a rows 2-3] [b rows 2-3]      ->         [b rows 0-3]
"""

from collections.abc import Iterator, Mapping, Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.torch_engines.shards import rows_of


def exchange(
    rows: Mapping[str, Tensor], lengths: Mapping[str, int], wanted: Sequence[Set[str]], group: dist.ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that this rank wants, whole. Collective in the group.

    Args:
        rows: name -> this rank's rows of a parameter; the same names, of one dtype, on all ranks.
        lengths: name -> rows of the whole parameter.
        wanted: for each rank of the group, names of the parameters that it wants.
    """
    asked = [name for name in rows if name in wanted[dist.get_rank(group)]]
    if len(wanted) == 1:
        yield from ((name, rows[name]) for name in asked)
        return
    # To each rank its parameters one after the other, and so from each.
    sent = [[mine.reshape(-1) for name, mine in rows.items() if name in names] for names in wanted]
    sizes = [
        [len(rows_of(rank, len(wanted), lengths[name])) * rows[name].shape[1:].numel() for name in asked]
        for rank in range(len(wanted))
    ]
    first = next(iter(rows.values()))
    received, nothing = first.new_empty(sum(map(sum, sizes))), first.new_empty(0)
    dist.all_to_all_single(
        received, torch.cat([nothing, *(part for parts in sent for part in parts)]), [sum(each) for each in sizes],
        [sum(part.numel() for part in parts) for parts in sent], group,
    )  # fmt: skip
    parts = iter(received.split([size for each in sizes for size in each]))
    by_rank = [[next(parts) for _ in asked] for _ in wanted]
    for index, name in enumerate(asked):
        yield name, torch.cat([each[index] for each in by_rank]).view(lengths[name], *rows[name].shape[1:])
