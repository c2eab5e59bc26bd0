"""The whole pipeline on the source of Python's own standard library: `make demo`.

Every stage prints the plain command that it runs. All files go into folders below --dir, which each demo makes anew.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import importlib.util
import json
import lzma
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import indent

from demo.functions import modules_of
from demo.scores import Score, describe, difference, read_answers, score_of, verdict
from runs.exits import STOPPED
from runs.layout import RunPaths
from runs.reslog import read_reslog
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 4096
"""With 8,192 the head takes half of a step's time, and pieces of rare names are seen too seldom to be copied."""
VALID_RATIO = 0.06
"""Holds out about 28 modules."""
QUESTIONS_A_STEP = 4
"""Questions for each DPO step. The model answers each eight times; about half of them give up to four preferences."""
EVALUATED = 16
"""Questions of each task that the report card asks the models."""
TITLES = {"run": "before SFT", "sft": "after SFT", "dpo": "after DPO"}


def show(command: list[str]) -> None:
    print("$ " + shlex.join(command), flush=True)


def run(command: list[str]) -> None:
    """Run a plain command with this interpreter; a failure ends the demo."""
    show(command)
    code = subprocess.run(_executable(command), cwd=ROOT).returncode
    if code:
        raise SystemExit(f"the demo stopped: the command above ended with exit code {code}")


def run_all(*commands: list[str]) -> None:
    for command in commands:
        run(command)


def run_until_half(command: list[str], run_dir: Path, stop_step: int) -> None:
    """Start training, ask it to stop after `stop_step` steps, and check that it saved and ended with STOPPED."""
    show(command)
    reslog = RunPaths(run_dir).reslog
    asked = False
    process = subprocess.Popen(_executable(command), cwd=ROOT)
    while process.poll() is None:
        time.sleep(0.2)
        if not asked and reslog.exists() and any(r.get("step", 0) >= stop_step for r in read_reslog(reslog)):
            print(f"$ kill -TERM {process.pid}    # as a scheduler would, in the middle of the run", flush=True)
            process.send_signal(signal.SIGTERM)
            asked = True
    if process.returncode != STOPPED:
        raise SystemExit("the demo stopped: training should have stopped on request, but did not")


def _executable(command: list[str]) -> list[str]:
    """The command with the interpreter that runs the demo in place of `python`."""
    return [sys.executable, *command[1:]]


