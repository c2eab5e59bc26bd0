"""SFT and DPO against TRL: same model, records, dtype, threads and machine, one process.

    python -m demo.run                                          (for its tokenizer, conversations and preferences)
    python -m benchmarks.sft_dpo --talk out/demo/talk --tokenizer_dir out/demo/tokenizer --work_dir W/bench

Needs requirements-bench.txt. Each case runs alone in a new process; the cases take turns, --rounds times. For each it
prints real tokens per second (without padding, with prompts; the median of the steps, without the first few), seconds
per step, and the growth of the process from before training to its peak.

TRL's trainers run with the defaults of `SFTConfig` and `DPOConfig`, except for batch size, dtype and saves, which are
off; `-gc` turns off gradient checkpointing, which TRL uses by default. A step of ours has as many sequences as TRL's
(packed: about as many), and clips and steps AdamW in the same way.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from pathlib import Path

from runs.layout import RunPaths
from utils.paths import a_path
from utils.terminal import run_main

_SKIPPED_STEPS = 3
MAX_SEQ_LEN = 1024


def shape(args: argparse.Namespace) -> list[str]:
    return [
        f"--hidden_size={args.hidden_size}", f"--num_hidden_layers={args.layers}",
        f"--num_attention_heads={args.hidden_size // 64}",
    ]  # fmt: skip


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def present_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_base(args: argparse.Namespace) -> Path:
    """Hugging Face folder with untrained weights, used by both."""
    import torch
    from safetensors.torch import save_file

    from model import Decoder, ModelConfig, hf
    from model.config import padded_vocab_size
    from tokenizer import load_tokenizer

    base = Path(args.work_dir) / "base"
    tokenizer = load_tokenizer(args.tokenizer_dir)
    config = ModelConfig(
        hidden_size=args.hidden_size, num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64
    ).resolve(padded_vocab_size(tokenizer.vocab_size), MAX_SEQ_LEN)
    model = Decoder(config)
    model.initialize(0)
    base.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in hf.named_weights(model).items()}, base / "model.safetensors", {"format": "pt"}
    )
    (base / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32, tokenizer.eod_id)))
    tokenizer.save_pretrained(base)
    return base


def run_ours(case: str, args: argparse.Namespace) -> dict:
    """Figures of a plain training run, from its log."""
    import torch

    import train_my_ddp

    task = case.split()[0]
    talk, out_dir = Path(args.talk) / task, Path(args.work_dir) / f"run-{os.getpid()}"
    packed = "packed" in case.split()
    # About ten of these conversations fill a row.
    batch = max(1, args.batch // 10) if packed else args.batch
    torch.set_num_threads(args.threads)
    before = present_mb()
    code = train_my_ddp.main([
        f"--task_type={task}", f"--data_dir={talk}", f"--init_from={Path(args.work_dir) / 'base'}",
        f"--out_dir={out_dir}", f"--max_seq_len={MAX_SEQ_LEN}", f"--train_batch_size={batch}",
        "--gradient_accumulation_steps=1", f"--max_iters={args.steps}", f"--dtype={args.dtype}",
        f"--num_threads={args.threads}", "--learning_rate=2e-5", "--device=cpu", "--valid_batch_size=8",
        "--packing" if packed else "--no-packing",
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    records = [json.loads(line) for line in RunPaths(out_dir).reslog.read_text().splitlines()]
    steps = [record for record in records if record["name"] == "train"][_SKIPPED_STEPS:]
    return {
        "tokens_per_sec": statistics.median(record["tokens_per_sec"] for record in steps),
        "seconds": statistics.median(record["dt"] for record in steps), "grew_mb": peak_mb() - before,
    }  # fmt: skip


def run_trl(case: str, args: argparse.Namespace) -> dict:
    """TRL's trainer, timed by a callback."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from data_preprocess.record_compiler import Compiler, CompilerOptions
    from tokenizer import load_tokenizer

    task, *options = case.split()
    torch.set_num_threads(args.threads)
    base = Path(args.work_dir) / "base"
    records = [json.loads(line) for line in next((Path(args.talk) / task).glob("*.jsonl")).read_text().splitlines()]
    records = records[: args.steps * args.batch * 4]
    compiler = Compiler(load_tokenizer(base), CompilerOptions(task, MAX_SEQ_LEN))

    batch = max(1, args.batch // 10) if "packed" in options else args.batch

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    common = {
        "output_dir": str(Path(args.work_dir) / f"trl-{os.getpid()}"), "max_steps": args.steps, "use_cpu": True,
        "per_device_train_batch_size": batch, "save_strategy": "no", "report_to": [], "logging_steps": 1000,
        "max_length": MAX_SEQ_LEN, "bf16": args.dtype == "bfloat16", "learning_rate": 2e-5, "disable_tqdm": True,
    }  # fmt: skip
    if "-gc" in options:
        common["gradient_checkpointing"] = False
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    clock, tokens = Clock(), []
    if task == "sft":
        samples = [compiler.compile(compiler.parse(record)).samples[0][0] for record in records]
        rows = [
            {"input_ids": s.ids, "labels": [i if learnt else -100 for i, learnt in zip(s.ids, s.supervised)]}
            for s in samples
        ]
        config = SFTConfig(**common, packing="packed" in options)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                             callbacks=[clock])  # fmt: skip
    else:
        rows = [
            {
                "prompt": [{"role": "user", "content": record["prompt"]}],
                "chosen": [{"role": "assistant", "content": record["chosen"]}],
                "rejected": [{"role": "assistant", "content": record["rejected"]}],
            }
            for record in records
        ]
        config = DPOConfig(**common, precompute_ref_log_probs="precomputed" in options)
        trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                             callbacks=[clock])  # fmt: skip
    collate = trainer.data_collator

    def counting(examples: list) -> dict:
        batch = collate(examples)
        # As in ours, a sequence of n tokens has n - 1 positions.
        mask = batch.get("attention_mask")
        real = int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        tokens.append(real - len(batch["input_ids"]))
        return batch

    trainer.data_collator = counting
    before = present_mb()
    trainer.train()
    # The loader reads ahead, but batches keep the order of the steps.
    rates = [count / seconds for count, seconds in zip(tokens, clock.seconds)][_SKIPPED_STEPS:]
    return {
        "tokens_per_sec": statistics.median(rates),
        "seconds": statistics.median(clock.seconds[_SKIPPED_STEPS:]), "grew_mb": peak_mb() - before,
    }  # fmt: skip


