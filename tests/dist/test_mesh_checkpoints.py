"""Weights that are cut over a mesh, made whole again; checkpoints of every mesh, read by every other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoint.folder import find_problem, read_trainer_state
from checkpoint.named import LazyTensors, Piece
from dataset import audit
from parallel.context import DistContext, destroy_context, init_context
from parallel.division import Division, Outline
from parallel.groups import Groups
from parallel.mesh import Mesh
from parallel.whole import outlines_of, plan_transfers, whole_weights
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks
from tests.dist.test_parallel_runs import POWERSGD, Plan
from tests.runs import elsewhere, final_state, losses, out_dir, records, relative_difference, same_bits

OUTLINES = {
    "embed_tokens.weight": Outline((16, 6), "vocabulary"),
    "layers.0.norm.weight": Outline((6,)),
    "layers.0.q_proj.weight": Outline((8, 6), "column"),
    "layers.0.o_proj.weight": Outline((6, 8), "row"),
    "layers.0.o_proj.bias": Outline((6,), "first"),
    "layers.1.experts.gate_up_proj": Outline((4, 8, 6), "column", joined=2, is_stack=True),
    "layers.1.experts.down_proj": Outline((4, 6, 4), "row", is_stack=True),
    "layers.1.router.selection_bias": Outline((4,), is_float32=True),
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
        name: replace(its, is_sharded=is_sharded and not its.is_float32) for name, its in OUTLINES.items()
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
    arrived = [(name, its.clone()) for name, its in whole_weights(own, mine, division, groups, torch.bfloat16)]
    assert [name for name, _ in arrived] == [name for name in OUTLINES if name in mine]
    whole = {name: its if OUTLINES[name].is_float32 else its.bfloat16() for name, its in whole.items()}
    assert {name: (its.shape, its.dtype) for name, its in outlines_of(division, torch.bfloat16).items()} == {
        name: (values.shape, values.dtype) for name, values in whole.items()
    }
    return [name for name, its in arrived if its.dtype != whole[name].dtype or not torch.equal(its, whole[name])]


def test_each_rank_gets_the_whole_parameters_that_it_wants():
    for found in run_ranks(8, work, MESHES):
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


T, P, E, C = (f"--{name}_parallel_size=" for name in ("tensor_model", "pipeline_model", "expert_model", "context"))
EXPERTS = ["--num_local_experts=4", "--num_experts_per_tok=2", "--model_type=mixtral", "--no-tie_word_embeddings"]
WAYS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "tp2": (2, [f"{T}2", "--sequence_parallel"]),
    "pp2": (2, [f"{P}2"]),
    "dp2": (2, ["--use_distributed_optimizer"]),
    "fsdp2": (2, ["--data_parallel=fsdp"]),
    "cp2": (2, [f"{C}2"]),
    "ep2": (2, [f"{E}2"]),
    "tp2 x pp2": (4, [f"{T}2", f"{P}2"]),
    "dp2 x tp2": (4, [f"{T}2", "--use_distributed_optimizer"]),
    "fsdp2 x tp2": (4, [f"{T}2", "--data_parallel=fsdp"]),
    "ep2 x tp2": (4, [f"{E}2", f"{T}2"]),
    "dp2 x pp2": (4, [f"{P}2"]),
    "powersgd": (4, [*POWERSGD, "--min_compression_rate=0"]),
    "powersgd x pp2": (4, [f"{P}2", *POWERSGD, "--min_compression_rate=0"]),
}
"""Name of a mesh -> number of ranks and flags."""
OFF = [f"{T}1", f"{P}1", f"{E}1", f"{C}1", "--data_parallel=auto", "--no-use_distributed_optimizer",
       "--no-sequence_parallel", "--no-use_powerSGD_hook"]  # fmt: skip
"""Flags that a resumed run would otherwise have from the mesh before."""
CHAINS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "dense": ([], ("1", "tp2", "pp2", "dp2", "fsdp2", "tp2 x pp2", "1")),
    "experts": (EXPERTS, ("1", "ep2", "tp2", "pp2", "ep2 x tp2", "1")),
}
"""What is trained: flags, and the meshes that go on from one another, two steps each."""
GRID: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "dense": ([], ("1", "tp2", "pp2", "dp2", "fsdp2", "cp2", "tp2 x pp2", "dp2 x tp2", "fsdp2 x tp2", "dp2 x pp2")),
    "experts": (EXPERTS, ("1", "tp2", "pp2", "dp2", "fsdp2", "ep2", "ep2 x tp2")),
}
"""The same, of which each mesh goes on from each."""


class Links(Plan):
    """Runs of which each goes on where one before has ended."""

    def link(self, name: str, more: list[str], way: str, steps: int, source: str = "", keep: int = 2) -> None:
        """Train up to a step.

        Args:
            source: run of which a copy is continued, from step `keep`; by default the run itself, if there is one.
        """
        ranks, mode = WAYS[way]
        given = {flag.partition("=")[0] for flag in mode}
        off = [flag for flag in OFF if flag.partition("=")[0].replace("--no-", "--") not in given]
        flags = [*elsewhere(self.flags, self.home / name), *more, *mode, *off, f"--max_iters={steps}", "--resume"]
        self.jobs[f"{name} {steps}"] = {"ranks": ranks, "flags": flags, "patch": None}
        if source:
            self.jobs[f"{name} {steps}"] |= {"copy": str(self.home / source), "keep": keep}


def flags_of(data_dir: Path) -> list[str]:
    return [
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--device=cpu", "--train_batch_size=2",
        "--gradient_accumulation_steps=4", "--valid_iters=2", "--valid_interval=100", "--save_interval=2",
        "--keep_last=9", "--learning_rate=1e-2", "--lr_schedule=constant", "--warmup_ratio=0", "--num_threads=1",
        "--sample_texts=0", "--dist_timeout=60", "--dtype=float32", "--vocab_size=530", *TINY_MODEL,
    ]  # fmt: skip


def make_chains(plan: Links, chains: dict[str, tuple[list[str], tuple[str, ...]]]) -> None:
    for name, (more, ways) in chains.items():
        for number, way in enumerate(ways, 1):
            plan.link(name, more, way, 2 * number)
        plan.link(f"{name} alone", more, "1", 2 * len(ways))


@pytest.fixture(scope="module")
def plan(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Links:
    plan = Links(flags_of(data_dir), tmp_path_factory.mktemp("meshes"), ranks=4)
    make_chains(plan, CHAINS)
    plan.link("powersgd x pp2", [], "powersgd x pp2", 4)
    plan.link("memory", [], "powersgd", 4, source="powersgd x pp2")
    plan.run()
    return plan


def check_chain(plan: Links, name: str) -> None:
    """The same samples and, within rounding, the run of one process; each checkpoint is a folder for other programs."""
    ways = CHAINS[name][1]
    last = 2 * len(ways)
    for number in range(1, len(ways) + 1):
        assert plan[f"{name} {2 * number}"]
    run, alone = plan[f"{name} {last}"], plan[f"{name} alone {last}"]
    assert [r["digest"] for r in records(run, "train")] == [r["digest"] for r in records(alone, "train")]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert relative_difference(final_state(run, last), final_state(alone, last)) < 1e-3
    assert audit.main([str(out_dir(run))]) == 0
    for number, way in enumerate(ways, 1):
        path = out_dir(run) / "ckpt" / f"step-{2 * number}"
        assert find_problem(path) is None
        sizes = read_trainer_state(path)["mesh"]
        ranks = sizes["pipe"] * sizes["data"] * sizes["context"] * sizes["tensor"]
        assert ranks == WAYS[way][0], sizes
        keys = [key for file in path.glob("optim-*.safetensors") for key in LazyTensors(file)]
        assert len(set(keys)) == len(keys) > 0, "each piece is written once"
        model = AutoModelForCausalLM.from_pretrained(path)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_every_mesh_goes_on_from_every_other(plan: Links, name: str):
    check_chain(plan, name)


@pytest.mark.slow
def test_memory_of_a_hook_finds_its_parameters_in_another_mesh(plan: Links):
    """Of each parameter, the residuals' sum over the ranks stays."""
    source, run = plan["powersgd x pp2 4"], plan["memory 4"]
    before, after = (losses(flags) for flags in (source, run))
    assert before[:2] == after[:2] and after == pytest.approx(before, rel=1e-3)
    log = (out_dir(run) / "train.log").read_text()
    assert "dropped" not in log and "lost" not in log


@pytest.mark.soak
@pytest.mark.parametrize("name", GRID)
def test_each_pair_of_meshes(name: str, data_dir: Path, tmp_path: Path):
    """Also with itself: to the same bits."""
    more, ways = GRID[name]
    plan = Links(flags_of(data_dir), tmp_path, ranks=4)
    for way in ways:
        plan.link(way, more, way, 4)
    for first in ways:
        for second in ways:
            plan.link(f"{first} | {second}", more, second, 4, source=first)
    plan.run()
    alone = plan["1 4"]
    for first in ways:
        for second in ways:
            run = plan[f"{first} | {second} 4"]
            assert losses(run) == pytest.approx(losses(alone), rel=1e-5), (first, second)
            assert relative_difference(final_state(run, 4), final_state(alone, 4)) < 1e-4, (first, second)
            assert audit.main([str(out_dir(run))]) == 0
        assert losses(plan[f"{first} | {first} 4"]) == losses(plan[f"{first} 4"])
        assert same_bits(final_state(plan[f"{first} | {first} 4"], 4), final_state(plan[f"{first} 4"], 4)), first
