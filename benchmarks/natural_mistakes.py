"""Mistakes of a newcomer who follows the README: is each answered at once, with one sentence?

    python -m benchmarks.natural_mistakes [--only TEXT] [--playground DIR]

Makes a playground (a corpus of some hundred kB, a tokenizer, a small run, conversations), runs each wrong command in
it, and prints a table of the command, the last line of its answer, the seconds (wall time, and CPU time, which other
work does not lengthen) and the exit code. This script's exit code is 1 if an answer is a traceback, has more lines than
allowed, has the wrong exit code, lacks the expected words, or takes longer than its limit: 2 s if the command line
alone shows the mistake.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from utils.arguments import Parser
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE, AFTER_A_LOOK = 2.0, 30.0
"""Limits in seconds: if the command line shows the mistake; if data, a tokenizer or torch must be loaded first."""
SHAPE = "--max_iters=3 --hidden_size=32 --num_hidden_layers=1 --num_attention_heads=2 --train_batch_size=2 " \
    "--gradient_accumulation_steps=2"  # fmt: skip
TRAIN = f"python train_my_ddp.py --data_dir=O --max_seq_len=64 --out_dir=out/new {SHAPE}"
TOKENIZER = "python -m tokenizer.train_tokenizer"
PRETOKENIZE = "python -m data_preprocess.pretokenize_pretrain_data"
INDEX = "python -m data_preprocess.build_pretrain_sample_index_map"
SFT_DATA = "python -m data_preprocess.pretokenize_sft_data"


@dataclass(frozen=True)
class Mistake:
    typed: str
    says: str
    """Pattern that the last line must match."""
    limit_s: float = AT_ONCE
    code: int = 2
    lines: int = 1
    """Most lines that may be printed: reading the data may leave a note."""


@dataclass(frozen=True)
class Answer:
    code: int
    said: tuple[str, ...]
    """Printed lines that are not empty."""
    seconds: float
    cpu_seconds: float
    """About the time on an idle machine."""

    @property
    def last(self) -> str:
        return self.said[-1] if self.said else ""


MISTAKES = [
    # The environment.
    Mistake("python -S train_my_ddp.py --nproc 2 --data_dir=O", r"package tyro is missing.*\.venv/bin/activate"),
    Mistake("python -S generate.py --ckpt out/mine --chat", r"package \w+ is missing.*\.venv/bin/activate"),
    Mistake("python -S -m tokenizer.train_tokenizer --data_dir D", r"package \w+ is missing.*\.venv/bin/activate"),
    Mistake("python -S -m utils.resplot out/mine", r"package \w+ is missing.*\.venv/bin/activate"),
    Mistake("python -m tokenizer.train_tokeniser --help", "No module named tokenizer.train_tokeniser", code=1),
    Mistake("python -m tokenizer/train_tokenizer.py --help", "Try using 'tokenizer/train_tokenizer'", code=1),
    Mistake("python tokenizer/train_tokenizer.py", "required: --output_dir"),
    Mistake("python dataset/inspect.py O --splitt train", "did you mean --split"),
    # Names of flags.
    Mistake(f"{TRAIN} --lr=1e-3", "--learning_rate"),
    Mistake(f"{TRAIN} --batch-size 8", "--train_batch_size"),
    Mistake(f"{TRAIN} --epochs 3", "did you mean --epoch"),
    Mistake(f"{TRAIN} --fp16", "--dtype"),
    Mistake(f"{TRAIN} --bf16", "--dtype"),
    Mistake(f"{TRAIN} --gpus 2", "--nproc"),
    Mistake(f"{TRAIN} --model llama", "did you mean --init_from"),
    Mistake(f"{TRAIN} -n 2", "-n"),
    Mistake(f"{TRAIN} --hiden_size=64", "did you mean --hidden_size"),
    Mistake("python train_my_ddp.py --data_dir O --out-dir out/new extra", "extra"),
    Mistake("python train_my_ddp.py --data_dir", "data_dir"),
    Mistake("python generate.py --checkpoint out/mine --prompt a", "did you mean --ckpt|no flag"),
    Mistake("python generate.py --ckpt out/mine --max-new-tokens 5 --prompt a", "did you mean --max_new_tokens"),
    Mistake(f"{TOKENIZER} --data-dir D --output_dir new", "did you mean --data_dir"),
    Mistake(f"{TOKENIZER} --data_dir D --output_dir new --vocab 512 --type bpe", "--type is not a flag"),
    Mistake(f"{PRETOKENIZE} --data_dir D --tokenizer T --output O --workers 2", "did you mean --num_workers"),
    Mistake(f"{INDEX} --data_dir O --seq_len 64", "did you mean --max_seq_len"),
    Mistake("python -m dataset.inspect O --samples 3", "did you mean --sample"),
    Mistake("python -m dataset.show_mask TALK/a.jsonl --tokeniser_dir T", "did you mean --tokenizer_dir"),
    Mistake("python -m utils.resplot out/mine --output a.png", "--output is not a flag"),
    # Values.
    Mistake(f"{TRAIN} --learning_rate 1e-3x", "learning_rate must be of type float"),
    Mistake(f"{TRAIN} --max_iters 0 --epoch 0", "epoch must be positive"),
    Mistake(f"{TRAIN} --hidden_size=33", "hidden_size|num_attention_heads"),
    Mistake(f"{TRAIN} --num_attention_heads=0", "num_attention_heads"),
    Mistake(f"{TRAIN} --dtype=fp16", "float16"),
    Mistake(f"{TRAIN} --task_type=pretraining", "pretrain"),
    Mistake(f"{TRAIN} --warmup_ratio=100", "warmup_ratio must lie between 0 and 1"),
    Mistake(f"{TRAIN} --nproc=0", "--nproc must be a number of processes"),
    Mistake(f"{TRAIN} --init_from=out/mine --lora_r=0", "lora_r must be positive"),
    Mistake(f"{TRAIN} --lora_r=8", "needs weights to stand on: give them with --init_from"),
    Mistake(f"{TRAIN} --adapter=out/mine", "needs weights to stand on: give them with --init_from"),
    Mistake(f"{TRAIN} --init_from=out/mine --lora_r=8 --optimizer=muon", "--optimizer=muon is for whole matrices"),
    Mistake(f"{TRAIN} --nproc=two", "--nproc must be a number of processes"),
    Mistake(f"{TOKENIZER} --data_dir D --output_dir new --vocab_size 8k", "invalid int value: '8k'"),
    Mistake(f"{TOKENIZER} --data_dir D --output_dir new --vocab_size 100000", "yields only .* at most", AFTER_A_LOOK),
    Mistake(f"{TOKENIZER} --data_dir D --output_dir new --vocab_size 100", "vocab_size"),
    Mistake(f"{TOKENIZER} --data_dir D --output_dir new --kind bpe", "choose from 'hf_bbpe', 'sp_bbpe'"),
    Mistake(f"{PRETOKENIZE} --data_dir D --tokenizer_dir T --output_dir new --valid_ratio 10", "valid_ratio must be"),
    Mistake(f"{PRETOKENIZE} --data_dir D --tokenizer_dir T --output_dir new --valid_ratio 10%", "invalid float value"),
    Mistake("python generate.py --ckpt out/mine", "--prompt is missing"),
    Mistake("python generate.py --ckpt out/mine --prompt a --temperature -1", "temperature must not be negative"),
    Mistake("python generate.py --ckpt out/mine --prompt a --device gpu", "choose from 'auto', 'cpu', 'cuda'"),
    # Forgotten arguments.
    Mistake("python train_my_ddp.py", "--data_dir is missing"),
    Mistake("python generate.py", "required: --model"),
    Mistake(f"{TOKENIZER} --data_dir D", "required: --output_dir"),
    Mistake(f"{TOKENIZER} --output_dir new", "--data_dir is missing"),
    Mistake(PRETOKENIZE, "required: --data_dir, --tokenizer_dir"),
    Mistake(f"{INDEX} --data_dir O", "required: --max_seq_len"),
    Mistake("python -m dataset.show_mask TALK/a.jsonl", "need --tokenizer_dir"),
    Mistake("python monitor_process.py", "the training command is missing"),
    Mistake(f"python monitor_process.py {TRAIN}", "goes behind --"),
    Mistake("python train_my_ddp.py --task_type=dpo --data_dir=PREFS --out_dir=out/new", "needs a model to begin with"),
    Mistake("python train_my_ddp.py --task_type=sft --data_dir=TALK --out_dir=out/new", "--init_from is missing",
            AFTER_A_LOOK),
    # Folders and files.
    Mistake("python generate.py --ckpt out/mien --prompt a", "out/mien does not exist: did you mean out/mine"),
    Mistake("python generate.py --ckpt mine --prompt a", "mine does not exist: did you mean out/mine"),
    Mistake("python generate.py --ckpt meta-llama/Llama-3.2-1B --prompt a", "does not exist: .*nothing is downloaded"),
    Mistake("python generate.py --ckpt out --prompt a", "did you mean out/begun|did you mean out/mine"),
    Mistake("python generate.py --ckpt O --prompt a", "neither a run, nor a checkpoint"),
    Mistake("python generate.py --ckpt out/begun --prompt a", "has no checkpoint"),
    Mistake("python generate.py --ckpt T --prompt a", "neither a run, nor a checkpoint"),
    Mistake(f"{TOKENIZER} --data_dir DD --output_dir new", "DD does not exist", AFTER_A_LOOK),
    Mistake(f"{TOKENIZER} --data_dir D/decoder.py --output_dir new", "is a file: give the directory", AFTER_A_LOOK),
    Mistake(f"{TOKENIZER} --data_dir empty --output_dir new", "empty holds no text: put", AFTER_A_LOOK),
    Mistake(f"{TOKENIZER} --data_dir papers --output_dir new", "papers holds no text: put", AFTER_A_LOOK, lines=3),
    Mistake(f"{TOKENIZER} --data_dir O --output_dir new", "O is pretokenized", AFTER_A_LOOK, lines=3),
    Mistake(f"{TOKENIZER} --data_dir utf16 --output_dir new", "iconv", AFTER_A_LOOK, lines=3),
    Mistake(f"{TOKENIZER} --data_dir little --output_dir new --vocab_size 8192", "vocab_size", AFTER_A_LOOK),
    Mistake(f"{TOKENIZER} --data_dir D --output_dir out/mine/ckpt/step-4 --vocab_size 512", "of a model or"),
    Mistake(f"{PRETOKENIZE} --data_dir D --tokenizer_dir TT --output_dir new", "TT does not exist", AFTER_A_LOOK),
    Mistake(f"{PRETOKENIZE} --data_dir D --tokenizer_dir D --output_dir new", "holds no tokenizer.json", AFTER_A_LOOK),
    Mistake(f"{PRETOKENIZE} --data_dir O --tokenizer_dir T --output_dir new", "O is pretokenized", AFTER_A_LOOK,
            lines=3),
    Mistake(f"{PRETOKENIZE} --data_dir little --tokenizer_dir T --output_dir new", "valid_ratio", AFTER_A_LOOK),
    Mistake(f"{INDEX} --data_dir D --max_seq_len 64", "is not pretokenized: run"),
    Mistake(f"{INDEX} --data_dir TALK --max_seq_len 64", "is not pretokenized: run"),
    Mistake(f"{INDEX} --data_dir O --max_seq_len 1000000", "max_seq_len|too small|tokens", AFTER_A_LOOK),
    Mistake("python -m dataset.inspect OO", "OO does not exist"),
    Mistake("python -m dataset.inspect no_index", "has no index: run"),
    Mistake("python -m dataset.inspect TALK", "is not pretokenized: run"),
    Mistake("python -m dataset.show_mask TALK --tokenizer_dir T", "name a file in it, such as TALK/a.jsonl"),
    Mistake("python -m dataset.show_mask PREFS/a.jsonl --tokenizer_dir T", "need --task dpo", AFTER_A_LOOK, lines=20),
    Mistake("python -m dataset.audit out/mien", "out/mien does not exist: did you mean out/mine", AFTER_A_LOOK),
    Mistake("python -m utils.checkpoint ls out", "out is not a run directory"),
    Mistake("python -m utils.checkpoint ls out/mien", "did you mean out/mine"),
    Mistake("python -m utils.resplot out/mien --png a.png", "out/mien does not exist: did you mean out/mine"),
    Mistake("python -m utils.resplot O --png a.png", "name a run's directory", AFTER_A_LOOK),
    Mistake("python -m utils.timeline out/mine", "is a directory: name a trace"),
    Mistake("python monitor_process.py --status out/mien", "out/mien does not exist: did you mean out/mine"),
    Mistake("python monitor_process.py --status out/mine", "no monitor has looked after out/mine"),
    Mistake("python monitor_process.py -- python train_my_dpp.py --data_dir=O", "train_my_dpp.py does not exist"),
    Mistake("python monitor_process.py -- train_my_ddp.py --data_dir=O", "begins with its script"),
    Mistake("python monitor_process.py --hosts hots.yaml -- python -m parallel.launch train_my_ddp.py", "hots.yaml"),
    Mistake("python train_my_ddp.py O --out_dir=out/new", "O is a directory.*--data_dir"),
    Mistake("python train_my_ddp.py smal.yml --data_dir=O", "smal.yml does not exist: did you mean small.yaml"),
    Mistake("python train_my_ddp.py tabs.yaml --data_dir=O", "tabs.yaml.*line 2"),
    Mistake("python train_my_ddp.py --config=small.yaml --data_dir=O", "did you mean --exp_config_file"),
    # Mistakes that the data shows.
    Mistake(TRAIN.replace("--data_dir=O", "--data_dir=OO"), "OO does not exist", AFTER_A_LOOK),
    Mistake(TRAIN.replace("--data_dir=O", "--data_dir=D"), "D is not pretokenized: run", AFTER_A_LOOK),
    Mistake(TRAIN.replace("--data_dir=O", "--data_dir=no_index"), "build_pretrain_sample_index_map", AFTER_A_LOOK),
    Mistake(TRAIN.replace("--max_seq_len=64", "--max_seq_len=128"), "--max_seq_len 128", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --tokenizer_dir=T2", "tokenizer", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=out/mien", "out/mien does not exist: did you mean out/mine", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=gpt2", "gpt2 does not exist: .*nothing is downloaded", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=out/begun", "has no checkpoint", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=out/mine --hidden_size=64", "does not fit the weights", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=out/mine --lora_r=4 --lora_target_modules=c_attn", "fits no layer .* c_attn",
            AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=out/mine --adapter=T", "T is neither a run", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=out/mine --adapter=out/mine", "holds no adapter_config.json", AFTER_A_LOOK),
    Mistake(f"{TRAIN} --init_from=pickled", "only adapter_model.bin, which may run code", AFTER_A_LOOK),
    Mistake(TRAIN.replace("out/new", "out/mine"), "already holds a run: add --resume", AFTER_A_LOOK),
    Mistake(TRAIN.replace("out/new", "D"), "holds other things than a run"),
    Mistake("python train_my_ddp.py --resume --out_dir=out/mien", "no run to resume: did you mean out/mine"),
    Mistake("python train_my_ddp.py --task_type=sft --init_from=out/mine --data_dir=PREFS --max_seq_len=64 "
            "--out_dir=out/new", "holds preferences: train on them with --task_type=dpo", AFTER_A_LOOK, lines=4),
    Mistake("python train_my_ddp.py --task_type=dpo --init_from=out/mine --data_dir=TALK --max_seq_len=64 "
            "--out_dir=out/new", "holds conversations: train on them with --task_type=sft", AFTER_A_LOOK, lines=4),
    Mistake("python train_my_ddp.py --task_type=sft --init_from=out/mine --data_dir=D --max_seq_len=64 "
            "--out_dir=out/new", "holds no records", AFTER_A_LOOK, lines=4),
    Mistake("python train_my_ddp.py --task_type=sft --init_from=out/mine --data_dir=O --max_seq_len=64 "
            "--out_dir=out/new", "pretrain", AFTER_A_LOOK, lines=4),
    Mistake(f"{SFT_DATA} --data_dir questions --tokenizer_dir T --output_dir new", "questions", AFTER_A_LOOK, lines=12),
    Mistake(f"{TRAIN} --nproc=3", "gradient_accumulation_steps=2.*use 3"),
    Mistake(f"{TRAIN} --nproc 2 --init_from=out/mien", "did you mean out/mine", AFTER_A_LOOK, lines=3),
]  # fmt: skip


def make_playground(where: Path) -> None:
    """Make everything that the commands name, with the commands of the README."""
    library = Path(sysconfig.get_paths()["stdlib"])
    (where / "D").mkdir(parents=True)
    for name in ("json", "email"):
        for path in sorted((library / name).glob("*.py")):
            shutil.copy(path, where / "D" / path.name)
    for name in ("empty", "papers", "utf16", "little", "TALK", "PREFS", "questions"):
        (where / name).mkdir()
    for name in ("a.pdf", "b.docx"):
        (where / "papers" / name).write_bytes(b"%PDF-1.7 \x00\x01")
    (where / "utf16" / "a.txt").write_text("words " * 500, encoding="utf-16")
    (where / "little" / "a.txt").write_text("a few words are not a corpus\n")
    (where / "pickled").mkdir()
    of_q = {"peft_type": "LORA", "target_modules": ["q_proj"], "base_model_name_or_path": "out/mine/ckpt/step-4"}
    write_lines(where / "pickled" / "adapter_config.json", [of_q])
    (where / "pickled" / "adapter_model.bin").write_bytes(b"not even a pickle")
    (where / "tabs.yaml").write_text("hidden_size: 32\n\tnum_hidden_layers: 1\n")
    (where / "small.yaml").write_text("hidden_size: 32\n")
    ask = [f"What is {number} and {number}?" for number in range(40)]
    talk = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"It is {2 * n}."}]}
            for n, q in enumerate(ask)]  # fmt: skip
    write_lines(where / "TALK" / "a.jsonl", talk)
    write_lines(where / "PREFS" / "a.jsonl", [{"prompt": q, "chosen": "It is so.", "rejected": "No."} for q in ask])
    write_lines(where / "questions" / "a.jsonl", [{"question": q} for q in ask])
    for vocabulary, folder in ((512, "T"), (600, "T2")):
        succeed(where, f"{TOKENIZER} --data_dir D --output_dir {folder} --vocab_size {vocabulary}")
    succeed(where, f"{PRETOKENIZE} --data_dir D --tokenizer_dir T --output_dir O --valid_ratio 0.2 --num_workers 1")
    shutil.copytree(where / "O", where / "no_index")
    succeed(where, f"{INDEX} --data_dir O --max_seq_len 64")
    succeed(where, f"{TRAIN.replace('out/new', 'out/mine').replace('=3', '=4', 1)} --save_interval=2")
    shutil.copytree(where / "out" / "mine", where / "out" / "begun", ignore=shutil.ignore_patterns("step-*", "reslog*"))


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def succeed(where: Path, typed: str) -> None:
    """Run a correct command.

    Raises:
        ValueError: it failed.
    """
    answer = give(where, typed)
    if answer.code:
        raise ValueError(f"the playground cannot be made: {typed}: {answer.last}")


def give(where: Path, typed: str) -> Answer:
    """Run a command in the playground, as if that were the repository."""
    words = shlex.split(typed)
    words = [str(ROOT / word) if word.endswith(".py") and (ROOT / word).exists() else word for word in words]
    words[0] = sys.executable
    started, before = time.monotonic(), cpu_seconds()
    done = subprocess.run(
        words, cwd=where, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    said = tuple(line for line in done.stdout.replace(f"{ROOT}/", "").splitlines() if line.strip())
    return Answer(done.returncode, said, time.monotonic() - started, cpu_seconds() - before)


def cpu_seconds() -> float:
    """CPU seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def verdict(mistake: Mistake, answer: Answer) -> str:
    """Problems with the answer; empty if there are none."""
    problems = {
        "traceback": any("Traceback (most recent call last)" in line for line in answer.said),
        f"{len(answer.said)} lines": len(answer.said) > mistake.lines,
        f"code {answer.code}": answer.code != mistake.code,
        f"does not say {mistake.says!r}": not re.search(mistake.says, answer.last),
        f"{answer.seconds:.1f} s": answer.seconds > mistake.limit_s,
    }
    return ", ".join(problem for problem, holds in problems.items() if holds)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.natural_mistakes", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run only the commands that contain this text")
    parser.add_argument("--playground", type=a_path, help="where to keep the playground; made if missing")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="natural-mistakes-") as temporary:
        where = Path(args.playground or temporary) / "playground"
        if not where.exists():
            make_playground(where)
        # Once, so that the first row does not pay for reading from disk.
        give(where, "python generate.py")
        chosen = [mistake for mistake in MISTAKES if args.only in mistake.typed]
        print("| what was typed | what is said | s | CPU s | code | |\n|---|---|---|---|---|---|")
        wrong = sum(not_as_it_should_be(where, mistake) for mistake in chosen)
    print(f"\n{len(chosen) - wrong} of {len(chosen)} are answered as they should be, on {cpu_name()}.")
    print(f"TRAIN stands for `{TRAIN.replace(SHAPE, 'SHAPE')}`, SHAPE for `{SHAPE}`.")
    return 1 if wrong else 0


def not_as_it_should_be(where: Path, mistake: Mistake) -> bool:
    """Make a mistake, and print its row of the table."""
    shutil.rmtree(where / "out" / "new", ignore_errors=True)
    answer = give(where, mistake.typed)
    problem = verdict(mistake, answer)
    typed = mistake.typed.replace(TRAIN, "TRAIN").replace(SHAPE, "SHAPE")
    times = [f"{answer.seconds:.1f}", f"{answer.cpu_seconds:.1f}"]
    cells = [f"`{typed}`", answer.last, *times, str(answer.code), problem or "ok"]
    print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)
    return bool(problem)


if __name__ == "__main__":
    run_main(main, goes_on=True)
