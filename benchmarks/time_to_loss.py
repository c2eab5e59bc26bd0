"""Held-out bits per byte over training time: nanoGPT's model and ours, on one machine.

    git clone https://github.com/karpathy/nanoGPT /elsewhere/nanoGPT
    python -m benchmarks.time_to_loss --nanogpt /elsewhere/nanoGPT --seconds 480

Both read the demo's corpus (the Python standard library's source) with one tokenizer, one split and 256 tokens of
context, and have 6 layers of width 384 with 6 heads and tied embeddings. One after the other, with all cores:

    nanoGPT    its model.py and AdamW under the steps of its train.py (random windows, clipping, cosine to a tenth that
               ends with the time), for --seconds
    ours       train_my_ddp.py with benchmarks/time_to_loss.yaml, for --iters steps; its schedule ends with them

Only training steps are timed; start-up, compilation of nanoGPT, validation and saves are excluded on both sides. The
held-out modules are scored whole, in the same rows and with the same labels. nanoGPT is float32 on a CPU; with
--nanogpt_dtype=bfloat16 it multiplies under torch.autocast, as it does on a GPU. It uses torch's unfused AdamW, as it
does on a CPU; ours is fused, and reads its data in a thread. Results are kept in --dir, and a part with the same
settings is not run again.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality_under_compression import ROOT
from dataset.format import map_tokens, read_bin_header
from dataset.loader import validation_batches
from dataset.pretrain import PretrainDataset
from demo.run import data_stages, records_of, run
from model.loss import IGNORE_INDEX, cross_entropy_sum
from runs.layout import RunPaths
from tokenizer import load_tokenizer
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

SEQ_LEN, LAYERS, HEADS, WIDTH = 256, 6, 6, 384
CONFIG = "benchmarks/time_to_loss.yaml"
Point = tuple[float, int, float]
"""Seconds of training, tokens read, held-out bits per byte."""


def load_nanogpt(directory: Path) -> object:
    """nanoGPT's model.py as a module.

    Raises:
        ValueError: there is no model.py.
    """
    path = directory / "model.py"
    if not path.exists() or "class GPTConfig" not in path.read_text():
        raise ValueError(f"{directory} is not a checkout of nanoGPT: it has no model.py with a GPTConfig")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks up its module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def bits_per_byte(logits_of: Callable[[torch.Tensor], torch.Tensor], data: Path, rows: int = 16) -> float:
    """Bits per byte of all held-out modules, as LanguageModelTask counts them; nanoGPT has no document mask."""
    valid = PretrainDataset(data, "valid", SEQ_LEN)
    byte_lengths = torch.tensor(load_tokenizer(data / "tokenizer").token_byte_lengths())
    nats = text_bytes = 0.0
    for _, batch in validation_batches(valid, rows, 0, 0, 1)[1]:
        labels = batch["labels"]
        logits = logits_of(batch["input_ids"])
        nats += cross_entropy_sum(logits, labels).item()
        text_bytes += byte_lengths[labels[labels != IGNORE_INDEX]].sum().item()
    return nats / math.log(2) / text_bytes


def random_batches(data: Path, batch: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows at random places of all training tokens, as in nanoGPT's get_batch."""
    shards = [map_tokens(path, read_bin_header(path)) for path in sorted(data.glob("train*.bin"))]
    tokens = torch.from_numpy(np.concatenate(shards).astype(np.int64))
    while True:
        places = torch.randint(len(tokens) - SEQ_LEN, (batch,), generator=generator)
        rows = torch.stack([tokens[place : place + SEQ_LEN + 1] for place in places.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train_nanogpt(args: argparse.Namespace, data: Path) -> list[Point]:
    """Train with the steps of nanoGPT's train.py until the time is over."""
    nanogpt = load_nanogpt(Path(args.nanogpt))
    torch.manual_seed(1337)
    vocab_size = PretrainDataset(data, "train", SEQ_LEN).header.vocab_size
    config = nanogpt.GPTConfig(SEQ_LEN, vocab_size, LAYERS, HEADS, WIDTH, dropout=0.0, bias=False)
    model = nanogpt.GPT(config)
    optimizer = model.configure_optimizers(0.1, args.nanogpt_lr, (0.9, args.nanogpt_beta2), "cpu")
    compiled = torch.compile(model) if args.nanogpt_compile else model
    # As in its train.py on a GPU; on a CPU that has only float32.
    lower = args.nanogpt_dtype != "float32"
    autocast = torch.autocast("cpu", getattr(torch, args.nanogpt_dtype)) if lower else nullcontext()
    batches = random_batches(data, args.nanogpt_batch, torch.Generator().manual_seed(1337))
    x, y = next(batches)
    with autocast:
        loss = compiled(x, y)[1]
    loss.backward()
    optimizer.zero_grad(set_to_none=True)

    def score() -> float:
        model.eval()
        with torch.no_grad():
            # Given targets, it returns the logits of all positions.
            bits = bits_per_byte(lambda rows: model(rows, rows)[0], data)
        model.train()
        return bits

    seconds, step, points, due = 0.0, 0, [], args.seconds / args.points
    warmup_s = 0.05 * args.seconds
    while seconds < args.seconds:
        started = time.perf_counter()
        # Its schedule by steps, but counted in time, so that the number of steps need not be known beforehand.
        done = (seconds - warmup_s) / (args.seconds - warmup_s)
        cosine = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done))
        lr = args.nanogpt_lr * ((seconds + 1.0) / (warmup_s + 1.0) if seconds < warmup_s else cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast:
            _, loss = compiled(x, y)
        x, y = next(batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        seconds += time.perf_counter() - started
        step += 1
        if seconds >= min(due, args.seconds):
            due += args.seconds / args.points
            points.append((seconds, step * args.nanogpt_batch * SEQ_LEN, score()))
            print(f"nanoGPT {seconds:6.1f} s, step {step}, loss {loss:.4f}, held out {points[-1][2]:.4f}", flush=True)
    return points


def train_ours(args: argparse.Namespace, home: Path, data: Path) -> list[Point]:
    """Points of a run of train_my_ddp.py, which is made if missing."""
    settings = json.dumps([args.iters, args.points, args.flag, (ROOT / CONFIG).read_text()])
    run_dir = home / f"run-{args.iters}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    ends = records_of(run_dir, "end") if RunPaths(run_dir).reslog.exists() else []
    if not any(end["reason"] == "finished" for end in ends):
        interval = max(1, args.iters // args.points)
        run([
            "python", "train_my_ddp.py", CONFIG, f"--data_dir={data}", f"--out_dir={run_dir}", "--resume",
            f"--max_iters={args.iters}", f"--valid_interval={interval}", "--log_interval=1", *args.flag,
        ])  # fmt: skip
    seconds, step, points = 0.0, 0, []
    trained = {record["step"]: record for record in records_of(run_dir, "train")}
    if "--compile" in args.flag or "compile: true" in (ROOT / CONFIG).read_text():
        # As for nanoGPT, compilation is excluded: the first step counts like the second.
        trained[1] = trained[1] | {"dt": trained[2]["dt"]}
    for record in records_of(run_dir, "valid"):
        for at in sorted(at for at in trained if step < at <= record["step"]):
            seconds += trained[at]["dt"] * (at - step)
            step = at
        points.append((seconds, trained[step]["tokens"], record["bits_per_byte"]))
    return points


def report(nanogpt: list[Point], ours: list[Point], home: Path, settings: str) -> str:
    target = nanogpt[-1]
    lines = [
        f"{torch.get_num_threads()} threads of {cpu_name()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}",
        settings,
        "",
        "| | seconds | tokens | held-out bits per byte |",
        "|---|---|---|---|",
        *(f"| nanoGPT | {s:.1f} | {tokens:,} | {bits:.4f} |" for s, tokens, bits in nanogpt),
        *(f"| ours | {s:.1f} | {tokens:,} | {bits:.4f} |" for s, tokens, bits in ours),
        "",
    ]
    reached = next((point for point in ours if point[2] <= target[2]), None)
    if reached is None:
        lines.append(f"Ours did not reach nanoGPT's {target[2]:.4f} within {ours[-1][0]:.0f} s.")
    else:
        lines.append(
            f"Ours is at nanoGPT's {target[2]:.4f} or below after {reached[0]:.1f} s: {reached[0] / target[0]:.2f} of "
            f"its {target[0]:.0f} s."
        )
    text = "\n".join(lines) + "\n"
    (home / "table.md").write_text(text)
    return text


def plot(nanogpt: list[Point], ours: list[Point], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in (("nanoGPT", nanogpt), ("zero2all", ours)):
        axes.plot([s for s, _, _ in points], [bits for _, _, bits in points], marker="o", markersize=4, label=name)
    axes.axhline(nanogpt[-1][2], color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds of training", ylabel="held-out bits per byte", xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=a_path, required=True, help="a checkout of nanoGPT, outside this tree")
    parser.add_argument("--dir", type=a_path, default="out/time_to_loss")
    parser.add_argument("--seconds", type=float, default=480.0, help="seconds of training, for nanoGPT")
    parser.add_argument("--points", type=int, default=4, help="validations of each part")
    parser.add_argument("--nanogpt_batch", type=int, default=4, help="rows of a step (4 is the best of 4, 8, 16)")
    parser.add_argument("--nanogpt_lr", type=float, default=1e-3)
    parser.add_argument("--nanogpt_beta2", type=float, default=0.95)
    parser.add_argument("--nanogpt_dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--nanogpt_compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--iters", type=int, default=140, help="our steps (default: 140)")
    parser.add_argument("--flag", action="append", default=[], help="further flag of train_my_ddp.py; repeatable")
    parser.add_argument("--only", choices=["nanogpt", "ours"], help="run only this part")
    args = parser.parse_args()
    home = ROOT / args.dir
    data = home / "data"
    name = f"nanogpt-{args.seconds:g}s-batch{args.nanogpt_batch}-lr{args.nanogpt_lr:g}-beta{args.nanogpt_beta2:g}"
    if args.nanogpt_dtype != "float32":
        name += f"-{args.nanogpt_dtype}"
    kept = home / f"{name}{'' if args.nanogpt_compile else '-eager'}-{args.points}.json"
    try:
        load_nanogpt(Path(args.nanogpt))
    except ValueError as error:
        print(f"benchmarks.time_to_loss: {error}", file=sys.stderr)
        return 2
    if not (data / "pretokenize.json").exists():
        for _, command in data_stages(str(home / "corpus"), str(home / "tokenizer"), str(data)):
            run(command)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    if args.only == "nanogpt":
        points = train_nanogpt(args, data)
        kept.write_text(json.dumps(points))
        return 0
    if args.only is None and not kept.exists():
        # In its own process, like ours.
        subprocess.run([sys.executable, "-m", "benchmarks.time_to_loss", *sys.argv[1:], "--only=nanogpt"], check=True)
    ours = train_ours(args, home, data)
    if args.only is None:
        nanogpt = [tuple(point) for point in json.loads(kept.read_text())]
        settings = (
            f"nanoGPT: {args.nanogpt_dtype}, {args.nanogpt_batch} x {SEQ_LEN} tokens, learning rate "
            f"{args.nanogpt_lr:g}, beta2 {args.nanogpt_beta2:g}, {'' if args.nanogpt_compile else 'not '}compiled; "
            f"ours: {' '.join([CONFIG, *args.flag])}, {args.iters} steps"
        )
        print(report(nanogpt, ours, home, settings))
        plot(nanogpt, ours, home / "time_to_loss.png")
    return 0


if __name__ == "__main__":
    run_main(main)
