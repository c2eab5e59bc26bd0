"""Whole runs on meshes: the trajectory of one process, and the same bits after a resume in the same mesh.

Eight processes are spawned once and work through many runs, each on the first ones of them. Of the grid, the normal
suite makes a few pairs.
"""

from pathlib import Path

import pytest
import torch

from checkpoint.named import Piece, load_named_state
from model import hf
from tests.conftest import TINY_MODEL
from tests.dist.test_experts_runs import BIASED, MIXTRAL
from tests.dist.test_fsdp_runs import Home, home
from tests.dist.test_parallel_runs import GATHER, POWERSGD, ZERO1, Plan, checkpoint
from tests.runs import final_state, losses, records, relative_difference, same_bits

__all__ = ["home"]
pytestmark = pytest.mark.slow

STEPS, LONG = 5, 20
TENSOR, SEQUENCE = "--tensor_model_parallel_size=2", "--sequence_parallel"
PIPE, CONTEXT, EXPERT = (f"--{name}_parallel_size=2" for name in ("pipeline_model", "context", "expert_model"))
FSDP = "--data_parallel=fsdp"
CHECKPOINTING, RING = "--gradient_checkpointing", "--context_parallel_method=ring"
SMALL = ["--train_batch_size=2", "--gradient_accumulation_steps=4"]
"""A global batch of eight rows, as that of one process."""
VIRTUAL = "--num_layers_per_virtual_pipeline_stage=1"
LORA = ["--lora_r=4", "--lora_target_modules=all-linear"]
LLAMA = [flag for flag in TINY_MODEL if "layers" not in flag] + ["--num_hidden_layers=4"]

KINDS: dict[str, tuple[str, list[str]]] = {
    "plain": ("pretrain", LLAMA),
    "untied": ("pretrain", [*LLAMA, "--no-tie_word_embeddings"]),
    "muon": ("pretrain", [*LLAMA, "--optimizer=muon"]),
    "mixtral": ("pretrain", [*TINY_MODEL, *MIXTRAL, "--no-tie_word_embeddings"]),
    "biased": ("pretrain", [*TINY_MODEL, *BIASED, "--no-tie_word_embeddings", "--attention_dropout=0"]),
    "bf16": ("pretrain", [*LLAMA, "--dtype=bfloat16"]),
    "sft packed": ("sft", []),
    "sft unpacked": ("sft", ["--no-packing"]),
    "dpo sigmoid": ("dpo", []),
    "dpo kto_pair": ("dpo", ["--dpo_loss_type=kto_pair", "--dpo_beta=0.5"]),
    "lora": ("sft", [*LORA, "--lora_modules_to_save=norm"]),
    "lora dpo": ("dpo", LORA),
}
"""What is trained: name -> task and flags. Each is first run by one process."""

