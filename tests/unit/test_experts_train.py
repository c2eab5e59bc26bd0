"""Runs of models with experts: figures in the log, the batch's form of the balance loss, refusals."""

import pytest

import train_my_ddp
from tests.runs import losses, records

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


def test_the_losses_of_routers_take_part_but_are_not_the_loss(tiny_run: list[str]):
    """The first step's loss is the task's alone; the second one's weights were moved by all losses."""
    found = []
    for coefficient in (0.0, 1.0):
        flags = [*tiny_run, *EXPERTS, f"--out_dir={tiny_run[1].partition('=')[2]}-{coefficient}",
                 f"--router_aux_loss_coef={coefficient}"]  # fmt: skip
        assert train(flags) == 0
        found.append(losses([flags[-2]]))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_the_batch_is_balanced_as_one_micro_batch_alone(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run, *EXPERTS, *ALONE, "--router_aux_loss=batch", "--router_aux_loss_coef=0.5") == 0
    assert all(record["balance_loss"] >= 0.9 for record in records(tiny_run, "experts"))
    for rate in ("--router_aux_loss=batch", "--router_aux_loss=row"):
        code = train([*tiny_run, f"--out_dir={tiny_run[1].partition('=')[2]}-more"], *EXPERTS, rate)
        assert code == (2 if rate.endswith("batch") else 0)
    out = capsys.readouterr().out
    assert "--router_aux_loss=batch balances the load within a micro-batch, and a step has 2 of them" in out


def test_a_bias_needs_experts_and_a_family_that_has_it(tiny_run: list[str], capsys: pytest.CaptureFixture):
    bias = "--router_bias_update_rate=0.01"
    assert train(tiny_run, bias) == 2
    assert "router_bias_update_rate has no meaning without experts" in capsys.readouterr().out
    assert train(tiny_run, "--max_iters=1") == 0
    again = [*tiny_run, f"--init_from={tiny_run[1].partition('=')[2]}", f"--out_dir={tiny_run[1].partition('=')[2]}-b"]
    assert train(again, bias) == 2
    assert "router_bias_update_rate has no meaning without experts" in capsys.readouterr().out
    assert train(tiny_run, *EXPERTS, bias, f"--out_dir={tiny_run[1].partition('=')[2]}-c") == 2
    assert "router_bias" in capsys.readouterr().out
