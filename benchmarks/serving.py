"""Speed of the engine against transformers and llama.cpp: same machine, model, dtype and threads, one process.

    OMP_NUM_THREADS=2 python -m benchmarks.serving --dtype float32 --rounds 5
    OMP_NUM_THREADS=2 python -m benchmarks.serving --model FOLDER --dtype bfloat16 --contenders ours,llama.cpp
    python -m benchmarks.serving --quick

The model is a llama of 125M parameters with random weights, or that of a folder. In each round, contenders take turns
in a rotating order: each answers one request, then 16 that come at the same time, with prompts and answers of random
lengths. Every round has other prompts, so no cache of prefixes helps. All decode greedily, and answer as many tokens as
they are told to. llama.cpp and transformers need `pip install -r requirements-bench.txt`.

Prints a Markdown table: answers' tokens per second from the first request's arrival to the last token, milliseconds to
the first token (the median request's), the median over rounds and in brackets the smallest and greatest value; the
ratio is the median over rounds of ours to theirs. --profile shows where our steps spend their time.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.serving_peers import Answer, Contender, Continuous, Job, LlamaCpp, Ours, Run, Transformers
from model import Decoder, ModelConfig, hf
from utils.machine import cpu_name
from utils.terminal import run_main

CONTENDERS = ("ours", "transformers", "continuous", "llama.cpp")
SIZES = {
    "125M": ModelConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000,
        max_position_embeddings=1024,
    ),
    "tiny": ModelConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=512,
        max_position_embeddings=256,
    ),
}  # fmt: skip


def make_folder(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Folder of a llama with random weights, and a tokenizer that decodes as many tokens as the model has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = config.resolve()
    model = Decoder(config)
    model.initialize(0)
    weights = hf.named_weights(model.to(dtype))
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf.to_hf_config(config, dtype)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = ["<|endoftext|>", *alphabet, *(f"Ġ{number}" for number in range(config.vocab_size))][: config.vocab_size]
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def jobs_of(seed: int, count: int, vocab_size: int, lengths: tuple[range, range]) -> list[Job]:
    """Random prompts and lengths of answers."""
    draw = random.Random(seed)
    prompts, answers = lengths
    return [
        Job([draw.randrange(300, vocab_size) for _ in range(draw.choice(prompts))], draw.choice(answers))
        for _ in range(count)
    ]


def open_contender(
    name: str, folder: Path, scratch: Path, dtype: torch.dtype, args: argparse.Namespace, context: int
) -> Contender:
    if name == "ours":
        return Ours(folder, dtype, {"batch_invariant": True} if args.batch_invariant else {})
    if name == "transformers":
        return Transformers(folder, dtype)
    if name == "continuous":
        return Continuous(folder, dtype)
    return LlamaCpp(folder, scratch / "model.gguf", dtype, torch.get_num_threads(), args.requests, context)


def require_installed(contenders: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a contender is not installed.
    """
    needed = {"transformers": ["transformers"], "continuous": ["transformers"], "llama.cpp": ["xllamacpp", "gguf"]}
    for name in contenders:
        if any(importlib.util.find_spec(package) is None for package in needed.get(name, [])):
            raise ValueError(f"{name} is not installed: pip install -r requirements-bench.txt, or leave it out")


class Timing:
    """Figures of a contender for one number of requests."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        """Tokens a second, for each round."""
        self.firsts: list[float] = []
        """Milliseconds to the first token."""

    def add(self, run: Run) -> None:
        self.rates.append(sum(len(answer.ids) for answer in run.answers) / run.seconds)
        self.firsts.append(1e3 * statistics.median(answer.first for answer in run.answers))


def spread(values: Sequence[float]) -> str:
    """Median, smallest and greatest value."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Share of their tokens that lie before the first difference from ours."""
    equal = total = 0
    for own, other in zip(ours, theirs):
        total += len(other.ids)
        equal += next((n for n, (a, b) in enumerate(zip(own.ids, other.ids)) if a != b), len(other.ids))
    return equal / total


