"""FSDP2 (torch's fully_shard; Zhao et al., VLDB 2023): every rank holds its rows of every parameter, and of its
gradients and optimizer state. A block's weights are whole only while it computes:

    forward     gather block 0 | block 0 | give up | gather block 1 | block 1 | ...
    backward    gather block 1 | block 1 | sum gradients into shards, give up | gather block 0 | ...
    step        norm over all shards | the optimizer on this rank's rows, which are the float32 main parameters

Without `reshard_after_forward` a block keeps its weights until its backward pass, so they are gathered once a
micro-batch. Embedding, last norm and head are whole from the beginning of a forward pass to the end of its backward
pass. Gradients are summed after each micro-batch: gradients of the whole model are never in memory.

HSDP: the ranks of a machine share a copy of the model in this way, and gradients are also summed between the copies.
Ranks that share the positions of each row (context parallelism) are such copies, too. Under tensor parallelism, the
data ranks with the same part of each matrix share it.

Bytes sent by each of N ranks for P parameters, a micro-batch: w (N - 1) / N P for each gather (w: bytes of the compute
dtype), and r (N - 1) / N P to sum the gradients of the trained ones (r: 4, or 2 with --no-grad_reduce_in_fp32). Between
M copies, 2 r (M - 1) / M of a rank's own share. Muon gathers once a step what it orthogonalizes, in float32.

Frozen vectors stay whole on every rank: they are small, and a rule that is no optimizer moves the routers' biases.

`shards.py` cuts the model, `transfers.py` sends, `gradients.py` is the optimizer's view; the engine is here.
"""

import math
from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import measure_bandwidth
from parallel.comm_hooks import shared_fraction
from parallel.contract import StepResult
from parallel.data_parallel import DataParallelEngine
from parallel.engine import EngineParts, StepPlan, Traffic
from parallel.layout import ParameterSpec
from parallel.mesh import Mesh
from parallel.observer import Observer, no_gradient_error
from parallel.replicas import require_same_pieces
from parallel.spans import span
from parallel.torch_engines.gradients import ShardedGradients
from parallel.torch_engines.shards import (
    give_up_gathered,
    group_of,
    local,
    most_rows,
    padded_size,
    parameters_by_unit,
    units,
)
from parallel.torch_engines.transfers import Communication
from parallel.whole import outlines_of, whole_weights


class _CutModel:
    """What the loop over micro-batches sees of a model that sums its gradients by itself."""

    def __init__(self, parts: EngineParts, observer: Observer, gradients: ShardedGradients):
        self.module, self.observer, self._gradients = parts.model, observer, gradients
        self._tensor_group = parts.groups.of("tensor") if parts.groups is not None else None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def finish_grad_sync(self) -> None:
        missing = self._gradients.without_gradient()
        if missing:
            raise no_gradient_error(missing)
        with self.observer.waiting("wait for parts of gradients"):
            self._gradients.sum_parts(self._tensor_group)


def open_fsdp(parts: EngineParts) -> "FsdpEngine":
    return FsdpEngine(parts)


