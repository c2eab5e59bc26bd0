"""The mesh: every rank's place, the groups of each dimension, and the sentences on what cannot be cut."""

import itertools
from typing import get_args

import pytest

from parallel.config import ParallelConfig
from parallel.mesh import Dimension, Mesh, places, plan

DIMENSIONS = get_args(Dimension)
OUTSIDE = ("pipe", "data", "context", "tensor")


def machines(*sizes: int) -> list[tuple[int, int]]:
    """Places of the ranks on machines of these sizes."""
    return [(local, size) for size in sizes for local in range(size)]


def meshes() -> list[Mesh]:
    """Rank 0 of each mesh of small sizes."""
    sizes = itertools.product((1, 2), (1, 3, 4), (1, 2), (1, 3))
    return [
        Mesh(0, pipe, data, context, tensor, shard, expert)
        for pipe, data, context, tensor in sizes
        for shard, expert in itertools.product((1, 2, 3, 4), repeat=2)
        if data % shard == data % expert == 0
    ]


def test_every_rank_has_coordinates_of_its_own():
    """Tensor ranks are neighbours, and one rank for each data rank counts."""
    for mesh in meshes():
        ranks = [mesh.at(rank) for rank in range(mesh.world_size)]
        places = [tuple(m.rank_in(name) for name in OUTSIDE) for m in ranks]
        assert places == list(itertools.product(*(range(mesh.size(name)) for name in OUTSIDE)))
        assert sorted(m.data_rank for m in ranks if m.counts) == list(range(mesh.data_size))
        assert all(m.data_rank == m.replica_rank * m.shard_size + m.shard_rank for m in ranks)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_groups_of_a_dimension(dimension: Dimension):
    """Each holds ranks that differ in this coordinate alone, in its order; together they are all ranks, once each."""
    for mesh in meshes():
        ranks = [mesh.at(rank) for rank in range(mesh.world_size)]
        for rank in ranks:
            group = [ranks[r] for r in rank.ranks_of(dimension)]
            assert rank in group and [r.rank_in(dimension) for r in group] == list(range(mesh.size(dimension)))
            others = [name for name in OUTSIDE if name != (dimension if dimension in OUTSIDE else "data")]
            if dimension in ("shard", "replica"):
                others.append("replica" if dimension == "shard" else "shard")
            assert len({tuple(r.rank_in(name) for name in others) for r in group}) == 1
            if dimension in ("shard", "expert"):
                # Neighbours in data.
                begin = rank.data_rank - rank.rank_in(dimension)
                assert [r.data_rank for r in group] == list(range(begin, begin + len(group)))
        groups = {rank.ranks_of(dimension) for rank in ranks}
        assert sorted(itertools.chain(*groups)) == list(range(mesh.world_size))


