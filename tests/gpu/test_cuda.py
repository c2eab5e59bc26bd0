"""Tests that need a GPU: the comm stream, CUDA against CPU, bit-exact resume. `pytest -m gpu tests/gpu`."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train_my_ddp
from dataset.dpo import DPODataset
from dataset.sft import SFTDataset
from model import Decoder, ModelConfig
from model.attend import document_starts
from model.loss import cross_entropy_sum
from model.ops import IMPLEMENTATIONS, REFERENCE, build_ops, needs_of
from model.roles import role_of
from parallel import CommStream, DistContext, DistributedDataParallel, Eager, PowerSGD, PowerSGDConfig
from tasks.config import DPOConfig
from tasks.dpo import DPOTask
from tasks.language_model import LanguageModelTask
from tests.dist.group import run_ranks, use_new_port
from tests.runs import elsewhere, final_state, losses, records, same_bits
from tests.unit.test_sequences import random_sequences, write_sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
).resolve()  # fmt: skip


def alone(device: str = "cuda") -> DistContext:
    return DistContext(0, 1, 0, 1, torch.device(device, 0) if device == "cuda" else torch.device("cpu"))


def test_comm_stream_keeps_order_and_waits():
    stream = CommStream(torch.device("cuda", 0))
    x = torch.zeros(1 << 22, device="cuda")

    def double() -> None:
        x.mul_(2.0)

    for _ in range(20):
        x.add_(1.0)
        # Must see the addition just issued, and must be seen by the next one.
        stream.submit(double).wait()
    expected = 0.0
    for _ in range(20):
        expected = (expected + 1.0) * 2.0
    assert (x == expected).all()
    stream.close()


@pytest.mark.parametrize("documents", [False, True])
def test_cuda_equals_cpu(documents: bool):
    rows = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0))
    ids = (torch.arange(64) // 20).expand(4, -1) if documents else None
    grads = []
    for device in ("cpu", "cuda"):
        model = Decoder(CONFIG)
        model.initialize(0)
        ddp = DistributedDataParallel(model.to(device), alone(device), bucket_size=20_000)
        hidden = ddp(rows[:, :-1].to(device), None, ids.to(device) if documents else None)
        cross_entropy_sum(model.logits(hidden), rows[:, 1:].to(device)).backward()
        ddp.finish_grad_sync()
        grads.append(torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()]))
        ddp.close()
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 1e-4


REACH = {
    "window": {"sliding_window": 9},
    "window by layer": {"sliding_window": 5, "full_attention_layers": "1"},
    "alibi": {"position_embedding": "alibi"},
    "alibi in a window": {"position_embedding": "alibi", "sliding_window": 9},
}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flash_attn"])
def test_windows_and_alibi_on_cuda_equal_a_cpu(attention: str, reach: str, documents: bool):
    """Gradients in bfloat16 against float32 on a CPU, with at most 1.5 times the error of the CPU's bfloat16."""
    config, cuda = dataclasses.replace(CONFIG, **REACH[reach]), torch.device("cuda")
    found = IMPLEMENTATIONS["attention"][attention]
    if reason := found.reason_against(cuda, torch.bfloat16, needs_of(config)):
        pytest.skip(reason)
    rows = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0))
    ids = (torch.arange(64) // 20).expand(4, -1) if documents else None
    grads = []
    for name, device, dtype in (
        ("sdpa", "cpu", torch.float32), ("sdpa", "cpu", torch.bfloat16), (attention, "cuda", torch.bfloat16),
    ):  # fmt: skip
        model = Decoder(config, ops=build_ops(dict(REFERENCE.names) | {"attention": name}))
        model.roles = lambda model=model: {name: role_of(name) for name, _ in model.named_parameters()}
        model.initialize(0)
        model.to(device=device, dtype=dtype)
        starts = document_starts(ids).to(device) if documents and model.wants_document_starts else None
        there = ids.to(device) if documents else None
        hidden = model(rows[:, :-1].to(device), None, there, document_starts=starts)
        cross_entropy_sum(model.logits(hidden), rows[:, 1:].to(device)).backward()
        grads.append(torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()]))
    exact, on_cpu, on_cuda = grads
    assert (on_cuda - exact).norm() <= 1.5 * (on_cpu - exact).norm()


