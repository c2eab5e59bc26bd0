"""FSDP2 (torch's fully_shard; Zhao et al., VLDB 2023): every rank holds its rows of every parameter, and of its
gradients and optimizer state. A block's weights are whole only while it computes:

    forward     gather block 0 | block 0 | give up | gather block 1 | block 1 | ...
    backward    gather block 1 | block 1 | sum gradients into shards, give up | gather block 0 | ...
    step        norm over all shards | the optimizer on this rank's rows, which are the float32 main parameters

Without `reshard_after_forward` a block keeps its weights until its backward pass, so they are gathered once a
micro-batch. Embedding, last norm and head are whole from the beginning of a forward pass to the end of its backward
pass. Gradients are summed after each micro-batch: gradients of the whole model are never in memory.

HSDP: the ranks of a machine share a copy of the model in this way, and gradients are also summed between the copies.

Bytes sent by each of N ranks for P parameters, a micro-batch: w (N - 1) / N P for each gather (w: bytes of the compute
dtype), and r (N - 1) / N P to sum the gradients of the trained ones (r: 4, or 2 with --no-grad_reduce_in_fp32). Between
M copies, 2 r (M - 1) / M of a rank's own share. Muon gathers once a step what it orthogonalizes, in float32.

Frozen vectors stay whole on every rank: they are small, and a rule that is no optimizer moves the routers' biases.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.buffer import ParameterSlice
from parallel.collectives import Collectives, measure_bandwidth
from parallel.comm_hooks import shared_fraction
from parallel.config import ParallelConfig
from parallel.context import DistContext, group_of_one, new_group
from parallel.contract import Named, StepResult
from parallel.data_parallel import DataParallelEngine, levels_of
from parallel.engine import Batch, EngineParts, StepPlan, Task, Traffic
from parallel.layout import ParameterSpec
from parallel.mesh import Dimension, Mesh
from parallel.observer import Observer, no_gradient_error
from parallel.replicas import require_same_shards
from parallel.spans import span, traffic_span
from parallel.torch_engines.rows import most_rows, rows_of
from parallel.torch_engines.whole import exchange


class Cuttable(Protocol):
    """The part of the model that FSDP cuts."""

    layers: nn.ModuleList


def cut(model: nn.Module, config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype) -> None:
    """Let every rank keep its rows of the model alone. Collective.

    Args:
        model: its trained parameters in float32, the frozen ones in `dtype`; may be without values, on the meta device.
        dtype: dtype to compute in.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32 if config.grad_reduce_in_fp32 else dtype,
        # Our blocks know which dtypes they want.
        cast_forward_inputs=False,
    )
    offload = OffloadPolicy()
    if config.fsdp_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=context.device.type == "cuda")
    group = _shard_group(config, context, mesh)
    device_mesh = DeviceMesh.from_group(group, context.device.type, mesh_dim_names=("shard",))
    whole = {parameter for parameter in model.parameters() if not parameter.requires_grad and parameter.dim() < 2}

    def cut_unit(unit: nn.Module, reshard_after_forward: bool) -> None:
        fully_shard(
            unit, mesh=device_mesh, mp_policy=policy, offload_policy=offload, ignored_params=whole,
            reshard_after_forward=reshard_after_forward,
        )  # fmt: skip

    for block in cast(Cuttable, model).layers:
        cut_unit(block, config.reshard_after_forward)
    # torch warns of views among a block's results, in which nothing must be changed in place; nothing is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    # The head computes after the model's own forward pass.
    cut_unit(model, reshard_after_forward=False)


