"""Bytes per parameter that each mode keeps between steps, measured and by the formula of parallel/README.md.

    python -m benchmarks.memory [--nproc 2] [--dtype bfloat16]

Every mode runs in fresh processes: a llama of about 50 M parameters takes three steps on few tokens, so that
activations do not count. The benchmark measures the storage of all tensors alive after the third step and, on a CPU,
the growth of the process's resident memory, which includes code loaded meanwhile and memory that the allocator retains.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import gc
import json
import os
import subprocess

import torch

from model import Decoder, ModelConfig
from model.loss import cross_entropy_sum
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import (
    BucketGradients,
    DistributedDataParallel,
    PowerSGD,
    PowerSGDConfig,
    Zero1,
    destroy_context,
    init_context,
    sum_hook,
)
from utils.terminal import run_main

MODES = ("plain", "ZeRO-1", "bf16 hook", "ZeRO-1, bf16 hook", "PowerSGD", "PowerSGD, residual in the gradient buffer",
         "PowerSGD, ZeRO-1", "PowerSGD, ZeRO-1, residual in the gradient buffer")  # fmt: skip
RANK = 32


def tensor_bytes() -> int:
    """Bytes of all living tensors; shared storage counts once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def formula(mode: str, dtype: torch.dtype, ranks: int, numel: int, bucket: int, factors: int) -> float:
    """Bytes per parameter: weights, gradients, optimizer state, residual, and its share of scratch and factors."""
    weights = dtype.itemsize
    # float32 weights are their own main parameters.
    state = 8.0 if dtype == torch.float32 else 12.0
    sharded, powersgd, shared = "ZeRO-1" in mode, "PowerSGD" in mode, "residual in" in mode
    scratch = 0.0
    if "bf16 hook" in mode:
        scratch = 2 * bucket + 2 * bucket * (ranks - 1) / ranks
    elif sharded and not powersgd:
        scratch = 4 * bucket * (ranks - 1) / ranks
    elif powersgd:
        scratch = 4 * factors + (4 * bucket if shared else 0)
    residual = 4.0 if powersgd and not shared else 0.0
    return weights + 4 + state / (ranks if sharded else 1) + residual + scratch / numel


def measure(mode: str, dtype: torch.dtype) -> None:
    """Program of a rank: three steps, then a line of JSON from rank 0."""
    torch.set_num_threads(1)
    context = init_context()
    config = ModelConfig(
        vocab_size=16384, hidden_size=768, num_hidden_layers=4, num_attention_heads=12, intermediate_size=2048
    ).resolve(max_seq_len=16)
    tensors, resident = tensor_bytes(), resident_bytes()
    model = Decoder(config)
    model.initialize(0)
    ddp = DistributedDataParallel(model.to(device=context.device, dtype=dtype), context)
    sharded = "ZeRO-1" in mode
    if "PowerSGD" in mode:
        options = PowerSGDConfig(
            matrix_approximation_rank=RANK, grad_buffer_is_powerSGD_error="residual in" in mode
        )
        ddp.use_hook(PowerSGD(ddp.buckets, ddp.collectives, options))
    else:
        ddp.use_hook(sum_hook(ddp.collectives, torch.bfloat16 if "bf16" in mode else None, sharded))
    zero1 = Zero1(ddp) if sharded else None
    gradients = BucketGradients(ddp, zero1)
    optimizer = MixedPrecisionOptimizer(gradients, [AdamW(AdamWConfig())], 1.0, LossScaler(enabled=False))
    rows = torch.randint(0, config.vocab_size, (1, 17), generator=torch.Generator().manual_seed(context.rank))
    rows = rows.to(context.device)
    for _ in range(3):
        hidden = ddp(rows[:, :-1])
        (cross_entropy_sum(model.logits(hidden), rows[:, 1:]) / 32).backward()
        del hidden
        ddp.finish_grad_sync()
        optimizer.step(1e-4, zero1.gather if zero1 else None)
        if zero1 is not None:
            zero1.wait()
    tensors, resident = tensor_bytes() - tensors, resident_bytes() - resident
    numel = sum(p.numel() for p in model.parameters())
    # P, and four tensors of Q's size: Q, this rank's part of it, the initial Q, the random one.
    factors = sum((m.shape[0] + 4 * m.shape[1]) * RANK for m in model.parameters() if m.dim() == 2)
    expected = formula(mode, dtype, context.world_size, numel, max(len(b.grad) for b in ddp.buckets), factors)
    if context.is_main:
        print(json.dumps({"formula": expected, "tensors": tensors / numel, "resident": resident / numel}))
    ddp.close()
    destroy_context(context)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--mode", choices=MODES)
    args = parser.parse_args()
    if args.mode:
        measure(args.mode, getattr(torch, args.dtype))
        return
    print(f"{args.nproc} ranks, {args.dtype}, torch {torch.__version__}; bytes a parameter")
    print("| mode | formula | tensors | resident memory |\n|---|---|---|---|")
    for mode in MODES:
        command = [sys.executable, "-m", "parallel.launch", f"--nproc_per_node={args.nproc}",
                   "-m", "benchmarks.memory", "--mode", mode, "--dtype", args.dtype]  # fmt: skip
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        print(f"| {mode} | {result['formula']:.2f} | {result['tensors']:.2f} | {result['resident']:.2f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
