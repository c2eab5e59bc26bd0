"""How long the ranks of a pipeline wait in each schedule, beside the formulas, as a table and a picture.

    python -m benchmarks.pipeline_bubble --png bubbles.png              about two minutes
    python -m benchmarks.pipeline_bubble --work compute --ranks 2

Steps of our engine on gloo, with real sends and waits. `sleep`: a stage's passes compute a tiny model and then sleep;
F, I and W equally long (as in the formulas) and the same in every stage, so that four ranks do not compete for two
cores. `compute`: the passes take what a real model takes; use no more ranks than cores. A rank waits while none of its
stages works, from the first start to the last end of all ranks. Of some steps, the one of median length counts.

    formula     equal stages, F, I and W (parallel/schedules.py)
    predicted   the schedule simulated with the mean times of each stage's passes, as measured

torch computes the whole backward pass of the first stage in its W, as nobody waits for its I.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model import ModelConfig
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rules import new_rules
from parallel import DistContext, ParallelConfig, PowerSGDConfig, destroy_context, init_context
from parallel.engine import Batch, EngineParts, StepPlan
from parallel.engines import model_cutter, open_engine
from parallel.gradients import square
from parallel.mesh import plan_mesh
from parallel.schedules import StageTimes, formula, predict
from parallel.stages import Stages
from tasks.language_model import LanguageModelTask
from training.build_model import build_model
from training.config import SystemConfig
from utils.machine import cpu_name
from utils.terminal import run_main

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}
"""Name -> stages a rank."""
VOCAB = 64
COLOURS = {"F": "#7fb3d9", "B": "#2f6fa8", "I": "#2f6fa8", "W": "#f0a03c"}
LEGEND = {"F": "forward", "B": "backward (zero-bubble: of the input)", "W": "backward, of the weights"}


class Pass(NamedTuple):
    """A pass of a micro-batch through a stage, and its time in seconds."""

    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


class Recorder:
    """Notes the passes of this rank's stages.

    Args:
        pause_s: seconds that a stage sleeps in each of F, I and W.
    """

    def __init__(self, engine: Any, is_split: bool, pause_s: float):
        self.passes: list[Pass] = []
        self._inner, self._is_split, self._pause_s = engine._idle.working, is_split, pause_s
        engine._idle.working = self.working

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """name: as "forward 3, stage 0"."""
        what, number, _, stage = name.replace(",", "").split()
        kind = {"forward": "F", "backward": "I" if self._is_split else "B", "weights": "W"}[what]
        parts = {"F": 1, "B": 2, "I": int(stage) and 1, "W": 1 if int(stage) else 2}[kind]
        with self._inner(name):
            start = time.perf_counter()
            yield
            time.sleep(parts * self._pause_s)
            self.passes.append(Pass(kind, int(stage), int(number), start, time.perf_counter()))


def steps_of(args: argparse.Namespace, schedule: str, context: DistContext) -> list[list[Pass]]:
    """This rank's passes in each step."""
    a_rank = SCHEDULES[schedule]
    is_sleep, count = args.work == "sleep", context.world_size * a_rank
    # With embedding and head, so that all stages have as many blocks.
    layers = count if is_sleep else args.layers
    parts = [layers // count] * count
    parts[0], parts[-1] = parts[0] + 1, parts[-1] + 1
    config = ParallelConfig(
        pipeline_model_parallel_size=context.world_size, pipeline_schedule=schedule,
        pipeline_parts=",".join(map(str, parts)),
    )  # fmt: skip
    stages = Stages(tuple(parts), context.world_size, "v" if schedule == "zbv" else "loop")
    width, length = (32, 16) if is_sleep else (args.hidden_size, args.seq_len)
    shape = ModelConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=length,
    ).resolve(max_seq_len=length)  # fmt: skip
    mesh = plan_mesh(config, context)
    cutter = model_cutter(config, context, mesh, torch.float32, stages)
    assert cutter is not None
    model = build_model(shape, SystemConfig(), 0, context.device, torch.float32, None, cutter=cutter).train()
    rules = new_rules("adamw", AdamWConfig(), MuonConfig(), LionConfig(), "torch", model.roles())
    engine = open_engine(
        EngineParts(
            config, PowerSGDConfig(), context, mesh, model, to_device=lambda batch: batch,
            new_optimizer=lambda gradients: MixedPrecisionOptimizer(gradients, rules, 1.0, LossScaler(enabled=False)),
            square=square, loss_scale=lambda: 1.0, is_fp16=False, seed=0, division=cutter.division,
            groups=cutter.groups, stages=stages, micro_batches=args.micro_batches,
        )
    )  # fmt: skip
    task = LanguageModelTask(model, 0, torch.ones(VOCAB))
    recorder = Recorder(engine, schedule in ("zero_bubble", "zbv"), args.pause_ms / 1e3 / a_rank if is_sleep else 0.0)
    batches, tokens = rows(args.micro_batches, length), args.micro_batches * length
    steps = []
    for number in range(1, args.steps + 2):
        context.barrier()
        recorder.passes = []
        plan = StepPlan(number, 1e-4, tokens, lambda: None)
        engine.forward_backward(batches, task, plan)
        engine.step(plan)
        steps.append(recorder.passes)
    engine.close()
    # The first one also opens connections.
    return steps[1:]


