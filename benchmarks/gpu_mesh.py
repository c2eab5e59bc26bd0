"""Everything about the mesh that needs several GPUs, in one command, with a dated report of what came out.

    python -m benchmarks.gpu_mesh --hardware h200 [--size 1.1b] [--out_dir benchmarks/results]

On as many ranks as there are GPUs, at least two, each part a process of its own:

    tests      tests/gpu/test_mesh_cuda.py and test_context_cuda.py: losses, resumed bits, kernels, the ring
    step       the training script in each mesh that so many GPUs make: seconds a step and tokens a second, after the
               first steps

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
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu_fsdp import run_part
from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import Corpus
from demo.corpus import copy_standard_library
from model.memory import SIZES
from runs.reslog import read_reslog
from tokenizer.hf_bbpe import train_hf_bbpe
from utils.files import atomic_write
from utils.paths import a_path
from utils.terminal import run_main

_STEPS, _WARM = 14, 4
"""Steps of a run, and those of them that are not measured."""
TENSOR, PIPE, CONTEXT = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"


def meshes(gpus: int) -> dict[str, list[str]]:
    """Title -> flags, for meshes of so many GPUs."""
    found = {"ddp": [], "fsdp": ["--data_parallel=fsdp"]}
    for size in (n for n in (2, 4, 8) if n <= gpus and gpus % n == 0):
        found |= {
            f"tensor {size}": [f"--{TENSOR}={size}"],
            f"tensor {size}, sequence": [f"--{TENSOR}={size}", "--sequence_parallel"],
            f"pipeline {size}": [f"--{PIPE}={size}"],
            f"context {size}": [f"--{CONTEXT}={size}"],
            f"context {size}, ring": [f"--{CONTEXT}={size}", "--context_parallel_method=ring", "--no-document_mask"],
        }
    if gpus % 4 == 0:
        found |= {
            "fsdp, tensor 2": ["--data_parallel=fsdp", f"--{TENSOR}=2"],
            "tensor 2, pipeline 2": [f"--{TENSOR}=2", f"--{PIPE}=2"],
            "tensor 2, context 2": [f"--{TENSOR}=2", "--sequence_parallel", f"--{CONTEXT}=2"],
        }
    return found


def make_data(home: Path, max_seq_len: int) -> Path:
    """Tokens of the standard library. What they say does not matter here."""
    copy_standard_library(home / "corpus")
    texts = (path.read_text("utf-8") for path in sorted((home / "corpus").glob("*.py"))[:60])
    train_hf_bbpe(texts, 512, show_progress=False).save_pretrained(home / "tokenizer")
    corpus, output = Corpus(str(home / "corpus")), home / "tokens"
    process_corpus(PretrainJob(corpus, str(output), str(home / "tokenizer"), valid_ratio=0.05), num_workers=0)
    build(output, max_seq_len)
    return output


def step_command(args: argparse.Namespace, gpus: int, data: Path, out_dir: Path, mesh: list[str]) -> list[str]:
    shape = SIZES[args.size][1].resolve(max_seq_len=args.max_seq_len)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size")  # fmt: skip
    return [
        "-m", "parallel.launch", "--standalone", f"--nproc_per_node={gpus}", "train_my_ddp.py", f"--data_dir={data}",
        f"--out_dir={out_dir}", *(f"--{name}={getattr(shape, name)}" for name in fields),
        f"--max_seq_len={args.max_seq_len}", "--dtype=bfloat16", f"--train_batch_size={args.rows}",
        f"--gradient_accumulation_steps={args.micro_batches * gpus}", f"--max_iters={_STEPS}", "--log_interval=1",
        "--sync_for_true_time", "--valid_iters=1", "--sample_texts=0", "--keep_last=1", *mesh,
    ]  # fmt: skip


def measure(args: argparse.Namespace, gpus: int, data: Path, home: Path) -> tuple[bool, list[str]]:
    """Whether all meshes trained, and the lines of the table."""
    lines = ["| mesh | s a step | tokens/s | against ddp |", "|---|---|---|---|"]
    base, succeeded = 0.0, True
    for number, (title, mesh) in enumerate(meshes(gpus).items()):
        out_dir = home / f"run-{number}"
        done, output = run_part(step_command(args, gpus, data, out_dir, mesh))
        if not done:
            succeeded = False
            lines += [f"| {title} | failed: {output.splitlines()[-1] if output else 'no output'} | | |"]
            continue
        steps = [record for record in read_reslog(out_dir / "reslog.jsonl") if record["name"] == "train"]
        seconds = statistics.median(step["dt"] for step in steps[_WARM:])
        # All meshes read the same global batch.
        tokens = args.rows * args.micro_batches * gpus * args.max_seq_len
        base = base or seconds
        lines += [f"| {title} | {seconds:.3f} | {tokens / seconds:,.0f} | {base / seconds:.2f} |"]
        print(lines[-1], flush=True)
    return succeeded, lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", required=True, help="for the report's name, such as h200")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--micro_batches", type=int, default=4, help="of a data rank, if each GPU is one")
    parser.add_argument("--max_seq_len", type=int, default=2048)
    parser.add_argument("--out_dir", type=a_path, default="benchmarks/results")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit("benchmarks.gpu_mesh needs several GPUs: a mesh of one is a single process")
    date = datetime.date.today().isoformat()
    lines = [
        f"# The mesh on {gpus} x {torch.cuda.get_device_name()}, {date}", "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}.",
    ]
    tests = ["-m", "pytest", "-q", "-rs", "tests/gpu/test_mesh_cuda.py", "tests/gpu/test_context_cuda.py"]
    passed, output = run_part(tests)
    lines += ["", f"## Tests{'' if passed else ': FAILED'}", "", f"    python {shlex.join(tests)}", ""]
    lines += [f"    {line}" for line in output.splitlines()]
    with tempfile.TemporaryDirectory() as home:
        measured, table = measure(args, gpus, make_data(Path(home), args.max_seq_len), Path(home))
    lines += ["", f"## Step, {args.size}, {args.max_seq_len} tokens a row{'' if measured else ': FAILED'}", "", *table]
    report = Path(args.out_dir) / f"mesh_{gpus}x{args.hardware}_{date}.md"
    atomic_write(report, ("\n".join(lines) + "\n").encode())
    print(f"wrote {report}")
    return 0 if passed and measured else 1


if __name__ == "__main__":
    run_main(main)
