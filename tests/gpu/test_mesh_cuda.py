"""Every dimension of the mesh on several NCCL ranks: the losses of one GPU.

`pytest -m gpu tests/gpu/test_mesh_cuda.py`; benchmarks/gpu_mesh.py runs these tests and measures.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.test_fsdp_cuda import CLOSE, four_gpus, train, train_on, two_gpus
from tests.runs import final_state, losses, out_dir, records, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TENSOR, SEQUENCE = "--tensor_model_parallel_size=2", "--sequence_parallel"
PIPE, CONTEXT, EXPERT = (
    "--pipeline_model_parallel_size=2", "--context_parallel_size=2", "--expert_model_parallel_size=2"
)  # fmt: skip
EXPERTS = [
    "--model_type=qwen3_moe", "--num_local_experts=4", "--moe_intermediate_size=32", "--router_aux_loss_coef=0.01"
]  # fmt: skip
ON_TWO = {
    "tp2": [TENSOR], "tp2 sp": [TENSOR, SEQUENCE], "pp2": [PIPE], "pp2 gpipe": [PIPE, "--pipeline_schedule=gpipe"],
    "cp2": [CONTEXT],
}  # fmt: skip
ON_FOUR = {
    "dp2 tp2": [TENSOR], "dp2 pp2": [PIPE], "dp2 cp2": [CONTEXT], "tp2 pp2": [TENSOR, PIPE],
    "tp2 cp2": [TENSOR, SEQUENCE, CONTEXT], "fsdp2 tp2": [TENSOR, "--data_parallel=fsdp"],
    "pp2 powersgd": [PIPE, "--use_powerSGD_hook", "--matrix_approximation_rank=64", "--min_compression_rate=0"],
}  # fmt: skip


@pytest.fixture
def on_gpu(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "--device=cuda", "--deterministic", "--gradient_accumulation_steps=4"]


def check(cases: dict[str, list[str]], expected: list[str], dtype: str) -> None:
    for name, case in cases.items():
        tolerance = 1e-3 if "powersgd" in name else CLOSE[dtype]
        assert losses(case) == pytest.approx(losses(expected), rel=tolerance), name
        assert [r["digest"] for r in records(case, "train")] == [r["digest"] for r in records(expected, "train")]


@two_gpus
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_two_ranks_train_as_one(dtype: str, on_gpu: list[str], tmp_path: Path):
    flags = [*on_gpu, f"--dtype={dtype}"]
    expected = train(flags, tmp_path / "one")
    check(train_on(2, flags, ON_TWO, tmp_path), expected, dtype)


@two_gpus
def test_two_ranks_share_experts_as_one_has_them(on_gpu: list[str], tmp_path: Path):
    flags = [*on_gpu, "--dtype=float32", *EXPERTS]
    expected = train(flags, tmp_path / "one")
    check(train_on(2, flags, {"ep2": [EXPERT], "cp2": [CONTEXT], "tp2": [TENSOR]}, tmp_path), expected, "float32")


@four_gpus
def test_four_ranks_train_as_one(on_gpu: list[str], tmp_path: Path):
    flags = [*on_gpu, "--dtype=float32"]
    expected = train(flags, tmp_path / "one")
    check(train_on(4, flags, ON_FOUR, tmp_path), expected, "float32")


@two_gpus
def test_a_killed_run_goes_on_with_the_same_bits(on_gpu: list[str], tmp_path: Path):
    flags = [*on_gpu, "--dtype=bfloat16", "--save_interval=2"]
    whole = train_on(2, flags, ON_TWO, tmp_path / "whole")
    parts = train_on(2, flags, ON_TWO, tmp_path / "parts")
    for name, case in parts.items():
        os.rename(out_dir(case) / "ckpt" / "step-4", tmp_path / f"gone {name}")
    train_on(2, flags, {name: [*mode, "--resume"] for name, mode in ON_TWO.items()}, tmp_path / "parts")
    for name, case in parts.items():
        assert losses(case) == losses(whole[name]), name
        assert same_bits(final_state(case, 4), final_state(whole[name], 4)), name
