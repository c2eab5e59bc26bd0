"""Our data pipeline against other libraries: pretokenizing, the sample index, and the training loader.

    python -m benchmarks.data pretokenize [--mb 100] [--num_workers 2] [--kind hf_bbpe]
    python -m benchmarks.data index [--documents 10000000]
    python -m benchmarks.data loader [--samples 1000000]

`pretokenize` makes a corpus of JSON lines from the standard library's source. It runs our command from start to finish
(starting processes, reading text, checking, hashing, writing and flushing tokens) against the bare `encode_batch` of
the same tokenizer, on text in memory and with as many threads, and against Hugging Face `datasets.map` if installed.
`loader` also reads the same tokens as nanoGPT does (random offsets into a memory map) and through torch's DataLoader
with a DistributedSampler. Contenders run in turns, each in its own process. Memory is the peak of the process, with the
share of its imports beside it, and the largest peak of its children if it has any.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as LibraryTokenizer

from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.pretokenize_pretrain_data import main as pretokenize_main
from dataset.format import MANIFEST_NAME, BinHeader, BinWriter
from dataset.loader import TrainLoader
from dataset.pretrain import PretrainDataset
from tokenizer.train_tokenizer import main as train_tokenizer_main
from utils.machine import cpu_name
from utils.terminal import run_main

VOCAB_SIZE, SEQ_LEN, BATCH_SIZE = 16384, 1024, 8


def standard_library() -> list[str]:
    """The source of all its modules, tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                texts.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
    return [text for text in texts if text]


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def write_corpus(path: Path, megabytes: float) -> None:
    """Write JSON lines: many copies of the standard library, with the lines of each document shuffled, so that no two
    documents are the same."""
    generator = np.random.default_rng(0)
    texts, written = standard_library(), 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            for text in texts:
                if written:
                    lines = text.splitlines(keepends=True)
                    start = int(generator.integers(len(lines)))
                    text = "".join(lines[start:] + lines[:start])
                line = json.dumps({"text": text}, ensure_ascii=False)
                file.write(line + "\n")
                written += len(line)


def texts_of(corpus: Path) -> list[str]:
    with open(corpus / "a.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def pretokenize_ours(home: Path, workers: int) -> dict:
    output = tempfile.mkdtemp(dir=home)
    started = time.perf_counter()
    command = ["--data_dir", str(home / "corpus"), "--tokenizer_dir", str(home / "tokenizer"), "--output_dir", output]
    if pretokenize_main([*command, "--num_workers", str(workers), "--shard_mb", "16"]):
        raise SystemExit("pretokenize failed")
    seconds = time.perf_counter() - started
    manifest = json.loads((Path(output) / MANIFEST_NAME).read_text())
    return {"seconds": seconds, "bytes": manifest["text_bytes"], "tokens": manifest["tokens"]}


def pretokenize_raw(home: Path, workers: int) -> dict:
    """Bare `encode_batch`, on the same number of threads."""
    texts = texts_of(home / "corpus")
    model = home / "tokenizer" / "tokenizer.model"
    if model.exists():
        processor = SentencePieceProcessor(model_file=str(model))
        encode = partial(processor.encode, num_threads=workers)
    else:
        encode = LibraryTokenizer.from_file(str(home / "tokenizer" / "tokenizer.json")).encode_batch
    started = time.perf_counter()
    for start in range(0, len(texts), 256):
        encode(texts[start : start + 256])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": sum(len(text.encode()) for text in texts)}


def pretokenize_datasets(home: Path, workers: int) -> dict:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer")
    texts = datasets.Dataset.from_json(str(home / "corpus" / "a.jsonl"), cache_dir=tempfile.mkdtemp(dir=home))
    started = time.perf_counter()
    texts.map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True, num_proc=workers, remove_columns=["text"],
    )  # fmt: skip
    return {"seconds": time.perf_counter() - started, "bytes": sum(len(text.encode()) for text in texts["text"])}