WAYS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, [TENSOR]),
    "tp2 sp": (2, [TENSOR, SEQUENCE]),
    "tp2 sp checkpointed": (2, [TENSOR, SEQUENCE, CHECKPOINTING]),
    "gpipe": (2, [PIPE, "--pipeline_schedule=gpipe"]),
    "1f1b": (2, [PIPE]),
    "interleaved": (2, [PIPE, "--pipeline_schedule=interleaved", VIRTUAL]),
    "zero_bubble": (2, [PIPE, "--pipeline_schedule=zero_bubble", VIRTUAL]),
    "zbv": (2, [PIPE, "--pipeline_schedule=zbv", VIRTUAL]),
    "pp2 auto": (2, [PIPE, "--pipeline_micro_batches=8"]),
    "cp2": (2, [CONTEXT]),
    "ring2": (2, [CONTEXT, RING]),
    "cp4": (4, ["--context_parallel_size=4", CHECKPOINTING]),
    "ep2": (2, [EXPERT]),
    "pp4 parts": (4, ["--pipeline_model_parallel_size=4", "--pipeline_parts=2,1,2,1"]),
    "dp2 tp2": (4, [TENSOR, SEQUENCE, ZERO1, GATHER]),
    "fsdp2 tp2": (4, [TENSOR, FSDP]),
    "fsdp2 tp2 sp": (4, [TENSOR, SEQUENCE, FSDP]),
    "dp2 pp2": (4, [PIPE]),
    "dp2 pp2 zero1": (4, [PIPE, ZERO1]),
    "dp2 cp2": (4, [CONTEXT]),
    "tp2 pp2": (4, [TENSOR, PIPE]),
    "tp2 sp pp2": (4, [TENSOR, SEQUENCE, PIPE]),
    "tp2 sp cp2": (4, [TENSOR, SEQUENCE, CONTEXT]),
    "ep2 tp2": (4, [EXPERT, TENSOR]),
    "ep2 pp2": (4, [EXPERT, PIPE]),
    "dp4 ep2": (4, [EXPERT, ZERO1]),
    "dp2 tp2 pp2": (8, [TENSOR, PIPE, ZERO1]),
    "dp2 tp2 cp2": (8, [TENSOR, CONTEXT]),
    "ep2 tp2 pp2": (8, [EXPERT, TENSOR, PIPE]),
}
"""How ranks share the work: name -> number of ranks and flags."""

PAIRS = {
    "plain": ("dp2 tp2", "dp2 pp2 zero1", "tp2 sp pp2", "fsdp2 tp2 sp", "dp2 cp2"),
    "biased": ("ep2 pp2", "tp2 sp checkpointed"),
    "sft packed": ("cp4",),
    "sft unpacked": ("dp2 tp2 pp2",),
    "lora dpo": ("tp2 pp2",),
}
"""Pairs of the normal suite."""
RESUMED = (("plain", "tp2 sp pp2"), ("plain", "dp2 tp2"), ("lora dpo", "tp2 pp2"))


COUNTED = ("balance_loss", "z_loss", "load_highest")


def can_be(kind: str, way: str) -> bool:
    """What is refused is no pair."""
    flags, has_experts = WAYS[way][1], kind in ("mixtral", "biased")
    has_four_layers = KINDS[kind][1][: len(LLAMA)] == LLAMA
    if EXPERT in flags and not has_experts or RING in flags and kind != "sft unpacked":
        return False
    if kind == "muon" and TENSOR in flags:
        return False
    return has_four_layers or not (VIRTUAL in flags or "parts" in way)


def add_runs(plan: Plan, home: Home, pairs: dict, steps: int) -> None:
    for kind, ways in pairs.items():
        plan.flags = home.flags_of(*KINDS[kind], steps)
        plan.add(kind, 1, [], "first")
        for way in ways:
            ranks, flags = WAYS[way]
            plan.add(f"{kind} | {way}", ranks, [*SMALL, *flags], "first")


