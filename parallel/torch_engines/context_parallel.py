"""Context parallelism: the ranks of a context group share the positions of each row, for rows that are too long for
one rank.

All of them read the same rows. Each computes everything with its own positions alone, a part of 1/c of them, except
attention, whose queries need the keys and values of all positions before them:

    rank 0   q k v | gather k, v | attend from chunks 0 and 3 | ... | loss of its labels | sum of the losses
    rank 1   q k v | gather k, v | attend from chunks 1 and 2 | ... | loss of its labels | sum of the losses

A row has 2 c chunks, and rank r those with the numbers r and 2 c - 1 - r: then each rank has equally many keys before
its queries (model/attend.py, RowShare; Megatron-LM and torch cut rows in the same way). A chunk attends only to keys
before its end, so attention costs a rank (1 + 1/(2 c)) / c of what it costs one process with causal kernels.

Loss and metrics are summed over the ranks in the forward pass, and their gradient goes back as it is: each rank gets
that of its own positions. Parameters are whole on every rank; their gradients are sums over data x context.

With B rows of T positions, K key heads of D channels, and e bytes an element, on each rank:

    bytes sent a layer      forward    2 B K D e T (c - 1) / c, keys and values: all-gather
                            backward   the same, their gradients: reduce-scatter; and the gather again where a block is
                                       computed again
    memory for activations  1/c of a row's, and in each layer keys and values of whole rows, 2 B K D e T, twice while
                            they are put in order; with a kernel that does not know where documents begin
                            (Ops.tails), masks of T / c queries for the keys before them, one byte each

Gradients of keys and values are added in their own dtype. It goes with every other dimension of the mesh, though not
with zero-bubble pipelines. --context_parallel_method=ring passes keys and values on instead, see ring.py.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.torch_engines.tensor import PART, WHOLE, change


class SharesRows(Protocol):
    """What a model does that can be cut."""

    def share_rows(
        self, number: int, count: int, gather: Callable[[Tensor], Tensor], add: Callable[[Tensor], Tensor],
        ring: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    ) -> None: ...  # fmt: skip


def cut(
    model: nn.Module, config: ParallelConfig, context: DistContext, mesh: Mesh, groups: Groups, dtype: torch.dtype
) -> None:
    """Let a model compute with this rank's positions of each row. Collective.

    Args:
        dtype: dtype to compute in.
    Raises:
        ValueError: the model needs whole rows, or there is no ring for its dtype; on all ranks.
    """
    group = groups.of("context")
    assert group is not None
    sums, ring = RowSums(group, context.device.type), None
    if config.context_parallel_method == "ring":
        if context.device.type == "cuda" and dtype.itemsize > 2:
            raise ValueError(
                "--context_parallel_method=ring has a kernel for 16 bits alone: give --dtype=bfloat16, or "
                "--context_parallel_method=gather"
            )
        ring = _new_ring(group)
    cast(SharesRows, model).share_rows(mesh.context_rank, mesh.context_size, sums.gather, sums.add, ring)


def _new_ring(group: dist.ProcessGroup) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    try:
        from parallel.torch_engines.ring import Ring
    except ImportError:
        # It is experimental, and has moved from version to version.
        raise ValueError(
            f"--context_parallel_method=ring needs torch's ring attention, which {torch.__version__} has elsewhere "
            f"or not at all: give --context_parallel_method=gather"
        ) from None
    return Ring(group).attend


class RowSums:
    """What the ranks of a group exchange that share the positions of each row."""

    def __init__(self, group: dist.ProcessGroup, device_type: str):
        self._mesh = DeviceMesh.from_group(group, device_type)

    def gather(self, own: Tensor) -> Tensor:
        """The ranks' tensors one after the other, along the first dimension. Backward: the sum over the ranks of the
        gradients of this one's (reduce-scatter)."""
        return change(own, self._mesh, Shard(0), WHOLE, PART)

    def add(self, own: Tensor) -> Tensor:
        """Sum over the ranks. Backward: the gradient as it is."""
        return change(own, self._mesh, PART, WHOLE, WHOLE)
