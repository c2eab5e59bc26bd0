"""Bytes per token of several pre-split patterns and kinds of tokenizers, on the same text.

    python -m benchmarks.split_patterns --source zh=D/zh --source en=D/en --source code=D/code --vocab_size 16384

Nine tenths of each source's documents are for training, and one tenth, chosen by hash, for measuring. Every tokenizer
is trained in its own process, so that its peak memory is its own.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import hashlib
import json
import resource
import subprocess
import time
from collections.abc import Iterator

from data_preprocess.readers import Corpus, Document, find_units, read_unit
from tokenizer import Tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe
from tokenizer.sp_bbpe import train_sp_bbpe
from utils.paths import expand
from utils.terminal import run_main

VARIANTS = {
    "digits 1, letters any": dict(max_digits=1),
    "digits 2, letters any": dict(max_digits=2),
    "digits 3, letters any": dict(max_digits=3),
    "digits 3, Han in 1": dict(max_digits=3, max_han=1),
    "digits 3, Han in 2": dict(max_digits=3, max_han=2),
    "digits 3, Han in 4": dict(max_digits=3, max_han=4),
    "digits 3, Han in 8": dict(max_digits=3, max_han=8),
    "sp_bbpe": None,
}


def texts(directory: str, held_out: bool) -> Iterator[str]:
    corpus = Corpus(directory)
    for unit in find_units(corpus, 1 << 24)[0]:
        for item in read_unit(corpus, unit):
            if isinstance(item, Document):
                digest = hashlib.blake2b(item.text.encode(), digest_size=1).digest()[0]
                if (digest < 26) == held_out:
                    yield item.text


def train(variant: str, directories: list[str], vocab_size: int) -> Tokenizer:
    training = (text for directory in directories for text in texts(directory, held_out=False))
    options = VARIANTS[variant]
    if options is None:
        return train_sp_bbpe(training, vocab_size, show_progress=False)
    return train_hf_bbpe(training, vocab_size, show_progress=False, **options)


def measure(variant: str, sources: dict[str, str], vocab_size: int) -> dict:
    started = time.perf_counter()
    tokenizer = train(variant, list(sources.values()), vocab_size)
    seconds = time.perf_counter() - started
    bytes_a_token = {}
    encoding_bytes, encoding_seconds = 0, 0.0
    for name, directory in sources.items():
        held_out = list(texts(directory, held_out=True))
        started = time.perf_counter()
        tokens = sum(map(len, (tokenizer.encode(text) for text in held_out)))
        encoding_seconds += time.perf_counter() - started
        num_bytes = sum(len(text.encode()) for text in held_out)
        encoding_bytes += num_bytes
        bytes_a_token[name] = num_bytes / tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "bytes_a_token": bytes_a_token, "train_s": seconds, "peak_mb": peak,
        "encode_mb_s": encoding_bytes / 1e6 / encoding_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.split_patterns", description=__doc__.splitlines()[0])
    parser.add_argument("--source", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--variant", choices=list(VARIANTS))
    args = parser.parse_args()
    sources = {name: expand(path) for name, path in (source.split("=", 1) for source in args.source)}
    if args.variant:
        print(json.dumps(measure(args.variant, sources, args.vocab_size)))
        return
    print(f"| {args.vocab_size} entries | " + " | ".join(sources) + " | training s | peak MB | encoding MB/s |")
    print("|---|" + "---|" * (len(sources) + 3))
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.split_patterns", *sys.argv[1:], "--variant", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        columns = [f"{value:.3f}" for value in result["bytes_a_token"].values()]
        print(
            f"| {variant} | {' | '.join(columns)} | {result['train_s']:.1f} | {result['peak_mb']:.0f} | "
            f"{result['encode_mb_s']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    run_main(main)
