"""Speed of evaluation against lm-eval's own `hf` model: same machine, folder, dtype and threads, one process.

    OMP_NUM_THREADS=2 python -m benchmarks.evaluation --rounds 5
    OMP_NUM_THREADS=2 python -m benchmarks.evaluation --model FOLDER --tasks choice,letters
    python -m benchmarks.evaluation --quick

The model is a llama of 42M parameters with random weights, or that of a folder. Questions are made of random tokens, in
the shapes of known tasks; each round has others, so no cache helps from one round to the next:

    choice     as HellaSwag: 60 to 140 tokens, then 4 endings of 10 to 30
    yes_no     as BoolQ: 100 to 300 tokens, then 2 endings of one token
    letters    as MMLU: 5 examples of 100 tokens before all questions, 60 to 140 tokens, then 4 endings of one token
    writing    as GSM8K: 5 examples of 100 tokens before all questions, 40 to 80 tokens, then 64 new tokens

lm-eval gets each of the batch sizes of --batch_sizes once, and then takes part with the fastest. ("auto" means the
largest that does not run out of memory, and on a CPU, nothing tells it so.) In each round, both take turns. Prints a
Markdown table: samples (questions with all their endings, or answers) per second, median over rounds and in brackets
the smallest and greatest value, the median ratio, and how far the answers differ.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.serving import SIZES, make_folder, spread, version_of
from evaluation.answering import answerer_of
from evaluation.asking import Scoring, Writing
from model import ModelConfig
from serving.loading import load
from utils.machine import cpu_name
from utils.terminal import run_main

SIZE = ModelConfig(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408, vocab_size=32000,
    max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
EXAMPLES = 500
"""Tokens of the examples before a question."""
NEW = 64
"""Tokens of a written answer."""


class Asked(NamedTuple):
    """A round's questions."""

    scorings: list[Scoring]
    writings: list[Writing]
    num_samples: int


def text(draw: random.Random, least: int, most: int) -> tuple[int, ...]:
    """Random tokens that are letters, so that a tokenizer gives them back."""
    return tuple(draw.randrange(34, 60) for _ in range(draw.randint(least, most)))


def choices(
    draw: random.Random, count: int, examples: int, context: tuple[int, int], endings: Sequence[tuple[int, int]]
) -> Asked:
    before, asked = text(draw, examples, examples), []
    for _ in range(count):
        question = before + text(draw, *context)
        its = {text(draw, *lengths) for lengths in endings}
        while len(its) < len(endings):
            its.add(text(draw, *endings[0]))
        asked += [Scoring(question, ending) for ending in sorted(its)]
    return Asked(asked, [], count)


def writings(draw: random.Random, count: int, examples: int, context: tuple[int, int], new: int) -> Asked:
    before = text(draw, examples, examples)
    # The stop text never comes, as in a task whose model has not learnt it.
    return Asked([], [Writing(before + text(draw, *context), new, ("###",)) for _ in range(count)], count)


TASKS: dict[str, Callable[[random.Random, int], Asked]] = {
    "choice": lambda draw, count: choices(draw, count, 0, (60, 140), [(10, 30)] * 4),
    "yes_no": lambda draw, count: choices(draw, count, 0, (100, 300), [(1, 1)] * 2),
    "letters": lambda draw, count: choices(draw, count, EXAMPLES, (60, 140), [(1, 1)] * 4),
    "writing": lambda draw, count: writings(draw, count, EXAMPLES, (40, 80), NEW),
}
QUICK: dict[str, Callable[[random.Random, int], Asked]] = {
    "choice": lambda draw, count: choices(draw, count, 0, (5, 20), [(2, 5)] * 4),
    "yes_no": lambda draw, count: choices(draw, count, 0, (5, 30), [(1, 1)] * 2),
    "letters": lambda draw, count: choices(draw, count, 30, (5, 20), [(1, 1)] * 4),
    "writing": lambda draw, count: writings(draw, count, 30, (5, 10), 8),
}


class Run(NamedTuple):
    seconds: float
    answers: list[Any]
    """(log-probability, is greedy) of each Scoring, or the text of each Writing."""


class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype):
        self._answerer = answerer_of(load(folder, {}, torch.device("cpu"), dtype))

    def run(self, asked: Asked) -> Run:
        began = time.perf_counter()
        found: dict[int, Any] = {}
        if asked.scorings:
            found |= {place: tuple(score) for place, score in self._answerer.score(asked.scorings)}
        else:
            found |= {place: written.text for place, written in self._answerer.write(asked.writings)}
        return Run(time.perf_counter() - began, [found[place] for place in range(len(found))])