@pytest.mark.parametrize("kind", ["sft packed", "sft", "dpo", "dpo kto_pair"])
def test_fine_tuning_on_cuda_equals_cpu(kind: str, tmp_path: Path):
    """Loss, metrics and gradients of SFT and DPO; packed rows attend by document on a CPU and under a mask on CUDA."""
    task_name, _, option = kind.partition(" ")
    write_sequences(tmp_path, [random_sequences(0, 16, 60, 512)], task_name, max_seq_len=60)
    if task_name == "sft":
        dataset = SFTDataset(tmp_path, "train", 60, packing=option == "packed")
    else:
        dataset = DPODataset(tmp_path, "train", 60)
        dataset.reference = np.random.default_rng(0).normal(-300, 10, (len(dataset), 2)).astype(np.float32)
    ids = np.arange(4)
    batch = dataset.collate(ids) | {"row_ids": torch.from_numpy(ids)}
    results = []
    for device in ("cpu", "cuda"):
        model = Decoder(CONFIG)
        model.initialize(0)
        model.to(device)
        if task_name == "sft":
            task = LanguageModelTask(model, 0, torch.ones(512, dtype=torch.int64, device=device))
        else:
            task = DPOTask(model, 0, DPOConfig(option or "sigmoid"))
        there = {name: tensor.to(device) for name, tensor in batch.items()}
        if task.uses_prepass:
            task.take_prepass(task.prepass(there))
        loss_sum, count, sums = task(there)
        loss_sum.backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])
        results.append((gradient, [loss_sum.item() / count, *(value.item() for value in sums.values())]))
    (on_cpu, figures), (on_cuda, expected) = results
    assert (on_cpu - on_cuda).norm() / on_cpu.norm() < 1e-4
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resume_is_bit_exact(tiny_run: list[str], tmp_path: Path, dtype: str):
    flags = [*tiny_run, "--device=cuda", f"--dtype={dtype}", "--deterministic", "--hidden_dropout=0.1"]
    assert train_my_ddp.main([*flags, "--save_interval=2"]) == 0
    parts = elsewhere(flags, tmp_path / "parts")
    assert train_my_ddp.main([*parts, "--save_interval=2"]) == 0
    os.rename(tmp_path / "parts" / "ckpt" / "step-4", tmp_path / "gone")
    assert train_my_ddp.main([*parts, "--resume"]) == 0
    assert losses(parts) == losses(flags)
    assert same_bits(final_state(parts, 4), final_state(flags, 4))


def two_ranks_on_one_gpu(flags: list[str]) -> int:
    return train_my_ddp.main([*flags, "--device=cuda", "--ddp_backend=gloo"])


def test_two_gloo_ranks_on_one_gpu(tiny_run: list[str], tmp_path: Path):
    """The comm stream's path with real collectives, on a machine with only one GPU."""
    assert run_ranks(2, two_ranks_on_one_gpu, elsewhere(tiny_run, tmp_path / "two")) == [0, 0]
    assert train_my_ddp.main([*tiny_run, "--device=cuda"]) == 0
    two = elsewhere(tiny_run, tmp_path / "two")
    assert losses(two) == pytest.approx(losses(tiny_run), rel=1e-4)
    assert [r["digest"] for r in records(two, "train")] == [r["digest"] for r in records(tiny_run, "train")]


def test_compiled_blocks():
    config = dataclasses.replace(CONFIG, hidden_dropout=0.0)
    rows = torch.randint(0, 512, (4, 64), device="cuda")
    hidden = []
    for compiled in (False, True):
        model = Decoder(config)
        model.initialize(0)
        model.cuda()
        if compiled:
            model.compile_blocks()
        hidden.append(model(rows))
    assert torch.allclose(*hidden, atol=1e-4)


MODES = {
    "zero1": ["--use_distributed_optimizer", "--overlap_param_gather"],
    "bf16 hook": ["--use_bf16_compress_hook"],
    "powersgd": ["--use_powerSGD_hook", "--matrix_approximation_rank=64", "--min_compression_rate=0"],
    "powersgd, zero1": ["--use_powerSGD_hook", "--matrix_approximation_rank=64", "--min_compression_rate=0",
                        "--use_distributed_optimizer"],
    "overlapped step": ["--overlap_optim_step", "--overlap_zero_grad_buffer", "--grad_clip=0"],
}  # fmt: skip


