"""Our DDP against torch's: one step (forward, backward, gradients summed), alternating in one process group.

    python -m parallel.launch --nproc_per_node=2 -m benchmarks.ddp --dtype float32

Both get the same weights, rows, dtype and bucket size; torch's runs with gradient_as_bucket_view. Each round times
ours, torch's, and ours without communication, in a rotating order. Prints median and quartiles of the slowest rank's
seconds, and the median over the rounds of the ratio ours / torch's.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import Decoder, ModelConfig
from model.loss import cross_entropy_sum
from parallel import DistContext, DistributedDataParallel, destroy_context, init_context
from utils.terminal import run_main

VOCAB_SIZE = 8192


class LossModule(nn.Module):
    """Model with its loss, because torch's DDP needs the loss inside the wrapped module."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.model(rows[:, :-1])
        return cross_entropy_sum(self.model.logits(hidden), rows[:, 1:]) / rows[:, 1:].numel()


def new_module(dtype: torch.dtype, args: argparse.Namespace) -> LossModule:
    """Model with the same weights for every contender and rank."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
    ).resolve(max_seq_len=args.seq_len)  # fmt: skip
    model = Decoder(config)
    model.initialize(0)
    return LossModule(model).to(dtype=dtype)


def timed(context: DistContext, work: Callable[[], None]) -> float:
    """Seconds that the slowest rank takes."""
    context.barrier()
    start = time.perf_counter()
    work()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    return max(context.gather(time.perf_counter() - start))


def describe(name: str, seconds: list[float]) -> str:
    low, median, high = statistics.quantiles(seconds, n=4)
    return f"{name:24s} median {median * 1e3:8.1f} ms   quartiles {low * 1e3:8.1f} .. {high * 1e3:8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ddp", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--bucket_mb", type=float, default=25.0)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    context = init_context()
    if context.world_size < 2:
        raise SystemExit("at least 2 ranks are needed: python -m parallel.launch --nproc_per_node=2 -m benchmarks.ddp")
    dtype = getattr(torch, args.dtype)
    bytes_each = torch.finfo(dtype).bits // 8
    ours = DistributedDataParallel(
        new_module(dtype, args).to(context.device), context, bucket_size=int(args.bucket_mb * 2**20) // bytes_each,
        grad_dtype=dtype,
    )  # fmt: skip
    theirs = nn.parallel.DistributedDataParallel(
        new_module(dtype, args).to(context.device), bucket_cap_mb=args.bucket_mb, gradient_as_bucket_view=True,
        device_ids=[context.device] if context.device.type == "cuda" else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(context.rank)
    rows = torch.randint(0, VOCAB_SIZE, (args.rows, args.seq_len + 1), generator=generator).to(context.device)

    def step_ours() -> None:
        ours.zero_grad()
        ours(rows).backward()
        ours.finish_grad_sync()

    def step_torch() -> None:
        theirs.zero_grad(set_to_none=False)
        theirs(rows).backward()

    def step_alone() -> None:
        ours.zero_grad()
        with ours.no_sync():
            ours(rows).backward()

    contenders = {"ours": step_ours, "torch DDP": step_torch, "no communication": step_alone}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    orders = itertools.cycle(itertools.permutations(contenders))
    for round_number in range(-2, args.rounds):
        for name in next(orders):
            elapsed = timed(context, contenders[name])
            if round_number >= 0:
                seconds[name].append(elapsed)
    step_ours()
    step_torch()
    gradients = [torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (ours, theirs)]
    # torch averages over the ranks, we sum.
    difference = (gradients[0] / context.world_size - gradients[1]).norm() / gradients[1].norm()
    if context.is_main:
        parameters = sum(p.numel() for p in ours.parameters())
        print(
            f"{parameters / 1e6:.1f} M parameters, {args.rows}x{args.seq_len} tokens a rank, {args.dtype}, "
            f"{context.world_size} ranks on {context.device.type}, {torch.get_num_threads()} thread(s) each, "
            f"torch {torch.__version__}, Python {platform.python_version()}"
        )
        for name, values in seconds.items():
            print(describe(name, values))
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["torch DDP"])]
        ratio = statistics.median(ratios)
        print(f"ours / torch DDP: median of the rounds {ratio:.3f}; gradients differ by {difference:.1e}")
    ours.close()
    destroy_context(context)


if __name__ == "__main__":
    run_main(main)
