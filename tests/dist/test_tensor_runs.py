"""Whole runs on ranks that share each matrix: the trajectory of one process, the same bits after a resume, the same
text.

Four processes are spawned once and work through all runs.
"""

from pathlib import Path

import pytest

from tests.dist.test_experts_runs import BIASED, MIXTRAL
from tests.dist.test_fsdp_runs import CHECKPOINTING, KINDS, Home, apart, steps_of
from tests.dist.test_parallel_runs import GATHER, POWERSGD, ZERO1, Plan
from tests.runs import final_state, losses, records, same_bits

TENSOR, SEQUENCE = "--tensor_model_parallel_size=2", "--sequence_parallel"
LORA = ["--lora_r=4", "--lora_target_modules=all-linear", "--lora_modules_to_save=norm"]
OWN_KINDS = {
    "mixtral": ("pretrain", [*MIXTRAL, "--no-tie_word_embeddings"]),
    "biased": ("pretrain", [*BIASED, "--no-tie_word_embeddings", "--num_key_value_heads=2", "--attention_dropout=0"]),
    "whole lora": ("sft", LORA),
    "unpacked": ("sft", ["--no-packing"]),
    "undropped dpo": ("dpo", LORA),
}
WAYS = {
    "tp": (2, [TENSOR]),
    "sp": (2, [TENSOR, SEQUENCE]),
    "sp checkpointed": (2, [TENSOR, SEQUENCE, CHECKPOINTING]),
    "dp tp": (4, [TENSOR]),
    "pp sp": (4, [TENSOR, SEQUENCE, "--pipeline_model_parallel_size=2"]),
    "cp sp": (4, [TENSOR, SEQUENCE, "--context_parallel_size=2"]),
    "dp sp": (4, [TENSOR, SEQUENCE]),
    "zero1 sp": (4, [TENSOR, SEQUENCE, ZERO1, GATHER]),
    "fsdp sp": (4, [TENSOR, SEQUENCE, "--data_parallel=fsdp"]),
}
"""Name -> number of ranks and flags."""
DIAGONAL = {
    "plain": ("tp", "zero1 sp", "pp sp", "cp sp"),
    "mixtral": ("dp sp",),
    "biased": ("sp checkpointed",),
    "whole lora": ("dp sp",),
    "undropped dpo": ("dp sp",),
    "dpo kto_pair": ("dp tp",),
    "bf16": ("sp",),
}
"""Pairs of the normal suite."""
TOLERANCES = {"bf16": (1e-3, 2e-2)}
"""Kind -> largest relative difference of losses, and relative norm of the difference of weights; otherwise 1e-5."""


class TensorHome(Home):
    def flags(self, kind: str) -> list[str]:
        KINDS.update(OWN_KINDS)
        return super().flags(kind)


@pytest.fixture(scope="module")
def home(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TensorHome:
    return TensorHome(tmp_path_factory.mktemp("data"), data_dir)


def planned(home: TensorHome, where: Path, pairs: dict) -> Plan:
    plan = Plan([], where)
    for kind, ways in pairs.items():
        plan.flags = home.flags(kind)
        plan.add(kind, 1, [])
        for way in ways:
            plan.add(f"{kind} | {way}", *WAYS[way], "first")
    return plan


@pytest.fixture(scope="module")
def runs(home: TensorHome, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = planned(home, tmp_path_factory.mktemp("runs"), DIAGONAL)
    plan.flags = home.flags("plain")
    ranks, flags = WAYS["zero1 sp"]
    plan.resume("resumed", plan.jobs["plain | zero1 sp"]["flags"], ranks, flags, keep=1)
    plan.run()
    return plan


def check(runs: Plan, kind: str, way: str) -> None:
    run, expected = runs[f"{kind} | {way}"], runs[kind]
    of_losses, of_weights = TOLERANCES.get(kind, (1e-5, 1e-5))
    train, theirs = records(run, "train"), records(expected, "train")
    for figure in ("digest", "samples", "tokens", "lr"):
        assert [r[figure] for r in train] == [r[figure] for r in theirs], figure
    if kind not in TOLERANCES:
        assert train[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-6)
    assert losses(run) == pytest.approx(losses(expected), rel=of_losses)
    assert records(run, "valid")[-1]["loss"] == pytest.approx(records(expected, "valid")[-1]["loss"], rel=of_losses)
    assert apart(run, expected, steps_of(kind)) < of_weights


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, ways in DIAGONAL.items() for way in ways])
def test_one_trajectory(runs: Plan, kind: str, way: str):
    check(runs, kind, way)


def test_a_resumed_run_has_the_same_bits(runs: Plan):
    whole, resumed = runs["plain | zero1 sp"], runs["resumed"]
    assert same_bits(final_state(whole, steps_of("plain")), final_state(resumed, steps_of("plain")))


GRID = {
    kind: tuple(WAYS)
    for kind in ("plain", "mixtral", "biased", "whole lora", "unpacked", "undropped dpo", "sft packed", "dpo sigmoid")
}


@pytest.mark.soak
def test_grid(home: TensorHome, tmp_path: Path):
    plan = planned(home, tmp_path / "runs", GRID)
    plan.flags = home.flags("plain")
    plan.add("plain | powersgd", 4, [TENSOR, SEQUENCE, *POWERSGD])
    plan.run()
    for kind, ways in GRID.items():
        for way in ways:
            check(plan, kind, way)
    # Compressed gradients are others, but training goes on.
    assert losses(plan["plain | powersgd"])[-1] == pytest.approx(losses(plan["plain"])[-1], rel=0.1)