class Theirs:
    """lm_eval.models.huggingface.HFLM."""

    def __init__(self, folder: Path, dtype: str, context: int):
        # Before the import, which reads them.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with quiet():
            self._lm = HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=1, max_length=context)

    def run(self, asked: Asked, batch_size: int) -> Run:
        from lm_eval.api.instance import Instance

        self._lm.batch_size_per_gpu = batch_size
        decode = self._lm.tokenizer.decode
        instances = [
            Instance("generate_until", {}, (decode(one.prompt), {
                "until": list(one.stop), "max_gen_toks": one.most, "do_sample": False, "temperature": 0.0,
            }), number) for number, one in enumerate(asked.writings)
        ]  # fmt: skip
        scorings = [((str(n), ""), list(one.context), list(one.continuation)) for n, one in enumerate(asked.scorings)]
        with quiet():
            began = time.perf_counter()
            if scorings:
                answers = self._lm._loglikelihood_tokens(scorings, disable_tqdm=True)
            else:
                answers = self._lm.generate_until(instances, disable_tqdm=True)
            return Run(time.perf_counter() - began, answers)


@contextlib.contextmanager
def quiet():
    """Without the words of other programs."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def best_batch_size(theirs: Theirs, asked: Asked, sizes: Sequence[int]) -> tuple[int, str]:
    """The fastest, and a sentence on all."""
    theirs.run(asked, sizes[0])
    rates = {size: asked.num_samples / theirs.run(asked, size).seconds for size in sizes}
    told = ", ".join(f"{size}: {rate:.2f}" for size, rate in rates.items())
    return max(rates, key=lambda size: rates[size]), told


def difference(pairs: Sequence[tuple[Any, Any]]) -> str:
    """How far our answers and theirs differ."""
    if isinstance(pairs[0][0], str):
        return f"{sum(own != other for own, other in pairs)} of {len(pairs)} texts"
    worst = max(abs(own[0] - other[0]) for own, other in pairs)
    return f"log-probabilities {worst:.1e} at most, {sum(own[1] != other[1] for own, other in pairs)} greedy flags"


def measure(ours: Ours, theirs: Theirs, name: str, args: argparse.Namespace) -> None:
    """Print a row of the table."""

    def new(number: int) -> Asked:
        return (QUICK if args.quick else TASKS)[name](random.Random(f"{name} {number}"), args.samples)

    sizes = [int(size) for size in args.batch_sizes.split(",")]
    size, told = best_batch_size(theirs, new(-1), sizes)
    ours.run(new(-1))
    rates: dict[str, list[float]] = {"ours": [], "hf": []}
    pairs: list[tuple[Any, Any]] = []
    for number in range(args.rounds):
        asked = new(number)
        runs = {}
        for who in ("ours", "hf") if number % 2 else ("hf", "ours"):
            runs[who] = ours.run(asked) if who == "ours" else theirs.run(asked, size)
            rates[who].append(asked.num_samples / runs[who].seconds)
        pairs += zip(runs["ours"].answers, runs["hf"].answers, strict=True)
    ratio = statistics.median(own / other for own, other in zip(rates["ours"], rates["hf"]))
    cells = name, spread(rates["ours"]), f"{spread(rates['hf'])} at {size}", f"{ratio:.2f}", difference(pairs), told
    print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a llama; by default 42M parameters at random")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names with commas")
    parser.add_argument("--samples", type=int, default=32, help="of each round")
    parser.add_argument("--batch_sizes", default="1,2,4,8,16", help="those that lm-eval tries; its scores of a batch "
                        "take batch x tokens x vocabulary numbers, several times")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, to see that it runs")
    args = parser.parse_args(argv)
    names = args.tasks.split(",")
    if unknown := set(names) - set(TASKS):
        raise ValueError(f"--tasks can be {', '.join(TASKS)}, not {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install -r requirements-eval.txt")
    if args.quick:
        args.samples, args.rounds, args.batch_sizes = 3, 1, "1,2"
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or Path(made)
        config = SIZES["tiny"] if args.quick else SIZE
        if args.model is None:
            make_folder(folder, config, dtype)
        versions = [version_of(name) for name in ("torch", "transformers", "lm_eval")]
        print(f"{cpu_name()}, {torch.get_num_threads()} threads, {args.dtype}, Python {platform.python_version()}, "
              f"{', '.join(versions)}; {args.rounds} rounds of {args.samples} samples")  # fmt: skip
        theirs, ours = Theirs(folder, args.dtype, config.max_position_embeddings), Ours(folder, dtype)
        print("| task | ours, samples/s | hf, samples/s, at its best batch size | ratio | differences | hf by batch "
              "size |\n|---|---|---|---|---|---|")  # fmt: skip
        for name in names:
            measure(ours, theirs, name, args)


if __name__ == "__main__":
    run_main(main)
