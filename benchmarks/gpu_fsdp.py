"""Everything about FSDP that needs GPUs, in one command, with a dated report of what came out.

    python -m benchmarks.gpu_fsdp --hardware h200 [--size 1.1b] [--out_dir benchmarks/results]

On as many ranks as there are GPUs (one is enough), each part a process of its own:

    tests      tests/gpu/test_fsdp_cuda.py: losses, resumed bits, memory, host memory, two machines of two GPUs
    step       benchmarks.fsdp: our engine beside torch's loop, with and without gathering twice; four GPUs: HSDP
    memory     benchmarks.step_memory: bytes of a rank beside the formula, per way to share the work

A part that fails is in the report with its last lines, and the exit code is 1.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import datetime
import shlex
import subprocess
from pathlib import Path

import torch

from model.memory import SIZES
from utils.files import atomic_write
from utils.paths import a_path
from utils.terminal import run_main

PART_SECONDS = 1200


def parts(args: argparse.Namespace, gpus: int) -> dict[str, list[str]]:
    """Title -> arguments of Python."""
    shape = SIZES[args.size][1].resolve(max_seq_len=args.max_seq_len)
    step = ["-m", "parallel.launch", "--standalone", f"--nproc_per_node={gpus}", "-m", "benchmarks.fsdp",
            "--dtype=bfloat16", f"--hidden_size={shape.hidden_size}", f"--layers={shape.num_hidden_layers}",
            f"--vocab_size={shape.vocab_size}", f"--rows={args.rows}", f"--seq_len={args.max_seq_len}",
            f"--rounds={args.rounds}"]  # fmt: skip
    memory = ["-m", "benchmarks.step_memory", f"--size={args.size}", f"--train_batch_size={args.rows}",
              f"--max_seq_len={args.max_seq_len}", f"--ranks={gpus}"]  # fmt: skip
    found = {
        "Tests": ["-m", "pytest", "-q", "-rs", "tests/gpu/test_fsdp_cuda.py"],
        "Step": step,
        "Step, weights gathered once": [*step, "--no-reshard_after_forward"],
    }
    if gpus >= 4:
        found["Step, HSDP on two halves"] = [*step, "--data_parallel=hsdp", f"--ranks_per_machine={gpus // 2}"]
    return found | {"Memory": memory}


def run_part(arguments: list[str]) -> tuple[bool, str]:
    """(Whether it succeeded, the end of what it printed)."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=PART_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"not done within {PART_SECONDS} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return done.returncode == 0, "\n".join(lines[-30:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_fsdp", description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", required=True, help="for the report's name, such as h200")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--max_seq_len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out_dir", type=a_path, default="benchmarks/results")
    parser.add_argument("--only", default="", help="parts whose titles begin so")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus:
        raise SystemExit("benchmarks.gpu_fsdp needs a GPU; on a CPU run benchmarks.fsdp and benchmarks.step_memory")
    date = datetime.date.today().isoformat()
    lines = [
        f"# FSDP on {gpus} x {torch.cuda.get_device_name()}, {date}", "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}.",
    ]
    failed = False
    for title, arguments in parts(args, gpus).items():
        if not title.startswith(args.only):
            continue
        succeeded, output = run_part(arguments)
        failed |= not succeeded
        lines += ["", f"## {title}{'' if succeeded else ': FAILED'}", "", f"    python {shlex.join(arguments)}", ""]
        lines += [line if line.startswith("|") else f"    {line}" for line in output.splitlines()]
        print("\n".join(lines[-40:]), flush=True)
    report = Path(args.out_dir) / f"fsdp_{gpus}x{args.hardware}_{date}.md"
    atomic_write(report, ("\n".join(lines) + "\n").encode())
    print(f"wrote {report}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
