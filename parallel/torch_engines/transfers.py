"""The transfers of FSDP2 by our own collectives, which torch calls: on a CPU in the main thread, which waits for them;
on CUDA on torch's streams, where a wait shows in no clock of ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.collectives import Collectives, Levels
from parallel.comm_hooks import shared_fraction
from parallel.data_parallel import levels_of
from parallel.engine import EngineParts
from parallel.observer import Observer
from parallel.spans import traffic_span
from parallel.sum_groups import levels_among, ranks_on_a_machine
from parallel.torch_engines.shards import COPIES, copies_group


class Communication:
    """The transfers of all units.

    Args:
        shard_group: the ranks that share this rank's copy of the model.
    """

    def __init__(self, parts: EngineParts, shard_group: dist.ProcessGroup, observer: Observer):
        self.observer, self._on_cuda = observer, parts.context.device.type == "cuda"
        size, levels = _machines(parts)
        # Each has memory of its own, as torch has a stream for each.
        self.gathers, self.sums = (Collectives(shard_group, size, levels) for _ in range(2))
        copies = parts.mesh.sharers(COPIES)
        is_inside = ranks_on_a_machine(copies, parts.mesh.machine_size) == len(copies)
        self.copies = Collectives(
            copies_group(parts.config, parts.context, parts.mesh), len(copies) if is_inside else 1
        )

    def take_over(self, unit: FSDPModule) -> None:
        """Let torch call us for a unit."""
        # (torch's own types of these are private.)
        unit.set_custom_all_gather(cast(Any, _Gather(self)))
        unit.set_custom_reduce_scatter(cast(Any, _Scatter(self)))
        # The loss is already divided by the count of the global batch.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if self.copies.world_size > 1:
            unit.set_all_reduce_hook(self.sum_copies)

    @contextmanager
    def transfer(self, name: str, num_bytes: float) -> Iterator[None]:
        with traffic_span(name, num_bytes):
            if self._on_cuda:
                yield
                return
            with self.observer.waiting(f"wait: {name}"):
                yield

    def sum_copies(self, summed: Tensor) -> None:
        """Sum this rank's share of a unit's gradients over the copies of the model, in place."""
        with self.transfer("sum over copies", 2 * shared_fraction(self.copies) * summed.nbytes):
            if self._on_cuda:
                # torch may drop the tensor before this stream is done with it.
                summed.record_stream(torch.cuda.current_stream(summed.device))
            padding = -len(summed) % self.copies.world_size
            padded = nn.functional.pad(summed, (0, padding)) if padding else summed
            handle = self.copies.all_reduce(padded)
            if handle is not None:
                handle.wait()
            if padding:
                summed.copy_(padded[: len(summed)])


def _machines(parts: EngineParts) -> tuple[int, Levels | None]:
    """How many of the ranks that share a copy of the model are on each machine, and groups for sums machine by machine
    if there is need for them. Collective."""
    mesh, ranks = parts.mesh, parts.mesh.ranks_of("shard")
    if len(ranks) == mesh.world_size:
        return mesh.machine_size, levels_of(parts)
    size = ranks_on_a_machine(ranks, mesh.machine_size)
    if parts.context.device.type != "cuda" or not 1 < size < len(ranks):
        return size, None
    assert parts.groups is not None
    sets = dict.fromkeys(mesh.at(rank).ranks_of("shard") for rank in range(mesh.world_size))
    found = [levels_among(parts.groups, "shards", its, size) for its in sets]
    return size, next(filter(None, found))


class _Transfer:
    """The common part of torch's interfaces to collectives."""

    def __init__(self, communication: Communication):
        self._communication = communication

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Transfer):
    """Makes a unit's weights whole (torch's AllGather)."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """The input is this rank's part of the output."""
        with self._communication.transfer("gather weights", output_tensor.nbytes - input_tensor.nbytes):
            self._communication.gathers.all_gather(output_tensor)


class _Scatter(_Transfer):
    """Sums a unit's gradients into shards (torch's ReduceScatter)."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        with self._communication.transfer("sum gradients", input_tensor.nbytes - output_tensor.nbytes):
            output_tensor.copy_(self._communication.sums.reduce_scatter(input_tensor))
