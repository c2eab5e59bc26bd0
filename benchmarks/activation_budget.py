"""--activation_budget_gb: what it chooses, and the memory and time that it expects, beside what whole passes take.

    python -m benchmarks.activation_budget --dtype bfloat16
    python -m benchmarks.activation_budget --dtype float32 --budgets 3 --rounds 2

Budgets lie evenly between what full recomputation needs and what keeping everything needs. Each choice then runs whole
forward and backward passes. Their peak is counted by allocations, as when choosing, and by the growth of the process's
resident memory, which the kernel counts (on Linux, with all freed memory given back before each pass). The choices take
turns, and the time is the median of the rounds' ratios to keeping everything. --clock cpu counts the process's CPU
seconds in place of time, for a machine on which others work.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import ctypes
import platform
import statistics
import time
from pathlib import Path

import torch

from model import Decoder, ModelConfig
from model.activations import Activations
from model.ops import build_ops, choose_ops, needs_of
from model.recompute import Choice, choose, expected_peak, least_peak
from utils.machine import cpu_name
from utils.terminal import run_main


def resident(name: str) -> int:
    """VmRSS or VmHWM (the highest since it was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def resident_growth(measure: Activations) -> int:
    """Growth of the resident memory in a pass, at its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    measure.peak()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.activation_budget", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=25600)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--budgets", type=int, default=4, help="budgets between the least and everything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["time", "cpu"], default="time")
    args = parser.parse_args()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    device, dtype = torch.device("cpu"), getattr(torch, args.dtype)
    config = ModelConfig(
        hidden_size=args.hidden_size, num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64,
    ).resolve(args.vocab_size, args.seq_len)  # fmt: skip
    model = Decoder(config, ops=build_ops(choose_ops("auto", {}, device, dtype, needs_of(config))))
    model.initialize(1)
    model.to(dtype).train()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(args.vocab_size, (args.rows, args.seq_len + 1), generator=generator)
    measure = Activations(
        model, lambda: model(rows[:, :-1]), lambda hidden: model.loss_sum(hidden, rows[:, 1:]), torch.float32
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, Python "
          f"{platform.python_version()}, {args.clock} clock")  # fmt: skip
    print(f"{parameters / 1e6:.1f} M parameters, {args.layers} layers, {args.rows} x {args.seq_len} tokens, "
          f"{args.dtype}, {args.rounds} rounds; {model.ops}", flush=True)  # fmt: skip

    started = clock()
    costs = measure.costs()
    spent = clock() - started
    least, everything = least_peak(costs), expected_peak(costs, ["all"] * args.layers)
    step = (everything - least) // (args.budgets + 1)
    budgets = [least + step * place for place in range(args.budgets + 1)] + [everything]
    choices = [choose(costs, budget) for budget in budgets]
    matmuls = ("matmuls",) * args.layers
    extra = sum(block.microseconds["matmuls"] / block.microseconds["all"] - 1 for block in costs.blocks) / args.layers
    named = dict(zip([f"{budget / 1e9:.3f}" for budget in budgets], choices))
    named["checkpoint_keeps=matmuls"] = Choice(matmuls, expected_peak(costs, matmuls), extra)

    peaks, residents, seconds = {}, {}, {name: [] for name in named}
    for name, choice in named.items():
        model.set_recompute(choice.keeps)
        peaks[name], residents[name] = measure.peak(), resident_growth(measure)
    names = list(named)
    for round_number in range(args.rounds):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            model.set_recompute(named[name].keeps)
            begun = clock()
            measure.run_pass()
            seconds[name].append(clock() - begun)
    whole = seconds[names[-2]]
    print(f"measuring took as long as {spent / statistics.median(whole):.1f} passes that keep everything, of "
          f"{statistics.median(whole):.2f} s each\n")  # fmt: skip
    print("| GB allowed | blocks that keep nothing, matmuls, all | expected peak, GB | counted | resident | expected "
          "time | measured (lowest .. highest) |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name, choice in named.items():
        ratios = [mine / base for mine, base in zip(seconds[name], whole)]
        counts = ", ".join(str(choice.keeps.count(kept)) for kept in ("nothing", "matmuls", "all"))
        sizes = " | ".join(f"{size / 1e9:.3f}" for size in (choice.peak, peaks[name], residents[name]))
        print(f"| {name} | {counts} | {sizes} | {1 + choice.extra:.2f} | "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) |")  # fmt: skip


if __name__ == "__main__":
    run_main(main)
