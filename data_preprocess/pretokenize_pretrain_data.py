"""Tokenize a corpus of text, JSON, Parquet and tables (readers/) into `.bin` shards (format: dataset/format.py).

    python -m data_preprocess.pretokenize_pretrain_data --data_dir D --tokenizer_dir T [--output_dir O]

Each document goes to the train or the valid set by the hash of its text, so that the same text is never in both. A
killed run goes on where it stopped (jobs.py), and the output does not depend on --num_workers.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_preprocess.jobs import Job, process_corpus, run_command
from data_preprocess.readers import (
    BadRecord,
    BadRecords,
    Document,
    Unit,
    add_corpus_arguments,
    corpus_from,
    place,
    read_unit,
)
from data_preprocess.shards import PartRecord, PartWriter, print_summary, set_of
from dataset.format import read_bin_header, read_document_table
from tokenizer import Tokenizer
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import run_main

_ENCODE_BATCH_CHARACTERS = 1 << 20
_ENCODE_BATCH_ITEMS = 1000


@dataclass(frozen=True)
class PretrainJob(Job):
    """Work of tokenizing documents into `.bin` shards."""

    def options(self) -> object:
        return [asdict(self.corpus.fields), self.valid_ratio, self.shard_bytes]

    def items(
        self, unit: Unit, tokenizer: Tokenizer, done: int, num_threads: int, on_bytes: Callable[[int], None]
    ) -> Iterator["Encoded"]:
        return _encode(tokenizer, itertools.islice(read_unit(self.corpus, unit, on_bytes), done, None), num_threads)

    def write_part(self, name: str, tokenizer: Tokenizer, items: Iterator["Encoded"], bad_before: int) -> PartRecord:
        """Write one shard for each set that gets a document."""
        bad = BadRecords()
        num_items = text_bytes = 0
        is_last, split = True, ""
        with PartWriter(Path(self.output_dir), name, tokenizer, self.valid_ratio) as shards:
            for item, ids in items:
                num_items += 1
                if isinstance(item, BadRecord):
                    bad.add(item)
                    self.check_bad_records(bad_before + bad.count, bad.examples)
                    continue
                # The first part of a document decides for all its parts.
                split = split or set_of(item.text.encode("utf-8"), self.valid_ratio)
                num_bytes = len(item.text.encode("utf-8"))
                shards.add_document(split, ids, num_bytes, (item.path, item.counts), item.record, item.continued)
                text_bytes += num_bytes
                if not item.continued:
                    split = ""
                    if text_bytes >= self.shard_bytes:
                        is_last = False
                        break
        return PartRecord(shards.names, num_items, is_last, shards.totals(), bad.count, bad.examples)

    def check_shard(self, path: Path) -> None:
        read_document_table(path).check_content(path, read_bin_header(path).num_tokens)


Encoded = tuple[Document | BadRecord, list[int]]


def _encode(tokenizer: Tokenizer, items: Iterator[Document | BadRecord], num_threads: int) -> Iterator[Encoded]:
    """Items with their token ids, in the same order; a bad record has no ids."""
    batch: list[Document | BadRecord] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.text) if isinstance(item, Document) else 0
        # A batch is large enough to give every thread its share.
        if characters >= _ENCODE_BATCH_CHARACTERS * num_threads or len(batch) >= _ENCODE_BATCH_ITEMS * num_threads:
            yield from _encode_batch(tokenizer, batch, num_threads)
            batch, characters = [], 0
    yield from _encode_batch(tokenizer, batch, num_threads)


def _encode_batch(tokenizer: Tokenizer, batch: list[Document | BadRecord], num_threads: int) -> Iterator[Encoded]:
    documents = [item for item in batch if isinstance(item, Document)]
    try:
        ids = iter(tokenizer.encode_batch([document.text for document in documents], num_threads))
    except Exception:
        # The libraries raise any exception, without saying which document it was.
        for document in documents:
            try:
                tokenizer.encode(document.text)
            except Exception as error:
                where = place(document.path, document.counts, document.record)
                raise ValueError(f"the tokenizer fails on {where} ({type(error).__name__}: {error})") from error
        raise
    for item in batch:
        yield item, next(ids) if isinstance(item, Document) else []


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data_preprocess.pretokenize_pretrain_data",
        description="Tokenize text, JSON, Parquet and tables into .bin shards.",
    )
    parser.add_argument("--data_dir", type=a_path, required=True, help="directory with the raw text")
    parser.add_argument("--tokenizer_dir", type=a_path, required=True, help="directory of the tokenizer")
    parser.add_argument("--output_dir", type=a_path, help="where the .bin files go (default: data_dir)")
    add_corpus_arguments(parser)
    parser.add_argument("--valid_ratio", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--shard_mb", type=float, default=256.0, help="MB of text in a shard (default: 256, about 100 MB of tokens)"
    )
    parser.add_argument("--max_bad_records", type=int, default=100, help="stop if more are unreadable (default: 100)")
    args = parser.parse_args(argv)

    def work() -> dict:
        if not 0.0 <= args.valid_ratio < 1.0:
            raise ValueError(f"--valid_ratio must be at least 0 and below 1, got {args.valid_ratio}")
        if not args.shard_mb * 1e6 < 2**63:
            raise ValueError(f"--shard_mb is too large: {args.shard_mb}")
        if args.num_workers < 1:
            raise ValueError(f"--num_workers must be positive, got {args.num_workers}")
        job = PretrainJob(
            corpus_from(args, args.data_dir), args.output_dir or args.data_dir, args.tokenizer_dir, args.valid_ratio,
            int(args.shard_mb * 1e6), args.max_bad_records,
        )  # fmt: skip
        return process_corpus(job, args.num_workers)

    return run_command("pretokenize", work, print_summary)


if __name__ == "__main__":
    run_main(main, goes_on=True)
