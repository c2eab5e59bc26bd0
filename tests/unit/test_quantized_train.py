"""Runs whose frozen matrices are in 4 bits."""

import shutil
import sys
from pathlib import Path

import pytest

import train_my_ddp
from model import flops, quantized
from tests.peers import peer
from tests.runs import elsewhere, final_state, losses, out_dir, same_bits

peer("bitsandbytes")

QLORA = ["--lora_r=4", "--lora_target_modules=all-linear", "--load_in_4bit"]
SHAPE = ("--hidden_size", "--num_", "--tie")


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


@pytest.fixture
def qlora_run(tiny_run: list[str], tmp_path: Path) -> list[str]:
    """Flags of a run whose base is another run."""
    base = elsewhere(tiny_run, tmp_path / "base")
    assert train_my_ddp.main([*base, "--max_iters=2"]) == 0
    return [*(flag for flag in tiny_run if not flag.startswith(SHAPE)), f"--init_from={tmp_path / 'base'}", *QLORA]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_and_goes_on_with_the_same_bits(qlora_run: list[str], tmp_path: Path, dtype: str):
    flags = [*qlora_run, f"--dtype={dtype}", "--lora_modules_to_save=embed_tokens"]
    assert train_my_ddp.main([*flags, "--max_iters=24", "--save_interval=20"]) == 0
    assert sum(losses(flags)[-5:]) < sum(losses(flags)[:5]) - 1.0
    checkpoint = out_dir(flags) / "ckpt" / "step-24"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    again = elsewhere(flags, tmp_path / "again")
    shutil.copytree(out_dir(flags), out_dir(again))
    shutil.rmtree(out_dir(again) / "ckpt" / "step-24")
    assert train_my_ddp.main([f"--out_dir={out_dir(again)}", "--resume"]) == 0
    assert losses(again)[-4:] == losses(flags)[-4:]
    assert same_bits(final_state(again, 24), final_state(flags, 24))


def test_a_missing_package_ends_the_command_before_anything_is_read(qlora_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._bitsandbytes.cache_clear()
    assert train_my_ddp.main(qlora_run) == 2
    assert "pip install -r requirements-qlora.txt" in capsys.readouterr().out
    assert not out_dir(qlora_run).joinpath("ckpt").exists()


def test_frozen_weights_need_something_that_trains(qlora_run: list[str], tmp_path: Path, capsys):
    """An adapter that is already there will do."""
    assert train_my_ddp.main(qlora_run) == 0
    others = [flag for flag in qlora_run if flag not in QLORA and not flag.startswith("--init_from")]
    flags = [*elsewhere(others, tmp_path / "on"), "--load_in_4bit"]
    assert train_my_ddp.main([*flags, f"--init_from={tmp_path / 'base'}"]) == 2
    assert "--load_in_4bit freezes the weights: give --lora_r" in capsys.readouterr().out
    capsys.readouterr()
    assert train_my_ddp.main([*flags, f"--init_from={out_dir(qlora_run)}"]) == 0
    told = "was trained with its base in 4 bits: add --load_in_4bit"
    assert told not in capsys.readouterr().out
    as_it_is = [flag for flag in elsewhere(others, tmp_path / "as it is") if flag != "--load_in_4bit"]
    assert train_my_ddp.main([*as_it_is, f"--init_from={out_dir(qlora_run)}"]) == 0
    assert told in capsys.readouterr().out