class FsdpEngine(DataParallelEngine):
    """Trains a model that `shards.cut` has cut.

    A forward pass is collective, also in validation: a rank without a batch of its own must run one, too.
    """

    is_cut, forward_is_collective = True, True

    def __init__(self, parts: EngineParts):
        observer = Observer(parts.context)
        # A reference may have been computed with the model.
        give_up_gathered(parts.model)
        self._communication = Communication(parts, group_of(parts.model), observer)
        for unit in units(parts.model):
            self._communication.take_over(unit)
            # torch lays out a unit's memory when it first gathers it; slices made earlier would be of other memory.
            unit.unshard()
            unit.reshard()
        assert parts.division is not None
        self._division = parts.division
        self._gradients = ShardedGradients(
            parts.model, parts.context, parts.division, self._communication.gathers, parts.square
        )
        _require_alignment(self._gradients, parts)
        self._nonfinite: list[str] = []
        super().__init__(parts, _CutModel(parts, observer, self._gradients), self._gradients)

    def _step(self, plan: StepPlan) -> StepResult:
        if self._parts.config.check_for_nan_in_grad:
            # The step gives the gradients up.
            found = self._parts.context.gather(self._gradients.nonfinite())
            self._nonfinite = list(dict.fromkeys(name for names in found for name in names))
        return super()._step(plan)

    def end_forward(self) -> None:
        give_up_gathered(self._parts.model)

    def outlines(self) -> dict[str, Tensor]:
        return outlines_of(self._division, self._parts.compute_dtype)

    def whole_weights(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        self.end_forward()
        assert self._parts.groups is not None
        held = {name: local(parameter.detach()) for name, parameter in self._parts.model.named_parameters()}
        yield from whole_weights(held, names, self._division, self._parts.groups, self._parts.compute_dtype)

    def check_replicas(self, step: int) -> None:
        with span("compare replicas"):
            model = self._parts.model
            held = ((name, local(parameter.detach())) for name, parameter in model.named_parameters())
            # What layers in other forms hold is in buffers.
            require_same_pieces(self._parts.context, self._division, held, model.buffers(), step)

    def nonfinite_parameters(self) -> list[str]:
        """All ranks': a parameter's rows are on several."""
        return self._nonfinite

    def take_state(self, scalars: dict) -> None:
        self.end_forward()
        super().take_state(scalars)

    def traffic(self) -> Traffic | None:
        context = self._parts.context
        if context.world_size == 1:
            return None
        rate = min(context.gather(measure_bandwidth(self._communication.gathers, context.device)))
        by_machine = self._bytes_sent(by_machine=True) if self.mesh.has_levels else {}
        return Traffic(rate, self._bytes_sent(by_machine=False), by_machine)

    def _bytes_sent(self, by_machine: bool) -> dict[str, float]:
        """Purpose -> bytes that each rank, or each machine, sends in a step."""
        parts, mesh = self._parts, self.mesh
        gathers, copies = self._communication.gathers, self._communication.copies
        *blocks, around = (_padded_sizes(unit, mesh) for unit in parameters_by_unit(parts.model))
        times = 2 if parts.config.reshard_after_forward else 1
        gathered = times * sum(size for block in blocks for _, size in block) + sum(size for _, size in around)
        trained = sum(size for unit in [*blocks, around] for parameter, size in unit if parameter.requires_grad)
        taken = torch.float32 if parts.config.grad_reduce_in_fp32 else parts.compute_dtype
        # By machine, groups with as many ranks on each machine send as much.
        groups = [mesh.machine_size // its.machine_size if by_machine else 1 for its in (gathers, copies)]
        inside = groups[0] * shared_fraction(gathers, by_machine)
        between = groups[1] * 2 * shared_fraction(copies, by_machine) / mesh.shard_size
        updates = sum(
            size for bucket, unit in enumerate([*blocks, around]) if self.optimizer.needs_gather(bucket)
            for parameter, size in unit if parameter.requires_grad
        )  # fmt: skip
        sent = {
            "gradients": (inside + between) * trained * taken.itemsize * parts.micro_batches,
            "weights": inside * gathered * parts.compute_dtype.itemsize * parts.micro_batches,
            "updates": inside * updates * 4,
        }
        return {purpose: num_bytes for purpose, num_bytes in sent.items() if num_bytes}

    def describe(self) -> str:
        mesh, config = self.mesh, self._parts.config
        gathers = "twice a micro-batch (ZeRO-3)" if config.reshard_after_forward else "once a micro-batch (ZeRO-2)"
        copies = f"{mesh.replica_size} copies of the model, each over " if mesh.replica_size > 1 else ""
        shared = f"{mesh.shard_size} processes, weights gathered {gathers}"
        mesh_sizes = f"{dimensions}; " if (dimensions := mesh.describe()) else ""
        text = f"FSDP2: {mesh_sizes}{copies}{shared if mesh.shard_size > 1 else 'one process, which shares nothing'}"
        if config.fsdp_cpu_offload and self._parts.context.device.type == "cuda":
            text += ", kept and stepped in host memory"
        elif config.fsdp_cpu_offload:
            text += ", --fsdp_cpu_offload changes nothing on a CPU"
        # Stacks of experts: matrices are cut by rows, which are many.
        stacks = {len(p) for p in self._parts.model.parameters() if p.dim() > 2}
        if stacks and min(stacks) % mesh.shard_size:
            experts = min(stacks)
            most = most_rows(mesh.shard_size, experts)
            text += f", {experts} experts a layer of which {-(-experts // most)} processes hold up to {most}"
        return f"{text}; {torch.get_num_threads()} thread(s) each"


def _padded_sizes(unit: dict[str, nn.Parameter], mesh: Mesh) -> list[tuple[nn.Parameter, int]]:
    """A unit's parameters that are cut, and the elements that travel for each: every rank sends as many rows."""
    return [(p, padded_size(p, mesh.shard_size)) for p in unit.values() if isinstance(p, DTensor)]


def _require_alignment(gradients: ShardedGradients, parts: EngineParts) -> None:
    """See that no rank's rows begin where the optimizer cannot cut a parameter. The same on all ranks.

    Raises:
        ValueError: they do; names the parameter.
    """
    for unit in gradients.trained:
        for name, parameter in unit.items():
            shape, multiple = tuple(parameter.shape), parts.alignment_of(ParameterSpec(name, tuple(parameter.shape)))
            rows = most_rows(parts.mesh.shard_size, len(parameter))
            if rows < len(parameter) and rows * math.prod(shape[1:]) % multiple:
                raise ValueError(
                    f"--optimizer: state in 8 bits has scales for {multiple} values in a row, and {name} "
                    f"{shape} would be cut over {parts.mesh.shard_size} processes into {rows} rows of "
                    f"{math.prod(shape[1:])}: give the optimizer without 8bit, or another number of processes"
                )