def data_stages(
    corpus: str, tokenizer: str, data: str, vocab_size: int = 8192, valid_ratio: float = 0.03
) -> list[tuple[str, list[str]]]:
    """(title, command) of each stage from the standard library's source to an indexed data directory."""
    return [
        ("corpus: the standard library's source", ["python", "-m", "demo.corpus", "--output_dir", corpus]),
        (f"tokenizer: byte-level BPE, {vocab_size:,} entries",
         ["python", "-m", "tokenizer.train_tokenizer", "--data_dir", corpus, "--output_dir", tokenizer,
          "--vocab_size", str(vocab_size), "--kind", "hf_bbpe"]),
        ("pretokenize: text -> .bin",
         ["python", "-m", "data_preprocess.pretokenize_pretrain_data", "--data_dir", corpus, "--tokenizer_dir",
          tokenizer, "--output_dir", data, "--num_workers", "2", "--shard_mb", "2", "--valid_ratio", str(valid_ratio)]),
        ("index: .bin -> .ibin",
         ["python", "-m", "data_preprocess.build_pretrain_sample_index_map", "--data_dir", data,
          "--max_seq_len", "256"]),
        ("look at the data", ["python", "-m", "dataset.inspect", data]),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="The whole pipeline, end to end.")
    parser.add_argument("--dir", type=a_path, default="out/demo", help="directory for all files (default: out/demo)")
    parser.add_argument("--max_iters", type=int, default=900, help="steps of pretraining (default: 900)")
    parser.add_argument("--sft_iters", type=int, default=240, help="steps of SFT (default: 240)")
    parser.add_argument("--dpo_iters", type=int, default=100, help="steps of DPO (default: 100)")
    parser.add_argument("--nproc", type=int, default=2, help="training processes (default: 2)")
    parser.add_argument("--dtype", default="auto", help="train_my_ddp.py's --dtype (default: auto)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of training and sampling (default: 1337)")
    parser.add_argument(
        "--quick", action="store_true", help="show every stage with few steps and questions; the model learns nothing"
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(max_iters=40, sft_iters=8, dpo_iters=4)
    args = parser.parse_args()
    asks = ["--count", "16"] if args.quick else []
    home = Path(args.dir)
    names = ("corpus", "tokenizer", "data", "run", "talk", "sft", "dpo")
    for name in names:
        # Only the folders of an earlier demo; other files there stay.
        shutil.rmtree(ROOT / home / name, ignore_errors=True)
    corpus, tokenizer, data, run_dir, talk, sft_dir, dpo_dir = (str(home / name) for name in names)
    drawn = ["--seed", str(args.seed), "--dtype", args.dtype]

    def training(config: str, data_dir: str, out_dir: str, max_iters: int, *more: str) -> list[str]:
        return [
            "python", "train_my_ddp.py", "--nproc", str(args.nproc), f"configs/{config}.yaml",
            f"--data_dir={data_dir}", f"--out_dir={out_dir}", f"--max_iters={max_iters}",
            f"--dtype={args.dtype}", f"--seed={args.seed}", *more,
        ]  # fmt: skip

    train = training("demo-cpu", data, run_dir, args.max_iters, "--task_type=pretrain")
    sft = training("demo-sft-cpu", f"{talk}/sft", sft_dir, args.sft_iters, f"--init_from={run_dir}",
                   f"--valid_data_dir={talk}/sft_valid")  # fmt: skip
    dpo = training("demo-dpo-cpu", f"{talk}/dpo", dpo_dir, args.dpo_iters, f"--init_from={sft_dir}",
                   f"--valid_data_dir={talk}/dpo_valid")  # fmt: skip

    def completions(name: str, *more: str) -> list[str]:
        return ["python", "-m", "demo.complete", "--ckpt", run_dir, "--corpus_dir", corpus, "--data_dir", data,
                "--output", str(home / f"completions-{name}.json"), *asks, *more, *drawn]  # fmt: skip

    def answers(name: str, split: str = "sft_valid", output: str = "", *more: str) -> list[str]:
        return ["python", "-m", "demo.answer", "--ckpt", str(home / name), "--questions",
                f"{talk}/{split}/functions.jsonl", "--output", str(home / f"answers-{output or name}.jsonl"), *asks,
                *more, *drawn]  # fmt: skip

    def preferences(output: str, split: str) -> list[str]:
        return ["python", "-m", "demo.preferences", "--answers", str(home / f"answers-{output}.jsonl"),
                "--functions", f"{talk}/sft{split}/functions.jsonl",
                "--output", f"{talk}/dpo{split}/functions.jsonl"]  # fmt: skip

    def evaluation(name: str) -> list[str]:
        return ["python", "evaluate_model.py", "--model", str(home / name), "--tasks", "zero", "--limit",
                "4" if args.quick else str(EVALUATED), "--dtype", args.dtype]  # fmt: skip

    data_commands = data_stages(corpus, tokenizer, data, VOCAB_SIZE, VALID_RATIO)
    asked = str(args.dpo_iters * QUESTIONS_A_STEP)
    stages: list[tuple[str, Callable[[], None]]] = [
        *((title, partial(run, command)) for title, command in data_commands),
        ("pretrain: first half, then a SIGTERM", lambda: run_until_half(
            train, ROOT / run_dir, args.max_iters // 2)),
        ("pretrain: resume, finish, validate", lambda: run([*train, "--resume"])),
        ("audit: no sample lost or repeated", lambda: run(["python", "-m", "dataset.audit", run_dir])),
        ("complete held-out functions, untrained and pretrained", lambda: run_all(
            completions("untrained", "--untrained", "--show", "0"), completions("run"))),
        ("conversations from docstrings and functions", lambda: run(
            ["python", "-m", "demo.conversations", "--corpus_dir", corpus, "--data_dir", data, "--output_dir", talk])),
        ("look at what SFT will learn", lambda: run(
            ["python", "-m", "dataset.show_mask", f"{talk}/sft/functions.jsonl", "--tokenizer_dir", tokenizer,
             "--max_seq_len", "256", "--num", "2", "--html", str(home / "mask.html")])),
        ("answers to held-out questions before SFT", lambda: run(answers("run"))),
        ("SFT on the conversations", lambda: run(sft)),
        ("answers after SFT", lambda: run(answers("sft"))),
        ("preferences between the model's own answers to training questions", lambda: run_all(
            answers("sft", "sft", "train", "--count", asked, "--samples", "8"), preferences("train", ""),
            preferences("sft", "_valid"))),
        ("DPO on them", lambda: run(dpo)),
        ("answers after DPO", lambda: run(answers("dpo"))),
        ("evaluate: tasks that need no download, after each training", lambda: run_all(
            *map(evaluation, TITLES))),
        ("curves of the three runs", lambda: draw_curves(home, run_dir, sft_dir, dpo_dir)),
        ("report card of all three", lambda: run(
            ["python", "-m", "evaluation.report", dpo_dir, "--beside", sft_dir, run_dir, "--output", str(home),
             "--title", "Report card of the demo"])),
    ]  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.nproc)))
    times = []
    for number, (title, stage) in enumerate(stages, 1):
        print(f"\n=== {number}/{len(stages)} {title}", flush=True)
        started = time.monotonic()
        stage()
        times.append((title, time.monotonic() - started))
        print(f"=== {times[-1][1]:.1f} s", flush=True)
    summarize(times, ROOT / home)
    return 0