def rows(count: int, length: int) -> list[Batch]:
    """Micro-batches of one row each."""
    ids = torch.arange(length)[None] % VOCAB
    return [{"input_ids": ids, "labels": ids, "positions": torch.arange(length)[None]} for _ in range(count)]


def measure(args: argparse.Namespace) -> None:
    """One rank's work: rank 0 writes schedule -> each rank's passes in the step of median length."""
    torch.set_num_threads(1)
    context, results = init_context("cpu"), {}
    for schedule in args.schedules.split(","):
        everyone = context.gather([list(map(list, step)) for step in steps_of(args, schedule, context)])
        steps = [[[Pass(*each) for each in passes] for passes in step] for step in zip(*everyone)]
        results[schedule] = sorted(steps, key=length_of)[len(steps) // 2]
    if context.is_main:
        Path(args.out).write_text(json.dumps(results))
    destroy_context(context)


def length_of(ranks: list[list[Pass]]) -> float:
    every = [each for passes in ranks for each in passes]
    return max(each.end for each in every) - min(each.start for each in every)


def waits_of(ranks: list[list[Pass]]) -> list[float]:
    """Share of the step in which each rank waits."""
    return [1 - sum(each.end - each.start for each in passes) / length_of(ranks) for passes in ranks]


def predicted_waits(schedule: str, ranks: list[list[Pass]], micro_batches: int) -> list[float]:
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for passes in ranks:
        for each in passes:
            times[each.stage, each.kind].append(each.end - each.start)
    mean = {key: statistics.mean(its) for key, its in times.items()}
    count = len(ranks) * SCHEDULES[schedule]
    stages = Stages((1,) * count, len(ranks), "v" if schedule == "zbv" else "loop")
    of_stages = [
        StageTimes(mean[s, "F"], mean.get((s, "I"), mean.get((s, "B"), 0.0)), mean.get((s, "W"), 0.0))
        for s in range(count)
    ]
    return list(predict(schedule, stages, micro_batches, of_stages).bubbles)


def table(results: dict[int, dict[str, list[list[Pass]]]], micro_batches: int) -> str:
    lines = [
        f"| ranks | schedule | stages a rank | step, ms | waits, measured | formula, m = {micro_batches} | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for count, by_schedule in results.items():
        for schedule, ranks in by_schedule.items():
            a_rank = SCHEDULES[schedule]
            measured, predicted = waits_of(ranks), predicted_waits(schedule, ranks, micro_batches)
            lines.append(
                f"| {count} | {schedule} | {a_rank} | {1e3 * length_of(ranks):.0f} | {in_words(measured)} | "
                f"{formula(schedule, count, a_rank, micro_batches):.1%} | {in_words(predicted)} |"
            )
    return "\n".join(lines)


def in_words(shares: list[float]) -> str:
    return f"{min(shares):.1%} to {max(shares):.1%}"


def plot(results: dict[int, dict[str, list[list[Pass]]]], micro_batches: int, path: Path) -> None:
    """Draw the passes of all ranks: a column for each number of ranks, a row for each schedule."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    names = list(next(iter(results.values())))
    figure, axes = plt.subplots(
        len(names), len(results), figsize=(6.2 * len(results), 1.35 * len(names) + 0.5), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column, (count, by_schedule) in enumerate(results.items()):
        longest = max(map(length_of, by_schedule.values()))
        for row, schedule in enumerate(names):
            draw_step(axes[row][column], by_schedule[schedule], 1e3 * longest)
            waits = statistics.mean(waits_of(by_schedule[schedule]))
            share = formula(schedule, count, SCHEDULES[schedule], micro_batches)
            axes[row][column].set_title(
                f"{schedule}, {count} ranks: waiting {waits:.0%} (formula {share:.0%})", fontsize=9, loc="left"
            )
        axes[-1][column].set_xlabel("ms", fontsize=8)
    patches = [Patch(color=COLOURS[kind], label=label) for kind, label in LEGEND.items()]
    patches.append(Patch(facecolor="white", edgecolor="gray", hatch="///", label="a rank's second stage"))
    figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def draw_step(axis: Any, ranks: list[list[Pass]], longest_ms: float) -> None:
    begin = min(each.start for passes in ranks for each in passes)
    for rank, passes in enumerate(ranks):
        for each in passes:
            left, width = 1e3 * (each.start - begin), 1e3 * (each.end - each.start)
            if width < longest_ms / 1000:
                continue
            # The second stage of a rank is hatched.
            hatch = "///" if each.stage >= len(ranks) else None
            axis.barh(rank, width, left=left, height=0.86, color=COLOURS[each.kind], edgecolor="white", linewidth=0.5,
                      hatch=hatch)  # fmt: skip
            if width > longest_ms / 60:
                colour = "white" if COLOURS[each.kind] == COLOURS["B"] else "black"
                axis.text(left + width / 2, rank, str(each.micro_batch), ha="center", va="center", fontsize=5.5,
                          color=colour)  # fmt: skip
    axis.set(xlim=(0, longest_ms), ylim=(len(ranks) - 0.5, -0.5), yticks=range(len(ranks)), facecolor="#f3f3f3")
    axis.set_yticklabels([f"rank {rank}" for rank in range(len(ranks))], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[:].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.pipeline_bubble", description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=["sleep", "compute"], default="sleep")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--micro_batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pause_ms", type=float, default=20.0, help="sleep: of F, I and W of all stages of a rank")
    parser.add_argument("--hidden_size", type=int, default=256, help="compute: width of the model")
    parser.add_argument("--layers", type=int, default=8, help="compute: blocks, a multiple of all numbers of stages")
    parser.add_argument("--seq_len", type=int, default=512, help="compute: tokens of a micro-batch")
    parser.add_argument("--png", default="")
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        measure(args)
        return
    results: dict[int, dict[str, list[list[Pass]]]] = {}
    for count in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory() as home:
            out = Path(home) / "passes.json"
            subprocess.run(
                [sys.executable, "-m", "parallel.launch", f"--nproc_per_node={count}", "-m",
                 "benchmarks.pipeline_bubble", *sys.argv[1:], f"--out={out}"],
                check=True,
            )  # fmt: skip
            stored = json.loads(out.read_text())
        results[count] = {
            name: [[Pass(*each) for each in passes] for passes in ranks] for name, ranks in stored.items()
        }
    print(f"{cpu_name()}, torch {torch.__version__}, --work {args.work}, median of {args.steps} steps")
    print(table(results, args.micro_batches))
    if args.png:
        plot(results, args.micro_batches, Path(args.png))


if __name__ == "__main__":
    run_main(main)
