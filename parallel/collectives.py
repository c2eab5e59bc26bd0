"""Collectives for hooks, on flat tensors that split evenly over the ranks.

Bytes sent by each of N ranks, for a tensor of B bytes:

    reduce_scatter   (N - 1) / N x B       afterwards this rank's shard of the tensor holds the sum
    all_gather       (N - 1) / N x B       afterwards every rank holds every shard
    all_reduce       2 (N - 1) / N x B     = reduce_scatter + all_gather

16-bit tensors are added in float32: a sum over many ranks is rounded once, not N - 1 times. On a CPU, reduce-scatter
and all-gather are pairwise exchanges written here: gloo has no reduce-scatter of its own (it runs an all-reduce, twice
the bytes), and its all-gather is slow over a network.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm_stream import Handle


class Collectives:
    """Collectives of one group, for the comm stream's thread only. Without a group, sums are over this rank alone."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self._native = group is not None and dist.get_backend(group) == "nccl"
        self._scratch: dict[torch.dtype, Tensor] = {}

    def shard(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """View of a rank's equal part of a flat tensor; by default this rank's."""
        size = len(tensor) // self.world_size
        start = (self.rank if rank is None else rank) * size
        return tensor[start : start + size]

    def all_reduce(self, tensor: Tensor) -> Handle | None:
        """Sum in place. Sums of 32 bits and wider are complete only after waiting for the handle."""
        if self.group is None:
            return None
        if tensor.itemsize >= 4:
            return dist.all_reduce(tensor, group=self.group, async_op=True)
        self.reduce_scatter(tensor)
        self.all_gather(tensor)
        return None

    def all_reduce_max(self, tensor: Tensor) -> None:
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum in place into this rank's shard; the rest of `tensor` keeps this rank's own values.

        Returns:
            the shard's sum in float32 (wider if `tensor` is), before rounding to the dtype of `tensor`.
        """
        own = self.shard(tensor)
        if self.group is None:
            return own.float() if own.itemsize < 4 else own
        if self._native and tensor.itemsize >= 4:
            _reduce_scatter_single(own, tensor, self.group)
            return own
        total = own.float() if own.itemsize < 4 else own
        for part in self._exchange(tensor):
            total += part
        if total is not own:
            own.copy_(total)
        return total

    def all_gather(self, tensor: Tensor) -> None:
        """Fill `tensor` in place with every rank's shard."""
        if self.group is None:
            return
        if tensor.device.type == "cuda":
            _all_gather_single(tensor, self.shard(tensor), self.group)
            return
        own = self.shard(tensor)
        works = []
        for step in range(1, self.world_size):
            source, target = (self.rank - step) % self.world_size, (self.rank + step) % self.world_size
            works.append(dist.irecv(self.shard(tensor, source), group=self.group, group_src=source))
            works.append(dist.isend(own, group=self.group, group_dst=target))
        _wait_for(works)

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        """Send every other rank its shard of `tensor`; return their values for this rank's shard."""
        size = len(tensor) // self.world_size
        if tensor.device.type == "cuda":
            received = self._empty_like(tensor)
            dist.all_to_all_single(received, tensor, group=self.group)
            return [part for rank, part in enumerate(received.split(size)) if rank != self.rank]
        received = self._empty_like(tensor[size:])
        works = []
        for step, part in enumerate(received.split(size), start=1):
            source, target = (self.rank - step) % self.world_size, (self.rank + step) % self.world_size
            works.append(dist.irecv(part, group=self.group, group_src=source))
            works.append(dist.isend(self.shard(tensor, target), group=self.group, group_dst=target))
        _wait_for(works)
        return list(received.split(size))

    def _empty_like(self, tensor: Tensor) -> Tensor:
        """Reused memory: page faults in fresh memory would cost more than the work on it."""
        if tensor.dtype not in self._scratch or len(self._scratch[tensor.dtype]) < len(tensor):
            self._scratch[tensor.dtype] = torch.empty_like(tensor)
        return self._scratch[tensor.dtype][: len(tensor)]


def _wait_for(works: list[dist.Work | None]) -> None:
    """Wait for all of them. (torch's types allow None, for ranks outside the group.)"""
    for work in works:
        assert work is not None
        work.wait()


# torch 2.13 renames these and warns of the old names.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def measure_bandwidth(collectives: Collectives, device: torch.device, megabytes: float = 4.0) -> float:
    """Measure the bytes a second that this rank sends while all ranks gather. Run it on the comm stream."""
    size = int(megabytes * 2**20) // (4 * collectives.world_size) * collectives.world_size
    tensor = torch.zeros(size, device=device)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        collectives.all_gather(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    # The first gather also sets up connections.
    return 4 * (size - len(collectives.shard(tensor))) / seconds[-1]
