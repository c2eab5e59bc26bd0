"""Sums of gradients on a mesh. Each rank holds parts of a toy model whose gradients every rank can compute: so sums,
norm and steps are compared with float64 ones of the whole model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from checkpoint.named import Piece
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import DistContext, destroy_context, init_context
from parallel.config import ParallelConfig, PowerSGDConfig
from parallel.data_parallel import BucketedEngine
from parallel.division import Division, Outline
from parallel.engine import EngineParts, StepPlan
from parallel.engines import open_engine
from parallel.gradients import square
from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.replicas import ReplicaDrift
from parallel.torch_engines import shards
from tests.dist.buckets import draw
from tests.dist.group import run_ranks

LR, CLIP, STEPS = 1.0, 3.0, 2
# A large epsilon: the steps then depend on the gradients' sizes, also on small ones.
ADAMW = AdamWConfig(weight_decay=0.0, adam_eps=0.3)

OUTLINES = {
    "embed.weight": Outline((16, 6), "vocabulary"),
    "layers.0.up": Outline((16, 6), "column", joined=2),
    "layers.0.norm": Outline((6,), is_partial=True),
    "layers.0.down": Outline((6, 8), "row"),
    "layers.0.bias": Outline((6,), "first"),
    "layers.0.router": Outline((4, 6)),
    "layers.0.experts": Outline((4, 8, 6), "column", is_stack=True),
    "layers.1.up": Outline((16, 6), "column", joined=2),
    "layers.1.norm": Outline((6,), is_partial=True),
    "layers.1.experts": Outline((4, 8, 6), is_stack=True),
    "head.weight": Outline((6,)),
}


def stages_of(mesh: Mesh) -> Callable[[str], tuple[int, ...]]:
    """The embedding is tied; block 0 and 1 are on the first and the last stage."""
    last = mesh.pipe_size - 1
    return lambda name: tuple({0, last}) if name == "embed.weight" else (0,) if name.startswith("layers.0") else (last,)


class Part(nn.Module):
    """What a rank holds. Its loss has the gradients that are given."""

    def __init__(self, division: Division):
        super().__init__()
        mine = {
            name: nn.Parameter(part_of(draw(f"weight {name}", its.shape), held.piece).view(held.shape))
            for name, its in OUTLINES.items() if (held := division.held(name)) is not None
        }  # fmt: skip
        self.embed = Block("embed.", mine)
        blocks = {number: Block(f"layers.{number}.", mine) for number in "01"}
        # (A stage of a pipeline has blocks of its own numbers.)
        self.layers = nn.ModuleDict({number: block for number, block in blocks.items() if block.names})
        if len(self.layers) == 2:
            self.layers = nn.ModuleList(self.layers.values())
        self.head = Block("head.", mine)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        blocks = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        return sum(block(gradients) for block in (self.embed, *blocks, self.head))


class Block(nn.Module):
    def __init__(self, prefix: str, parameters: dict[str, nn.Parameter]):
        super().__init__()
        self.prefix, self.names = prefix, [name for name in parameters if name.startswith(prefix)]
        for name in self.names:
            self.register_parameter(name.removeprefix(prefix), parameters[name])

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((p * gradients[self.prefix + name]).sum() for name, p in self.named_parameters())


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    """A piece of a whole tensor, 1-D."""
    boxes = [whole[tuple(slice(s, s + n) for s, n in zip(box.start, box.length))] for box in piece.boxes]
    return torch.cat([whole.new_zeros(0), *(box.reshape(-1) for box in boxes)])


def gradients_of(division: Division, rank: int, step: int) -> dict[str, Tensor]:
    """The gradients that a rank computes in a step."""
    place, found = division.mesh.at(rank), {}
    for name, outline in OUTLINES.items():
        if (held := division.held(name, rank)) is not None:
            # Ranks with the same rows compute parts of the same gradient, or different addends of it.
            rows = place.data_rank, place.context_rank
            addend = (place.tensor_rank if outline.is_partial else 0, place.pipe_rank if name == "embed.weight" else 0)
            found[name] = part_of(draw(f"{rows} {addend} {step} {name}", outline.shape), held.piece).view(held.shape)
    return found


def whole_gradients(division: Division, step: int) -> dict[str, Tensor]:
    """Sums over all ranks, in float64, of the whole model: each element is added once for each rank whose gradient is
    another addend of it."""
    mesh, sums = division.mesh, {name: torch.zeros(its.shape).double() for name, its in OUTLINES.items()}
    for name, outline in OUTLINES.items():
        for data in range(mesh.data_size):
            for context in range(mesh.context_size):
                for tensor in range(mesh.tensor_size if outline.is_partial else 1):
                    for pipe in stages_of(mesh)(name) if name == "embed.weight" else (0,):
                        key = f"{(data, context)} {(tensor, pipe)} {step} {name}"
                        gradient = draw(key, outline.shape).double()
                        if outline.is_stack and mesh.expert_size > 1:
                            # A data rank has gradients of its own experts alone.
                            its = 4 // mesh.expert_size
                            first = data % mesh.expert_size * its
                            sums[name][first : first + its] += gradient[first : first + its]
                        else:
                            sums[name] += gradient
    return sums


class ToyTask:
    uses_prepass, grad_scale, metric_names = False, 1.0, ()

    def __init__(self, model: Part):
        self.model = model

    def layer_losses(self, batch: dict[str, Tensor], scale: float) -> None:
        return None

    def __call__(self, batch: dict[str, Tensor], losses: None = None) -> tuple[Tensor, int, dict[str, Tensor]]:
        return self.model(batch), 1, {}


def new_engine(
    context: DistContext, mesh: Mesh, config: ParallelConfig, clip: float, powersgd: PowerSGDConfig
) -> BucketedEngine:
    outlines = {name: replace(its, is_sharded=config.uses_fsdp) for name, its in OUTLINES.items()}
    division, scaler = Division(outlines, mesh, stages_of(mesh)), LossScaler(enabled=False)
    model = Part(division)
    if config.uses_fsdp:
        shards.cut(model, config, context, mesh, torch.float32)
    return open_engine(
        EngineParts(
            config, powersgd, context, mesh, model, to_device=lambda batch: batch,
            new_optimizer=lambda gradients: MixedPrecisionOptimizer(gradients, [AdamW(ADAMW)], clip, scaler),
            square=square, loss_scale=lambda: 1.0, is_fp16=False, seed=0, division=division,
            groups=Groups(context, mesh, 60.0),
        )
    )  # fmt: skip


def steps_by_hand(division: Division, clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """The whole model's weights after the steps of torch's AdamW in float64, and the norms of the gradients."""
    weights = {name: nn.Parameter(draw(f"weight {name}", its.shape).double()) for name, its in OUTLINES.items()}
    adamw = torch.optim.AdamW(weights.values(), LR, (ADAMW.beta1, ADAMW.beta2), ADAMW.adam_eps, weight_decay=0.0)
    norms = []
    for step in range(STEPS):
        for name, gradient in whole_gradients(division, step).items():
            weights[name].grad = gradient
        norms.append(nn.utils.clip_grad_norm_(weights.values(), clip or math.inf).item())
        adamw.step()
    return {name: weight.detach() for name, weight in weights.items()}, norms


FULL_RANK = PowerSGDConfig(matrix_approximation_rank=16, min_compression_rate=0.0, powerSGD_log_interval=0)
WAYS: dict[str, tuple[ParallelConfig, float]] = {
    "plain": (ParallelConfig(bucket_size=60), 1e-5),
    "one bucket a kind": (ParallelConfig(disable_bucketing=True, overlap_grad_reduce=False), 1e-5),
    "ZeRO-1": (ParallelConfig(bucket_size=60, use_distributed_optimizer=True), 1e-5),
    "ZeRO-1 bf16": (ParallelConfig(bucket_size=60, use_distributed_optimizer=True, use_bf16_compress_hook=True), 3e-2),
    "bf16": (ParallelConfig(bucket_size=60, use_bf16_compress_hook=True), 3e-2),
    "fp16": (ParallelConfig(bucket_size=60, use_fp16_compress_hook=True), 3e-3),
    "PowerSGD": (ParallelConfig(bucket_size=60, use_powerSGD_hook=True), 1e-4),
    "ZeRO-1 PowerSGD": (
        ParallelConfig(bucket_size=60, use_powerSGD_hook=True, use_distributed_optimizer=True), 1e-4
    ),
    "FSDP": (ParallelConfig(data_parallel="fsdp"), 1e-5),
    "overlapped": (ParallelConfig(bucket_size=60, overlap_optim_step=True), 1e-5),
}  # fmt: skip


def sizes_in(mesh: Mesh) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": mesh.tensor_size, "pipeline_model_parallel_size": mesh.pipe_size,
        "context_parallel_size": mesh.context_size, "expert_model_parallel_size": mesh.expert_size,
    }  # fmt: skip


def check_steps(context: DistContext, mesh: Mesh, way: str) -> None:
    """Steps of this rank's part against those of the whole model."""
    config, tolerance = WAYS[way]
    # (Its own engine runs a pipeline; what it sums is the same.)
    sizes = sizes_in(mesh) | {"pipeline_model_parallel_size": 1}
    clip = 0.0 if config.overlap_optim_step else CLIP
    engine = new_engine(context, mesh, replace(config, **sizes), clip, FULL_RANK)
    division, model = engine._parts.division, engine._parts.model
    expected, norms = steps_by_hand(division, clip)
    for step, norm in enumerate(norms):
        plan = StepPlan(step + 1, LR, 1, lambda: None)
        half = {name: 0.5 * gradient for name, gradient in gradients_of(division, mesh.rank, step).items()}
        engine.forward_backward([half, half], ToyTask(model), plan)
        result = engine.step(plan)
        assert not result.skipped and result.grad_norm == pytest.approx(norm, rel=tolerance), (mesh, way)
    engine.settle()
    for name, parameter in model.named_parameters():
        piece, start = division.piece(name), draw(f"weight {name}", OUTLINES[name].shape)
        moved = shards.local(parameter.detach()).reshape(-1) - part_of(start, piece)
        wanted = part_of(expected[name] - start.double(), piece)
        assert (moved - wanted).norm() <= tolerance * wanted.norm(), (mesh, way, name)
    engine.check_replicas(STEPS)
    check_whole(context, engine)
    engine.close()


