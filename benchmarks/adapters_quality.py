"""Held-out loss of SFT with LoRA against full fine-tuning, each at its best learning rate.

    python -m demo.run                                          (for its model, conversations and tokenizer)
    python -m benchmarks.adapters_quality --demo out/demo --work_dir W

The demo's model learns the demo's conversations: AdamW, the same schedule, batch and steps for all. First, each way
tries its learning rates with one seed; then the best one runs with the other seeds, which decide the order of the
samples and the first values of A. Finished runs are remembered in W/results.jsonl, so that the command can be killed
and begun again.

"+ embedding" also trains the (tied) matrix of the vocabulary, by --lora_modules_to_save: pretraining never saw the
tokens that begin and end a message, and without it their rows stay as random as they are.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import shutil
import statistics
import subprocess
from pathlib import Path

from runs.layout import RunPaths
from runs.reslog import read_reslog
from utils.paths import a_path
from utils.terminal import run_main

LORA = ("--lora_r=16", "--lora_alpha=32", "--lora_target_modules=all-linear")
WAYS: dict[str, tuple[str, ...]] = {
    "full": (), "LoRA r=16": LORA, "LoRA r=16 + embedding": (*LORA, "--lora_modules_to_save=embed_tokens"),
}  # fmt: skip
"""Way -> its flags."""
RATES = {
    "full": (1e-3, 2e-3, 4e-3),
    "LoRA r=16": (3e-3, 5e-3, 1e-2),
    "LoRA r=16 + embedding": (3e-3, 5e-3, 1e-2),
}


def train(args: argparse.Namespace, way: str, rate: float, seed: int) -> float:
    """The held-out loss of a run."""
    results = Path(args.work_dir) / "results.jsonl"
    key = {"way": way, "rate": rate, "seed": seed, "steps": args.steps}
    for line in results.read_text().splitlines() if results.exists() else ():
        found = json.loads(line)
        if key.items() <= found.items():
            return found["loss"]
    demo, out_dir = Path(args.demo), Path(args.work_dir) / "run"
    shutil.rmtree(out_dir, ignore_errors=True)
    command = [
        sys.executable, "train_my_ddp.py", "configs/demo-sft-cpu.yaml", f"--data_dir={demo / 'talk' / 'sft'}",
        f"--valid_data_dir={demo / 'talk' / 'sft_valid'}", f"--init_from={demo / 'run'}", f"--out_dir={out_dir}",
        f"--max_iters={args.steps}", "--optimizer=adamw", "--no-use_distributed_optimizer", "--beta2=0.99",
        f"--learning_rate={rate}", f"--seed={seed}", f"--num_threads={args.threads}", f"--dtype={args.dtype}",
        *WAYS[way],
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode:
        raise ValueError(f"a run failed: {' '.join(command)}\n{done.stdout[-2000:]}")
    loss = [record["loss"] for record in read_reslog(RunPaths(out_dir).reslog) if record["name"] == "valid"][-1]
    with open(results, "a") as file:
        file.write(json.dumps(key | {"loss": loss}) + "\n")
    print(f"{way}, rate {rate:g}, seed {seed}: {loss:.4f}", flush=True)
    return loss


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.adapters_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=a_path, required=True, help="folder of a demo that ran to its end")
    parser.add_argument("--work_dir", type=a_path, required=True)
    parser.add_argument("--steps", type=int, default=960)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    tried = {way: {rate: train(args, way, rate, 1) for rate in RATES[way]} for way in args.ways}
    best = {way: min(losses, key=losses.__getitem__) for way, losses in tried.items()}
    final = {way: [train(args, way, best[way], seed) for seed in range(1, args.seeds + 1)] for way in args.ways}
    print(f"\n{'way':24s} {'rate':>8s} {'mean':>8s} {'lowest':>8s} {'highest':>8s} {'of full':>8s}")
    reference = statistics.mean(final["full"]) if "full" in final else float("nan")
    for way, losses in final.items():
        mean = statistics.mean(losses)
        print(
            f"{way:24s} {best[way]:8g} {mean:8.4f} {min(losses):8.4f} {max(losses):8.4f} {mean / reference - 1:+8.1%}"
        )
    for way, losses in tried.items():
        print(f"{way}, seed 1: " + ", ".join(f"{rate:g} -> {loss:.4f}" for rate, loss in losses.items()))
    return 0


if __name__ == "__main__":
    run_main(main)