def modes_on_one_gpu(cases: list[list[str]]) -> list[int]:
    codes = []
    for case in cases:
        use_new_port()
        codes.append(train_my_ddp.main([*case, "--device=cuda", "--ddp_backend=gloo"]))
    return codes


def test_every_mode_on_one_gpu(tiny_run: list[str], tmp_path: Path):
    """Two gloo ranks: hooks, ZeRO-1 and the overlaps run on CUDA streams, and train like a single process."""
    flags = [*tiny_run, "--bucket_size=20000"]
    cases = {name: [*elsewhere(flags, tmp_path / name), *more] for name, more in MODES.items()}
    for codes in run_ranks(2, modes_on_one_gpu, list(cases.values())):
        assert codes == [0] * len(cases)
    for name, case in cases.items():
        alone = elsewhere([*flags, "--grad_clip=0"] if "step" in name else flags, tmp_path / f"{name} alone")
        assert train_my_ddp.main([*alone, "--device=cuda"]) == 0
        assert losses(case) == pytest.approx(losses(alone), rel=2e-2 if "bf16" in name else 1e-3), name


@pytest.mark.parametrize("rank", [2, 64])
def test_powersgd_on_cuda_equals_the_cpu(rank: int):
    """One PowerSGD step without a group gives the same sums and residuals on both devices."""
    sums, residuals = [], []
    for device in ("cpu", "cuda"):
        model = Decoder(CONFIG)
        model.initialize(0)
        ddp = DistributedDataParallel(model.to(device), alone(device), bucket_size=20_000)
        config = PowerSGDConfig(matrix_approximation_rank=rank, min_compression_rate=1.0)
        powersgd = PowerSGD(ddp.buckets, ddp.collectives, config)
        ddp.use_hook(Eager(powersgd))
        rows = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
        cross_entropy_sum(model.logits(ddp(rows[:, :-1])), rows[:, 1:]).backward()
        ddp.finish_grad_sync()
        sums.append(ddp.flat_buffers.grad_data.double().cpu())
        kept = [t for name, t in powersgd.saved_state().items() if name.endswith("residual")]
        residuals.append(torch.cat([t.double().flatten().cpu() for t in kept]))
        ddp.close()
    assert (sums[0] - sums[1]).norm() / sums[0].norm() < 1e-2
    assert (residuals[0] - residuals[1]).norm() / sums[0].norm() < 1e-2


def expert_results(function, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """(y, dx, dW, dD, dw) for 512 tokens, of which experts 1 and 3 of 5 get none."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(device, dtype)

    chosen = (torch.rand(512, 3, generator=generator).topk(2).indices * 2).to(device)
    leaves = [draw(512, 64), draw(5, 96, 64, scale=0.2), draw(5, 64, 48, scale=0.2), draw(512, 2).sigmoid()]
    leaves[3] = leaves[3].to(torch.promote_types(dtype, torch.float32))
    x, gate_up, down, weights = (leaf.requires_grad_() for leaf in leaves)
    y = function(x, gate_up, down, chosen, weights)
    y.backward(draw(512, 64))
    return [y.detach(), x.grad, gate_up.grad, down.grad, weights.grad]


@pytest.mark.parametrize(("name", "dtype"), [
    ("grouped", torch.bfloat16), ("sorted", torch.bfloat16), ("sorted", torch.float32),
])  # fmt: skip
def test_experts_err_no_more_than_the_obvious_loop(name: str, dtype: torch.dtype):
    found = IMPLEMENTATIONS["experts"][name]
    assert found.why_not(torch.device("cuda"), dtype) is None
    of_ours = expert_results(found.build()["experts"], dtype, "cuda")
    of_loop = expert_results(REFERENCE.experts, dtype, "cuda")
    exact = expert_results(REFERENCE.experts, torch.float64, "cpu")
    for ours, loop, right in zip(of_ours, of_loop, exact):
        error, allowed = ((x.double().cpu() - right).square().mean().sqrt() for x in (ours, loop))
        assert error <= 1.5 * allowed
    for gradient in of_ours[2:4]:
        assert not gradient[1::2].any() and gradient[::2].flatten(1).any(1).all()
    again = expert_results(found.build()["experts"], dtype, "cuda")
    assert all(map(torch.equal, of_ours, again))