CASES = {
    "sft": ["ours sft packed", "ours sft", "trl sft", "trl sft -gc", "trl sft packed -gc"],
    "dpo": ["ours dpo", "trl dpo", "trl dpo -gc", "trl dpo -gc precomputed"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.sft_dpo", description=__doc__.splitlines()[0])
    parser.add_argument("--talk", type=a_path, required=True, help="folder with the demo's sft and dpo")
    parser.add_argument("--tokenizer_dir", type=a_path, required=True)
    parser.add_argument("--work_dir", type=a_path, required=True)
    parser.add_argument("--task", choices=["sft", "dpo", "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="sequences (DPO: pairs) per step; TRL's default is 8")
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        who, case = args.case.split(" ", 1)
        print("RESULT " + json.dumps((run_ours if who == "ours" else run_trl)(case, args)))
        return 0
    make_base(args)
    cases = [case for task in CASES if args.task in (task, "both") for case in CASES[task]]
    results: dict[str, list[dict]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            command = [sys.executable, "-m", "benchmarks.sft_dpo", *sys.argv[1:], "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                print(f"{case}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                return 1
            results[case].append(json.loads(line.removeprefix("RESULT ")))
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, {args.dtype}, {args.batch} sequences")
    print(f"{'case':28s} {'real tokens/s':>14s} {'lowest':>8s} {'highest':>8s} {'s a step':>9s} {'grew MB':>8s}")
    for case, runs in results.items():
        rates = sorted(run["tokens_per_sec"] for run in runs)
        print(
            f"{case:28s} {statistics.median(rates):14,.0f} {rates[0]:8,.0f} {rates[-1]:8,.0f} "
            f"{statistics.median(run['seconds'] for run in runs):9.3f} "
            f"{statistics.median(run['grew_mb'] for run in runs):8,.0f}"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