def _shard_group(config: ParallelConfig, context: DistContext, mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that share this rank's copy of the model. Collective."""
    if context.grad_group is None:
        return group_of_one(context)
    if mesh.shard_size == mesh.data_size:
        return context.grad_group
    return new_group(context, _sets_of("shard", mesh), config.dist_timeout)


def _replica_group(config: ParallelConfig, context: DistContext, mesh: Mesh) -> dist.ProcessGroup | None:
    """The ranks that hold the same shard of other copies; None: there is one copy. Collective."""
    return new_group(context, _sets_of("replica", mesh), config.dist_timeout) if mesh.replica_size > 1 else None


def _sets_of(dimension: Dimension, mesh: Mesh) -> list[tuple[int, ...]]:
    """The ranks of each group in this dimension, in one order."""
    return list(dict.fromkeys(mesh.at(rank).ranks_of(dimension) for rank in range(mesh.world_size)))


def give_up_gathered(model: nn.Module) -> None:
    """Give up the weights that a forward pass has left whole: those around the blocks, for the head, and without
    `reshard_after_forward` those of the blocks. Until then the model's parameters are the whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter, or of its gradient: a view."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _first_row(parameter: Tensor, mesh: Mesh) -> int:
    """Number of the first of this rank's rows of a parameter."""
    return rows_of(mesh.shard_rank, mesh.shard_size, len(parameter)).start


def held_rows(parameter: Tensor, mesh: Mesh) -> tuple[Tensor, slice]:
    """The memory of this rank's rows of a parameter, and which rows they are."""
    first = _first_row(parameter, mesh) if isinstance(parameter, DTensor) else 0
    rows = local(parameter.detach())
    return rows, slice(first, first + len(rows))


def device_of(parameter: Tensor, config: ParallelConfig, context: DistContext) -> torch.device:
    """Where this rank's rows of a parameter are kept; what is whole on every rank stays beside the model's work."""
    return torch.device("cpu") if config.fsdp_cpu_offload and isinstance(parameter, DTensor) else context.device


def units(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered at once: the last block first, at the end the model itself, which has what lies
    around the blocks."""
    return [*reversed([cast(FSDPModule, block) for block in cast(Cuttable, model).layers]), cast(FSDPModule, model)]


def _parameters_by_unit(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Name -> parameter of each unit."""
    blocks = cast(Cuttable, model).layers
    by_block = [
        {f"layers.{number}.{name}": parameter for name, parameter in blocks[number].named_parameters()}
        for number in reversed(range(len(blocks)))
    ]
    in_blocks = {name for block in by_block for name in block}
    around = {name: parameter for name, parameter in model.named_parameters() if name not in in_blocks}
    return [*by_block, around]


class _Communication:
    """The transfers of all units, which torch calls: on a CPU in the main thread, which waits for them; on CUDA on
    torch's streams, where a wait shows in no clock of ours.

    Args:
        shard_group: the ranks that share this rank's copy of the model.
    """

    def __init__(self, parts: EngineParts, shard_group: dist.ProcessGroup, observer: Observer):
        self.observer, self._on_cuda = observer, parts.context.device.type == "cuda"
        # Of several machines, a group is all ranks, or the ranks of one.
        is_all = parts.mesh.replica_size == 1
        size, levels = (parts.mesh.machine_size, levels_of(parts)) if is_all else (1, None)
        # Each has memory of its own, as torch has a stream for each.
        self.gathers, self.sums = (Collectives(shard_group, size, levels) for _ in range(2))
        self.copies = Collectives(_replica_group(parts.config, parts.context, parts.mesh))

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


class _Transfer:
    """The common part of torch's interfaces to collectives."""

    def __init__(self, communication: _Communication):
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


class ShardedGradients:
    """Gradients of this rank's rows (parallel/contract.py). A unit is a bucket.

    Args:
        shards: collectives of the ranks that share a copy of the model.
    """

    keeps_scale, is_zeroed_by_step = True, False

    def __init__(
        self, model: nn.Module, context: DistContext, mesh: Mesh, shards: Collectives,
        square: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self._context, self._mesh, self._shards, self._square = context, mesh, shards, square
        self.trained = [
            {name: parameter for name, parameter in unit.items() if parameter.requires_grad}
            for unit in _parameters_by_unit(model)
        ]
        self.slices = [[piece for name, p in unit.items() for piece in self._slice(name, p)] for unit in self.trained]

    def _slice(self, name: str, parameter: nn.Parameter) -> list[ParameterSlice]:
        """This rank's rows, if it has some: rows that lie side by side are a flat slice."""
        rows = local(parameter.detach())
        offset = _first_row(parameter, self._mesh) * math.prod(parameter.shape[1:])
        return [ParameterSlice(name, offset, tuple(parameter.shape), rows.view(-1))] if rows.numel() else []

    def parameters(self, bucket: int) -> Sequence[Named]:
        return [ParameterSpec(name, tuple(p.shape)) for name, p in self.trained[bucket].items()]

    def sum_of_squares(self, bucket: int) -> Tensor:
        squares = [self._square(grad) for grad in self.take(bucket)]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def over_ranks(self, squares: Tensor) -> Tensor:
        # Every copy of the model has the same sum. All are added, so that NaN in any of them shows.
        return self._context.all_sum(squares) / self._mesh.replica_size

    def take(self, bucket: int) -> list[Tensor]:
        grads = [local(cast(Tensor, p.grad)) for p in self.trained[bucket].values()]
        return [grad.view(-1) for grad in grads if grad.numel()]

    def gather(self, bucket: int) -> list[Tensor]:
        gathered = [(local(cast(Tensor, p.grad)), self._gather(p)) for p in self.trained[bucket].values()]
        return [whole for grad, whole in gathered if grad.numel()]

    def _gather(self, parameter: nn.Parameter) -> Tensor:
        """The whole gradient, 1-D: every rank sends as many rows as the first one has."""
        own = local(cast(Tensor, parameter.grad)).view(-1)
        size = most_rows(self._mesh.shard_size, len(parameter)) * math.prod(parameter.shape[1:])
        padded = own.new_zeros(size * self._mesh.shard_size)
        self._shards.shard(padded)[: len(own)] = own
        self._shards.all_gather(padded)
        return padded[: parameter.numel()]

    def release(self, bucket: int) -> None:
        for parameter in self.trained[bucket].values():
            parameter.grad = None

    def without_gradient(self) -> list[str]:
        """Names of the parameters that got no gradient."""
        return [name for unit in self.trained for name, parameter in unit.items() if parameter.grad is None]

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose summed gradients are not finite in this rank's rows."""
        grads = {name: local(cast(Tensor, p.grad)) for unit in self.trained for name, p in unit.items()}
        are_finite = torch.stack([torch.isfinite(grad).all() for grad in grads.values()]).tolist()
        return [name for name, is_finite in zip(grads, are_finite) if not is_finite]


class _CutModel:
    """What the loop over micro-batches sees of a model that sums its gradients by itself."""

    def __init__(self, model: nn.Module, observer: Observer, gradients: ShardedGradients):
        self.module, self.observer, self._gradients = model, observer, gradients

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def finish_grad_sync(self) -> None:
        missing = self._gradients.without_gradient()
        if missing:
            raise no_gradient_error(missing)


def open_fsdp(parts: EngineParts) -> "FsdpEngine":
    return FsdpEngine(parts)


class FsdpEngine(DataParallelEngine):
    """Trains a model that `cut` has cut.

    A forward pass is collective, also in validation: a rank without a batch of its own must run one, too.
    """

    is_cut, forward_is_collective = True, True

    def __init__(self, parts: EngineParts):
        self._units, observer = units(parts.model), Observer(parts.context)
        # A reference may have been computed with the model.
        give_up_gathered(parts.model)
        self._communication = _Communication(parts, _group_of(parts.model), observer)
        for unit in self._units:
            self._communication.take_over(unit)
            # torch lays out a unit's memory when it first gathers it; slices made earlier would be of other memory.
            unit.unshard()
            unit.reshard()
        self._gradients = ShardedGradients(
            parts.model, parts.context, parts.mesh, self._communication.gathers, parts.square
        )
        _require_alignment(self._gradients, parts)
        self._nonfinite: list[str] = []
        super().__init__(parts, _CutModel(parts.model, observer, self._gradients), self._gradients)
        self.state_holders = self.mesh.ranks_of("replica")

    def _step(self, plan: StepPlan) -> StepResult:
        if self._parts.config.check_for_nan_in_grad:
            # The step gives the gradients up.
            found = self._parts.context.gather(self._gradients.nonfinite())
            self._nonfinite = list(dict.fromkeys(name for names in found for name in names))
        return super()._step(plan)

    def evaluate(self, batch: Batch, task: Task) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        result = super().evaluate(batch, task)
        self.end_forward()
        return result

    def end_forward(self) -> None:
        give_up_gathered(self._parts.model)

    def outlines(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(p.shape, dtype=self._dtype_of(p), device="meta")
            for name, p in self._parts.model.named_parameters()
        }

    def _dtype_of(self, parameter: Tensor) -> torch.dtype:
        """dtype that a forward pass sees a parameter in."""
        return self._parts.compute_dtype if isinstance(parameter, DTensor) else parameter.dtype

    @torch.no_grad()
    def whole_weights(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """The rows of each unit that some rank wants are exchanged at once."""
        self.end_forward()
        context = self._parts.context
        everyone = context.gather(sorted(names))
        wanted = [set(everyone[rank]) for rank in self.mesh.ranks_of("shard")]
        for unit in _parameters_by_unit(self._parts.model):
            rows: dict[str, Tensor] = {}
            for name, parameter in unit.items():
                if not isinstance(parameter, DTensor) and name in names:
                    yield name, parameter.detach()
                elif isinstance(parameter, DTensor) and any(name in theirs for theirs in wanted):
                    rows[name] = local(parameter.detach()).to(context.device, self._parts.compute_dtype)
            if rows:
                lengths = {name: len(unit[name]) for name in rows}
                yield from exchange(rows, lengths, wanted, _group_of(self._parts.model))

    def check_replicas(self, step: int) -> None:
        with span("compare replicas"):
            model = self._parts.model
            parameters = [*model.parameters()]
            shards = [local(p.detach()) for p in parameters if isinstance(p, DTensor)]
            # What layers in other forms hold is in buffers.
            whole = [*(p for p in parameters if not isinstance(p, DTensor)), *model.buffers()]
            require_same_shards(self._parts.context, shards, self.mesh.shard_size, whole, step)

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
        by_machine = self._bytes_sent(by_machine=True) if 1 < self.mesh.machine_size < context.world_size else {}
        return Traffic(rate, self._bytes_sent(by_machine=False), by_machine)

    def _bytes_sent(self, by_machine: bool) -> dict[str, float]:
        """Purpose -> bytes that each rank, or each machine, sends in a step."""
        parts, mesh, copies = self._parts, self.mesh, self._communication.copies
        *blocks, around = (_padded_sizes(unit, mesh) for unit in _parameters_by_unit(parts.model))
        times = 2 if parts.config.reshard_after_forward else 1
        gathered = times * sum(size for block in blocks for _, size in block) + sum(size for _, size in around)
        trained = sum(size for unit in [*blocks, around] for parameter, size in unit if parameter.requires_grad)
        taken = torch.float32 if parts.config.grad_reduce_in_fp32 else parts.compute_dtype
        # The ranks of a copy are on one machine, or the copy is on all of them.
        inside = shared_fraction(self._communication.gathers, by_machine)
        inside = 0.0 if by_machine and mesh.replica_size > 1 else inside
        between = 2 * shared_fraction(copies) / (1 if by_machine else mesh.shard_size)
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
        text = f"FSDP2: {copies}{shared if mesh.shard_size > 1 else 'one process, which shares nothing'}"
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
    return [
        (p, most_rows(mesh.shard_size, len(p)) * mesh.shard_size * math.prod(p.shape[1:]))
        for p in unit.values() if isinstance(p, DTensor)
    ]  # fmt: skip


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


def _group_of(model: nn.Module) -> dist.ProcessGroup:
    """The ranks that share this rank's copy of the model."""
    return next(p.device_mesh.get_group() for p in model.parameters() if isinstance(p, DTensor))