@pytest.mark.parametrize(("sizes", "flags", "data", "shard", "machine"), [
    ((4,), {}, 4, 1, 4),
    ((2, 2), {}, 4, 1, 2),
    # Without machines of one size, nothing is assumed.
    ((1, 2), {}, 3, 1, 1),
    ((4,), {"ranks_per_machine": 2}, 4, 1, 2),
    ((4,), {"data_parallel": "fsdp"}, 4, 4, 4),
    ((1, 2), {"data_parallel": "fsdp"}, 3, 3, 1),
    ((2, 2), {"data_parallel": "hsdp"}, 4, 2, 2),
    ((4, 4), {"data_parallel": "hsdp", "ranks_per_machine": 2}, 8, 2, 2),
    ((1, 2, 1), {"data_parallel": "hsdp", "ranks_per_machine": 2}, 4, 2, 2),
    ((8, 8), {"data_parallel": "hsdp", "tensor_model_parallel_size": 2}, 8, 4, 8),
    ((16,), {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
     2, 1, 16),
])  # fmt: skip
def test_a_mesh_is_what_the_flags_leave(sizes: tuple[int, ...], flags: dict, data: int, shard: int, machine: int):
    places = machines(*sizes)
    for rank in range(len(places)):
        mesh = plan(ParallelConfig(**flags), rank, places)
        assert (mesh.rank, mesh.world_size) == (rank, len(places))
        assert (mesh.data_size, mesh.shard_size, mesh.machine_size) == (data, shard, machine)


HSDP = {"data_parallel": "hsdp"}


@pytest.mark.parametrize(("sizes", "flags", "reason"), [
    ((12,), {"tensor_model_parallel_size": 8},
     "12 processes cannot be cut into tensor 8: --tensor_model_parallel_size=6 or 16 processes are the nearest"),
    ((8, 4), {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
     "12 processes cannot be cut into pipe 2 x tensor 4: --tensor_model_parallel_size=3 or 16 processes"),
    ((4,), {"context_parallel_size": 3}, "cannot be cut into context 3: --context_parallel_size=4 or 6 processes"),
    ((12,), {"expert_model_parallel_size": 8},
     "12 data ranks cannot share the experts in groups of 8: --expert_model_parallel_size=6 is the nearest"),
    ((1,), {"ranks_per_machine": 2}, "--ranks_per_machine=2, and there is one process: leave it out"),
    ((12,), {"ranks_per_machine": 8}, "12 processes are no whole number of such machines: --ranks_per_machine=6 is"),
    ((4,), HSDP | {"ranks_per_machine": 8}, "--ranks_per_machine=4 is the nearest"),
    ((4,), HSDP, "all 4 processes are on one: give --data_parallel=fsdp (or --ranks_per_machine=2, for copies on"),
    ((3,), HSDP, "all 3 processes are on one: give --data_parallel=fsdp"),
    ((1,), HSDP, "there is one process: leave it out"),
    ((1, 1), HSDP, "a machine of 1 process has not got several: give --data_parallel=fsdp, or auto"),
    ((4, 2), HSDP, "these have 4 + 2: give --ranks_per_machine=2 or --data_parallel=fsdp"),
    ((3, 2), HSDP, "these have 3 + 2: give --data_parallel=fsdp"),
    ((4, 4), HSDP | {"tensor_model_parallel_size": 4}, "a machine of 4 processes has not got several"),
])  # fmt: skip
def test_what_cannot_be_cut_is_told_with_what_can(sizes: tuple[int, ...], flags: dict, reason: str):
    with pytest.raises(ValueError) as caught:
        plan(ParallelConfig(**flags), 0, machines(*sizes))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_machines_whose_ranks_are_no_neighbours_are_not_assumed():
    dealt = [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert plan(ParallelConfig(), 0, dealt).machine_size == 1
    with pytest.raises(ValueError, match="numbered machine by machine, and these have 2 \\+ 2"):
        plan(ParallelConfig(**HSDP), 0, dealt)


def test_the_nearest_mesh_is_possible():
    """What a sentence proposes can be cut."""
    for size, tensor, pipe in itertools.product(range(1, 25), (1, 2, 3, 5, 8), (1, 2, 7)):
        flags = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipe}
        try:
            plan(ParallelConfig(**flags), 0, machines(size))
        except ValueError as error:
            words = str(error).split()
            told = (word[2:].split("=") for word in words if word.startswith("--"))
            proposed = {name: int(value) for name, value in told}
            assert proposed and plan(ParallelConfig(**flags | proposed), 0, machines(size))
            enough = int(words[words.index("processes", words.index("or")) - 1])
            assert enough > size and plan(ParallelConfig(**flags), 0, machines(enough)).data_size >= 1


@pytest.mark.parametrize(("mesh", "hosts", "told"), [
    (Mesh(0, data_size=2), "aa", "2 copies of the model, one a rank; ranks 0-1 on a"),
    (Mesh(0, data_size=3, shard_size=3), "aab",
     "1 copy of the model x 3 shards; ranks 0-1 on a: shards 0-1; rank 2 on b: shard 2"),
    (Mesh(3, data_size=4, shard_size=2, machine_size=2), "aabb",
     "2 copies of the model x 2 shards, 2 machines of 2 ranks; ranks 0-1 on a: shards 0-1 of copy 0; "
     "ranks 2-3 on b: shards 0-1 of copy 1"),
    (Mesh(0, data_size=64, machine_size=8), [f"h{rank // 8}" for rank in range(64)],
     "64 copies of the model, one a rank, 8 machines of 8 ranks; ranks 0-7 on h0; ranks 8-15 on h1; ranks 16-23 on h2; "
     "ranks 24-31 on h3; ...; ranks 56-63 on h7"),
    (Mesh(0, pipe_size=2, data_size=2, tensor_size=2, machine_size=4), "aaaabbbb",
     "2 pipe ranks x 2 data ranks x 2 tensor ranks, 2 machines of 4 ranks; ranks 0-3 on a: pipe rank 0; "
     "ranks 4-7 on b: pipe rank 1"
     ),
    (Mesh(0, data_size=2, context_size=2, shard_size=2), "aaaa",
     "2 data ranks x 2 context ranks, which hold the model as 1 copy x 2 shards; ranks 0-3 on a"),
    (Mesh(0, data_size=4, expert_size=2), "aaaa",
     "4 data ranks, of which each 2 share the experts; ranks 0-3 on a"),
])  # fmt: skip
def test_the_start_says_who_is_where(mesh: Mesh, hosts: str | list[str], told: str):
    assert places(mesh, hosts) == told