def draw_curves(home: Path, *runs: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is missing (pip install -r requirements-viewer.txt)")
        return
    run(["python", "-m", "utils.resplot", *runs, "--png", str(home / "curves.png"), "--smoothing", "0.8"])


def records_of(run_dir: Path, name: str) -> list[dict]:
    return [record for record in read_reslog(RunPaths(run_dir).reslog) if record["name"] == name]


def xz_bits_per_byte(corpus: Path) -> float:
    """Bits per byte of the held-out modules under xz, one by one: a baseline for the model."""
    texts = [text.encode() for split, _, text in modules_of(corpus, VALID_RATIO) if split == "valid"]
    packed = sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts)
    return 8 * packed / sum(map(len, texts))


def summarize(times: list[tuple[str, float]], home: Path) -> None:
    run_dir = home / "run"
    trained, valid = records_of(run_dir, "train")[-1], records_of(run_dir, "valid")[-1]
    dtype = records_of(run_dir, "start")[-1]["dtype"]
    answers = {name: read_answers(home / f"answers-{name}.jsonl") for name in ("run", "sft", "dpo")}
    print("\n=== result")
    for title, seconds in times:
        print(f"{seconds:8.1f} s  {title}")
    print(f"{sum(seconds for _, seconds in times):8.1f} s  in all, on {os.cpu_count()} cores of {cpu_name()}, {dtype}")
    print(
        f"pretrained on {trained['tokens']:,} tokens; held-out modules: loss {valid['loss']:.3f}, "
        f"{valid['bits_per_byte']:.3f} bits per byte (xz, module by module: {xz_bits_per_byte(home / 'corpus'):.3f})"
    )
    show_answers(answers)
    sft, dpo = (records_of(home / name, "valid")[-1] for name in ("sft", "dpo"))
    print(
        f"held-out conversations after SFT: loss {sft['loss']:.3f} a learnt token; held-out preferences after DPO: "
        f"accuracy {dpo['rewards/accuracies']:.2f}, margin {dpo['rewards/margins']:.3f}"
    )
    for name, title in TITLES.items():
        print(f"{title}: {describe(answers[name])}")
    untrained, completed = (
        Score(json.loads((home / f"completions-{name}.json").read_text())["parts"]) for name in ("untrained", "run")
    )
    scores = {name: score_of(records) for name, records in answers.items()}
    print("\ngain of each stage on held-out modules (a difference of more than two standard errors counts):")
    print_change("pretraining", "completions of functions that parse", untrained, completed)
    print_change("SFT", "answers that are the function asked for", scores["run"], scores["sft"])
    print_change("DPO", "answers that are the function asked for", scores["sft"], scores["dpo"])
    shown = home.relative_to(ROOT) if home.is_relative_to(ROOT) else home
    print(f'\ntry: python generate.py --model {shown / "run"} --prompt "def main("')
    print(f"     python generate.py --model {shown / 'dpo'} --chat    # {answers['dpo'][0]['question']}")
    shorter = ", also make chat" if str(shown) == "out/demo" else ""
    print(f"     python serve.py --model {shown / 'dpo'}    # the same on a page, and an API for programs{shorter}")
    print(f"     open {shown / 'report.html'} in a browser    # what was trained, what it cost, how good it is")
    print(f"     python -m utils.resplot {shown}    # the curves in a window, also while a run goes on")


def show_answers(answers: dict[str, list[dict]], count: int = 3) -> None:
    """Print the first answers to some questions after each stage; the choice does not depend on the answers."""
    total = len(answers["run"])
    for number in range(0, total, max(1, total // count))[:count]:
        print(f"\n--- {answers['run'][number]['question']}")
        for name, title in TITLES.items():
            answer = answers[name][number]["answers"][0]
            print(f"{title} ({'good' if answer['good'] else 'not good'}):\n{indent(answer['text'].strip(), '    ')}")


def print_change(stage: str, what: str, before: Score, after: Score) -> None:
    change = difference(before, after)
    print(f"  {stage:12} {what:40} {before} -> {after}, by {change.mean:+.1%} ± {change.error:.1%}: {verdict(change)}")


if __name__ == "__main__":
    run_main(main)
