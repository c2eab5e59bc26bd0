"""Memory of comm hooks in another mesh: of each parameter, what the ranks hold adds up to what was saved."""

import pytest
import torch
from torch import Tensor

from parallel.division import Division, Outline
from parallel.hook_states import by_parameter, fits, is_by_rank, mesh_of
from parallel.mesh import Mesh

OUTLINES = {"embed.weight": Outline((4, 2), "vocabulary"), "layers.0.q": Outline((4, 2), "column"),
            "layers.1.o": Outline((2, 4), "row"), "layers.1.experts": Outline((4, 2, 2), is_stack=True)}  # fmt: skip
MESHES = [
    {"data_size": 4}, {"data_size": 2}, {"data_size": 8}, {"pipe_size": 2}, {"pipe_size": 2, "data_size": 3},
    {"pipe_size": 2, "data_size": 2, "context_size": 2}, {"context_size": 2},
    {"data_size": 2, "tensor_size": 2}, {"pipe_size": 2, "data_size": 2, "tensor_size": 2}, {"tensor_size": 2},
    {"data_size": 4, "expert_size": 2}, {"data_size": 2, "expert_size": 2, "pipe_size": 2},
]  # fmt: skip


def division_of(mesh: Mesh) -> Division:
    """The embedding is tied: the first and the last stage hold it."""
    stages = {"embed.weight": (0, 1), "layers.0.q": (0,)}
    return Division(OUTLINES, mesh, lambda name: stages.get(name, (1,)) if mesh.pipe_size > 1 else (0,))


def memory_of(mesh: Mesh) -> dict[int, dict[str, Tensor]]:
    """Each rank's residuals, which are different powers of two; Q names the tensor and expert rank that shared it."""
    found: dict[int, dict[str, Tensor]] = {}
    for rank in range(mesh.world_size):
        place, division = mesh.at(rank), division_of(mesh.at(rank))
        its: dict[str, Tensor] = {}
        for name in OUTLINES:
            if division.held(name) is not None:
                its[f"{name}/residual"] = torch.tensor([2**rank])
                its[f"{name}/q"] = torch.tensor([place.tensor_rank, place.expert_rank])
        found[rank] = its
    return found


@pytest.mark.parametrize("now", MESHES, ids=str)
@pytest.mark.parametrize("before", MESHES, ids=str)
def test_residuals_add_up(before: dict, now: dict):
    saved, mesh = Mesh(0, **before), Mesh(0, **now)
    if not fits(saved, mesh):
        return
    memory, sums = memory_of(saved), dict[tuple, int]()
    for rank in range(mesh.world_size):
        place = mesh.at(rank)
        division = None if mesh.is_data_alone else division_of(place)
        (shared, is_mine), *states = by_parameter(memory, saved, place, division)
        assert not is_mine and all(is_mine for _, is_mine in states)
        for name in OUTLINES:
            if division is not None and division.held(name) is None:
                continue
            expert = place.expert_rank if OUTLINES[name].is_stack else shared[f"{name}/q"][1].item()
            assert shared[f"{name}/q"].tolist() == [place.tensor_rank, expert]
            key = name, place.tensor_rank, place.expert_rank if OUTLINES[name].is_stack else 0
            mine = sum(state[f"{name}/residual"].item() for state, _ in states if f"{name}/residual" in state)
            sums[key] = sums.get(key, 0) + mine
            if before == now:
                assert mine == 2**rank
    for (name, tensor_rank, expert_rank), total in sums.items():
        places = [saved.at(rank) for rank, its in memory.items() if f"{name}/residual" in its]
        is_stack = OUTLINES[name].is_stack
        expected = [2**its.rank for its in places if its.tensor_rank == tensor_rank
                    and (its.expert_rank == expert_rank or not is_stack)]  # fmt: skip
        assert total == sum(expected), name


def test_what_a_checkpoint_says_of_its_mesh():
    mesh = Mesh(0, pipe_size=2, data_size=2, tensor_size=2)
    assert mesh_of({"mesh": mesh.sizes()}, 8) == mesh and mesh_of({}, 4) == Mesh(0, data_size=4)
    assert is_by_rank(Mesh(0, data_size=4), Mesh(0, data_size=2)) and not is_by_rank(mesh, Mesh(0))
    assert fits(mesh, Mesh(0, tensor_size=2)) and not fits(mesh, Mesh(0, data_size=4))
