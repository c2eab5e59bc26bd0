"""Runs that train an adapter: what is saved, what goes on, what is refused."""

import shutil
from pathlib import Path

import pytest

import train_my_ddp
from model import flops
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits

LORA = ["--lora_r=4", "--lora_target_modules=all-linear"]


def train(flags: list[str], *more: str) -> int:
    return train_my_ddp.main([*flags, *more])


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


def checkpoint(flags: list[str], step: int) -> Path:
    return out_dir(flags) / "ckpt" / f"step-{step}"


@pytest.fixture
def base(tiny_run: list[str], tmp_path: Path) -> Path:
    assert train(elsewhere(tiny_run, tmp_path / "base"), "--max_iters=2") == 0
    return tmp_path / "base"


@pytest.fixture
def lora_run(tiny_run: list[str], base: Path) -> list[str]:
    shape = ("--hidden_size", "--num_", "--tie")
    return [*(flag for flag in tiny_run if not flag.startswith(shape)), f"--init_from={base}"]


def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_with_the_same_bits(lora_run: list[str], tmp_path: Path):
    assert train(lora_run, *LORA, "--save_interval=2") == 0
    names = {path.name for path in checkpoint(lora_run, 4).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    again = elsewhere(lora_run, tmp_path / "again")
    shutil.copytree(out_dir(lora_run), out_dir(again))
    shutil.rmtree(checkpoint(again, 4))
    assert train(again, "--resume") == 0
    assert losses(again)[-2:] == losses(lora_run)[-2:]
    assert same_bits(final_state(again, 4), final_state(lora_run, 4))
    assert records(again, "start")[-1]["changed"] == {}
