"""Data-parallel training: every rank computes gradients on its share of the batch, then all ranks sum them.

Read `NaiveDDP` in naive.py first: it is the whole idea. `DistributedDataParallel` computes the same sums, but sends a
bucket of gradients as soon as the backward pass has completed it, while the pass goes on with earlier layers:

    main thread    forward | backward layer 3 | layer 2 | layer 1 | layer 0 | wait | step
    comm stream                               [  bucket 0  ][  bucket 1  ][ bucket 2 ]
                                                                            ^ the only exposed part

Each gradient is sent once: 2 (N - 1) / N x its bytes a rank (see comm_hooks.py). Gradients are summed, never averaged:
the task's loss is divided by the supervised tokens of the whole global batch before the backward pass. Both classes
wrap a model in the same way:

    for micro_batch in step[:-1]:
        with ddp.no_sync():
            loss(ddp, micro_batch).backward()
    loss(ddp, step[-1]).backward()
    ddp.finish_grad_sync()

In a pipeline, backward passes of micro-batches and stages mix, and none is the last one of all. There `expect(m)` says
that a parameter's gradient is complete after m backward passes, and `complete` that it is, where autograd says nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from parallel.buffer import Bucket, FlatBuffers, ParameterSlice
from parallel.collectives import Collectives
from parallel.comm_hooks import AllReduce, CommHook, FunctionHook
from parallel.comm_stream import CommStream, Handle
from parallel.context import DistContext
from parallel.layout import ALIGNMENT, ParameterSpec
from parallel.naive import broadcast_parameters
from parallel.observer import Observer, no_gradient_error
from parallel.sum_groups import SumGroups


class DistributedDataParallel(nn.Module):
    """Bucketed gradient reduction, overlapped with the backward pass.

    A bucket is launched when its last gradient has arrived, always in bucket order: every rank issues the same
    collectives in the same order, in whatever order its gradients arrive.

    Args:
        module: the model, already in its training dtype and on its device. Its parameters move into flat buffers.
        context: this process's rank, device and groups.
        comm_stream: runs the hooks; created here if not given.
        bucket_size: elements after which a bucket is closed; 0 for a single bucket.
        overlap_grad_reduce: launch buckets during the backward pass; off: launch all of them after it.
        grad_dtype: dtype in which gradients accumulate and, with the default hook, travel.
        observer: receives reports for profiles and logs; created here if not given.
        alignment: multiple of elements at which parameters start in the buffers and shards are cut.
        collectives: those of `context.grad_group`; created here, without levels, if not given.
        sums: the ranks that add each parameter's gradients, on a mesh; None: all do. With it, the ranks must begin with
            the same weights by themselves.
    """

    def __init__(
        self,
        module: nn.Module,
        context: DistContext,
        comm_stream: CommStream | None = None,
        bucket_size: int = 6_553_600,
        overlap_grad_reduce: bool = True,
        grad_dtype: torch.dtype = torch.float32,
        observer: Observer | None = None,
        alignment: int = ALIGNMENT,
        collectives: Collectives | None = None,
        sums: SumGroups | None = None,
    ):
        super().__init__()
        self.module, self.context, self.sums = module, context, sums
        self.comm_stream = comm_stream or CommStream(context.device)
        self.observer = observer or Observer(context)
        self.overlap_grad_reduce = overlap_grad_reduce
        self.collectives = collectives or Collectives(context.grad_group)
        """Collectives of all ranks."""
        if sums is None:
            broadcast_parameters(module, context.grad_group)
        # named_parameters yields a tied tensor once, at its first use.
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        spec_of = ParameterSpec if sums is None else sums.spec
        self.flat_buffers = FlatBuffers(trained, bucket_size, context.world_size, grad_dtype, alignment, spec_of)
        self.buckets = [
            Bucket.of(layout, self.flat_buffers, self.collectives if sums is None else sums.of(layout.summed_over))
            for layout in self.flat_buffers.layout.buckets
        ]
        self.hook: CommHook = AllReduce(self.collectives)
        self._after: tuple[CommStream, Callable[[Bucket], None]] | None = None
        self._sync_this_backward = True
        self._expected, self._expected_of = 1, dict[str, int]()
        self._slot_of = {}
        for slot in self.flat_buffers.layout.slots:
            parameter = self.flat_buffers.parameters[slot.parameter.name]
            self._slot_of[parameter] = slot
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self._begin()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def use_hook(self, hook: CommHook) -> None:
        """Replace the all-reduce by a hook from comm_hooks.py or powersgd.py."""
        self.hook = hook

    def register_comm_hook(self, state: object, hook: Callable[[object, Bucket], Handle | None]) -> None:
        """Replace the all-reduce by a plain function `hook(state, bucket)`; comm_hooks.py states its contract."""
        self.hook = FunctionHook(state, hook)

    def register_after_reduction(self, callback: Callable[[Bucket], None]) -> None:
        """Call `callback(bucket)` as soon as a bucket is reduced, while the backward pass and later buckets go on.

        Calls run one after the other on their own stream (on a CPU: thread) and must not issue collectives.
        """
        self._after = CommStream(self.context.device), callback

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which backward passes only accumulate: for all micro-batches of a step but the last."""
        before, self._sync_this_backward = self._sync_this_backward, False
        try:
            yield
        finally:
            self._sync_this_backward = before

    def expect(self, passes: int, of: Mapping[str, int] | None = None) -> None:
        """Say after how many backward passes a gradient is complete, from the next pass on: in a pipeline, the number
        of micro-batches. All of them must be outside `no_sync`. At the start it is one.

        Args:
            passes: 0: `complete` will say so, and what autograd says does not count.
            of: the same for parameters that differ, such as one that two stages of a rank use.
        """
        self._expected, self._expected_of = passes, dict(of or {})

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say that the gradients of these parameters are complete, and launch what is due; frozen ones are passed over.
        For passes that autograd does not report, such as those for weights alone under zero-bubble schedules: call it
        when the last one of a stage has ended."""
        for parameter in parameters:
            if parameter in self._slot_of and parameter not in self._arrived:
                self._arrive(parameter)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Get all buckets ready for the next backward pass. MixedPrecisionOptimizer does so at the end of its step.

        Raises:
            ValueError: `set_to_none` is given, but gradients are views into the buffers.
        """
        if set_to_none:
            raise ValueError("gradients are views into flat buffers and cannot be None: leave set_to_none out")
        for bucket in self.buckets:
            self.hook.release(bucket)
        self.flat_buffers.restore_grad_views()

    def bytes_sent(self, by_machine: bool = False) -> float:
        """Bytes that each rank sends in a step to sum the gradients; `by_machine`: that each machine sends to the
        others. 0 (unknown) if the hook is a plain function."""
        return sum(self.hook.bytes_sent(bucket, by_machine=by_machine) for bucket in self.buckets)

    def close(self) -> None:
        """Finish all submitted work and end the threads."""
        self.comm_stream.close()
        if self._after is not None:
            self._after[0].close()

    def slices(self) -> list[list[ParameterSlice]]:
        """Slices for the optimizer: every parameter whole, one list a bucket."""
        return [bucket.slices(0, len(bucket.grad)) for bucket in self.buckets]

    def finish_grad_sync(self) -> None:
        """Launch the remaining buckets and wait for all of them. Call it after the last micro-batch's backward pass.

        Raises:
            RuntimeError: some parameters got no gradient, or one outside the buffers; names them.
        """
        missing = [slot.parameter.name for parameter, slot in self._slot_of.items() if parameter not in self._arrived]
        if missing:
            raise no_gradient_error(missing)
        self.flat_buffers.require_grad_views()
        while self._next_bucket < len(self.buckets):
            self._launch(self.buckets[self._next_bucket])
        with self.observer.waiting("wait for buckets"):
            for handle, bucket in zip(self._handles, self.buckets):
                handle.wait()
                if self._after is None:
                    self.hook.settle(bucket)
        self.observer.synchronised()
        self._begin()

    def _begin(self) -> None:
        """Reset the bookkeeping for the next synchronised backward pass."""
        self._arrived: set[nn.Parameter] = set()
        self._passes: dict[nn.Parameter, int] = {}
        self._pending = [len(bucket.slots) for bucket in self.buckets]
        self._next_bucket = 0
        self._handles: list[Handle] = []

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        """Launch complete buckets. Autograd calls this after adding the gradient of `parameter` to its view."""
        if not self._sync_this_backward or not self._expected:
            return
        name = self._slot_of[parameter].parameter.name
        if parameter in self._arrived:
            raise RuntimeError(
                f"{name} got a second gradient in one synchronised backward pass: "
                f"run all micro-batches of a step but the last under no_sync(), then call finish_grad_sync()"
            )
        self._passes[parameter] = self._passes.get(parameter, 0) + 1
        if self._passes[parameter] == self._expected_of.get(name, self._expected):
            self._arrive(parameter)

    def _arrive(self, parameter: nn.Parameter) -> None:
        """Launch complete buckets, as the gradient of `parameter` is complete."""
        self._arrived.add(parameter)
        bucket = self._slot_of[parameter].bucket
        self._pending[bucket] -= 1
        if self._pending[bucket] == 0:
            self.observer.completed(bucket)
            while (
                self.overlap_grad_reduce
                and self._next_bucket < len(self.buckets)
                and self._pending[self._next_bucket] == 0
            ):
                self._launch(self.buckets[self._next_bucket])

    def _launch(self, bucket: Bucket) -> None:
        def work() -> Handle | None:
            with self.observer.reducing(bucket, self.hook.bytes_sent(bucket)):
                return self.hook.reduce(bucket)

        self.observer.launched(len(self._arrived))
        reduced = self.comm_stream.submit(work)
        if self._after is None:
            self._handles.append(reduced)
        else:
            stream, callback = self._after
            self._handles.append(stream.submit(partial(self._when_reduced, reduced, bucket, callback)))
        self._next_bucket += 1

    def _when_reduced(self, reduced: Handle, bucket: Bucket, callback: Callable[[Bucket], None]) -> None:
        reduced.wait()
        self.hook.settle(bucket)
        callback(bucket)
