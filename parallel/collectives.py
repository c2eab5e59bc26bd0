"""Collectives for hooks, on flat tensors that split evenly over the ranks.

Bytes sent by each of N ranks, for a tensor of B bytes:

    reduce_scatter   (N - 1) / N x B       afterwards this rank's shard of the tensor holds the sum
    all_gather       (N - 1) / N x B       afterwards every rank holds every shard
    all_reduce       2 (N - 1) / N x B     = reduce_scatter + all_gather

16-bit tensors are added in float32: a sum over many ranks is rounded once, not N - 1 times. On a CPU, reduce-scatter
and all-gather are pairwise exchanges written here: gloo has no reduce-scatter of its own (it runs an all-reduce, twice
the bytes), and its all-gather is slow over a network.

On M machines with L ranks each, a sum has two levels: ranks first add inside their machine, and only the machines' sums
travel between machines. Rank (m, l), the l-th of machine m, still owns shard number m L + l:

    reduce_scatter   inside:   to (m, k) go the M shards that (0, k), (1, k), ... own; what arrives is added
                     between:  to (n, l) goes the machine's sum of its shard; what arrives is added
    all_gather       between:  to all (n, l) goes this rank's own shard
                     inside:   to all (m, k) go the M shards that are then here

A rank sends as many bytes as with one level, but most of them inside. Each of the two collectives sends (M - 1) / M x B
from a machine to the others: an L-th of what leaves it if every rank exchanges with every other. All-reduce sends
2 (M - 1) / M x B instead of 2 (N - 1) / N x B, which torch's ring over all ranks sends. 16-bit tensors are narrowed
again between the levels: machines' sums are rounded on their way to others, which makes two roundings instead of one.
Such hierarchies are usual (Mikami et al., "Massively Distributed SGD: ImageNet/ResNet-50 Training in a Flash", 2018).
"""

import time
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm_stream import Handle
from parallel.context import Levels