def check_whole(context: DistContext, engine: BucketedEngine) -> None:
    """The pieces of all ranks make up the whole state, and each set of holders has the same ones."""
    own = [[piece.name, [[*box.start, *box.length] for box in piece.boxes]] for piece, _ in engine.named_state()]
    everyone = context.gather([own, list(engine.state_holders)])
    for pieces, holders in everyone:
        assert all(everyone[rank][0] == pieces for rank in holders)
    covered = {name: torch.zeros(its.shape) for name, its in OUTLINES.items()}
    for pieces, _ in everyone:
        for name, boxes in pieces:
            for box in boxes:
                dims = len(box) // 2
                covered[name][tuple(slice(s, s + n) for s, n in zip(box[:dims], box[dims:]))] = 1.0
    assert all((its == 1.0).all() for its in covered.values())
    assert {name: tuple(its.shape) for name, its in engine.outlines().items()} == {
        name: its.shape for name, its in OUTLINES.items()
    }


def check_faults(context: DistContext, mesh: Mesh, config: ParallelConfig) -> None:
    """NaN on one rank makes all skip the step; a weight that only one rank has changed is found."""
    engine = new_engine(context, mesh, config, CLIP, FULL_RANK)
    division, model, last = engine._parts.division, engine._parts.model, mesh.world_size - 1
    plan = StepPlan(1, LR, 1, lambda: None)
    gradients = gradients_of(division, mesh.rank, 0)
    if mesh.rank == last:
        gradients["head.weight"] = gradients["head.weight"] * math.nan
    engine.forward_backward([gradients], ToyTask(model), plan)
    result = engine.step(plan)
    assert result.skipped and result.grad_norm == math.inf
    engine.check_replicas(1)
    for name in ("head.weight", "embed.weight"):
        others = [rank for rank in division.held_alike(name, last) if rank != last]
        if mesh.rank == last:
            parameter = dict(model.named_parameters())[name]
            before = parameter.detach().clone()
            parameter.detach().view(-1)[3] += 1e-3
        if others:
            with pytest.raises(ReplicaDrift, match=f"{last} are not the same|the ranks' weights are not"):
                engine.check_replicas(1)
        if mesh.rank == last:
            parameter.detach().copy_(before)
        engine.check_replicas(1)
    engine.close()


