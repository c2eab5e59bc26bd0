"""Let the trained model complete functions of modules that it never saw, and count how many completions parse.

    python -m demo.complete --ckpt out/demo/run --corpus_dir out/demo/corpus --data_dir out/demo/data

The prompt is the end of the module up to and including a function's header. The completion is cut where the function
ends (a line indented no deeper than the header), or before the last, unfinished line; header and body must parse.
"""

import argparse
import ast
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_preprocess.shards import set_of
from dataset.format import MANIFEST_NAME
from demo.conversations import parses as is_python
from generate import generate, load_model
from optimizer import resolve_dtype
from utils.paths import a_path
from utils.terminal import run_main


@dataclass(frozen=True)
class Header:
    """A function of a held-out module."""

    module: str
    before: str
    """The module's text before the header."""
    text: str
    """The header's lines, from `def` to the colon."""
    indent: int
    """Columns before `def`."""


def held_out_headers(corpus_dir: Path, valid_ratio: float) -> Iterator[Header]:
    """Functions with a body of 2 to 15 lines, in the modules that went to the validation set, in order of names."""
    for path in sorted(corpus_dir.rglob("*.py")):
        try:
            text = path.read_bytes().decode("utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if set_of(text.encode("utf-8"), valid_ratio) != "valid":
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and 2 <= node.end_lineno - node.body[0].lineno + 1 <= 15:
                first, body = node.lineno - 1, node.body[0].lineno - 1
                header = "".join(lines[first:body])
                if body > first and header.rstrip().endswith(":"):
                    yield Header(path.stem, "".join(lines[:first]), header, node.col_offset)


def cut_body(header: Header, completion: str, finished: bool) -> str:
    """The function's body in a completion; see the module's docstring."""
    lines = completion.splitlines(keepends=True)
    if lines and not finished and not completion.endswith("\n"):
        lines.pop()
    body = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= header.indent:
            break
        body.append(line)
    return "".join(body)


def function_source(header: Header, body: str) -> str:
    return textwrap.dedent(" " * header.indent + header.text.lstrip() + body)


def parses(header: Header, body: str) -> bool:
    return bool(body.strip()) and is_python(function_source(header, body))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.complete", description="Complete held-out functions.")
    parser.add_argument("--ckpt", type=a_path, required=True)
    parser.add_argument("--corpus_dir", type=a_path, required=True)
    parser.add_argument("--data_dir", type=a_path, required=True)
    parser.add_argument("--count", type=int, default=20, help="functions to complete (default: 20)")
    parser.add_argument("--show", type=int, default=3, help="completions to print (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--output", type=a_path, help="write the score to this JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        valid_ratio = json.loads((Path(args.data_dir) / MANIFEST_NAME).read_text())["valid_ratio"]
        headers = list(held_out_headers(Path(args.corpus_dir), valid_ratio))
        if not headers or args.count < 1:
            raise ValueError("there is no function to complete in the held-out modules")
        model, tokenizer, stop_ids = load_model(Path(args.ckpt), device, resolve_dtype("auto", device))
    except (ValueError, OSError) as error:
        print(f"demo.complete: {error}", file=sys.stderr)
        return 2
    headers = headers[:: max(1, len(headers) // args.count)][: args.count]
    context, begin = model.config.max_position_embeddings, tokenizer.begin_ids
    new_tokens = min(96, context // 2)
    room = context - new_tokens - len(begin)
    good = 0
    for index, header in enumerate(headers):
        prompt = begin + tokenizer.encode(header.before + header.text)[-room:]
        ids = list(
            generate(
                model,
                prompt,
                new_tokens,
                stop_ids,
                args.temperature,
                seed=index,
                top_k=0,
                vocab_size=tokenizer.vocab_size,
            )
        )
        body = cut_body(header, tokenizer.decode(ids), finished=len(ids) < new_tokens)
        parsed = parses(header, body)
        good += parsed
        if index < args.show:
            print(f"--- {header.module}, {'parses' if parsed else 'does not parse'}:")
            print(function_source(header, body).rstrip())
    share = good / len(headers)
    print(f"--- {good} of {len(headers)} completions parse ({share:.0%})")
    if args.output:
        Path(args.output).write_text(json.dumps({"completions": len(headers), "parse": good, "share": share}) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
