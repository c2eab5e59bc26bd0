"""Optimizers compared: held-out loss after equal steps, and the memory and time of a step.

    OMP_NUM_THREADS=1 python -m benchmarks.optimizers quality [--steps 500] [--seeds 0,1,2] [--rows 8]
        [--contenders adamw,adamw8bit,lion:3,lion8bit:3]
    OMP_NUM_THREADS=1 python -m benchmarks.optimizers step [--parameters 125000000]

quality: a byte-level model learns the source of Python's standard library. Runs of one seed begin with the same weights
and see the same rows; only the optimizer differs. "lion:3" takes AdamW's rate divided by 3, and its decay times 3. The
difference is to the first contender: the mean over the seeds, and its standard error.

step: one slice with random gradients is stepped, first in float32, then with bfloat16 weights and gradients. Prints the
bytes of main parameters and state, processor time (which other programs on the machine do not add to), and the memory
that the step itself needs at its peak, as the kernel saw it.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablation import resident_growth
from demo.corpus import copy_standard_library
from model import Decoder, ModelConfig
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rule import Rule
from optimizer.rules import new_rules
from optimizer.schedule import learning_rate_at
from parallel import BucketGradients, DistContext, DistributedDataParallel
from parallel.buffer import SliceWithGrad
from parallel.gradients import PlainGradients
from utils.machine import cpu_name, keep_freed_memory
from utils.terminal import run_main

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=True
)
SEQ_LEN, VALID_ROWS = 64, 512
RATE, DECAY = 2e-3, 0.1


def rules_of(name: str, decay: float, model: Decoder | None = None) -> list[Rule]:
    roles = None if model is None else model.roles()
    return new_rules(name, AdamWConfig(weight_decay=decay), MuonConfig(), LionConfig(), roles=roles)


def corpus_bytes() -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        copy_standard_library(Path(folder))
        text = b"".join(path.read_bytes() for path in sorted(Path(folder).rglob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def rows_at(corpus: Tensor, starts: Tensor) -> Tensor:
    return corpus[starts[:, None] + torch.arange(SEQ_LEN + 1)].long()


def valid_loss(model: Decoder, rows: Tensor) -> float:
    with torch.no_grad():
        sums = [model.loss_sum(model(part[:, :-1]), part[:, 1:]).item() for part in rows.split(64)]
    return sum(sums) / rows[:, 1:].numel()


def train(corpus: Tensor, name: str, factor: float, rows_a_step: int, steps: int, seed: int) -> float:
    """Held-out loss in nats per byte. The last tenth of the corpus is held out."""
    model = Decoder(CONFIG.resolve(max_seq_len=SEQ_LEN))
    model.initialize(seed)
    ddp = DistributedDataParallel(model, DistContext(0, 1, 0, 1, torch.device("cpu")), overlap_grad_reduce=False)
    optimizer = MixedPrecisionOptimizer(
        BucketGradients(ddp), rules_of(name, DECAY * factor, model), 1.0, LossScaler(enabled=False)
    )
    generator, border = torch.Generator().manual_seed(seed), len(corpus) * 9 // 10
    for step in range(steps):
        rows = rows_at(corpus, torch.randint(border - SEQ_LEN, (rows_a_step,), generator=generator))
        (model.loss_sum(ddp(rows[:, :-1]), rows[:, 1:]) / rows[:, 1:].numel()).backward()
        ddp.finish_grad_sync()
        optimizer.step(learning_rate_at(step, steps, RATE / factor, warmup_ratio=0.05))
    ddp.close()
    return valid_loss(model, rows_at(corpus, torch.linspace(border, len(corpus) - SEQ_LEN - 1, VALID_ROWS).long()))


def quality(contenders: list[str], rows: int, steps: int, seeds: list[int]) -> None:
    corpus = corpus_bytes()
    print(f"{steps} steps of {rows} x {SEQ_LEN} bytes of {len(corpus) / 1e6:.1f} MB, rate {RATE:g}, decay {DECAY:g}")
    print("| optimizer | held-out loss, by seed | mean | against the first |\n|---|---|---|---|")
    baseline: list[float] = []
    for contender in contenders:
        name, _, factor = contender.partition(":")
        losses = [train(corpus, name, float(factor or 1), rows, steps, seed) for seed in seeds]
        baseline = baseline or losses
        ratios = [100 * (loss / base - 1) for loss, base in zip(losses, baseline)]
        spread = f" +- {statistics.stdev(ratios) / len(ratios) ** 0.5:.2f}" if len(ratios) > 1 else ""
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        against = f"{statistics.mean(ratios):+.2f}{spread}%"
        print(f"| {contender} | {shown} | {statistics.mean(losses):.4f} | {against} |", flush=True)


class EqualNorm(PlainGradients):
    """Gradients whose norm costs nothing, so that the step alone is measured."""

    def sum_of_squares(self, bucket: int) -> Tensor:
        return torch.ones((), dtype=torch.float64)


def step(numel: int, rounds: int) -> None:
    print("| weights, gradients | optimizer | bytes a parameter | processor ms | extra MB |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("adamw", "adamw8bit", "lion", "lion8bit"):
            grad = torch.ones(numel // 1024 * 1024, dtype=dtype)
            piece = SliceWithGrad("layers.0.weight", 0, (numel // 1024, 1024), torch.ones_like(grad), grad, grad)
            optimizer = MixedPrecisionOptimizer(
                EqualNorm([[piece]]), rules_of(name, DECAY), 0.0, LossScaler(enabled=False)
            )  # fmt: skip
            kept = sum(tensor.nbytes for _, tensors in optimizer.named_state() for tensor in tensors.values())
            seconds, extra = [], 0
            # In the first step, memory of the state is touched for the first time.
            for _ in range(rounds + 1):
                grad.normal_()
                start = time.process_time()
                extra = resident_growth(lambda it=optimizer: it.step(1e-3)) or 0
                seconds.append(time.process_time() - start)
            print(
                f"| {str(dtype).removeprefix('torch.')} | {name} | {kept / len(grad):.2f} | "
                f"{1e3 * statistics.median(seconds[1:]):.0f} | {extra / 1e6:.0f} |", flush=True
            )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description="Compare optimizers.")
    parser.add_argument("part", choices=("quality", "step"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--contenders", default="adamw,adamw8bit,lion:3,lion8bit:3")
    parser.add_argument("--parameters", type=int, default=125_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    print(f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    if args.part == "quality":
        quality(args.contenders.split(","), args.rows, args.steps, args.seeds)
    else:
        step(args.parameters, args.rounds)
    return 0


if __name__ == "__main__":
    run_main(main)
