"""ZeRO stage 1 (Rajbhandari et al., SC 2020): every rank keeps the optimizer state of its own shard only.

Each bucket splits into N even shards; rank i owns the i-th of every bucket, wherever parameters begin and end in it.
(On a mesh, the N ranks are those that add the bucket's gradients, and i is a rank's number among them.)

    reduce    the hook sums every bucket, at least this rank's shard of it (ReduceScatter: half an all-reduce's bytes)
    step      the optimizer clips by the global norm and steps its own shards, which lie in the flat parameter buffer
    gather    every rank gets every shard, straight into that buffer: the model's views see the new weights

    main thread   backward          | clip, AdamW on shards | forward: embedding | layer 0 | layer 1 ...
    comm stream   [rs 0][rs 1][rs 2]           [gather 2][gather 1][gather 0]

Buckets are stepped and gathered last first, as the forward pass begins with the last bucket. With `overlap_gather`, a
layer waits only for the buckets that hold its own parameters; without it, the step ends when all are gathered.

Bytes sent by each rank for P parameters of w bytes: (N - 1) / N x P w a step, in addition to the gradients; by each
of M machines to the others: (M - 1) / M x P w. Optimizer state shrinks from 12 bytes a parameter (fp32 main parameters,
two moments) to 12 / N.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from parallel.buffer import Bucket, ParameterSlice
from parallel.comm_hooks import ranks_of, shared_fraction
from parallel.comm_stream import Handle
from parallel.ddp import DistributedDataParallel
from parallel.spans import traffic_span


class Zero1:
    """The shards that this rank owns, and the gathers that make parameters whole again.

    Args:
        ddp: owner of the buckets. Its hook must leave sums in this rank's shards.
        overlap_gather: wait for gathered parameters only when the forward pass first needs them.
    """

    def __init__(self, ddp: DistributedDataParallel, overlap_gather: bool = False):
        self.ddp, self.overlap_gather = ddp, overlap_gather
        self._gathers: dict[int, Handle] = {}
        if overlap_gather:
            self._wait_where_needed(ddp.module)

    def slices(self) -> list[list[ParameterSlice]]:
        """Slices for this rank's optimizer: its shard of every bucket, one list a bucket."""
        owned = []
        for bucket in self.ddp.buckets:
            collectives = ranks_of(bucket, self.ddp.collectives)
            size = len(bucket.grad) // collectives.world_size
            owned.append(bucket.slices(collectives.rank * size, (collectives.rank + 1) * size))
        return owned

    def gather_updates(self, bucket: int, updates: Tensor) -> None:
        """Gather every rank's shard of `updates` on all ranks, and wait.

        For an optimizer that needs whole matrices (Muon). Sends as many bytes as a reduce-scatter of the gradients.

        Args:
            updates: 1-D, as long as the bucket.
        """

        its = self.ddp.buckets[bucket]

        def work() -> None:
            with traffic_span(f"gather updates of bucket {bucket}", self._bytes_to_gather(its, updates.itemsize)):
                ranks_of(its, self.ddp.collectives).all_gather(updates)

        with self.ddp.observer.waiting("wait for updates"):
            self.ddp.comm_stream.submit(work).wait()

    def gather(self, bucket: int) -> None:
        """Start to gather a bucket's parameters. Main thread only, in the same order on every rank."""
        its = self.ddp.buckets[bucket]

        def work() -> None:
            with traffic_span(f"gather bucket {bucket}", self._bytes_to_gather(its, its.param.itemsize)):
                ranks_of(its, self.ddp.collectives).all_gather(its.param)

        self._gathers[bucket] = self.ddp.comm_stream.submit(work)

    def start_gathers(self) -> None:
        """Start to gather every bucket, in the order in which the forward pass needs them."""
        for bucket in reversed(range(len(self.ddp.buckets))):
            self.gather(bucket)

    def gather_all(self) -> None:
        """Gather every bucket, and wait."""
        self.start_gathers()
        self.wait()

    def wait(self, first_bucket: int = 0) -> None:
        """Wait until the parameters of `first_bucket` and all later buckets are whole."""
        due = [index for index in self._gathers if index >= first_bucket]
        if due:
            with self.ddp.observer.waiting("wait for gathers"):
                for bucket in due:
                    self._gathers.pop(bucket).wait()

    def bytes_of_updates(self, bucket: Bucket, by_machine: bool = False) -> float:
        """Bytes that each rank sends in `gather_updates`; `by_machine`: that each machine sends to the others."""
        return self._bytes_to_gather(bucket, self.ddp.hook.dtype_taken(bucket).itemsize, by_machine)

    def bytes_of_parameters(self, bucket: Bucket, by_machine: bool = False) -> float:
        """Bytes that each rank sends to gather a bucket's parameters; `by_machine`: that each machine sends to the
        others."""
        return self._bytes_to_gather(bucket, bucket.param.itemsize, by_machine)

    def bytes_sent(self, by_machine: bool = False) -> float:
        """Bytes that each rank sends to gather the parameters once; `by_machine`: that each machine sends to the
        others."""
        return sum(self.bytes_of_parameters(bucket, by_machine) for bucket in self.ddp.buckets)

    def _bytes_to_gather(self, bucket: Bucket, itemsize: int, by_machine: bool = False) -> float:
        share = shared_fraction(ranks_of(bucket, self.ddp.collectives), by_machine)
        return share * len(bucket.grad) * itemsize

    def _wait_where_needed(self, model: nn.Module) -> None:
        """Wait for the buckets of a unit's parameters before the unit runs, and for the rest after the model has run.

        The rest matters for parameters used outside their module's own forward, such as a head fused with its loss.
        """
        bucket_of = {
            self.ddp.flat_buffers.parameters[slot.parameter.name]: slot.bucket
            for slot in self.ddp.flat_buffers.layout.slots
        }
        for unit, parameters in _units(model):
            buckets = [bucket_of[parameter] for parameter in parameters if parameter in bucket_of]
            if buckets:
                unit.register_forward_pre_hook(_outside_compilation(partial(self.wait, min(buckets))))
        for module in model.modules():
            if module is model or _has_layers(module):
                module.register_forward_hook(_outside_compilation(self.wait))


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that wait as a unit, with their parameters: each layer of a list of layers, other children, and modules
    around them with the parameters that they hold themselves. Layers may be compiled, so hooks lie around them."""
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((layer, list(layer.parameters())) for layer in child)
        elif _has_layers(child):
            yield from _units(child)
        else:
            yield child, list(child.parameters())


def _has_layers(module: nn.Module) -> bool:
    """Whether the module contains a list of layers, at any depth."""
    return not isinstance(module, nn.ModuleList) and any(isinstance(inner, nn.ModuleList) for inner in module.modules())


def _outside_compilation(wait: Callable[[], None]) -> Callable:
    """A module hook that calls `wait` and that torch.compile leaves to Python, as it cannot trace threads."""

    @torch.compiler.disable
    def hook(*_arguments: object) -> None:
        wait()

    return hook