def write_tokens(home: Path, documents: int, tokens_each: int, shards: int) -> None:
    """A data directory of random tokens, without a tokenizer."""
    header = BinHeader(VOCAB_SIZE, 0, "00" * 32, "train", 0.0)
    ids = np.random.default_rng(0).integers(1, VOCAB_SIZE, tokens_each)
    names = [f"train-{shard:04d}.bin" for shard in range(shards)]
    for name in names:
        with BinWriter(home / name, header) as writer:
            for document in range(documents // shards):
                writer.add_document(ids, 4 * tokens_each, ("made", "record"), document)
    manifest = {"shards": {"train": names, "valid": []}, "valid_ratio": 0}
    (home / MANIFEST_NAME).write_text(json.dumps(manifest))


def index_ours(home: Path, _: int) -> dict:
    started = time.perf_counter()
    lines = build(home, SEQ_LEN)
    return {"seconds": time.perf_counter() - started, "remark": lines[0]}


class NanoGPTSampling:
    """Random offsets into one memory map, as in nanoGPT's get_batch."""

    def __init__(self, home: Path):
        path = sorted(home.glob("*.bin"))[0]
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=256)
        self.generator = torch.Generator().manual_seed(0)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(self.tokens) - SEQ_LEN, (BATCH_SIZE,), generator=self.generator)
        x = torch.stack([torch.from_numpy(self.tokens[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(self.tokens[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
        return x, y


class Rows(torch.utils.data.Dataset):
    """Our samples one by one, for torch's DataLoader."""

    def __init__(self, home: Path):
        self.dataset = PretrainDataset(home, "train", SEQ_LEN, document_mask=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.from_numpy(self.dataset.read_rows(np.array([index]))[0])
        return row[:-1], row[1:]


def time_loader(make: Callable[[int], object], batches: int, middle: int) -> dict:
    """Samples per second from the beginning, and seconds until the first batch from the middle of the epoch."""
    loader = iter(make(0))
    next(loader)
    started = time.perf_counter()
    for _ in range(batches):
        next(loader)
    rate = batches * BATCH_SIZE / (time.perf_counter() - started)
    started = time.perf_counter()
    next(iter(make(middle)))
    return {"samples_s": rate, "seek_s": time.perf_counter() - started}


def loader_ours(home: Path, batches: int) -> dict:
    return _loader_ours(home, batches, document_mask=True, threads=0)


def loader_ours_ahead(home: Path, batches: int) -> dict:
    return _loader_ours(home, batches, document_mask=True, threads=1)


def loader_ours_plain(home: Path, batches: int) -> dict:
    return _loader_ours(home, batches, document_mask=False, threads=0)


def _loader_ours(home: Path, batches: int, document_mask: bool, threads: int) -> dict:
    dataset = PretrainDataset(home, "train", SEQ_LEN, document_mask)

    def make(position: int) -> TrainLoader:
        return TrainLoader(dataset, 0, BATCH_SIZE, 1, 0, 1, position, threads)

    return time_loader(make, batches, len(dataset) // 2)


def loader_nanogpt(home: Path, batches: int) -> dict:
    sampling = NanoGPTSampling(home)
    result = time_loader(lambda _: iter(sampling.__next__, None), batches, 0)
    return result | {"seek_s": None}


def loader_torch(home: Path, batches: int) -> dict:
    rows = Rows(home)

    def make(position: int) -> object:
        sampler = torch.utils.data.DistributedSampler(rows, num_replicas=1, rank=0, seed=0)
        loader = iter(torch.utils.data.DataLoader(rows, BATCH_SIZE, sampler=sampler))
        for _ in range(min(position // BATCH_SIZE, 2000)):
            next(loader)
        return loader

    result = time_loader(make, batches, 2000 * BATCH_SIZE)
    # Skipped batches cost the same each: the time of 2,000 is scaled to the middle of the epoch.
    return result | {"seek_s": result["seek_s"] * (len(rows) / 2) / (2000 * BATCH_SIZE)}


CONTENDERS = {
    "pretokenize": {
        "ours": pretokenize_ours,
        "raw encode_batch": pretokenize_raw,
        "datasets.map": pretokenize_datasets,
    },
    "index": {"ours": index_ours},
    "loader": {
        "ours, document mask": loader_ours,
        "ours, document mask, reading ahead": loader_ours_ahead,
        "ours, no mask": loader_ours_plain,
        "nanoGPT's sampling": loader_nanogpt,
        "torch DistributedSampler": loader_torch,
    },
}


def in_process(part: str, name: str, home: Path, number: int) -> dict | None:
    """Run one contender in its own process; None if its library is not installed."""
    command = [sys.executable, "-m", "benchmarks.data", part, "--contender", name, "--home", str(home)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(number), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([*command, "--number", str(number)], env=environment, capture_output=True, text=True)
    if "No module named 'datasets'" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(args: argparse.Namespace, home: Path) -> tuple[int, str]:
    """Make the contenders' input; returns their number argument and a line that describes it."""
    if args.part == "pretokenize":
        (home / "corpus").mkdir()
        write_corpus(home / "corpus" / "a.jsonl", args.mb)
        train_tokenizer_main(
            ["--data_dir", str(home / "corpus"), "--output_dir", str(home / "tokenizer"), "--sample_mb", "20",
             "--vocab_size", str(VOCAB_SIZE), "--kind", args.kind],
        )  # fmt: skip
        return args.num_workers, f"{args.mb:g} MB of JSON lines, {args.kind}, {VOCAB_SIZE} entries"
    if args.part == "index":
        write_tokens(home, args.documents, 20, 10)
        return 1, f"{args.documents:,} documents of 20 tokens in 10 shards"
    write_tokens(home, args.samples * SEQ_LEN // 512, 511, 1)
    build(home, SEQ_LEN)
    return 3000, f"{args.samples:,} samples of {SEQ_LEN} tokens, batches of {BATCH_SIZE}, page cache warm"


def show(part: str, name: str, results: list[dict]) -> str:
    def median(key: str) -> float:
        return statistics.median(result[key] for result in results)

    memory = f"{median('peak_mb'):.0f} MB (imports {median('imports_mb'):.0f})"
    if part == "loader":
        seek = "none" if results[0]["seek_s"] is None else f"{1e3 * median('seek_s'):,.2f} ms"
        return f"| {name} | {median('samples_s'):,.0f} samples/s | {seek} | {memory} |"
    children = median("children_mb")
    memory += f", largest child {children:.0f} MB" if children > 1 else ""
    if part == "index":
        return f"| {name} | {median('seconds'):.3f} s | {memory} |"
    rates = sorted(result["bytes"] / 1e6 / result["seconds"] for result in results)
    return f"| {name} | {statistics.median(rates):.2f} MB/s ({rates[0]:.2f} to {rates[-1]:.2f}) | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(CONTENDERS))
    parser.add_argument("--mb", type=float, default=100.0)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--kind", choices=["hf_bbpe", "sp_bbpe"], default="hf_bbpe")
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        imports = peak_mb()
        result = CONTENDERS[args.part][args.contender](Path(args.home), args.number)
        memory = {"imports_mb": imports, "peak_mb": peak_mb(), "children_mb": peak_mb(resource.RUSAGE_CHILDREN)}
        print(json.dumps(result | memory))
        return
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        number, remark = prepare(args, home)
        print(
            f"{remark}; {number if args.part == 'pretokenize' else 1} of {os.cpu_count()} cores of {cpu_name()}, "
            f"Python {platform.python_version()}, torch {torch.__version__}, {args.rounds} rounds"
        )
        names = list(CONTENDERS[args.part])
        results: dict[str, list[dict]] = {name: [] for name in names}
        for round_number in range(args.rounds):
            for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
                result = in_process(args.part, name, home, number)
                results[name] += [result] if result else []
        for name in names:
            print(show(args.part, name, results[name]) if results[name] else f"| {name} | not installed |")


if __name__ == "__main__":
    run_main(main)
