"""FSDP2 (torch's fully_shard; Zhao et al., VLDB 2023): every rank holds its rows of every parameter, and of its
gradients and optimizer state. A block's weights are whole only while it computes:

    forward     gather block 0 | block 0 | give up | gather block 1 | block 1 | ...
    backward    gather block 1 | block 1 | sum gradients into shards, give up | gather block 0 | ...
    step        norm over all shards | the optimizer on this rank's rows, which are the float32 main parameters

Without `reshard_after_forward` a block keeps its weights until its backward pass, so they are gathered once a
micro-batch. Embedding, last norm and head are whole from the beginning of a forward pass to the end of its backward
pass. Gradients are summed after each micro-batch: gradients of the whole model are never in memory.

HSDP: the ranks of a machine share a copy of the model in this way, and gradients are also summed between the copies.

Bytes sent by each of N ranks for P trained parameters, a micro-batch: w (N - 1) / N P for each gather (w: bytes of the
compute dtype), and r (N - 1) / N P to sum the gradients (r: 4, or 2 with --no-grad_reduce_in_fp32).
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.buffer import ParameterSlice
from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.contract import Named
from parallel.data_parallel import WholeModelEngine
from parallel.engine import Batch, EngineParts, Task
from parallel.layout import ParameterSpec
from parallel.mesh import Mesh
from parallel.observer import Observer
from parallel.torch_engines.whole import exchange


class Cuttable(Protocol):
    """The part of the model that FSDP cuts."""

    layers: nn.ModuleList


def cut(model: nn.Module, config: ParallelConfig, context: DistContext, mesh: Mesh, dtype: torch.dtype) -> None:
    """Let every rank keep its rows of the model alone.

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
    offload = CPUOffloadPolicy() if config.fsdp_cpu_offload else OffloadPolicy()
    device_mesh = _device_mesh(context, mesh)
    for block in cast(Cuttable, model).layers:
        fully_shard(
            block, mesh=device_mesh, mp_policy=policy, offload_policy=offload,
            reshard_after_forward=config.reshard_after_forward,
        )  # fmt: skip
    # The head computes after the model's own forward pass.
    fully_shard(model, mesh=device_mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the count of the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _device_mesh(context: DistContext, mesh: Mesh) -> DeviceMesh:
    replicas = mesh.data_size // mesh.shard_size
    if replicas == 1:
        return init_device_mesh(context.device.type, (mesh.shard_size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        context.device.type, (replicas, mesh.shard_size), mesh_dim_names=("replicate", "shard")
    )


def give_up_gathered(model: nn.Module) -> None:
    """Give up the weights that a forward pass has left whole: those around the blocks, for the head, and without
    `reshard_after_forward` those of the blocks. Until then the model's parameters are the whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter, or of its gradient: a view."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def first_row(rows: int, mesh: Mesh) -> int:
    """Number of the first of a rank's rows, of so many."""
    return min(mesh.shard_rank * -(-rows // mesh.shard_size), rows)


def held_rows(parameter: Tensor, mesh: Mesh) -> tuple[Tensor, slice]:
    """The memory of this rank's rows of a parameter, and which rows they are."""
    first = first_row(len(parameter), mesh) if isinstance(parameter, DTensor) else 0
    rows = local(parameter.detach())
    return rows, slice(first, first + len(rows))


class ShardedGradients:
    """Gradients of this rank's rows (parallel/contract.py). A unit that is gathered at once, such as a block, is a
    bucket."""

    keeps_scale, is_zeroed_by_step = True, False

    def __init__(self, model: nn.Module, context: DistContext, mesh: Mesh, square: Callable[[Tensor], Tensor]):
        self._context, self._mesh, self._square = context, mesh, square
        self._units = [
            [(name, p) for name, p in unit if p.requires_grad] for unit in _units(model)
        ]
        self.slices = [[piece for name, p in unit for piece in self._slice(name, p)] for unit in self._units]

    def _slice(self, name: str, parameter: nn.Parameter) -> list[ParameterSlice]:
        rows = local(parameter.detach())
        row_size = parameter.numel() // max(len(parameter), 1)
        offset = first_row(len(parameter), self._mesh) * row_size
        return [ParameterSlice(name, offset, tuple(parameter.shape), rows.view(-1))] if rows.numel() else []

    def parameters(self, bucket: int) -> Sequence[Named]:
        return [ParameterSpec(name, tuple(p.shape)) for name, p in self._units[bucket]]

    def sum_of_squares(self, bucket: int) -> Tensor:
        squares = [self._square(grad) for grad in self.take(bucket)]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def over_ranks(self, squares: Tensor) -> Tensor:
        # Every copy of the model has the same sum.
        return self._context.all_sum(squares if self._mesh.replica_rank == 0 else torch.zeros_like(squares))

    def take(self, bucket: int) -> list[Tensor]:
        grads = [local(cast(Tensor, p.grad)) for _, p in self._units[bucket]]
        return [grad.view(-1) for grad in grads if grad.numel()]

    def gather(self, bucket: int) -> list[Tensor]:
        raise NotImplementedError

    def release(self, bucket: int) -> None:
        for _, parameter in self._units[bucket]:
            parameter.grad = None

    def without_gradient(self) -> list[str]:
        """Names of the parameters that got no gradient."""
        return [name for unit in self._units for name, parameter in unit if parameter.grad is None]


def _units(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters of each unit that is gathered at once: the last block first, at the end those around the blocks."""
    numbers = reversed(range(len(cast(Cuttable, model).layers)))
    blocks: dict[str, list[tuple[str, nn.Parameter]]] = {str(number): [] for number in numbers}
    around: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        unit = blocks[parts[1]] if parts[0] == "layers" else around
        unit.append((name, parameter))
    return [*blocks.values(), around]


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
            raise RuntimeError(f"{len(missing)} parameters got no gradient in this backward pass: {missing[:5]}")


def open_fsdp(parts: EngineParts) -> "FsdpEngine":
    return FsdpEngine(parts)


class FsdpEngine(WholeModelEngine):
    """Trains a model that `cut` has cut.

    A forward pass is collective, also in validation: a rank without a batch of its own must run one, too.
    """

    forward_is_collective = True

    def __init__(self, parts: EngineParts):
        # A reference may have been computed with the model.
        give_up_gathered(parts.model)
        gradients = ShardedGradients(parts.model, parts.context, parts.mesh, parts.square)
        super().__init__(parts, _CutModel(parts.model, Observer(parts.context), gradients), gradients)
        self.state_holders = self.mesh.ranks_of("replica")

    def evaluate(self, batch: Batch, task: Task) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        result = super().evaluate(batch, task)
        self.end_forward()
        return result

    def end_forward(self) -> None:
        give_up_gathered(self._parts.model)

    def outlines(self) -> dict[str, Tensor]:
        named, dtype = self._parts.model.named_parameters(), self._parts.compute_dtype
        return {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in named}

    @torch.no_grad()
    def whole_weights(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """The rows of each unit that some rank wants are exchanged at once."""
        self.end_forward()
        context, dtype = self._parts.context, self._parts.compute_dtype
        everyone = context.gather(sorted(names))
        wanted = [set(everyone[rank]) for rank in self.mesh.ranks_of("shard")]
        for unit in _units(self._parts.model):
            cut: dict[str, DTensor] = {}
            for name, parameter in unit:
                if isinstance(parameter.data, DTensor) and any(name in theirs for theirs in wanted):
                    cut[name] = parameter.data
                elif name in names:
                    yield name, parameter.detach().to(dtype)
            if cut:
                rows = {name: local(parameter).to(context.device, dtype) for name, parameter in cut.items()}
                lengths = {name: len(parameter) for name, parameter in cut.items()}
                group = next(iter(cut.values())).device_mesh.get_group("shard")
                yield from exchange(rows, lengths, wanted, group)

    def check_replicas(self, step: int) -> None:
        pass

    def nonfinite_parameters(self) -> list[str]:
        return []

    def take_state(self, scalars: dict) -> None:
        self.end_forward()
        super().take_state(scalars)

    def describe(self) -> str:
        mesh, config = self.mesh, self._parts.config
        kind = "weights gathered twice a micro-batch (ZeRO-3)" if config.reshard_after_forward else "ZeRO-2"
        replicas = mesh.data_size // mesh.shard_size
        copies = f"{replicas} copies of the model, each over " if replicas > 1 else ""
        return f"FSDP2: {copies}{mesh.shard_size} processes, {kind}; {torch.get_num_threads()} thread(s) each"
