"""The demo's conversations, made from the standard library's functions and their docstrings.

python -m demo.conversations --corpus_dir out/demo/corpus --data_dir out/demo/data --output_dir out/demo/talk

sft, sft_valid    {"messages": [...]}: a request for a function, the function, and what it does

sft_valid holds functions of the modules that pretraining held out; nothing is trained on them. Each module gives only a
few, so that none dominates the scores.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
from pathlib import Path

from dataset.format import MANIFEST_NAME
from demo.functions import Function, functions_of, modules_of
from utils.paths import a_path
from utils.terminal import run_main

MOST_HELD_OUT_OF_A_MODULE = 24


def conversation(function: Function) -> dict:
    turns = [
        ("user", function.question),
        ("assistant", function.source),
        ("user", "What does it do?"),
        ("assistant", function.does),
    ]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.conversations", description="Conversations about functions.")
    parser.add_argument("--corpus_dir", type=a_path, required=True)
    parser.add_argument(
        "--data_dir", type=a_path, required=True, help="pretokenized corpus, which says which modules are held out"
    )
    parser.add_argument("--output_dir", type=a_path, required=True)
    args = parser.parse_args()
    try:
        valid_ratio = json.loads((Path(args.data_dir) / MANIFEST_NAME).read_text())["valid_ratio"]
    except OSError as error:
        print(f"demo.conversations: {error}", file=sys.stderr)
        return 2
    talks: dict[str, list[dict]] = {"train": [], "valid": []}
    for split, module, text in modules_of(Path(args.corpus_dir), valid_ratio):
        found = [conversation(function) for function in functions_of(text, module)]
        talks[split] += found if split == "train" else found[:MOST_HELD_OUT_OF_A_MODULE]
    for split, found in talks.items():
        write_lines(Path(args.output_dir) / ("sft" if split == "train" else "sft_valid") / "functions.jsonl", found)
        print(f"{split}: {len(found)} conversations")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
