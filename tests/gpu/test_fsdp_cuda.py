"""FSDP2 and collectives that know machines, on GPUs: one NCCL rank, two, and four that are two machines.

`pytest -m gpu tests/gpu/test_fsdp_cuda.py`; benchmarks/gpu_fsdp.py runs these tests and measures.
"""

import os
from pathlib import Path

import pytest
import torch

import train_my_ddp
from benchmarks.step_memory import Training, in_use, peak_in_use, watch_peak
from model import ModelConfig
from model.memory import TrainingPlan, estimate
from parallel import ParallelConfig, destroy_context, init_context
from tests.chaos.data import make_base
from tests.chaos.run import BASE
from tests.dist.group import run_ranks, use_new_port
from tests.runs import elsewhere, final_state, losses, records, same_bits

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, this machine has {GPUS}")
four_gpus = pytest.mark.skipif(GPUS < 4, reason=f"needs 4 GPUs, this machine has {GPUS}")

FSDP, KEPT = ["--data_parallel=fsdp"], ["--data_parallel=fsdp", "--no-reshard_after_forward"]
ON_HOST = [*FSDP, "--fsdp_cpu_offload"]
LORA = ["--lora_r=8", "--lora_target_modules=all-linear", "--lora_dropout=0.1"]
CLOSE = {"float32": 1e-5, "bfloat16": 2e-3}
"""Largest relative difference of losses between ways to train the same: the order of additions differs."""


@pytest.fixture
def on_gpu(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "--device=cuda", "--deterministic"]


@pytest.fixture
def base(data_dir: Path) -> list[str]:
    """Flags of an adapter and of the weights below it."""
    if not (data_dir / BASE).exists():
        make_base(data_dir)
    return [f"--init_from={data_dir / BASE}", *LORA]


def train(flags: list[str], directory: Path, *more: str) -> list[str]:
    """Train in this process; returns the run's flags."""
    its = [*elsewhere(flags, directory), *more]
    assert train_my_ddp.main(its) == 0
    return its


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_one_rank_trains_as_ddp_does(dtype: str, kernels: str, on_gpu: list[str], tmp_path: Path):
    """With and without gathering twice; our Triton kernels compute on weights that are gathered around them."""
    flags = [*on_gpu, f"--dtype={dtype}", f"--kernels={kernels}", "--hidden_dropout=0.1"]
    expected = losses(train(flags, tmp_path / "ddp"))
    found = [losses(train(flags, tmp_path / str(n), *mode)) for n, mode in enumerate((FSDP, KEPT))]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=CLOSE[dtype])


OTHERS = ["--compile", "--gradient_checkpointing", "--optimizer=adamw8bit", "--optimizer=muon",
          "--no-grad_reduce_in_fp32"]  # fmt: skip


@pytest.mark.parametrize("mode", OTHERS)
def test_one_rank_in_other_modes(mode: str, on_gpu: list[str], tmp_path: Path):
    flags = [*on_gpu, "--dtype=bfloat16", mode]
    expected = losses(train(flags, tmp_path / "ddp"))
    assert losses(train(flags, tmp_path / "fsdp", *FSDP)) == pytest.approx(expected, rel=5e-3)


def test_an_adapter_trains_as_under_ddp(base: list[str], on_gpu: list[str], tmp_path: Path):
    flags = [*on_gpu, "--dtype=bfloat16", *base]
    expected = losses(train(flags, tmp_path / "ddp"))
    assert losses(train(flags, tmp_path / "fsdp", *FSDP)) == pytest.approx(expected, rel=CLOSE["bfloat16"])


@pytest.mark.parametrize("mode", [FSDP, KEPT, ON_HOST, [*FSDP, "adapter"]], ids=["fsdp", "kept", "on the host", "lora"])
def test_a_killed_run_goes_on_with_the_same_bits(mode: list[str], base: list[str], on_gpu: list[str], tmp_path: Path):
    more = [flag for flag in mode if flag != "adapter"] + (base if "adapter" in mode else [])
    flags = [*on_gpu, "--dtype=bfloat16", "--hidden_dropout=0.1", *more]
    whole = train(flags, tmp_path / "whole")
    parts = train(flags, tmp_path / "parts", "--save_interval=2")
    os.rename(tmp_path / "parts" / "ckpt" / "step-4", tmp_path / "gone")
    assert train_my_ddp.main([*parts, "--resume"]) == 0
    assert losses(parts) == losses(whole) and same_bits(final_state(parts, 4), final_state(whole, 4))


def test_on_the_host_it_trains_as_on_the_device(on_gpu: list[str], tmp_path: Path):
    """The step is computed by the host there, so a bit may differ."""
    flags = [*on_gpu, "--dtype=bfloat16"]
    expected = losses(train(flags, tmp_path / "device", *FSDP))
    assert losses(train(flags, tmp_path / "host", *ON_HOST)) == pytest.approx(expected, rel=CLOSE["bfloat16"])


SHAPE = ModelConfig(
    vocab_size=8192, hidden_size=1024, num_hidden_layers=6, num_attention_heads=16, max_position_embeddings=1024
).resolve()  # fmt: skip


