"""Weights that are cut over a mesh, made whole again; checkpoints of every mesh, read by every other."""

import pytest
import torch
from torch import Tensor

from checkpoint.named import Piece
from parallel.context import DistContext, destroy_context, init_context
from parallel.division import Division, Outline
from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.torch_engines.whole import outlines_of, plan_transfers, whole_weights
from tests.dist.group import run_ranks

OUTLINES = {
    "embed_tokens.weight": Outline((16, 6), "vocabulary"),
    "layers.0.norm.weight": Outline((6,)),
    "layers.0.q_proj.weight": Outline((8, 6), "column"),
    "layers.0.o_proj.weight": Outline((6, 8), "row"),
    "layers.0.o_proj.bias": Outline((6,), "first"),
    "layers.1.experts.gate_up_proj": Outline((4, 8, 6), "column", joined=2, is_stack=True),
    "layers.1.experts.down_proj": Outline((4, 6, 4), "row", is_stack=True),
    "norm.weight": Outline((6,)),
}
MESHES = {
    "tp2": {"tensor_size": 2}, "tp4": {"tensor_size": 4}, "pp2": {"pipe_size": 2},
    "tp2 x pp2": {"pipe_size": 2, "tensor_size": 2}, "cp2 x tp2": {"context_size": 2, "tensor_size": 2},
    "ep4": {"expert_size": 4}, "ep2 x tp2": {"expert_size": 2, "tensor_size": 2},
    "fsdp": {"shard_size": 0}, "fsdp x tp2": {"shard_size": 0, "tensor_size": 2}, "hsdp": {"shard_size": 2},
}  # fmt: skip
TIED = "embed_tokens.weight"


def stages_of(name: str) -> tuple[int, ...]:
    """Of a pipeline of two stages with a tied embedding."""
    return (0, 1) if name == TIED else (int(name[:8] in ("layers.1", "norm.wei")),)


def division_of(rank: int, ranks: int, sizes: dict[str, int]) -> Division:
    sizes = dict(sizes)
    data = ranks // (sizes.get("tensor_size", 1) * sizes.get("context_size", 1) * sizes.get("pipe_size", 1))
    is_sharded = "shard_size" in sizes
    sizes["shard_size"] = sizes.get("shard_size", 1) or data
    mesh = Mesh(rank, data_size=data, **sizes)
    outlines = {
        name: Outline(its.shape, its.cut, its.joined, its.is_partial, its.is_stack, is_sharded)
        for name, its in OUTLINES.items()
    }
    return Division(outlines, mesh, stages_of if mesh.pipe_size > 1 else lambda name: (0,))


def whole_values() -> dict[str, Tensor]:
    return {
        name: torch.randn(its.shape, generator=torch.Generator().manual_seed(number))
        for number, (name, its) in enumerate(OUTLINES.items())
    }


def cut_out(piece: Piece, whole: Tensor) -> Tensor:
    """Elements of a piece, one box after the other."""
    return torch.cat([
        whole[tuple(slice(s, s + n) for s, n in zip(box.start, box.length))].reshape(-1) for box in piece.boxes
    ] or [whole.new_empty(0)])  # fmt: skip


def wanted_by(rank: int, ranks: int) -> set[str]:
    """Two ranks want the same, one wants nothing, others what is dealt to them."""
    names = list(OUTLINES)
    return set() if rank == 2 else set(names) if rank < 2 else set(names[rank::ranks])


def work(meshes: dict[str, dict[str, int]]) -> dict:
    context, found = init_context("cpu"), {}
    for name, sizes in meshes.items():
        found[name] = differences(context, division_of(context.rank, context.world_size, sizes))
    destroy_context(context)
    return found


def differences(context: DistContext, division: Division) -> list[str]:
    """Names of parameters that do not arrive as they should; they are held in another dtype."""
    whole, mine = whole_values(), wanted_by(context.rank, context.world_size)
    own = {
        name: cut_out(piece, values).double() for name, values in whole.items()
        if (piece := division.piece(name)) is not None
    }  # fmt: skip
    groups = Groups(context, division.mesh, 60.0)
    arrived = [(name, its.clone()) for name, its in whole_weights(own, mine, division, groups, torch.float32)]
    assert [name for name, _ in arrived] == [name for name in OUTLINES if name in mine]
    assert {name: its.shape for name, its in outlines_of(division, torch.float32).items()} == {
        name: values.shape for name, values in whole.items()
    }
    return [name for name, its in arrived if its.dtype != torch.float32 or not torch.equal(its, whole[name])]


@pytest.mark.parametrize("ranks", [4, 8])
def test_each_rank_gets_the_whole_parameters_that_it_wants(ranks: int):
    for found in run_ranks(ranks, work, MESHES):
        assert found == {name: [] for name in MESHES}


def test_pieces_are_the_whole_and_come_from_near_ranks():
    for name, sizes in MESHES.items():
        division = division_of(0, 8, sizes)
        assert division.is_cut
        for parameter, outline in OUTLINES.items():
            held = torch.zeros(outline.shape)
            for piece in division.pieces(parameter):
                for box in piece.boxes:
                    held[tuple(slice(s, s + n) for s, n in zip(box.start, box.length))] += 1
            assert (held == 1).all(), (name, parameter)
        for piece, source, target in plan_transfers(list(OUTLINES), [set(OUTLINES)] * 8, division):
            holders, data = division.pieces(piece.name)[piece], division.mesh.at(target).data_rank
            assert source in holders and (source == target or target not in holders)
            near = [rank for rank in holders if division.mesh.at(rank).data_rank == data]
            assert source in near or not near
