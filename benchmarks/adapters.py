"""LoRA and QLoRA against PEFT with TRL's SFTTrainer: same model, tokens, dtype, threads and machine, one process.

    python -m demo.run                                          (for its tokenizer and conversations)
    python -m benchmarks.adapters --demo out/demo --work_dir W --peer PEER/bin/python

PEER/bin/python is an interpreter with requirements-bench.txt, peft and bitsandbytes; ours needs requirements-qlora.txt
for QLoRA. Each case runs alone in a new process; the cases take turns, --rounds times. For each it prints real tokens
per second (without padding, with prompts; the median of the steps, without the first few), seconds per step, and by how
much the process grew from when its programs were imported to its peak: the model, its quantization and the training.

All train the same adapter (r=16, alpha=32, all linear layers) on the same rows of tokens. TRL runs at its best: packed
without padding, no gradient checkpointing, SDPA, weights in the dtype of the training; also with torch.compile. The
larger figure of its cases is the one to compare with.
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
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from runs.layout import RunPaths
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

_SKIPPED_STEPS = 3
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
CASES = (
    "ours lora", "ours lora compiled", "peer lora", "peer lora compiled", "ours qlora", "ours qlora compiled",
    "peer qlora", "peer qlora compiled",
)  # fmt: skip


def memory_mb(name: str) -> float:
    """Memory of this process: "VmRSS" now, "VmHWM" at most. (The peak of resource.getrusage may be its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def figures(seconds: Sequence[float], rates: Sequence[float], losses: Sequence[float], before: float) -> dict:
    kept = slice(_SKIPPED_STEPS, None)
    return {
        "tokens_per_sec": statistics.median(rates[kept]), "seconds": statistics.median(seconds[kept]),
        "grew_mb": memory_mb("VmHWM") - before, "loss": losses[-1],
    }  # fmt: skip


def prepare(args: argparse.Namespace) -> None:
    """Write a folder with untrained weights in the dtype of the training, and the tokens of the conversations."""
    import torch
    from safetensors.torch import save_file

    from data_preprocess.record_compiler import Compiler, CompilerOptions
    from model import Decoder, ModelConfig, hf
    from model.config import padded_vocab_size
    from tokenizer import load_tokenizer

    work, dtype = Path(args.work_dir), getattr(torch, args.dtype)
    tokenizer = load_tokenizer(Path(args.demo) / "tokenizer")
    config = ModelConfig(
        hidden_size=args.hidden_size, num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64
    ).resolve(padded_vocab_size(tokenizer.vocab_size), args.max_seq_len)
    model = Decoder(config)
    model.initialize(0)
    base = work / "base"
    base.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype).contiguous() for name, weight in hf.named_weights(model).items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(hf.to_hf_config(config, dtype, tokenizer.eod_id)))
    tokenizer.save_pretrained(base)
    compiler = Compiler(tokenizer, CompilerOptions("sft", args.max_seq_len))
    rows, room = [], args.steps * args.batch * args.max_seq_len * 2
    with open(Path(args.demo) / "talk" / "sft" / "functions.jsonl") as records, open(work / "rows.jsonl", "w") as file:
        for line in records:
            sample = compiler.compile(compiler.parse(json.loads(line))).samples[0][0]
            labels = [token if learnt else -100 for token, learnt in zip(sample.ids, sample.supervised)]
            file.write(json.dumps({"input_ids": list(map(int, sample.ids)), "labels": list(map(int, labels))}) + "\n")
            rows.append(len(labels))
            if sum(rows) > room:
                break
    num_parameters = sum(weight.numel() for weight in weights.values())
    print(f"{num_parameters / 1e6:.1f} M parameters, {len(rows)} samples of {statistics.mean(rows):.0f} tokens")


