"""QLoRA on two ranks: the trajectory of one."""

from pathlib import Path

import pytest
import torch

import train_my_ddp
from tests.dist.group import run_ranks
from tests.dist.test_runs import run_cases
from tests.runs import elsewhere, final_state, losses, same_bits
from tests.unit.test_quantized_train import QLORA, qlora_run  # noqa: F401

pytest.importorskip("bitsandbytes")


def test_two_ranks_take_the_trajectory_of_one(qlora_run: list[str], tmp_path: Path):  # noqa: F811
    one, two, zero1 = (elsewhere(qlora_run, tmp_path / name) for name in ("one", "two", "zero1"))
    assert train_my_ddp.main(one) == 0
    checked = "--replica_check_interval=1"
    cases = [[*two, checked], [*zero1, checked, "--use_distributed_optimizer"]]
    assert run_ranks(2, run_cases, cases) == [[0, 0]] * 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-6) and losses(zero1) == losses(two)
    assert same_bits(final_state(zero1, 4), final_state(two, 4))
    ours, its = final_state(two, 4), final_state(one, 4)
    for name in its:
        if ".lora_" in name and its[name].is_floating_point() and its[name].norm():
            assert torch.linalg.vector_norm(ours[name] - its[name]) < 1e-3 * its[name].norm(), name
