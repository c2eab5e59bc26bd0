"""Ask a model for functions, several times each, and count the answers that are the requested function.

    python -m demo.answer --ckpt out/demo/sft --questions out/demo/talk/sft_valid/functions.jsonl --output answers.jsonl

An answer counts if it ends by itself, is one function of the requested name, and Python compiles it (`demo.functions`).
Whether the function does the requested thing is not checked: a model of this size cannot know.

Each line of --output: {"question", "answers": [{"text", "tokens", "ends", "good"}, ...]}.
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

import torch

from demo.functions import asked_name, is_asked_function
from demo.sampling import answer_all
from demo.scores import describe
from optimizer.mixed_precision import resolve_dtype
from serving.loading import load
from utils.paths import a_path, absent
from utils.terminal import run_main


def read_questions(path: Path, count: int) -> list[str]:
    """First messages of a file of conversations, evenly spaced.

    Raises:
        ValueError, OSError: there are no questions, or the file cannot be read.
    """
    if not path.exists():
        raise ValueError(absent(path))
    try:
        questions = [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{path} holds no conversations: give a file that demo.conversations wrote") from None
    # Overloaded functions share one name and one docstring.
    questions = list(dict.fromkeys(questions))
    if not questions or count < 1:
        raise ValueError(f"there is no question in {path}")
    step = max(1.0, len(questions) / count)
    return [questions[int(number * step)] for number in range(min(count, len(questions)))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.answer", description="Answers to questions for functions.")
    parser.add_argument("--ckpt", type=a_path, required=True)
    parser.add_argument("--questions", type=a_path, required=True)
    parser.add_argument("--count", type=int, default=160, help="questions to ask, at most (default: 160)")
    parser.add_argument("--samples", type=int, default=4, help="answers to each (default: 4)")
    parser.add_argument("--show", type=int, default=0, help="answers to print (default: 0)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=88)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--output", type=a_path, help="write questions and answers to this JSONL file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # Groups of questions are answered in parallel threads.
    try:
        if args.samples < 1 or args.temperature <= 0:
            raise ValueError("--samples and --temperature must be positive")
        questions = read_questions(Path(args.questions), args.count)
        names = [asked_name(question) for question in questions]
        served = load(Path(args.ckpt), {}, device, resolve_dtype(args.dtype, device))
        answers = answer_all(served, questions, args.samples, args.max_new_tokens, args.temperature, args.seed)
    except (ValueError, KeyError, OSError) as error:
        print(f"demo.answer: {error}", file=sys.stderr)
        return 2
    records = [
        {
            "question": question,
            "answers": [{**a._asdict(), "good": a.ends and is_asked_function(a.text, name)} for a in found],
        }
        for question, name, found in zip(questions, names, answers)
    ]
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records[:: max(1, len(records) // max(1, args.show))][: args.show]:
        first = record["answers"][0]
        print(f"--- {record['question']}\n{first['text'].rstrip()}\n[{'good' if first['good'] else 'not good'}]")
    print(describe(records))
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
