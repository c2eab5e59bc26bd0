"""Preferences between a model's own answers: the requested function against something else.

    python -m demo.preferences --answers out/demo/answers-train.jsonl --functions out/demo/talk/sft/functions.jsonl \\
        --output out/demo/talk/dpo/functions.jsonl

Each line of --output: {"prompt", "chosen", "rejected"}. A pair is two answers to one question whose lengths differ
least. Otherwise short answers, which are right more often, would be preferred for being short, and the model would
learn to write nothing else. If fewer than --least pairs are found, questions without a right answer get the real
function as the chosen answer, so that even a hardly trained model has something to learn from.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
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
    """Preferences for each question that has good and bad answers.

    Args:
        records: as `demo.answer` writes them.
        most: pairs per question. Each answer is in at most one pair.
    """
    for record in records:
        good, bad = ([a for a in record["answers"] if a["good"] == is_good] for is_good in (True, False))
        for _ in range(min(most, len(good), len(bad))):
            chosen, rejected = min(product(good, bad), key=lambda pair: abs(pair[0]["tokens"] - pair[1]["tokens"]))
            good.remove(chosen)
            bad.remove(rejected)
            yield {"prompt": record["question"], "chosen": chosen["text"], "rejected": rejected["text"]}


def pairs_with_real_functions(records: list[dict], functions: dict[str, str]) -> Iterator[dict]:
    """A preference for the real function, for each question whose answers are all wrong."""
    for record in records:
        if record["question"] in functions and not any(answer["good"] for answer in record["answers"]):
            rejected = record["answers"][0]["text"]
            yield {"prompt": record["question"], "chosen": functions[record["question"]], "rejected": rejected}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.preferences", description="Preferences between answers.")
    parser.add_argument("--answers", type=a_path, required=True, help="file that demo.answer wrote")
    parser.add_argument("--functions", type=a_path, required=True, help="conversations with the real functions")
    parser.add_argument("--most", type=int, default=4, help="pairs per question, at most (default: 4)")
    parser.add_argument("--least", type=int, default=16, help="below this, add real functions (default: 16 pairs)")
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
