"""Let the trained model complete functions of unseen modules, and count how many completions parse.

    python -m demo.complete --ckpt out/demo/run --corpus_dir out/demo/corpus --data_dir out/demo/data

The prompt is the end of the module up to and including a function's header. The completion is cut at the end of the
function (a line indented no deeper than the header) or before an unfinished last line. Header and body must parse.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import ast
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.format import MANIFEST_NAME
from demo.functions import modules_of
from demo.sampling import draw_all
from demo.scores import Score
from evaluation.python_source import cut_body, tree_of
from evaluation.python_source import parses as is_python
from optimizer.mixed_precision import resolve_dtype
from serving.loading import Served, load
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
    """Functions with a body of 2 to 15 lines in the modules of the validation set, sorted by module name."""
    for split, module, text in modules_of(corpus_dir, valid_ratio):
        if split != "valid":
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree_of(text)):
            if isinstance(node, ast.FunctionDef) and 2 <= node.end_lineno - node.body[0].lineno + 1 <= 15:
                first, body = node.lineno - 1, node.body[0].lineno - 1
                header = "".join(lines[first:body])
                if body > first and header.rstrip().endswith(":"):
                    yield Header(module, "".join(lines[:first]), header, node.col_offset)


def function_source(header: Header, body: str) -> str:
    return textwrap.dedent(" " * header.indent + header.text.lstrip() + body)


def parses(header: Header, body: str) -> bool:
    return bool(body.strip()) and is_python(function_source(header, body))


def complete_all(served: Served, headers: list[Header], temperature: float, seed: int, rows: int = 64) -> list[str]:
    """A body for each header."""
    context, tokenizer = served.model.config.max_position_embeddings, served.tokenizer
    new_tokens = min(96, context // 2)
    room = context - new_tokens - len(tokenizer.begin_ids)
    prompts = [tokenizer.begin_ids + tokenizer.encode(header.before + header.text)[-room:] for header in headers]
    drawn = draw_all(served, prompts, 1, new_tokens, frozenset(), temperature, seed, rows)
    return [cut_body(answers[0].text, header.indent, answers[0].ends) for header, answers in zip(headers, drawn)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.complete", description="Complete held-out functions.")
    parser.add_argument("--ckpt", type=a_path, required=True)
    parser.add_argument("--corpus_dir", type=a_path, required=True)
    parser.add_argument("--data_dir", type=a_path, required=True)
    parser.add_argument("--count", type=int, default=128, help="functions to complete (default: 128)")
    parser.add_argument("--show", type=int, default=3, help="completions to print (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--untrained", action="store_true", help="use freshly initialized weights instead")
    parser.add_argument("--output", type=a_path, help="write the score to this JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # Groups of functions are completed in parallel threads.
    try:
        if args.temperature <= 0:
            raise ValueError("--temperature must be positive")
        valid_ratio = json.loads((Path(args.data_dir) / MANIFEST_NAME).read_text())["valid_ratio"]
        headers = list(held_out_headers(Path(args.corpus_dir), valid_ratio))
        if not headers or args.count < 1:
            raise ValueError("there is no function to complete in the held-out modules")
        served = load(Path(args.ckpt), {}, device, resolve_dtype(args.dtype, device))
    except (ValueError, OSError) as error:
        print(f"demo.complete: {error}", file=sys.stderr)
        return 2
    if args.untrained:
        served.model.initialize(args.seed)
    step = max(1.0, len(headers) / args.count)
    headers = [headers[int(number * step)] for number in range(min(args.count, len(headers)))]
    bodies = complete_all(served, headers, args.temperature, args.seed)
    parsed = [parses(header, body) for header, body in zip(headers, bodies)]
    shown = range(0, len(headers), max(1, len(headers) // max(1, args.show)))
    for index in list(shown)[: args.show]:
        print(f"--- {headers[index].module}, {'parses' if parsed[index] else 'does not parse'}:")
        print(function_source(headers[index], bodies[index]).rstrip())
    score = Score([float(p) for p in parsed])
    print(f"--- {sum(parsed)} of {len(headers)} completions parse ({score})")
    if args.output:
        Path(args.output).write_text(json.dumps({"completions": len(headers), "parts": score.parts}) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