@pytest.fixture(scope="module")
def runs(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs "kind" of one process and "kind | way", runs that go on from their first step, and PowerSGD."""
    plan = Plan([], tmp_path_factory.mktemp("runs"), ranks=8)
    add_runs(plan, home, PAIRS, STEPS)
    for kind, way in RESUMED:
        plan.flags, (ranks, flags) = home.flags_of(*KINDS[kind], STEPS), WAYS[way]
        plan.resume(f"{kind} | {way} resumed", plan.jobs[f"{kind} | {way}"]["flags"], ranks, [*SMALL, *flags], keep=1)
    plan.flags = home.flags_of(*KINDS["plain"], STEPS)
    plan.add("powersgd", 2, [*SMALL, *POWERSGD])
    flags = plan.add("powersgd pp2", 4, [*SMALL, *POWERSGD, PIPE], "first")
    plan.resume("powersgd pp2 resumed", flags, 4, [*SMALL, *POWERSGD, PIPE], keep=1)
    plan.run()
    return plan


def gradients(run: list[str], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Gradients of the first step, up to a factor: the first moments after it."""
    found = {name: torch.zeros(shape) for name, shape in shapes.items()}
    wanted = [(Piece.whole(name, tensor.shape), {"exp_avg": tensor}) for name, tensor in found.items()]
    load_named_state([checkpoint(run, 1)], wanted)
    return {f"model.{name}": tensor for name, tensor in found.items()}


def shapes_of(run: list[str]) -> dict[str, torch.Size]:
    """Name -> shape of each trained parameter of a model without an adapter."""
    model = hf.outline(hf.read_config(checkpoint(run, 1)))
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    """Weights, or those of an adapter."""
    files = {name: t for name, t in final_state(flags, step).items() if "@" not in name and "/" not in name}
    return {f"model.{name}": tensor for name, tensor in files.items()}


def check_trajectory(run: list[str], expected: list[str], name: str, steps: int) -> None:
    """In float32, gradients of the first step: 1e-6 (relative norm of the difference); losses and weights: 1e-5. In 16
    bits micro-batches round apart, and so do parts of a sum."""
    kind = name.partition(" | ")[0]
    is_exact = kind != "bf16"
    of_losses, of_weights = (1e-5, 1e-5) if is_exact else (2e-3, 1e-1)
    train, theirs = records(run, "train"), records(expected, "train")
    assert len(train) == len(theirs) == steps
    for figure in ("digest", "samples", "tokens", "lr"):
        assert [r[figure] for r in train] == [r[figure] for r in theirs], figure
    if is_exact:
        assert train[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-6)
    if is_exact and kind not in ("lora", "lora dpo", "muon"):
        shapes = shapes_of(expected)
        assert relative_difference(gradients(run, shapes), gradients(expected, shapes)) < 1e-6
    # This loss is a mean of numbers 1 - sigmoid(...) that goes towards 0: its rounding is that of 1.
    rounding = 5e-7 if kind == "dpo kto_pair" else 0.0
    assert losses(run) == pytest.approx(losses(expected), rel=of_losses, abs=rounding)
    # What the routers have counted is counted once.
    for ours, wanted in zip(records(run, "experts"), records(expected, "experts"), strict=True):
        assert all(ours[key] == pytest.approx(wanted[key], rel=1e-5) for key in COUNTED), (ours, wanted)
    last, its = records(run, "valid")[-1], records(expected, "valid")[-1]
    assert last["loss"] == pytest.approx(its["loss"], rel=of_losses)
    ours, wanted = weights(run, steps), weights(expected, steps)
    assert ours.keys() == wanted.keys() and ours
    assert relative_difference(ours, wanted) < of_weights


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, ways in PAIRS.items() for way in ways])
def test_one_trajectory(runs: Plan, kind: str, way: str):
    check_trajectory(runs[f"{kind} | {way}"], runs[kind], f"{kind} | {way}", STEPS)


@pytest.mark.parametrize("name", [*(f"{kind} | {way}" for kind, way in RESUMED), "powersgd pp2"])
def test_a_run_goes_on_in_its_mesh_with_the_same_bits(runs: Plan, name: str):
    run, whole = runs[f"{name} resumed"], runs[name]
    assert losses(run) == losses(whole) and same_bits(final_state(run, STEPS), final_state(whole, STEPS))


def test_powersgd_does_not_see_the_stages(runs: Plan):
    """The residuals are those of two data ranks without a pipeline."""
    run, flat = runs["powersgd pp2"], runs["powersgd"]
    assert losses(run) == pytest.approx(losses(flat), rel=1e-5)
    assert relative_difference(weights(run, STEPS), weights(flat, STEPS)) < 1e-4


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_grid(home: Home, tmp_path: Path, kind: str):
    plan = Plan([], tmp_path, ranks=8)
    add_runs(plan, home, {kind: [way for way in WAYS if can_be(kind, way)]}, LONG)
    plan.run()
    for name in list(plan.jobs)[1:]:
        check_trajectory(plan[name], plan[kind], name, LONG)
