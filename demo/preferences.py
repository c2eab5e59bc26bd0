"""Preferences between a model's own answers: one that is the function that was asked for, against one that is not.

    python -m demo.preferences --answers out/demo/answers-train.jsonl --functions out/demo/talk/sft/functions.jsonl \\
        --output out/demo/talk/dpo/functions.jsonl

A line of --output: {"prompt", "chosen", "rejected"}. Paired are answers to one question that differ least in length.
Otherwise short ones, which are right more often, would be preferred for being short, and the model would learn to write
nothing else. Where no answer is right and fewer than --least pairs were
found, the real function takes its place: a model that was hardly trained has to begin somewhere.
"""

import sys

if __name__ == "__main__":
    # Also when it is run by its path, or by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

from demo.conversations import write_lines
from demo.scores import read_answers
from utils.paths import a_path
from utils.terminal import run_main


def read_functions(path: Path) -> dict[str, str]:
    """Question -> the real function, from a file of conversations.

    Raises:
        ValueError, OSError: the file holds something else, or cannot be read.
    """
    try:
        talks = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
        return {talk[0]["content"]: talk[1]["content"] for talk in talks}
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{path} holds no conversations: give a file that demo.conversations wrote") from None


def pairs_of(records: list[dict], most: int) -> Iterator[dict]:
    """Records as `demo.answer` writes them -> preferences of each question that has answers of both kinds.

    Args:
        most: of a question. Each of its answers is in one of them at most.
    """
    for record in records:
        good, bad = ([a for a in record["answers"] if a["good"] == is_good] for is_good in (True, False))
        for _ in range(min(most, len(good), len(bad))):
            chosen, rejected = min(product(good, bad), key=lambda pair: abs(pair[0]["tokens"] - pair[1]["tokens"]))
            good.remove(chosen)
            bad.remove(rejected)
            yield {"prompt": record["question"], "chosen": chosen["text"], "rejected": rejected["text"]}


def pairs_with_real_functions(records: list[dict], functions: dict[str, str]) -> Iterator[dict]:
    """The same of each question whose answers are all wrong."""
    for record in records:
        if record["question"] in functions and not any(answer["good"] for answer in record["answers"]):
            rejected = record["answers"][0]["text"]
            yield {"prompt": record["question"], "chosen": functions[record["question"]], "rejected": rejected}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.preferences", description="Preferences between answers.")
    parser.add_argument("--answers", type=a_path, required=True, help="what demo.answer wrote")
    parser.add_argument("--functions", type=a_path, required=True, help="conversations with the real functions")
    parser.add_argument("--most", type=int, default=4, help="pairs of a question (default: 4)")
    parser.add_argument("--least", type=int, default=16, help="pairs to complete with real functions (default: 16)")
    parser.add_argument("--output", type=a_path, required=True)
    args = parser.parse_args()
    try:
        records, functions = read_answers(Path(args.answers)), read_functions(Path(args.functions))
        pairs = list(pairs_of(records, args.most))
        own = len(pairs)
        pairs += islice(pairs_with_real_functions(records, functions), max(0, args.least - own))
    except (ValueError, OSError) as error:
        print(f"demo.preferences: {error}", file=sys.stderr)
        return 2
    write_lines(Path(args.output), pairs)
    print(f"{own} preferences from the answers to {len(records)} questions, {len(pairs) - own} with the real function")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
