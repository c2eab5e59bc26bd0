"""Scores of a finished demo, on given held-out modules and questions, so that demos can be compared.

    python -m benchmarks.demo_scores out/demo --modules out/demo/data [--old_questions]

--modules is the corpus, pretokenized with the demo's tokenizer. The questions are about its held-out modules, which the
demo must have held out, too. --old_questions words them as the demo did until 2026-11-29, for models fine-tuned then.
Prints bits per byte, the share of completions that parse, and after each stage the share of answers that are the
requested function.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import math
from pathlib import Path

import torch

from dataset.format import MANIFEST_NAME
from dataset.loader import validation_batches
from dataset.pretrain import PretrainDataset
from demo.complete import complete_all, held_out_headers, parses
from demo.conversations import MOST_HELD_OUT_OF_A_MODULE
from demo.functions import Function, functions_of, is_asked_function, modules_of
from demo.sampling import answer_all
from demo.scores import Score, describe
from model.loss import IGNORE_INDEX, cross_entropy_sum
from serving.loading import Served, load
from tokenizer import load_tokenizer
from utils.paths import a_path
from utils.terminal import run_main


@torch.inference_mode()
def bits_per_byte(served: Served, data: Path) -> float:
    """Bits per byte on all held-out modules of `data`, in masked rows of 256 tokens, as in validation.

    Raises:
        ValueError: the tokens are from another tokenizer.
    """
    valid = PretrainDataset(data, "valid", 256)
    if load_tokenizer(data / "tokenizer").fingerprint != served.tokenizer.fingerprint:
        raise ValueError(f"the tokens in {data} are of another tokenizer: pretokenize with the demo's")
    byte_lengths = torch.tensor(load_tokenizer(data / "tokenizer").token_byte_lengths())
    nats = text_bytes = 0.0
    for _, batch in validation_batches(valid, 16, 0, 0, 1)[1]:
        labels = batch["labels"]
        hidden = served.model(batch["input_ids"], batch["positions"], batch["document_ids"])
        nats += cross_entropy_sum(served.model.logits(hidden), labels).item()
        text_bytes += byte_lengths[labels[labels != IGNORE_INDEX]].sum().item()
    return nats / math.log(2) / text_bytes


def question_of(function: Function, is_old: bool) -> str:
    if not is_old:
        return function.question
    return f"Write the function {function.name} of {function.module.rpartition('.')[2]}. {function.does}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.demo_scores", description=__doc__.splitlines()[0])
    parser.add_argument("home", type=a_path, help="directory of the finished demo")
    parser.add_argument("--modules", type=a_path, required=True)
    parser.add_argument("--old_questions", action="store_true")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=88)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    home, data = Path(args.home), Path(args.modules)
    torch.set_num_threads(1)
    ratio = json.loads((data / MANIFEST_NAME).read_text())["valid_ratio"]
    functions = [
        function
        for split, module, text in modules_of(home / "corpus", ratio)
        if split == "valid"
        for function in list(functions_of(text, module))[:MOST_HELD_OUT_OF_A_MODULE]
    ]
    questions = {question_of(function, args.old_questions): function.name for function in functions}
    for name in ("run", "sft", "dpo"):
        served = load(home / name, {}, torch.device("cpu"), torch.float32)
        if name == "run":
            headers = list(held_out_headers(home / "corpus", ratio))[::2]
            completed = [parses(h, body) for h, body in zip(headers, complete_all(served, headers, 0.3, args.seed))]
            print(f"bits per byte {bits_per_byte(served, data):.4f}")
            print(f"of {len(headers)} completions {Score([float(c) for c in completed])} parse")
        answers = answer_all(served, list(questions), args.samples, args.max_new_tokens, args.temperature, args.seed)
        records = [
            {"answers": [{**a._asdict(), "good": a.ends and is_asked_function(a.text, asked)} for a in found]}
            for asked, found in zip(questions.values(), answers)
        ]
        print(f"{name}: {describe(records)}")
    return 0


if __name__ == "__main__":
    run_main(main)