def run_ours(case: str, args: argparse.Namespace) -> dict:
    """Figures of a plain training run, from its log."""
    import torch

    import train_my_ddp
    from model import hf, quantized  # noqa: F401
    from parallel import engines  # noqa: F401
    from tasks import registry  # noqa: F401

    if "qlora" in case:
        import bitsandbytes  # noqa: F401
    torch.set_num_threads(args.threads)
    out_dir = Path(args.work_dir) / "run-ours"
    shutil.rmtree(out_dir, ignore_errors=True)
    before = memory_mb("VmRSS")
    code = train_my_ddp.main([
        "--task_type=sft", f"--data_dir={Path(args.demo) / 'talk' / 'sft'}", "--valid_ratio=0",
        f"--init_from={Path(args.work_dir) / 'base'}", f"--out_dir={out_dir}", f"--max_seq_len={args.max_seq_len}",
        f"--train_batch_size={args.batch}", "--gradient_accumulation_steps=1", f"--max_iters={args.steps}",
        f"--dtype={args.dtype}", f"--num_threads={args.threads}", f"--learning_rate={LEARNING_RATE}", "--device=cpu",
        f"--lora_r={RANK}", f"--lora_alpha={ALPHA}", "--lora_target_modules=all-linear",
        *(["--load_in_4bit"] if "qlora" in case else []), *(["--compile"] if "compiled" in case else []),
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    records = [json.loads(line) for line in RunPaths(out_dir).reslog.read_text().splitlines()]
    steps = [record for record in records if record["name"] == "train"]
    columns = ([step[name] for step in steps] for name in ("dt", "tokens_per_sec", "loss"))
    return figures(*columns, before)


def run_peer(case: str, args: argparse.Namespace) -> dict:
    """TRL's trainer with PEFT's adapter, timed by a callback."""
    import bitsandbytes  # noqa: F401
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(args.threads)
    dtype, work = getattr(torch, args.dtype), Path(args.work_dir)
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    before = memory_mb("VmRSS")
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        work / "base", dtype=dtype, attn_implementation="sdpa",
        **({"quantization_config": in_4_bits} if "qlora" in case else {}),
    )  # fmt: skip

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, _args: object, _state: object, _control: object, logs: dict, **__: object) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []

    config = SFTConfig(
        output_dir=str(work / "run-peer"), max_steps=args.steps, use_cpu=True, per_device_train_batch_size=args.batch,
        save_strategy="no", report_to=[], logging_steps=1, max_length=args.max_seq_len, bf16=args.dtype == "bfloat16",
        learning_rate=LEARNING_RATE, disable_tqdm=True, packing=True, gradient_checkpointing=False,
        torch_compile="compiled" in case,
    )  # fmt: skip
    clock, tokens = Clock(), []
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, config, train_dataset=Dataset.from_list(rows), peft_config=adapter, callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(work / "base"),
    )  # fmt: skip
    collate = trainer.data_collator

    def counting(examples: list) -> dict:
        batch = collate(examples)
        # As in ours, a sequence of n tokens has n - 1 positions; the rows are flattened, so that no padding is there.
        tokens.append(int((batch["position_ids"] != 0).sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    # The loader reads ahead, but batches keep the order of the steps.
    return figures(clock.seconds, [n / s for n, s in zip(tokens, clock.seconds)], clock.losses, before)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=a_path, required=True, help="folder with the demo's talk and tokenizer")
    parser.add_argument("--work_dir", type=a_path, required=True)
    parser.add_argument("--peer", type=a_path, default=sys.executable, help="interpreter with peft, trl, bitsandbytes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1, help="packed rows per step (default: 1)")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run = run_ours if args.case.startswith("ours") else run_peer
        print("RESULT " + json.dumps(run(args.case, args)))
        return 0
    prepare(args)
    results: dict[str, list[dict]] = {case: [] for case in args.cases}
    for _ in range(args.rounds):
        for case in args.cases:
            interpreter = args.peer if case.startswith("peer") else sys.executable
            command = [interpreter, "-m", "benchmarks.adapters", *sys.argv[1:], "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                print(f"{case}: failed\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            results[case].append(json.loads(line.removeprefix("RESULT ")))
    print(f"{cpu_name()}, {args.threads} threads, {args.dtype}, {args.batch} rows of {args.max_seq_len}")
    print(f"{'case':22s} {'real tokens/s':>14s} {'lowest':>8s} {'highest':>8s} {'s a step':>9s} {'grew MB':>8s} loss")
    for case, runs in results.items():
        if not runs:
            print(f"{case:22s} failed")
            continue
        rates = sorted(run["tokens_per_sec"] for run in runs)
        seconds, grew, loss = (statistics.median(run[name] for run in runs) for name in ("seconds", "grew_mb", "loss"))
        print(
            f"{case:22s} {statistics.median(rates):14,.0f} {rates[0]:8,.0f} {rates[-1]:8,.0f} {seconds:9.3f} "
            f"{grew:8,.0f} {loss:.2f}"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
