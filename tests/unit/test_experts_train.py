"""Runs of models with experts: figures in the log, the batch's form of the balance loss, refusals."""

from pathlib import Path

import pytest

import train_my_ddp
from tests.runs import elsewhere, losses, out_dir, records

EXPERTS = ["--model_type=mixtral", "--num_local_experts=4", "--no-tie_word_embeddings", "--max_iters=2"]
ALONE = ["--gradient_accumulation_steps=1", "--train_batch_size=4"]


def train(flags: list[str], *more: str) -> int:
    return train_my_ddp.main([*flags, *more])


def test_figures_of_the_experts_are_logged(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run, *EXPERTS, "--log_interval=2") == 0
    (record,) = records(tiny_run, "experts")
    assert record["step"] == 2 and 0.9 < record["balance_loss"] < 2.0 and 0 <= record["load_lowest"] <= 1
    assert len(record["load_by_layer"]) == len(record["entropy_by_layer"]) == 2
    assert all(len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-3) for shares in record["load_by_layer"])
    assert f"| balance {record['balance_loss']:.3f} |" in capsys.readouterr().out


def test_a_dense_model_has_no_such_figures(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run, "--max_iters=1") == 0
    assert not records(tiny_run, "experts") and "balance" not in capsys.readouterr().out


def test_the_losses_of_routers_take_part_but_are_not_the_loss(tiny_run: list[str], tmp_path: Path):
    """The first step's loss is the task's alone; the second one's weights were moved by all losses."""
    found = []
    for coefficient in (0.0, 1.0):
        flags = elsewhere(tiny_run, tmp_path / str(coefficient))
        assert train(flags, *EXPERTS, f"--router_aux_loss_coef={coefficient}") == 0
        found.append(losses(flags))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_a_batch_is_balanced_in_one_micro_batch_alone(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert train(tiny_run, *EXPERTS, *ALONE, "--router_aux_loss=batch", "--router_aux_loss_coef=0.5") == 0
    assert all(record["balance_loss"] >= 0.9 for record in records(tiny_run, "experts"))
    assert train(elsewhere(tiny_run, tmp_path / "two"), *EXPERTS, "--router_aux_loss=batch") == 2
    assert "balances the load within a micro-batch, and a step has 2 of them" in capsys.readouterr().out


def test_a_bias_needs_experts_and_a_family_that_has_it(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    bias = "--router_bias_update_rate=0.01"
    assert train(tiny_run, bias) == 2
    assert "router_bias_update_rate has no meaning without experts" in capsys.readouterr().out
    assert train(tiny_run, "--max_iters=1") == 0
    assert train(elsewhere(tiny_run, tmp_path / "from dense"), f"--init_from={out_dir(tiny_run)}", bias) == 2
    assert "router_bias_update_rate has no meaning without experts" in capsys.readouterr().out
    assert train(elsewhere(tiny_run, tmp_path / "mixtral"), *EXPERTS, bias) == 2
    assert "router_bias" in capsys.readouterr().out
