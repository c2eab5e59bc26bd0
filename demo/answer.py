"""Ask a model for held-out functions, and count which of its answers end by themselves and parse.

python -m demo.answer --ckpt out/demo/sft --questions out/demo/talk/sft_valid/functions.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from demo.conversations import parses
from generate import generate, load_model, room_for_text
from optimizer import resolve_dtype
from tokenizer.chat_template import Message, template_of
from utils.paths import a_path
from utils.terminal import run_main


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.answer", description="Answers to held-out questions.")
    parser.add_argument("--ckpt", type=a_path, required=True)
    parser.add_argument("--questions", type=a_path, required=True)
    parser.add_argument("--count", type=int, default=16, help="questions to ask (default: 16)")
    parser.add_argument("--show", type=int, default=2, help="answers to print (default: 2)")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--output", type=a_path, help="write the score to this JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        records = map(json.loads, Path(args.questions).read_text().splitlines())
        questions = [record["messages"][0]["content"] for record in records]
        if not questions or args.count < 1:
            raise ValueError(f"there is no question in {args.questions}")
        model, tokenizer, folder_stops = load_model(Path(args.ckpt), device, resolve_dtype("auto", device))
        template = template_of(tokenizer)
        questions = questions[:: max(1, len(questions) // args.count)][: args.count]
        prompts = [template.prompt([Message("user", question)]) for question in questions]
        rooms = [min(args.max_new_tokens, room_for_text(model, prompt)) for prompt in prompts]
    except (ValueError, OSError) as error:
        print(f"demo.answer: {error}", file=sys.stderr)
        return 2
    ended = good = 0
    for index, (question, prompt, room) in enumerate(zip(questions, prompts, rooms)):
        ids = list(
            generate(
                model, prompt, room, template.stop_ids | folder_stops, temperature=args.temperature, seed=index,
                vocab_size=tokenizer.vocab_size,
            )
        )  # fmt: skip
        answer = tokenizer.decode(ids)
        ends = len(ids) < room
        # A function that is cut off counts as one that does not parse.
        is_good = ends and answer.lstrip().startswith("def ") and parses(answer)
        ended, good = ended + ends, good + is_good
        if index < args.show:
            print(f"--- {question}\n{answer.rstrip()}\n[{'ends' if ends else 'goes on'}]")
    score = {"questions": len(questions), "ended": ended, "parse": good}
    print(f"--- of {len(questions)} answers {ended} end by themselves, {good} are functions that parse")
    if args.output:
        Path(args.output).write_text(json.dumps(score) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
