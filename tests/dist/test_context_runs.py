"""Whole runs whose ranks share the positions of each row: the trajectory of one process.

Four processes are spawned once and work through all runs, each on the first 1, 2 or 4 of them.
"""


import pytest

from tests.dist.test_fsdp_runs import Home, check_trajectory, home, steps_of
from tests.dist.test_parallel_runs import ZERO1, Plan
from tests.runs import final_state, losses, records, same_bits

__all__ = ["home"]
CONTEXT = "--context_parallel_size=2"
RING = [CONTEXT, "--context_parallel_method=ring"]
WAYS = {
    "cp 2": (2, [CONTEXT]), "cp 4": (4, ["--context_parallel_size=4", "--gradient_checkpointing"]),
    "dp 2 x cp 2": (4, [CONTEXT, ZERO1]), "ring 2": (2, RING),
}  # fmt: skip
RUNS = {"plain": ["dp 2 x cp 2"], "sft packed": ["cp 4"], "sft unpacked": ["ring 2"], "dpo sigmoid": ["cp 2"]}


@pytest.fixture(scope="module")
def runs(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs "kind" of one process and "kind | way"."""
    plan = Plan([], tmp_path_factory.mktemp("runs"), ranks=4)
    for kind, ways in RUNS.items():
        plan.flags = home.flags(kind)
        plan.add(kind, 1, [], "first")
        for way in ways:
            ranks, flags = WAYS[way]
            plan.add(f"{kind} | {way}", ranks, flags, "first")
    plan.flags = home.flags("plain")
    plan.resume("resumed", plan.jobs["plain | dp 2 x cp 2"]["flags"], 4, WAYS["dp 2 x cp 2"][1], keep=1)
    plan.run()
    return plan


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, ways in RUNS.items() for way in ways])
def test_one_trajectory(runs: Plan, kind: str, way: str):
    """Gradients, losses, validation and weights; DPO also computes its reference in parts."""
    check_trajectory(runs[f"{kind} | {way}"], runs[kind], f"{kind} | {way}")


def test_samples_are_those_of_one_process(runs: Plan):
    """Rank 0 writes them with whole texts, while the others wait."""
    texts = [
        [record["text"] for record in records(runs[name], "sample")] for name in ("plain", "plain | dp 2 x cp 2")
    ]
    assert texts[0] == texts[1] and any(texts[0])


def test_a_resumed_run_has_the_same_bits(runs: Plan):
    run, whole = runs["resumed"], runs["plain | dp 2 x cp 2"]
    assert losses(run)[-3:] == losses(whole)[-3:]
    assert same_bits(final_state(run, steps_of("plain")), final_state(whole, steps_of("plain")))
