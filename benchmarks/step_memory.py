"""Peak memory of a training step, measured on a CPU, beside the formula of model/memory.py.

    python -m benchmarks.step_memory [--size 125m] [--train_batch_size 1] [--max_seq_len 512]
    python -m benchmarks.step_memory --gpus             by formula: which GPUs hold 7B, 13B and 70B (docs/memory.md)
    python -m benchmarks.step_memory --offload_time     optimizer's step with and without --offload_optimizer

Each row is a process of its own that takes two steps. Measured is the resident memory beyond that of the same process
before it had a model: between the steps, and at the peak of the second. Freed tensors go back to the system at once.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch

from model import Decoder, ModelConfig, hf
from model.adapters.config import AdapterConfig
from model.adapters.lora import LoraSpec, attach
from model.kernels.blocked_attention import kept_size
from model.memory import GB, GPUS_GB, SIZES, TrainingPlan, estimate
from model.ops import build_ops, choose_ops
from model.quantized import quantized_layers
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.offload import OffloadedOptimizer
from optimizer.rules import new_rules
from parallel import BucketGradients, DistContext, DistributedDataParallel, destroy_context, init_context
from utils.terminal import run_main

MB = 1e6
LORA = AdapterConfig(lora_r=16, lora_target_modules="all-linear")
FULL = TrainingPlan(fused=False)
ROWS = {
    "AdamW, float32": replace(FULL, dtype="float32"),
    "AdamW": FULL,
    "AdamW, checkpointing but for matmuls": replace(FULL, gradient_checkpointing=True, checkpoint_keeps="matmuls"),
    "AdamW, checkpointing": replace(FULL, gradient_checkpointing=True),
    "AdamW, gradients in bfloat16": replace(FULL, grad_reduce_in_fp32=False),
    "AdamW in 8 bits": replace(FULL, optimizer="adamw8bit"),
    "Lion": replace(FULL, optimizer="lion"),
    "Lion in 8 bits": replace(FULL, optimizer="lion8bit"),
    "Muon": replace(FULL, optimizer="muon"),
    "AdamW, offloaded": replace(FULL, offload_optimizer=True),
    "LoRA of q and v, rank 16": replace(FULL, adapter=replace(LORA, lora_target_modules="q_proj,v_proj")),
    "LoRA of all linear layers, rank 16": replace(FULL, adapter=LORA),
    "the same, checkpointing": replace(FULL, adapter=LORA, gradient_checkpointing=True),
    "QLoRA of all linear layers, rank 16": replace(FULL, adapter=replace(LORA, load_in_4bit=True)),
    "the same in 4 bits, checkpointing": replace(
        FULL, adapter=replace(LORA, load_in_4bit=True), gradient_checkpointing=True
    ),
}
"""In bfloat16 where nothing is said."""

ON_GPU = TrainingPlan(max_seq_len=2048)
RECOMPUTED, ADAPTED = replace(ON_GPU, gradient_checkpointing=True), replace(ON_GPU, adapter=LORA)
NARROW = replace(RECOMPUTED, grad_reduce_in_fp32=False)
BY_FORMULA = {
    "all weights, AdamW": ON_GPU,
    "`--gradient_checkpointing`": RECOMPUTED,
    "the same and `--no-grad_reduce_in_fp32 --optimizer=adamw8bit`": replace(NARROW, optimizer="adamw8bit"),
    "the same and `--no-grad_reduce_in_fp32 --optimizer=lion8bit`": replace(NARROW, optimizer="lion8bit"),
    "the same and `--no-grad_reduce_in_fp32 --offload_optimizer`": replace(NARROW, offload_optimizer=True),
    "LoRA: `--lora_r=16 --lora_target_modules=all-linear`": ADAPTED,
    "LoRA, `--gradient_checkpointing`": replace(RECOMPUTED, adapter=LORA),
    "QLoRA: LoRA, `--load_in_4bit`": replace(ADAPTED, adapter=replace(LORA, load_in_4bit=True)),
    "QLoRA, `--gradient_checkpointing`": replace(RECOMPUTED, adapter=replace(LORA, load_in_4bit=True)),
}  # fmt: skip
"""What docs/memory.md compares: a micro-batch of one row of 2,048 tokens, bfloat16, Triton kernels."""


def gpu_lines() -> list[str]:
    """GB that each plan needs, and the smallest GPU that holds it."""
    lines = ["| | 7B | 13B | 70B |", "|---|---|---|---|"]
    for name, plan in BY_FORMULA.items():
        found = [estimate(SIZES[size][1], plan) for size in ("7b", "13b", "70b")]
        gpus = [next((f"**{gb} GB**" for gb in GPUS_GB if its.fits(gb)), "-") for its in found]
        cells = [f"{its.peak / GB:,.1f} {gpu}" for its, gpu in zip(found, gpus)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def give_back_freed_memory() -> None:
    """Let the C library return freed blocks of 64 KiB and more to the system at once."""
    mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


def planned(size: str, row: str, rows: int, seq_len: int) -> TrainingPlan:
    plan = replace(ROWS[row], train_batch_size=rows, max_seq_len=seq_len)
    config = SIZES[size][1].resolve()
    if plan.dtype != "bfloat16":
        return plan
    kept = kept_size(rows, config.num_attention_heads, seq_len, config.head_dim)
    return replace(plan, blocked_weights=kept)


def new_model(config: ModelConfig, plan: TrainingPlan) -> Decoder:
    """As a run builds it: with the fastest implementations on a CPU."""
    dtype = getattr(torch, plan.dtype)
    ops = build_ops(choose_ops("auto", {}, torch.device("cpu"), dtype))
    options = plan.gradient_checkpointing, plan.checkpoint_keeps, ops
    if plan.adapter.load_in_4bit:
        model = hf.outline_in_4bit(config, torch.device("cpu"), dtype, *options)
        for layer in quantized_layers(model).values():
            layer.set_matrix(torch.randn(layer.out_features, layer.in_features) * 0.02)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.02)
    else:
        model = Decoder(config, *options).to(dtype)
    if plan.adapter.is_used:
        attach(model, LoraSpec.of(plan.adapter), seed=0)
    return model.train()


class Training:
    """A model and what it needs to take steps."""

    def __init__(self, config: ModelConfig, plan: TrainingPlan, context: DistContext):
        self.plan, self.model = plan, new_model(config, plan)
        grad_dtype = torch.float32 if plan.grad_reduce_in_fp32 else getattr(torch, plan.dtype)
        self.ddp = DistributedDataParallel(self.model, context, grad_dtype=grad_dtype)
        gradients, scaler = BucketGradients(self.ddp), LossScaler(enabled=False)
        roles = self.model.roles()
        rules = new_rules(plan.optimizer, AdamWConfig(), MuonConfig(), LionConfig(), kernel="torch", roles=roles)
        self.optimizer = (
            OffloadedOptimizer(gradients, rules, 1.0, scaler, context.device)
            if plan.offload_optimizer else MixedPrecisionOptimizer(gradients, rules, 1.0, scaler)
        )  # fmt: skip

    def step(self) -> None:
        rows = torch.randint(0, 64, (self.plan.train_batch_size, self.plan.max_seq_len + 1))
        hidden = self.ddp(rows[:, :-1])
        (self.model.loss_sum(hidden, rows[:, 1:], 1.0 / self.plan.tokens) / self.plan.tokens).backward()
        del hidden
        self.ddp.finish_grad_sync()
        self.optimizer.step(1e-4)


def measure(config: ModelConfig, plan: TrainingPlan) -> None:
    """Program of a row: prints a line of JSON."""
    give_back_freed_memory()
    context = init_context()
    # A small model first, which loads all code.
    small = replace(config, hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1,
                    num_hidden_layers=1, vocab_size=64, head_dim=64)  # fmt: skip
    training = Training(small, plan, context)
    training.step()
    training.ddp.close()
    del training
    gc.collect()
    bare = status_bytes("VmRSS")
    training = Training(config, plan, context)
    training.step()
    gc.collect()
    between = status_bytes("VmRSS")
    # The peak counts from here.
    Path("/proc/self/clear_refs").write_text("5")
    training.step()
    print(json.dumps({"between": between - bare, "peak": status_bytes("VmHWM") - bare}))
    training.ddp.close()
    destroy_context(context)


def offload_time(config: ModelConfig, steps: int = 7) -> str:
    """Seconds of the optimizer's step with its state offloaded and not, which take turns. Here both are on the CPU, so
    the difference is what the copies cost when nothing hides them."""
    context = init_context()
    both = [Training(config, replace(ON_GPU, fused=False, offload_optimizer=offloads), context)
            for offloads in (False, True)]  # fmt: skip
    seconds: list[list[float]] = [[], []]
    for _ in range(steps):
        for training, found in zip(both, seconds):
            training.ddp.flat_buffers.grad_data.fill_(1e-3)
            started = time.perf_counter()
            training.optimizer.step(1e-4)
            found.append(time.perf_counter() - started)
    for training in both:
        training.ddp.close()
    destroy_context(context)
    plain, offloaded = ([f"{at(found[1:]):.3f}" for at in (statistics.median, min)] for found in seconds)
    return f"seconds a step (median, least): {', '.join(plain)} without, {', '.join(offloaded)} with"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="125m")
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--row", choices=ROWS, help="measure this row in this process")
    parser.add_argument("--gpus", action="store_true", help="print the table for GPUs, by formula alone")
    parser.add_argument("--offload_time", action="store_true", help="time the optimizer's step alone")
    args = parser.parse_args()
    if args.offload_time:
        print(offload_time(SIZES[args.size][1].resolve(max_seq_len=args.max_seq_len)))
        return
    if args.gpus:
        print("\n".join(gpu_lines()))
        return
    if args.row:
        plan = planned(args.size, args.row, args.train_batch_size, args.max_seq_len)
        measure(SIZES[args.size][1].resolve(max_seq_len=args.max_seq_len), plan)
        return
    print(f"{args.size}, micro-batch {args.train_batch_size} x {args.max_seq_len}, torch {torch.__version__}; MB")
    print("| mode | between steps | by the formula | peak | by the formula | ratio |\n|---|---|---|---|---|---|")
    for row in ROWS:
        plan = planned(args.size, row, args.train_batch_size, args.max_seq_len)
        command = [sys.executable, "-m", "benchmarks.step_memory", "--row", row, "--size", args.size,
                   f"--train_batch_size={args.train_batch_size}", f"--max_seq_len={args.max_seq_len}"]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(next(line for line in done.splitlines() if line.startswith("{")))
        print(line_of(row, found, plan, args.size), flush=True)


def line_of(row: str, found: dict[str, float], plan: TrainingPlan, size: str) -> str:
    """A line of the table. On a CPU, host memory is the device's."""
    expected = estimate(SIZES[size][1], plan)
    host = sum(expected.host.values())
    between, peak = sum(expected.lasting.values()) + host, expected.peak + host
    return (
        f"| {row} | {found['between'] / MB:,.0f} | {between / MB:,.0f} | {found['peak'] / MB:,.0f} | "
        f"{peak / MB:,.0f} | {found['peak'] / peak:.2f} |"
    )


if __name__ == "__main__":
    run_main(main)
