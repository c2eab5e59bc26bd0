"""The demo's conversations and preferences, made from the standard library's functions and their docstrings.

python -m demo.conversations --corpus_dir out/demo/corpus --data_dir out/demo/data --output_dir out/demo/talk

sft, sft_valid    {"messages": [...]}: a function is asked for and given, then what it does
dpo, dpo_valid    {"prompt", "chosen", "rejected"}: the real function against one that was damaged so that it does
                  not parse

The valid folders hold functions of the modules that pretraining held out, too; nothing is trained on them.
"""

import argparse
import ast
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.shards import set_of
from dataset.format import MANIFEST_NAME
from utils.paths import a_path
from utils.terminal import run_main

_MOST_LINES = 12
_MOST_CHARACTERS = 500
_MOST_PREFERENCES = {"train": 400, "valid": 100}
"""The demo needs no more, and the reference model's log-probabilities are computed for all there are."""


@dataclass(frozen=True)
class Function:
    module: str
    name: str
    does: str
    """The first sentence of its docstring, in one line."""
    source: str
    """Without decorators and docstring, at column 0."""

    @property
    def question(self) -> str:
        return f"Write the function {self.name} of {self.module}. {self.does}"


def functions_of(text: str, module: str) -> Iterator[Function]:
    """Short functions with a docstring and more than that."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (docstring := ast.get_docstring(node)):
            continue
        begin, end = node.body[0].lineno - 1, node.body[0].end_lineno
        source = textwrap.dedent("".join(lines[node.lineno - 1 : begin] + lines[end : node.end_lineno]))
        does = " ".join(re.split(r"(?<=\.)\s|\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
        short = source.count("\n") <= _MOST_LINES and len(source) <= _MOST_CHARACTERS and 10 <= len(does) <= 160
        if short and parses(source):
            yield Function(module, node.name, does, source.strip() + "\n")


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def damaged(source: str, rng: random.Random) -> str | None:
    """The source with one mistake in it, so that it does not parse any more; None if none was found."""
    for _ in range(20):
        kind, position = rng.randrange(4), rng.randrange(len(source))
        lines = source.splitlines(keepends=True)
        line = rng.randrange(1, len(lines)) if len(lines) > 1 else 0
        if kind == 0:
            broken = re.sub(r":\s*$", "\n", lines[0]) + "".join(lines[1:])
        elif kind == 1:
            broken = source[: position + 1].rstrip() + "\n"
        elif kind == 2:
            broken = "".join([*lines[:line], " " + lines[line], *lines[line + 1 :]])
        else:
            brackets = [match.start() for match in re.finditer(r"[()\[\]{}]", source)]
            at = rng.choice(brackets)
            broken = source[:at] + source[at + 1 :]
        if broken.strip() and not parses(broken):
            return broken
    return None


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
    parser = argparse.ArgumentParser(prog="python -m demo.conversations", description="Conversations and preferences.")
    parser.add_argument("--corpus_dir", type=a_path, required=True)
    parser.add_argument(
        "--data_dir", type=a_path, required=True, help="pretokenized corpus, for which modules it held out"
    )
    parser.add_argument("--output_dir", type=a_path, required=True)
    args = parser.parse_args()
    corpus, output, rng = Path(args.corpus_dir), Path(args.output_dir), random.Random(0)
    try:
        valid_ratio = json.loads((Path(args.data_dir) / MANIFEST_NAME).read_text())["valid_ratio"]
    except OSError as error:
        print(f"demo.conversations: {error}", file=sys.stderr)
        return 2
    functions: dict[str, list[Function]] = {"train": [], "valid": []}
    for path in sorted(corpus.rglob("*.py")):
        try:
            text = path.read_bytes().decode("utf-8")
            found = list(functions_of(text, path.stem))
        except (UnicodeDecodeError, SyntaxError):
            continue
        functions[set_of(text.encode("utf-8"), valid_ratio)] += found
    for split, found in functions.items():
        talks = [conversation(function) for function in found]
        chosen = found[:: max(1, len(found) // _MOST_PREFERENCES[split])][: _MOST_PREFERENCES[split]]
        preferences = [
            {"prompt": function.question, "chosen": function.source, "rejected": rejected}
            for function in chosen
            if (rejected := damaged(function.source, rng)) is not None
        ]
        suffix = "" if split == "train" else "_valid"
        write_lines(output / f"sft{suffix}" / "functions.jsonl", talks)
        write_lines(output / f"dpo{suffix}" / "functions.jsonl", preferences)
        print(f"{split}: {len(talks)} conversations, {len(preferences)} preferences")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
