"""Engines whose ranks sum gradients by our own code: naive, or in buckets with hooks, ZeRO-1 and overlaps.

    forward_backward   micro-batch | micro-batch | ... | the last one, during which buckets are reduced
    step               wait for the buckets | norm | step and, with ZeRO-1, gather bucket by bucket

The model is whole on every rank, or cut over other dimensions of the mesh than data: then each bucket is summed over
the ranks that hold it (sum_groups.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from checkpoint.named import NamedState, Piece
from parallel.buffer import Bucket
from parallel.collectives import Collectives, Levels, measure_bandwidth
from parallel.comm_hooks import CommHook, SavedStates, sum_hook, take_saved_states
from parallel.context import machine_groups
from parallel.contract import GradientSource, StepResult
from parallel.ddp import DistributedDataParallel
from parallel.engine import Batch, EngineParts, StepPlan, Sums, Task, Traffic
from parallel.gradients import BucketGradients, PlainGradients
from parallel.naive import NaiveDDP
from parallel.observer import Observer
from parallel.powersgd import PowerSGD
from parallel.replicas import require_same_pieces, require_same_weights
from parallel.spans import span
from parallel.sum_groups import SumGroups
from parallel.whole import outlines_of, whole_weights
from parallel.zero1 import Zero1


def open_naive(parts: EngineParts) -> "NaiveEngine":
    return NaiveEngine(parts, NaiveDDP(parts.model, parts.context, _grad_dtype(parts)))


def open_bucketed(parts: EngineParts) -> "BucketedEngine":
    config = parts.config
    ddp = new_ddp(parts)
    zero1 = Zero1(ddp, config.overlap_param_gather) if config.use_distributed_optimizer else None
    return BucketedEngine(parts, ddp, zero1)


def new_ddp(parts: EngineParts) -> DistributedDataParallel:
    """The model in buckets, with the hook that the flags choose. Collective."""
    config, collectives = parts.config, Collectives(parts.context.grad_group, parts.mesh.machine_size, levels_of(parts))
    sums = None
    if parts.division is not None and parts.groups is not None:
        sums = SumGroups(parts.division, parts.groups, collectives, parts.context.device.type == "cuda")
    ddp = DistributedDataParallel(
        parts.model,
        parts.context,
        bucket_size=0 if config.disable_bucketing else config.bucket_size,
        overlap_grad_reduce=config.overlap_grad_reduce,
        grad_dtype=_grad_dtype(parts),
        observer=Observer(parts.context, config.check_for_nan_in_grad),
        alignment=parts.alignment,
        collectives=collectives,
        sums=sums,
    )
    # The stages of a pipeline differ in their parameters.
    parts.context.gather_from(lambda: _require_alignment(ddp, parts))
    ddp.use_hook(_new_hook(parts, ddp))
    return ddp


def _require_alignment(ddp: DistributedDataParallel, parts: EngineParts) -> None:
    """See that no part of a parameter that this rank holds begins where the optimizer cannot cut it.

    Raises:
        ValueError: one does; names the parameter.
    """
    for slot in ddp.flat_buffers.layout.slots:
        parameter, multiple = slot.parameter, parts.alignment_of(slot.parameter)
        is_cut = parameter.held is not None and parameter.numel < math.prod(parameter.held.shape)
        if is_cut and parameter.numel % multiple:
            raise ValueError(
                f"--optimizer: state in 8 bits has scales for {multiple} values in a row, and {parameter.name} would "
                f"be cut into parts of {parameter.numel}: give the optimizer without 8bit"
            )


def levels_of(parts: EngineParts) -> Levels | None:
    """Groups for collectives of all ranks on the machines of the mesh; None: none are needed. Collective."""
    if parts.context.device.type == "cuda" and parts.mesh.has_levels:
        return machine_groups(parts.context, parts.mesh.machine_size, parts.config.dist_timeout)
    return None


def _new_hook(parts: EngineParts, ddp: DistributedDataParallel) -> CommHook:
    """The hook that the flags choose."""
    config, wire_dtype = parts.config, None
    if config.use_bf16_compress_hook or config.use_fp16_compress_hook:
        wire_dtype = torch.bfloat16 if config.use_bf16_compress_hook else torch.float16
    if config.use_powerSGD_hook:
        return PowerSGD(
            ddp.buckets, ddp.collectives, parts.powersgd, wire_dtype, parts.seed, loss_scale=parts.loss_scale
        )
    return sum_hook(ddp.collectives, wire_dtype, sharded=config.use_distributed_optimizer)


def one_process() -> str:
    return f"one process of {torch.get_num_threads()} thread(s)"


def _trained_dtype(parts: EngineParts) -> torch.dtype:
    # A stage of a pipeline may train nothing.
    return next((p.dtype for p in parts.model.parameters() if p.requires_grad), parts.compute_dtype)


def _grad_dtype(parts: EngineParts) -> torch.dtype:
    return torch.float32 if parts.config.grad_reduce_in_fp32 else _trained_dtype(parts)


class Wrapped(Protocol):
    """A model that sums its gradients over the ranks."""

    @property
    def observer(self) -> Observer: ...

    def no_sync(self) -> AbstractContextManager[None]: ...

    def finish_grad_sync(self) -> None: ...


class DataParallelEngine:
    """The common part of engines whose ranks each have rows of their own: the loop over micro-batches.

    Args:
        gradients: the gradients of `ddp`, for the optimizer.
    """

    is_cut, forward_is_collective = False, False

    def __init__(self, parts: EngineParts, ddp: Wrapped, gradients: GradientSource):
        self.mesh, self._ddp, self._parts = parts.mesh, ddp, parts
        self.is_cut = self.is_cut or parts.division is not None and parts.division.is_cut
        self.state_holders = tuple(range(parts.mesh.world_size))
        if parts.division is not None:
            self.forward_is_collective = True
            # Ranks that share the experts hold the rest alike, and each set writes it.
            self.state_holders = parts.division.same_pieces()
        self._layers: Tensor | None = None
        self.optimizer = parts.new_optimizer(gradients)

    def forward_backward(self, micro_batches: Sequence[Batch], task: Task, plan: StepPlan) -> Sums | None:
        device = self._parts.context.device
        self._run_prepass(micro_batches, task)
        factor = self._factor(task, plan)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        metrics = {name: torch.zeros_like(loss) for name in task.metric_names}
        layers: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            if index and plan.shall_drop is not None and plan.shall_drop(index, len(micro_batches)):
                return None
            is_last = index == len(micro_batches) - 1
            if is_last:
                self._before_last(plan)
            with nullcontext() if is_last else self._ddp.no_sync():
                with span("forward"):
                    batch = self._parts.to_device(batch)
                    losses = task.layer_losses(batch, factor)
                    loss_sum, _, sums = task(batch, losses)
                with span("backward"):
                    (loss_sum * factor).backward()
            loss += loss_sum.detach()
            for name, value in sums.items():
                metrics[name] += value
            if losses is not None and losses.sums is not None:
                layers.append(losses.sums)
        self._layers = self._counted(torch.stack(layers).sum(0)) if layers else None
        return Sums(self._counted(loss), {name: self._counted(value) for name, value in metrics.items()}, self._layers)

    def _factor(self, task: Task, plan: StepPlan) -> float:
        """The factor by which the sum of the losses is multiplied before its backward pass. The task gets to know
        it."""
        factor = self._parts.loss_scale() / max(plan.count, 1)
        # A fused loss rounds its gradient before it is scaled. Only in float16 does that lose small values.
        task.grad_scale = factor if self._parts.is_fp16 else 1.0
        return factor

    def _counted(self, sums: Tensor) -> Tensor:
        """Share of this rank in sums over all ranks: nothing, if another one counts the same rows."""
        return sums if self.mesh.counts else torch.zeros_like(sums)

    def _run_prepass(self, micro_batches: Sequence[Batch], task: Task) -> None:
        if task.uses_prepass:
            with span("prepass"):
                sums = [task.prepass(self._parts.to_device(batch)) for batch in micro_batches]
                context, own = self._parts.context, self._counted(sum(sums[1:], sums[0]))
                task.take_prepass(context.all_sum(own.cpu()).to(context.device))

    def _before_last(self, plan: StepPlan) -> None:
        """Called right before the last micro-batch, during which gradients may be reduced."""

    def step(self, plan: StepPlan) -> StepResult:
        self._ddp.finish_grad_sync()
        plan.before_update()
        with span("optimizer"):
            result = self._step(plan)
        if not result.skipped:
            self._rebalance()
        return result

    def _rebalance(self) -> None:
        """Move the biases of the routers by the load of the global batch."""
        if self._layers is not None and self._parts.rebalance is not None:
            with span("rebalance"):
                self._parts.rebalance(self._parts.context.all_sum(self._layers.to("cpu", copy=True)))

    def _step(self, plan: StepPlan) -> StepResult:
        return self.optimizer.step(plan.lr)

    def evaluate(self, batch: Batch, task: Task) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        loss, count, metrics = task(self._parts.to_device(batch))
        own = {name: self._counted(value) for name, value in metrics.items()}
        return self._counted(loss), count if self.mesh.counts else 0, own

    def end_forward(self) -> None:
        """Do nothing: no weights are gathered."""

    def settle(self) -> None:
        """Do nothing: the weights are whole after every step."""

    def outlines(self) -> dict[str, Tensor]:
        if self.is_cut:
            assert self._parts.division is not None
            return outlines_of(self._parts.division, self._parts.compute_dtype)
        return {name: parameter.detach().to("meta") for name, parameter in self._parts.model.named_parameters()}

    def whole_weights(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        own = {name: parameter.detach() for name, parameter in self._parts.model.named_parameters()}
        if self.is_cut:
            parts = self._parts
            assert parts.division is not None and parts.groups is not None
            yield from whole_weights(own, names, parts.division, parts.groups, parts.compute_dtype)
        else:
            yield from ((name, parameter) for name, parameter in own.items() if name in names)

    def check_replicas(self, step: int) -> None:
        self.settle()
        with span("compare replicas"):
            # What layers in other forms hold is in buffers.
            model, division = self._parts.model, self._parts.division
            if division is not None:
                require_same_pieces(self._parts.context, division, model.named_parameters(), model.buffers(), step)
                return
            require_same_weights(self._parts.context, [*model.parameters(), *model.buffers()], step)

    def communication_s(self) -> float:
        return self._ddp.observer.waits.take()

    def records(self) -> Mapping[str, dict]:
        return {}

    def named_state(self) -> NamedState:
        return self.optimizer.named_state()

    def holders_of(self, piece: Piece) -> Sequence[int]:
        division = self._parts.division
        if division is None or piece != division.piece(piece.name):
            return self.state_holders
        return division.holders(piece.name)

    def scalar_state(self) -> dict:
        return self.optimizer.scalar_state()

    def local_state(self) -> dict[str, Tensor] | None:
        return None

    def take_state(self, scalars: dict) -> None:
        self.optimizer.weights_from_main()
        self.optimizer.load_scalar_state(scalars)

    def take_local_states(self, states: SavedStates, step: int, name: str) -> list[str]:
        return take_saved_states(CommHook(), states, step, name)

    def traffic(self) -> Traffic | None:
        return None

    def advice(self, traffic: Traffic, compute_s: float) -> str | None:
        return None

    def close(self) -> None:
        pass


class NaiveEngine(DataParallelEngine):
    """Sums every gradient after the backward pass."""

    def __init__(self, parts: EngineParts, ddp: NaiveDDP):
        super().__init__(parts, ddp, PlainGradients(ddp.slices(), parts.square))
        self.ddp = ddp
        self._nonfinite: list[str] = []

    def _step(self, plan: StepPlan) -> StepResult:
        if self._parts.config.check_for_nan_in_grad:
            # The step zeroes the gradients.
            self._nonfinite = self.ddp.nonfinite_parameters()
        return super()._step(plan)

    def nonfinite_parameters(self) -> list[str]:
        return self._nonfinite

    def describe(self) -> str:
        threads, size = torch.get_num_threads(), self.mesh.world_size
        return f"{size} processes, naive all-reduce; {threads} thread(s) each" if size > 1 else one_process()


class BucketedEngine(DataParallelEngine):
    """Reduces buckets of gradients during the backward pass.

    Args:
        zero1: shards the optimizer's state.
    """

    def __init__(self, parts: EngineParts, ddp: DistributedDataParallel, zero1: Zero1 | None):
        self.ddp, self.hook, self.zero1 = ddp, ddp.hook, zero1
        super().__init__(parts, ddp, BucketGradients(ddp, zero1, parts.square))
        if zero1 is not None:
            self.state_holders = (parts.mesh.rank,)
        if parts.config.overlap_optim_step:
            ddp.register_after_reduction(self._step_reduced)

    def _step_reduced(self, bucket: Bucket) -> None:
        """Step a reduced bucket while the backward pass goes on (overlap_optim_step)."""
        with span(f"step bucket {bucket.index}"):
            self.optimizer.step_bucket(bucket.index, release=self._parts.config.overlap_zero_grad_buffer)

    def forward_backward(self, micro_batches: Sequence[Batch], task: Task, plan: StepPlan) -> Sums | None:
        self._begin_step(plan)
        if self.hook.saves_gradients:
            plan = replace(plan, shall_drop=None)
        return super().forward_backward(micro_batches, task, plan)

    def _begin_step(self, plan: StepPlan) -> None:
        if self.hook.remembers or self._parts.config.overlap_optim_step:
            # Saved state changes while the backward pass goes on.
            plan.before_update()
        self.hook.begin_step(plan.number)

    def nonfinite_parameters(self) -> list[str]:
        return self.ddp.observer.nonfinite_parameters

    def _before_last(self, plan: StepPlan) -> None:
        if self._parts.config.overlap_optim_step:
            self.optimizer.begin_overlapped_step(plan.lr)

    def _step(self, plan: StepPlan) -> StepResult:
        zero1 = self.zero1
        if self._parts.config.overlap_optim_step:
            result = self.optimizer.end_overlapped_step(zero1.start_gathers if zero1 is not None else None)
        else:
            result = self.optimizer.step(plan.lr, zero1.gather if zero1 is not None else None)
        if zero1 is not None and not zero1.overlap_gather:
            zero1.wait()
        return result

    def holders_of(self, piece: Piece) -> Sequence[int]:
        # A parameter that lies in one rank's share is whole there alone.
        return super().holders_of(piece) if self.zero1 is None else self.state_holders

    def settle(self) -> None:
        if self.zero1 is not None:
            with self.ddp.observer.waits.uncounted():
                self.zero1.wait()

    def records(self) -> Mapping[str, dict]:
        return self.hook.records()

    def local_state(self) -> dict[str, Tensor] | None:
        return self.hook.saved_state()

    def take_state(self, scalars: dict) -> None:
        super().take_state(scalars)
        if self.zero1 is not None:
            self.zero1.gather_all()

    def take_local_states(self, states: SavedStates, step: int, name: str) -> list[str]:
        return take_saved_states(self.hook, states, step, name)

    def describe(self) -> str:
        config, size, count = self._parts.config, self.mesh.world_size, len(self.ddp.buckets)
        hook = self.hook.describe()
        if size == 1 and not self.hook.remembers and self.zero1 is None:
            return one_process()
        overlap = "overlapped with" if config.overlap_grad_reduce else "after"
        text = f"{size} processes" if size > 1 else "one process"
        text += f" ({dimensions})" if (dimensions := self.mesh.describe()) else ""
        text += f", {count} gradient bucket{'' if count == 1 else 's'} reduced {overlap} the backward pass"
        if self._has_levels:
            text += f", summed first on each of {self.ddp.collectives.machines} machines"
        text += f", {hook}" if hook else ""
        if self.zero1 is not None:
            text += ", ZeRO-1" + (" gathered under the forward pass" if self.zero1.overlap_gather else "")
        if config.overlap_optim_step:
            text += ", buckets stepped as they arrive"
        return f"{text}; {torch.get_num_threads()} thread(s) each"

    def traffic(self) -> Traffic | None:
        context, rates = self._parts.context, [0.0]
        if context.world_size == 1:
            return None

        def measure() -> None:
            rates[0] = measure_bandwidth(self.ddp.collectives, context.device)

        self.ddp.comm_stream.submit(measure).wait()
        measured = context.gather([rates[0], context.local_world_size])
        remark, ranks = "", [count for _, count in measured]
        if self.mesh.machine_size == 1 < max(ranks) and not self._parts.config.ranks_per_machine:
            remark = "sums are not taken machine by machine, as machines have different numbers of processes"
        by_machine = self._bytes_sent(by_machine=True) if self.mesh.has_levels else {}
        return Traffic(min(rate for rate, _ in measured), self._bytes_sent(by_machine=False), by_machine, remark)

    def _bytes_sent(self, by_machine: bool) -> dict[str, float]:
        """Purpose -> bytes that each rank, or each machine, sends in a step."""
        zero1, hook = self.zero1, self.ddp.hook

        def added(num_bytes: Callable[[Bucket], float]) -> float:
            return sum(num_bytes(bucket) * self._senders(bucket, by_machine) for bucket in self.ddp.buckets)

        sent = {"gradients": added(lambda bucket: hook.bytes_sent(bucket, by_machine=by_machine))}
        if zero1 is not None:
            sent["parameters"] = added(lambda bucket: zero1.bytes_of_parameters(bucket, by_machine))
            updates = added(
                lambda bucket: zero1.bytes_of_updates(bucket, by_machine) * self.optimizer.needs_gather(bucket.index)
            )
            sent |= {"updates": updates} if updates else {}
        return sent

    def _senders(self, bucket: Bucket, by_machine: bool) -> int:
        """Groups that send as much as this rank's for a bucket: those on a machine, if bytes are counted by machine."""
        ranks = self.ddp.collectives if bucket.collectives is None else bucket.collectives
        return self.mesh.machine_size // ranks.machine_size if by_machine else 1

    @property
    def _has_levels(self) -> bool:
        """Whether any bucket is summed on two levels."""
        return any(bucket.collectives is not None and bucket.collectives.has_levels for bucket in self.ddp.buckets)

    def advice(self, traffic: Traffic, compute_s: float) -> str | None:
        seconds = traffic.sent.get("parameters", 0.0) / traffic.bytes_per_s
        if seconds <= compute_s:
            return None
        return (
            f"ZeRO-1 gathers parameters for {seconds:.2f} s a step, longer than the compute ({compute_s:.2f} s at half "
            f"the peak), and no compression shortens that: leave out --use_distributed_optimizer if memory allows, or "
            f"make steps larger"
        )

    def close(self) -> None:
        self.ddp.close()