def check_arrivals(context: DistContext, mesh: Mesh) -> None:
    """Buckets leave after the expected number of backward passes, or when they are said to be complete."""
    engine = new_engine(context, mesh, ParallelConfig(bucket_size=60), CLIP, FULL_RANK)
    ddp, division = engine.ddp, engine._parts.division
    gradients = gradients_of(division, mesh.rank, 0)
    wanted = whole_gradients(division, 0)

    def sums() -> Iterator[tuple[Tensor, Tensor]]:
        for bucket in ddp.buckets:
            for name, gradient in bucket.views():
                yield gradient.view(-1).double(), 3 * part_of(wanted[name], division.piece(name))

    ddp.expect(3)
    for _ in range(3):
        assert not ddp._handles
        ddp.module(gradients).backward()
    assert len(ddp._handles) == len(ddp.buckets)
    ddp.finish_grad_sync()
    assert all((got - its).norm() <= 1e-5 * its.norm() for got, its in sums())
    ddp.zero_grad()
    ddp.expect(0)
    for _ in range(3):
        ddp.module(gradients).backward()
    assert not ddp._handles
    ddp.complete(ddp.module.parameters())
    assert len(ddp._handles) == len(ddp.buckets)
    ddp.finish_grad_sync()
    assert all((got - its).norm() <= 1e-5 * its.norm() for got, its in sums())
    engine.close()