@pytest.mark.parametrize("reshards", [True, False])
def test_peak_memory_is_that_of_the_formula(reshards: bool):
    """Within a tenth: torch rounds sizes up, and a unit's gathered copy lies in memory a little longer."""
    context = init_context("cuda")
    plan = TrainingPlan(
        max_seq_len=1024, train_batch_size=2, data_parallel="fsdp", reshard_after_forward=reshards
    )  # fmt: skip
    bare = in_use(context.device)
    parallel = ParallelConfig(data_parallel="fsdp", reshard_after_forward=reshards)
    training = Training(SHAPE, plan, context, parallel)
    training.step()
    between = in_use(context.device) - bare
    watch_peak(context.device)
    training.step()
    peak, expected = peak_in_use(context.device) - bare, estimate(SHAPE, plan)
    training.engine.close()
    destroy_context(context)
    # Between steps there are no gradients.
    lasting = sum(expected.lasting.values()) - expected.lasting["gradients"]
    assert between == pytest.approx(lasting, rel=0.05)
    assert peak == pytest.approx(expected.peak, rel=0.1)


def test_on_the_host_the_device_holds_no_shards():
    context = init_context("cuda")
    bare = in_use(context.device)
    plan = TrainingPlan(max_seq_len=1024, data_parallel="fsdp", fsdp_cpu_offload=True)
    training = Training(SHAPE, plan, context, ParallelConfig(data_parallel="fsdp", fsdp_cpu_offload=True))
    training.step()
    state = [tensor for _, tensors in training.engine.named_state() for tensor in tensors.values()]
    shards = [parameter.to_local() for parameter in training.model.parameters()]
    assert {tensor.device.type for tensor in [*state, *shards]} == {"cpu"}
    number = sum(parameter.numel() for parameter in training.model.parameters())
    # Not a byte a parameter, of the 16 that are there without it.
    assert in_use(context.device) - bare < number
    training.engine.close()
    destroy_context(context)


def train_all(cases: list[list[str]]) -> list[int]:
    """Program of a rank."""
    codes = []
    for case in cases:
        use_new_port()
        codes.append(train_my_ddp.main(case))
    return codes


def train_on(ranks: int, flags: list[str], modes: dict[str, list[str]], home: Path) -> dict[str, list[str]]:
    """Train in every mode on so many NCCL ranks; returns each run's flags."""
    cases = {name: [*elsewhere(flags, home / name.replace(" ", "_")), *mode] for name, mode in modes.items()}
    for codes in run_ranks(ranks, train_all, list(cases.values())):
        assert codes == [0] * len(cases)
    return cases


@two_gpus
def test_two_ranks_train_as_one_process_and_resume_to_the_bit(on_gpu: list[str], base: list[str], tmp_path: Path):
    flags = [*on_gpu, "--dtype=float32"]
    expected = train(flags, tmp_path / "one")
    cases = train_on(2, flags, {"fsdp": FSDP, "kept": KEPT, "on the host": ON_HOST}, tmp_path)
    for name, case in cases.items():
        assert losses(case) == pytest.approx(losses(expected), rel=CLOSE["float32"]), name
        assert [r["digest"] for r in records(case, "train")] == [r["digest"] for r in records(expected, "train")]
    narrow = {"fsdp": FSDP, "on the host": ON_HOST, "lora": [*FSDP, *base]}
    modes = {name: [*mode, "--dtype=bfloat16", "--save_interval=2"] for name, mode in narrow.items()}
    whole = train_on(2, on_gpu, modes, tmp_path / "whole")
    parts = train_on(2, on_gpu, modes, tmp_path / "parts")
    for name, case in parts.items():
        directory = Path(next(flag.partition("=")[2] for flag in case if flag.startswith("--out_dir=")))
        os.rename(directory / "ckpt" / "step-4", tmp_path / f"gone {name}")
    train_on(2, on_gpu, {name: [*mode, "--resume"] for name, mode in modes.items()}, tmp_path / "parts")
    for name, case in parts.items():
        assert losses(case) == losses(whole[name]), name
        assert same_bits(final_state(case, 4), final_state(whole[name], 4)), name


MACHINES = {
    "ddp": [],
    "bf16 hook": ["--use_bf16_compress_hook"],
    "powersgd": ["--use_powerSGD_hook", "--matrix_approximation_rank=64", "--min_compression_rate=0"],
    "zero1": ["--use_distributed_optimizer", "--overlap_param_gather"],
    "zero1, bf16 hook": ["--use_distributed_optimizer", "--use_bf16_compress_hook"],
    "zero1, muon": ["--use_distributed_optimizer", "--optimizer=muon"],
    "hsdp": ["--data_parallel=hsdp"],
    "hsdp, muon": ["--data_parallel=hsdp", "--optimizer=muon"],
}


@four_gpus
def test_two_machines_of_two_ranks_train_as_one_process(on_gpu: list[str], tmp_path: Path):
    """Sums go in two levels: within a machine, then once between the machines."""
    flags = [*on_gpu, "--bucket_size=20000", "--gradient_accumulation_steps=4"]
    modes = {name: [*mode, "--ranks_per_machine=2"] for name, mode in MACHINES.items()}
    for name, case in train_on(4, flags, modes, tmp_path).items():
        alone = train(flags, tmp_path / f"alone {name}", *[flag for flag in MACHINES[name] if "muon" in flag])
        tolerance = 2e-2 if "bf16" in name else 1e-3
        assert losses(case) == pytest.approx(losses(alone), rel=tolerance), name