def measure(
    contenders: dict[str, Contender], rounds: int, counts: Sequence[int], new_jobs: Callable[[int, int], list[Job]]
) -> tuple[dict[tuple[str, int], Timing], dict[tuple[str, int], float]]:
    """Figures by contender and number of requests, and the share of tokens that are ours.

    Args:
        new_jobs: (round, number of requests) -> jobs; round -1 warms up.
    """
    timings = {(name, count): Timing() for name in contenders for count in counts}
    agreements: dict[tuple[str, int], float] = {}
    for number in range(-1, rounds):
        order = list(contenders)
        order = order[number % len(order) :] + order[: number % len(order)]
        for count in counts:
            jobs, found = new_jobs(number, count), {}
            for name in order:
                run = contenders[name].run(jobs)
                found[name] = run.answers
                assert [len(answer.ids) for answer in run.answers] == [job.num_new for job in jobs], name
                if number >= 0:
                    timings[name, count].add(run)
            for name in order if "ours" in found else ():
                agreements[name, count] = agreement(found["ours"], found[name])
    return timings, agreements


def table(
    contenders: Sequence[str], counts: Sequence[int], timings: dict[tuple[str, int], Timing],
    agreements: dict[tuple[str, int], float],
) -> list[str]:  # fmt: skip
    heads = ("requests", "contender", "tokens/s", "first token, ms", "ours / theirs", "equal tokens")
    lines = [f"| {' | '.join(heads)} |", f"|{len(heads) * '---|'}"]
    for count in counts:
        for name in contenders:
            timing = timings[name, count]
            ratio = equal = "-"
            if "ours" in contenders:
                pairs = zip(timings["ours", count].rates, timing.rates)
                ratio = f"{statistics.median(own / other for own, other in pairs):.2f}"
                equal = f"{agreements[name, count]:.0%}"
            lines.append(f"| {count} | {name} | {spread(timing.rates)} | {spread(timing.firsts)} | {ratio} | {equal} |")
    return lines


def show_profile(ours: Contender, jobs: Sequence[Job]) -> None:
    """Where a run spends its time: operations, and Python's functions."""
    import cProfile
    import pstats

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ours.run(jobs)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))
    functions = cProfile.Profile()
    functions.runcall(ours.run, jobs)
    pstats.Stats(functions).sort_stats("tottime").print_stats(25)


def version_of(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a llama; by default 125M parameters at random")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="names with commas")
    parser.add_argument("--requests", type=int, default=16, help="number of requests beside 1")
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 256), metavar=("MIN", "MAX"))
    parser.add_argument("--answer", type=int, nargs=2, default=(32, 128), metavar=("MIN", "MAX"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_invariant", action="store_true", help="ours with the same bits whoever else is served")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, to see that it runs")
    args = parser.parse_args(argv)
    names = args.contenders.split(",")
    if unknown := set(names) - set(CONTENDERS):
        raise ValueError(f"--contenders can be {', '.join(CONTENDERS)}, not {', '.join(sorted(unknown))}")
    require_installed(names)
    if args.quick:
        args.requests, args.prompt, args.answer, args.rounds = 3, (4, 20), (3, 8), 1
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        folder = args.model or scratch
        if args.model is None:
            make_folder(folder, SIZES["tiny" if args.quick else "125M"], dtype)
        config = hf.read_config(folder)
        lengths = tuple(range(least, most + 1) for least, most in (args.prompt, args.answer))
        versions = [version_of(name) for name in ("torch", "transformers", "xllamacpp")]
        print(f"{cpu_name()}, {torch.get_num_threads()} threads, {args.dtype}, Python {platform.python_version()}, "
              f"{', '.join(versions)}")  # fmt: skip
        context = args.prompt[1] + args.answer[1]
        contenders = {name: open_contender(name, folder, scratch, dtype, args, context) for name in names}

        def new_jobs(number: int, count: int) -> list[Job]:
            return jobs_of(1000 * (number + 2) + count, count, config.vocab_size, lengths)

        counts = [1, args.requests]
        timings, agreements = measure(contenders, args.rounds, counts, new_jobs)
        print(f"{args.rounds} rounds; prompts of {args.prompt[0]}-{args.prompt[1]} tokens, answers of {args.answer[0]}-"
              f"{args.answer[1]}")  # fmt: skip
        print("\n".join(table(names, counts, timings, agreements)))
        if args.profile and "ours" in contenders:
            for count in counts:
                show_profile(contenders["ours"], new_jobs(args.rounds, count))
        for contender in contenders.values():
            contender.close()


if __name__ == "__main__":
    run_main(main)
