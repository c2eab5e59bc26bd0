"""One training step of the model (forward, backward, clipping, AdamW) against Hugging Face's llama with equal weights.

    OMP_NUM_THREADS=2 python -m benchmarks.model_step --dtype float32
    python -m benchmarks.model_step --dtype bfloat16 --layers 12 --hidden_size 768 --rows 16 --seq_len 1024    (a GPU)

Contenders take turns, in a rotating order: Hugging Face eager and compiled, ours in each variant. In bfloat16 ours
keeps float32 main parameters beside the weights; Hugging Face's model is stepped by torch's fused AdamW in bfloat16,
which is less work. Prints median and quartiles, the strict FLOP rate, and the medians over the rounds of two ratios: to
the best matmul (measured in each round on a CPU, whose speed may change) and to the fastest Hugging Face. --profile
also shows where one more step of each contender spends its time. On a CPU, malloc is configured as in training
(utils.machine), unless --plain_malloc is given.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.ddp import describe
from model import Decoder, ModelConfig, flops, hf
from model.layer_losses import LayerLosses
from model.ops import build_ops, choose_ops, needs_of
from optimizer import adamw_triton
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer, choose_kernel
from parallel import BucketGradients, DistContext, DistributedDataParallel
from parallel.gradients import square
from utils.machine import cpu_name, keep_freed_memory
from utils.terminal import run_main

VOCAB_SIZE = 8192


def our_step(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: torch.Tensor, compiled: bool,
    kernels: str,
) -> Callable[[], float]:  # fmt: skip
    ops = build_ops(choose_ops(kernels, {}, device, dtype, needs_of(config)))
    model = Decoder(config, ops=ops)
    model.initialize(0)
    model.to(device=device, dtype=dtype).train()
    if compiled:
        model.compile_blocks()
    ddp = DistributedDataParallel(model, DistContext(0, 1, 0, 1, device), overlap_grad_reduce=False)
    kernel = choose_kernel("auto", "", device)
    gradients = BucketGradients(ddp, square=adamw_triton.sum_of_squares if kernel == "triton" else square)
    rules = [AdamW(AdamWConfig(), kernel=kernel)]
    optimizer = MixedPrecisionOptimizer(gradients, rules, 1.0, LossScaler(enabled=False))

    losses = None
    if config.num_local_experts:
        tokens_B = torch.full((len(rows),), rows.shape[1] - 1.0, device=device)
        losses = LayerLosses(tokens_B, 1.0 / tokens_B.sum())

    def step() -> float:
        loss = model.loss_sum(ddp(rows[:, :-1], losses=losses), rows[:, 1:]) / rows[:, 1:].numel()
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step(1e-4)
        return loss.item()

    return step


def their_step(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: torch.Tensor, compiled: bool
) -> Callable[[], float]:
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    ours = Decoder(config)
    ours.initialize(0)
    settings = {key: value for key, value in hf.to_hf_config(config, dtype).items() if key != "architectures"}
    theirs = LlamaForCausalLM(TheirConfig(**settings, attn_implementation="sdpa"))
    theirs.load_state_dict(hf.named_weights(ours), strict=False)
    theirs.to(device=device, dtype=dtype).train()
    called = torch.compile(theirs) if compiled else theirs
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        labels = rows[:, 1:].contiguous()
        loss = called(input_ids=rows[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.item()

    return step


KINDS = {
    "matmul": ("aten::mm", "aten::addmm", "aten::linear", "mkldnn", "gemm", "nvjet", "cutlass"),
    "attention": ("scaled_dot_product", "flash", "fmha", "attention", "aten::bmm", "baddbmm", "aten::_softmax"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "optimizer and clipping": ("adamw", "aten::dot", "norm", "_foreach"),
    "compiled elementwise": ("cpp_fused", "triton_"),
}
"""Part of an operation's name -> kind that its time counts for. The first match counts; the rest is "other"."""


def profile(device: torch.device, step: Callable[[], float]) -> dict[str, float]:
    """Kind -> its share of one step's time inside operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        timed(device, step)
    shares: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in trace.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
        shares[kind] += spent
    total = sum(shares.values())
    return {kind: spent / total for kind, spent in shares.items()}


def timed(device: torch.device, step: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plain_malloc", action="store_true", help="on a CPU: leave malloc as it is")
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cpu" and not args.plain_malloc:
        keep_freed_memory()
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
    ).resolve(max_seq_len=args.seq_len)  # fmt: skip
    rows = torch.randint(0, VOCAB_SIZE, (args.rows, args.seq_len + 1), generator=torch.Generator().manual_seed(0))
    rows = rows.to(device)
    inputs = (config, dtype, device, rows)
    contenders: dict[str, Callable[[], float]] = {
        "Hugging Face": their_step(*inputs, compiled=False),
        "Hugging Face compiled": their_step(*inputs, compiled=True),
        "ours, plain kernels": our_step(*inputs, False, "reference"),
        "ours": our_step(*inputs, False, "auto"),
        "ours compiled": our_step(*inputs, True, "auto"),
    }
    first = {name: step() for name, step in contenders.items()}
    reference = first["Hugging Face"]
    assert all(abs(loss - reference) < 2e-2 * reference for loss in first.values()), first
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: list[float] = []
    orders = itertools.cycle(itertools.islice(itertools.permutations(contenders), 0, None, 97))
    for round_number in range(-1, args.rounds):
        if round_number >= 0:
            # nan: the table lacks this GPU.
            peaks.append(flops.device_peak_flops(device, dtype) or math.nan)
        for name in next(orders):
            elapsed = timed(device, contenders[name])
            if round_number >= 0:
                seconds[name].append(elapsed)
    tokens = args.rows * args.seq_len
    operations = tokens * flops.flops_per_token_strict(config, args.seq_len)
    parameters = sum(p.numel() for p in Decoder(config).parameters())
    cpu = f"{torch.get_num_threads()} threads of {cpu_name()}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    print(f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {args.dtype}")
    print(f"{parameters / 1e6:.1f} M parameters, {args.rows} x {args.seq_len} tokens, {args.rounds} rounds")
    print(f"best matmul of a round: median {statistics.median(peaks) / 1e9:,.0f} GFLOP/s, "
          f"{min(peaks) / 1e9:,.0f} .. {max(peaks) / 1e9:,.0f}")  # fmt: skip
    best = min(("Hugging Face", "Hugging Face compiled"), key=lambda name: statistics.median(seconds[name]))
    for name, times in seconds.items():
        rate = operations / statistics.median(times)
        share = statistics.median(operations / elapsed / peak for elapsed, peak in zip(times, peaks))
        ratio = statistics.median(b / a for a, b in zip(times, seconds[best]))
        print(f"{describe(name, times)}   {rate / 1e9:8,.0f} GFLOP/s {100 * share:5.1f}%   {ratio:.2f}x {best}")
    if args.profile:
        for name, step in contenders.items():
            print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in profile(device, step).items()))


if __name__ == "__main__":
    run_main(main)