class Collectives:
    """Collectives of one group, for the comm stream's thread only. Without a group, sums are over this rank alone.

    Args:
        machine_size: consecutive ranks that share a machine; divides the number of ranks. If there are several machines
            of several ranks, collectives have two levels.
        levels: groups in which torch's collectives do the work on two levels; required on GPUs.
    """

    def __init__(self, group: dist.ProcessGroup | None, machine_size: int = 1, levels: Levels | None = None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        assert self.world_size % machine_size == 0, (self.world_size, machine_size)
        self.machine_size, self.machines = machine_size, self.world_size // machine_size
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}
        self._levels = self._two_levels(levels) if group is not None and self.has_levels else None

    @property
    def has_levels(self) -> bool:
        """Whether there are several machines of several ranks."""
        return 1 < self.machine_size < self.world_size

    def shard(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """View of a rank's equal part of a flat tensor; by default this rank's."""
        return _part(tensor, self.world_size, self.rank if rank is None else rank)

    def all_reduce(self, tensor: Tensor) -> Handle | None:
        """Sum in place. Sums of 32 bits and wider may be complete only after waiting for the handle; they have one
        level if they do not split evenly."""
        if self.group is None:
            return None
        if tensor.itemsize >= 4 and (self._levels is None or len(tensor) % self.world_size):
            return dist.all_reduce(tensor, group=self.group, async_op=True)
        self.reduce_scatter(tensor)
        self.all_gather(tensor)
        return None

    def all_reduce_max(self, tensor: Tensor) -> None:
        """Largest values of all ranks, in place. It is for single numbers and has one level."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def reduce_scatter(self, tensor: Tensor, rounding: Tensor | None = None) -> Tensor:
        """Sum in place into this rank's shard; the rest of `tensor` keeps this rank's own values.

        Args:
            rounding: as long as `tensor`. The errors of 16-bit roundings that this rank makes are added to it: those of
                all ranks together are the difference of the sum from the exact one.
        Returns:
            the shard's sum in float32 (wider if `tensor` is), before rounding to the dtype of `tensor`. Valid until the
            next call.
        """
        own = self.shard(tensor)
        if self.group is None:
            return own.float() if own.itemsize < 4 else own
        if self._levels is None:
            total = self._sum(self._all_peers(tensor), tensor)
        else:
            inside, between = self._levels
            by_number = self._memory("by number", tensor, len(tensor)).view(self.machine_size, self.machines, -1)
            by_number.copy_(self._by_machine(tensor).transpose(0, 1))
            sums = self._sum(inside, by_number.view(-1))
            total = self._sum_between(between, sums, tensor.dtype, rounding)
        if total.data_ptr() != own.data_ptr():
            own.copy_(total)
        if rounding is not None:
            self.shard(rounding).add_(own - total)
        return total

    def all_gather(self, tensor: Tensor) -> None:
        """Fill `tensor` in place with every rank's shard."""
        if self.group is None:
            return
        if self._levels is None:
            self._all_peers(tensor).gather(tensor)
            return
        inside, between = self._levels
        by_number = self._memory("by number", tensor, len(tensor)).view(self.machine_size, self.machines, -1)
        mine = by_number[inside.place]
        mine[between.place] = self.shard(tensor)
        between.gather(mine.view(-1))
        inside.gather(by_number.view(-1))
        self._by_machine(tensor).copy_(by_number.transpose(0, 1))

    def _two_levels(self, levels: Levels | None) -> "tuple[_Peers, _Peers]":
        """The ranks of this machine, and those with this rank's number in every machine."""
        if levels is not None:
            return _TorchPeers(levels.inside), _TorchPeers(levels.between)
        assert self.group is not None
        machine, number = divmod(self.rank, self.machine_size)
        first = machine * self.machine_size
        inside = _PairwisePeers(self.group, range(first, first + self.machine_size), number)
        return inside, _PairwisePeers(self.group, range(number, self.world_size, self.machine_size), machine)

    def _all_peers(self, tensor: Tensor) -> "_Peers":
        """All ranks, on one level."""
        assert self.group is not None
        if tensor.device.type == "cuda":
            return _TorchPeers(self.group)
        return _PairwisePeers(self.group, range(self.world_size), self.rank)

    def _by_machine(self, tensor: Tensor) -> Tensor:
        """View of the shards: [machine, rank's number in it, element]."""
        return tensor.view(self.machines, self.machine_size, -1)

    def _sum_between(self, between: "_Peers", sums: Tensor, dtype: torch.dtype, rounding: Tensor | None) -> Tensor:
        """The whole sum of this rank's shard.

        Args:
            sums: this machine's sums of the shards of `between`, one after the other; overwritten.
            dtype: the wire's.
        """
        if sums.dtype == dtype:
            return self._sum(between, sums)
        on_wire = self._memory("on the wire", sums, len(sums), dtype).copy_(sums)
        # This machine's sum of its own shard does not travel, and stays exact.
        total = _part(sums, self.machines, between.place)
        if rounding is not None:
            errors = on_wire.view(self.machines, -1) - sums.view(self.machines, -1)
            errors[between.place] = 0.0
            self._by_machine(rounding)[:, self.rank % self.machine_size].add_(errors)
        for part in between.exchange(on_wire, self._memory("received", on_wire, len(on_wire))):
            total += part
        return total

    def _sum(self, peers: "_Peers", parts: Tensor) -> Tensor:
        """Sum of this rank's part over some ranks: in place, or of 16 bits in reused memory in float32."""
        own = _part(parts, peers.size, peers.place)
        if parts.itemsize >= 4 and peers.adds:
            peers.reduce_scatter(parts)
            return own
        total = own if own.itemsize >= 4 else self._memory("sums", own, len(own), torch.float32).copy_(own)
        for part in peers.exchange(parts, self._memory("received", parts, len(parts))):
            total += part
        return total

    def _memory(self, purpose: str, like: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Reused memory: page faults in fresh memory would cost more than the work on it."""
        key = purpose, dtype or like.dtype
        if key not in self._scratch or len(self._scratch[key]) < size:
            self._scratch[key] = torch.empty(size, dtype=key[1], device=like.device)
        return self._scratch[key][:size]


class _Peers(Protocol):
    """Ranks among which each exchanges with each. A tensor has one equal part for every one of them, in their order."""

    size: int
    place: int
    """This rank's number among them."""
    adds: bool
    """Whether they have a `reduce_scatter`."""

    def exchange(self, parts: Tensor, received: Tensor) -> list[Tensor]:
        """Send every other rank its part; return their values for this rank's part, in the memory of `received`, which
        is as long as `parts`."""

    def gather(self, parts: Tensor) -> None:
        """Fill `parts` in place with every rank's part."""

    def reduce_scatter(self, parts: Tensor) -> None:
        """Sum in place into this rank's part, in its own dtype."""


class _PairwisePeers:
    """Some ranks of a group, which send to each other one by one."""

    adds = False

    def __init__(self, group: dist.ProcessGroup, ranks: range, place: int):
        self.group, self.ranks, self.size, self.place = group, ranks, len(ranks), place

    def exchange(self, parts: Tensor, received: Tensor) -> list[Tensor]:
        works, others = [], []
        for step in range(1, self.size):
            source, target = (self.place - step) % self.size, (self.place + step) % self.size
            others.append(_part(received, self.size, step - 1))
            works += self._swap(others[-1], source, _part(parts, self.size, target), target)
        _wait_for(works)
        return others

    def gather(self, parts: Tensor) -> None:
        own, works = _part(parts, self.size, self.place), []
        for step in range(1, self.size):
            source, target = (self.place - step) % self.size, (self.place + step) % self.size
            works += self._swap(_part(parts, self.size, source), source, own, target)
        _wait_for(works)

    def reduce_scatter(self, parts: Tensor) -> None:
        raise NotImplementedError

    def _swap(self, to_fill: Tensor, source: int, to_send: Tensor, target: int) -> list[dist.Work | None]:
        return [
            dist.irecv(to_fill, group=self.group, group_src=self.ranks[source]),
            dist.isend(to_send, group=self.group, group_dst=self.ranks[target]),
        ]


class _TorchPeers:
    """All ranks of a group, for which torch's collectives do the work."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.place = group, dist.get_world_size(group), dist.get_rank(group)
        self.adds = dist.get_backend(group) == "nccl"

    def exchange(self, parts: Tensor, received: Tensor) -> list[Tensor]:
        dist.all_to_all_single(received, parts, group=self.group)
        return [_part(received, self.size, place) for place in range(self.size) if place != self.place]

    def gather(self, parts: Tensor) -> None:
        _all_gather_single(parts, _part(parts, self.size, self.place), group=self.group)

    def reduce_scatter(self, parts: Tensor) -> None:
        _reduce_scatter_single(_part(parts, self.size, self.place), parts, group=self.group)


def _part(tensor: Tensor, count: int, number: int) -> Tensor:
    """View of one of `count` equal parts of a flat tensor."""
    size = len(tensor) // count
    return tensor[number * size : (number + 1) * size]


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
