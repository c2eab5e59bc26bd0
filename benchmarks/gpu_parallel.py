"""Cost of compression and the optimizer on a GPU, and overlap of the comm stream with the backward pass.

    python -m benchmarks.gpu_parallel [--preset 1.1b] [--rank 32] [--trace trace.json]

One process runs without collectives, so these costs exclude the network. Prints the milliseconds of AdamW and of
PowerSGD's compression and decompression of all gradients, beside the time for moving their bytes at the copy bandwidth.
Also prints those of forward and backward without a hook, with the hook on the comm stream, and with the hook after
them, timed with CUDA events. --trace writes a profile for the browser (ui.perfetto.dev). Without a GPU, `--preset tiny`
runs the same code on a CPU, as a check that it works.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from model import Decoder, ModelConfig
from model.loss import cross_entropy_sum
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import BucketGradients, DistContext, DistributedDataParallel, PowerSGD, PowerSGDConfig
from utils.paths import a_path
from utils.terminal import run_main

PRESETS = {
    "1.1b": dict(vocab_size=64320, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                 num_attention_heads=32, num_key_value_heads=8),
    "124m": dict(vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "tiny": dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2),
}  # fmt: skip


def milliseconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time from CUDA events or the clock, after two untimed calls."""
    measured = []
    for repeat in range(-2, repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            elapsed = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            work()
            elapsed = 1e3 * (time.perf_counter() - began)
        if repeat >= 0:
            measured.append(elapsed)
    return statistics.median(measured)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes (on a CPU: 64 MiB)."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.zeros_like(source)
    elapsed = milliseconds(lambda: target.copy_(source), device, repeats)
    return 2 * source.nbytes / elapsed * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="1.1b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trace", type=a_path, help="write a profile of one backward pass with the hook")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and args.preset != "tiny":
        raise SystemExit("benchmarks.gpu_parallel needs a GPU; --preset tiny runs on a CPU, as a trial")
    if device.type == "cpu":
        args.seq_len = min(args.seq_len, 64)
    config = ModelConfig(**PRESETS[args.preset]).resolve(max_seq_len=args.seq_len)
    model = Decoder(config)
    model.initialize(0)
    context = DistContext(0, 1, 0, 1, device)
    ddp = DistributedDataParallel(model.to(device=device, dtype=torch.bfloat16), context)
    optimizer = MixedPrecisionOptimizer(BucketGradients(ddp), [AdamW(AdamWConfig())], 1.0, LossScaler(enabled=False))
    options = PowerSGDConfig(matrix_approximation_rank=args.rank, grad_buffer_is_powerSGD_error=True)
    powersgd = PowerSGD(ddp.buckets, ddp.collectives, options)
    rows = torch.randint(0, config.vocab_size, (args.rows, args.seq_len + 1), device=device)
    parameters = sum(p.numel() for p in model.parameters())
    bandwidth = copy_bandwidth(device, args.repeats)
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor()}, torch "
          f"{torch.__version__}; {parameters / 1e6:.0f} M parameters, {len(ddp.buckets)} buckets, "
          f"{args.rows}x{args.seq_len} tokens; copies at {bandwidth / 1e9:.0f} GB/s")  # fmt: skip

    ddp.flat_buffers.grad_data.normal_()

    def compress() -> None:
        for bucket in ddp.buckets:
            powersgd.reduce(bucket)

    def decompress() -> None:
        for bucket in ddp.buckets:
            powersgd.settle(bucket)
            powersgd.take(bucket)

    grad_bytes = ddp.flat_buffers.grad_data.nbytes
    for name, work, passes in (("compress", compress, 2), ("decompress, residual", decompress, 3)):
        elapsed = milliseconds(work, device, args.repeats)
        floor = 1e3 * passes * grad_bytes / bandwidth
        print(f"PowerSGD rank {args.rank}, {name}: {elapsed:.2f} ms; {passes} passes over the gradients {floor:.2f} ms")
    ddp.flat_buffers.grad_data.normal_()
    elapsed = milliseconds(lambda: optimizer.step(1e-4), device, args.repeats)
    # Gradient, main parameter and moments are read; the latter three and the bf16 weight written; the norm reads again;
    # the gradient is zeroed.
    floor = 1e3 * parameters * (16 + 12 + 2 + 4 + 4) / bandwidth
    print(f"norm, AdamW and zeroing: {elapsed:.2f} ms; at the copy bandwidth {floor:.2f} ms")

    def step(overlap: bool, hook: bool) -> None:
        ddp.overlap_grad_reduce = overlap
        if hook:
            ddp.use_hook(powersgd)
        else:
            ddp.register_comm_hook(None, lambda _state, _bucket: None)
        hidden = ddp(rows[:, :-1])
        (cross_entropy_sum(model.logits(hidden), rows[:, 1:]) / rows.numel()).backward()
        ddp.finish_grad_sync()

    for name, overlap, hook in (
        ("no hook", True, False), ("compression on the comm stream", True, True), ("compression after it", False, True),
    ):  # fmt: skip
        elapsed = milliseconds(lambda o=overlap, h=hook: step(o, h), device, args.repeats)
        print(f"forward and backward, {name}: {elapsed:.2f} ms")
    if args.trace:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=activities) as profile:
            step(True, True)
        profile.export_chrome_trace(args.trace)
        print(f"wrote {args.trace}")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    ddp.close()


if __name__ == "__main__":
    run_main(main)