def check_memory(context: DistContext, mesh: Mesh) -> None:
    """What PowerSGD remembers of a piece is taken up for the same piece alone."""
    config = ParallelConfig(use_powerSGD_hook=True, tensor_model_parallel_size=mesh.tensor_size)
    low_rank = replace(FULL_RANK, matrix_approximation_rank=1)
    first, second = (new_engine(context, mesh, config, CLIP, low_rank) for _ in range(2))
    model = first._parts.model
    for step in range(STEPS):
        plan = StepPlan(step + 1, LR, 1, lambda: None)
        first.forward_backward([gradients_of(first._parts.division, mesh.rank, step)], ToyTask(model), plan)
        first.step(plan)
    saved = first.local_state()
    everyone = context.gather(sorted(saved))
    for rank, keys in enumerate(everyone):
        if mesh.at(rank).tensor_rank != mesh.tensor_rank:
            # (The norm is whole on every rank; its gradient is not compressed.)
            assert not {key for key in keys if key.endswith("/residual")} & saved.keys()
        else:
            assert keys == sorted(saved)
    assert second.take_local_states([(saved, True)], STEPS, "step-2") == []
    taken = second.local_state()
    assert all(torch.equal(taken[key], saved[key]) and saved[key].norm() > 0.0 for key in saved)
    foreign = {key.replace("0:", "1:"): value for key, value in saved.items() if "up@" in key}
    [sentence] = second.take_local_states([(foreign, True)], STEPS, "step-2")
    assert "cut in another way: layers.0.up, layers.1.up" in sentence
    assert torch.equal(second.local_state()["layers.0.router/q"], saved["layers.0.router/q"])
    first.close()
    second.close()


MESHES = {
    "data 2 x tensor 2": Mesh(0, data_size=2, tensor_size=2, machine_size=2),
    "pipe 2 x data 2": Mesh(0, pipe_size=2, data_size=2),
    "experts 2": Mesh(0, data_size=4, expert_size=2, machine_size=2),
    "data 2 x context 2": Mesh(0, data_size=2, context_size=2, machine_size=2),
    "tensor 4": Mesh(0, tensor_size=4),
}
SHARED = (
    Mesh(0, data_size=2, tensor_size=2, shard_size=2, machine_size=2),
    Mesh(0, data_size=2, context_size=2, shard_size=2, machine_size=2),
    Mesh(0, context_size=2, tensor_size=2),
)
"""Meshes under FSDP."""


def on_four() -> None:
    context = init_context("cpu")
    for number, mesh in enumerate(MESHES.values()):
        mesh = mesh.at(context.rank)
        # All ways on the mesh with the most kinds of buckets, some on the others.
        ways = [way for way in WAYS if way != "FSDP"], ["plain", "PowerSGD", "ZeRO-1 PowerSGD", "overlapped"]
        for way in ways[number] if number < 2 else ("plain", "ZeRO-1"):
            check_steps(context, mesh, way)
        check_faults(context, mesh, ParallelConfig())
    for mesh in SHARED:
        check_steps(context, mesh.at(context.rank), "FSDP")
    check_memory(context, MESHES["data 2 x tensor 2"].at(context.rank))
    check_arrivals(context, MESHES["pipe 2 x data 2"].at(context.rank))
    destroy_context(context)


def test_sums_on_four_ranks_are_those_of_the_whole_model():
    run_ranks(4, on_four)


def on_eight() -> None:
    context = init_context("cpu")
    check_steps(context, Mesh(context.rank, data_size=4, tensor_size=2, expert_size=2, machine_size=4), "ZeRO-1")
    check_steps(context, Mesh(context.rank, pipe_size=2, data_size=2, tensor_size=2, machine_size=4), "plain")
    destroy_context(context)


def test_sums_on_eight_ranks_are_those_of_the_whole_model():
    run_ranks(8, on_eight)
