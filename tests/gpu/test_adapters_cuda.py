"""Adapters, 4-bit weights and lean optimizers on a GPU: as on a CPU, and resumed to the bit."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import train_my_ddp
from tests.chaos.data import make_base
from tests.chaos.run import BASE
from tests.runs import elsewhere, final_state, losses, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LORA = ["--lora_r=8", "--lora_target_modules=all-linear", "--lora_dropout=0.1"]
MODES = {
    "lora": [],
    "dora": ["--use_dora"],
    "compiled": ["--compile"],
    "recomputed": ["--gradient_checkpointing", "--checkpoint_keeps=matmuls"],
    "4 bits": ["--load_in_4bit"],
    "8 bits": ["--optimizer=adamw8bit"],
    "lion": ["--optimizer=lion8bit", "--learning_rate=1e-3"],
    "offloaded": ["--offload_optimizer"],
}


@pytest.fixture
def base(data_dir: Path) -> list[str]:
    """Flag of the weights below the adapter."""
    if not (data_dir / BASE).exists():
        make_base(data_dir)
    return [f"--init_from={data_dir / BASE}"]


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_a_cpu(mode: str, base: list[str], tiny_run: list[str], tmp_path: Path):
    if mode == "4 bits" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    on_gpu, on_cpu = ([*elsewhere(tiny_run, tmp_path / device), *base, *LORA, *MODES[mode], f"--device={device}"]
                      for device in ("cuda", "cpu"))  # fmt: skip
    assert train_my_ddp.main(on_gpu) == 0 and train_my_ddp.main(on_cpu) == 0
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=2e-3)


@pytest.mark.parametrize("mode", ["lora", "4 bits", "8 bits", "offloaded"])
def test_a_killed_run_goes_on_with_the_same_bits(mode: str, base: list[str], tiny_run: list[str], tmp_path: Path):
    if mode == "4 bits" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    flags = [*tiny_run, *base, *LORA, *MODES[mode], "--device=cuda", "--deterministic"]
    whole, parts = elsewhere(flags, tmp_path / "whole"), elsewhere(flags, tmp_path / "parts")
    assert train_my_ddp.main(whole) == 0
    assert train_my_ddp.main([*parts, "--save_interval=2"]) == 0
    os.rename(tmp_path / "parts" / "ckpt" / "step-4", tmp_path / "gone")
    assert train_my_ddp.main([*parts, "--resume"]) == 0
    assert losses(parts) == losses(whole) and same_bits(final_state(parts, 4), final_state(whole, 4))
