"""Tokenize a corpus: text, JSON, Parquet and tables (see readers.py) -> `.bin` shards (format: dataset/format.py).

    python -m data_preprocess.pretokenize_pretrain_data --data_dir D --tokenizer_dir T [--output_dir O]

Each document goes to the train or the valid set by the hash of its text, so that the same text never lands in both.
The work is cut into units by the files alone, and a unit into parts of about --shard_mb of text. A part's shards are
named by the unit's content, the tokenizer and the options, and a record that is written after them says that they are
whole. A run that was killed goes on where it stopped: the same command skips the parts whose record is there. The
output does not depend on --num_workers.
"""

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data_preprocess.readers import (
    BadRecord,
    BadRecords,
    Corpus,
    Document,
    Unit,
    add_corpus_arguments,
    corpus_from,
    find_units,
    place,
    read_unit,
)
from data_preprocess.shards import NOTES_DIR, PartWriter, check_sets, print_summary, replace_manifest, sole_writer
from dataset.format import SPLITS, read_document_table
from tokenizer import Tokenizer, load_tokenizer
from utils.files import atomic_write_json

_ENCODE_BATCH_CHARACTERS = 1 << 20
_ENCODE_BATCH_ITEMS = 1000
_SECONDS_A_LINE = 30.0


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    corpus: Corpus
    output_dir: str
    tokenizer_dir: str
    valid_ratio: float = 0.01
    shard_bytes: int = 256_000_000
    """Text after which a part ends, at the end of a document."""
    max_bad_records: int = 100


@dataclass(frozen=True)
class PartRecord:
    """Written after a part's shards: its existence says that they are whole."""

    shards: dict[str, str]
    """Set -> file name; a set that got no document is left out."""
    items: int
    """Documents' parts and bad records of the unit that this part took: how many to pass over to go on after it."""
    is_last: bool
    """The unit ends here."""
    documents: int
    tokens: int
    text_bytes: int
    bad_records: int
    bad_examples: list[str]


def is_valid_document(text: str, valid_ratio: float) -> bool:
    """Whether a document belongs to the validation set: its hash, as a fraction of 2**64, is below the ratio.

    Of a document in parts, the first one decides.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < valid_ratio * 2.0**64


@functools.cache
def _tokenizer(directory: str) -> Tokenizer:
    """One tokenizer a process, however many units it works on."""
    return load_tokenizer(directory)


def _finished_part(output: Path, name: str) -> PartRecord | None:
    """The record of a part that an earlier run completed."""
    path = output / NOTES_DIR / f"{name}.json"
    try:
        record = PartRecord(**json.loads(path.read_text()))
        for file in record.shards.values():
            read_document_table(output / file)
    except (OSError, ValueError, TypeError):
        return None
    return record


def process_unit(
    job: Job, unit: Unit, num_threads: int = 1, on_bytes: Callable[[int], None] = lambda _: None
) -> list[PartRecord]:
    """Tokenize a unit, from where an earlier run stopped; returns the records of all its parts.

    Raises:
        ValueError: what went wrong, with the file and the record.
    """
    tokenizer = _tokenizer(job.tokenizer_dir)
    output = Path(job.output_dir)
    options = [tokenizer.fingerprint, asdict(job.corpus.fields), job.valid_ratio, job.shard_bytes]
    name = hashlib.sha256(json.dumps([unit.fingerprint(job.corpus), options]).encode()).hexdigest()[:16]
    records: list[PartRecord] = []
    while record := _finished_part(output, f"{name}-{len(records)}"):
        records.append(record)
        if record.is_last:
            on_bytes(unit.num_bytes)
            return records
    done = sum(record.items for record in records)
    items = itertools.islice(read_unit(job.corpus, unit, on_bytes), done, None)
    encoded = _encode(tokenizer, items, num_threads)
    while not (records and records[-1].is_last):
        bad_records = sum(record.bad_records for record in records)
        records.append(_write_part(job, tokenizer, f"{name}-{len(records)}", encoded, bad_records))
    return records


Encoded = tuple[Document | BadRecord, list[int]]


def _encode(tokenizer: Tokenizer, items: Iterator[Document | BadRecord], num_threads: int) -> Iterator[Encoded]:
    """Each item with its token ids (a bad record has none), in the same order."""
    batch: list[Document | BadRecord] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.text) if isinstance(item, Document) else 0
        # Every thread has its share to do.
        if characters >= _ENCODE_BATCH_CHARACTERS * num_threads or len(batch) >= _ENCODE_BATCH_ITEMS * num_threads:
            yield from _encode_batch(tokenizer, batch, num_threads)
            batch, characters = [], 0
    yield from _encode_batch(tokenizer, batch, num_threads)


def _encode_batch(tokenizer: Tokenizer, batch: list[Document | BadRecord], num_threads: int) -> Iterator[Encoded]:
    documents = [item for item in batch if isinstance(item, Document)]
    try:
        ids = iter(tokenizer.encode_batch([document.text for document in documents], num_threads))
    except Exception:
        # The libraries raise what they like; which document was it?
        for document in documents:
            try:
                tokenizer.encode(document.text)
            except Exception as error:
                where = place(document.path, document.counts, document.record)
                raise ValueError(f"the tokenizer fails on {where} ({type(error).__name__}: {error})") from error
        raise
    for item in batch:
        yield item, next(ids) if isinstance(item, Document) else []


def _write_part(job: Job, tokenizer: Tokenizer, name: str, encoded: Iterator[Encoded], bad_before: int) -> PartRecord:
    """Write the next shards of a unit, one of each set, and their record. `bad_before` are its earlier bad records."""
    output, bad = Path(job.output_dir), BadRecords()
    items = text_bytes = 0
    is_last, split = True, ""
    with PartWriter(output, name, tokenizer, job.valid_ratio) as shards:
        for item, ids in encoded:
            items += 1
            if isinstance(item, BadRecord):
                bad.add(item)
                _check_bad_records(bad_before + bad.count, job.max_bad_records, bad.examples[0])
                continue
            # Else it goes on with the document of the item before.
            split = split or ("valid" if is_valid_document(item.text, job.valid_ratio) else "train")
            num_bytes = len(item.text.encode("utf-8"))
            shards.add_document(split, ids, num_bytes, (item.path, item.counts), item.record, item.continued)
            text_bytes += num_bytes
            if not item.continued:
                split = ""
                if text_bytes >= job.shard_bytes:
                    is_last = False
                    break
    record = PartRecord(
        shards=shards.names,
        items=items,
        is_last=is_last,
        **shards.totals(),
        bad_records=bad.count,
        bad_examples=bad.examples,
    )
    atomic_write_json(output / NOTES_DIR / f"{name}.json", asdict(record))
    return record


def _check_bad_records(count: int, most: int, example: str) -> None:
    if count > most:
        raise ValueError(
            f"{count} records could not be read, more than --max_bad_records {most}; for example {example}"
        )


class _Worker:
    """What a worker process knows besides its units; set when it starts."""

    bytes_read = None
    """Of all workers together: a multiprocessing.Value."""


def _start_worker(bytes_read: object, num_threads: int) -> None:
    """A worker ends with its parent, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # How many threads the tokenizer takes when it is let.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    _Worker.bytes_read = bytes_read
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work_on_unit(job: Job, unit: Unit, num_threads: int) -> list[PartRecord]:
    """In a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"

    def count(num_bytes: int) -> None:
        with _Worker.bytes_read.get_lock():
            _Worker.bytes_read.value += num_bytes

    return process_unit(job, unit, num_threads, count)


def _process_units(job: Job, units: list[Unit], num_workers: int) -> list[PartRecord]:
    """Spread the units over processes; returns the records of their parts, in the units' order.

    Raises:
        ValueError: a worker's error, with the file it was at, or more unreadable records than allowed.
    """
    context = multiprocessing.get_context("spawn")  # Forking a process that runs the tokenizer's threads can deadlock.
    bytes_read = context.Value("q", 0)
    progress = _Progress(sum(unit.num_bytes for unit in units))
    records: dict[int, list[PartRecord]] = {}
    bad_records = 0
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (bytes_read, num_workers))
    try:
        # A large file that cannot be cut would keep the others waiting: it goes first, and takes all threads.
        largest_first = sorted(range(len(units)), key=lambda index: -units[index].num_bytes)
        futures = {}
        for index in largest_first:
            threads = num_workers if units[index].num_bytes > 2 * job.shard_bytes else 1
            futures[pool.submit(_work_on_unit, job, units[index], threads)] = index
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.show(bytes_read.value)
            for future in done:
                index = futures[future]
                try:
                    parts = records[index] = future.result()
                except (ValueError, OSError) as error:
                    raise ValueError(_with_file(str(error), units[index])) from error
                bad_records += sum(part.bad_records for part in parts)
                examples = [example for part in parts for example in part.bad_examples]
                _check_bad_records(bad_records, job.max_bad_records, examples[0] if examples else "")
    except BaseException:
        # What is whole has its record; the rest would only keep the user waiting.
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()
    return [part for index in range(len(units)) for part in records[index]]


def _with_file(sentence: str, unit: Unit) -> str:
    """A failing disk, for one, does not say which file it was."""
    if any(piece.path in sentence for piece in unit.pieces):
        return sentence
    first, last = unit.pieces[0].path, unit.pieces[-1].path
    return f"{sentence} (in {first})" if first == last else f"{sentence} (between {first} and {last})"


class _Progress:
    """MB, MB/s and time left: a bar on a terminal, else a line every half minute, at the rate since the line before
    (what an earlier run completed goes by in a moment)."""

    def __init__(self, total_bytes: int):
        self._total, self._last_time, self._last_bytes = total_bytes, time.monotonic(), 0
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)

    def show(self, done_bytes: int) -> None:
        done_bytes = min(done_bytes, self._total)
        self._bar.update(done_bytes - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._last_time >= _SECONDS_A_LINE and done_bytes > self._last_bytes:
            rate = (done_bytes - self._last_bytes) / (now - self._last_time)
            self._last_time, self._last_bytes = now, done_bytes
            print(
                f"tokenizing: {done_bytes / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(self._total - done_bytes) / rate / 60:.0f} min left",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def close(self) -> None:
        self._bar.close()


def pretokenize(job: Job, num_workers: int = 1) -> dict:
    """Run the whole job and write its manifest, which lists the shards in the order of their inputs.

    Raises:
        ValueError: nothing to read, nothing held out, or more unreadable records than allowed.
    """
    output = Path(job.output_dir)
    if not 0.0 <= job.valid_ratio < 1.0:
        raise ValueError(f"--valid_ratio must be at least 0 and below 1, got {job.valid_ratio}")
    if not 1 <= job.shard_bytes < 2**63 or num_workers < 1:
        raise ValueError("--shard_mb and --num_workers must be positive")
    units, others = find_units(job.corpus, job.shard_bytes)
    if others:
        suffixes = sorted({Path(path).suffix or "no suffix" for path in others})
        print(f"left out {len(others)} files of other kinds ({', '.join(suffixes)})", file=sys.stderr)
    tokenizer = load_tokenizer(job.tokenizer_dir)
    with sole_writer(output):
        records = _process_units(job, units, num_workers)
        return _complete(job, tokenizer, records)


def _complete(job: Job, tokenizer: Tokenizer, records: list[PartRecord]) -> dict:
    """Check that both sets got documents, and write the manifest and the tokenizer beside the shards."""
    output = Path(job.output_dir)

    documents = sum(record.documents for record in records)
    if not documents:
        raise ValueError(f"{job.corpus.root} holds no text that could be read: every file is empty or unreadable")
    shards = {split: [r.shards[split] for r in records if split in r.shards] for split in SPLITS}
    check_sets(shards, documents, job.valid_ratio)
    tokenizer.save_pretrained(output / "tokenizer")
    manifest = {
        "shards": shards,
        "valid_ratio": job.valid_ratio,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "documents": documents,
        "tokens": sum(record.tokens for record in records),
        "text_bytes": sum(record.text_bytes for record in records),
        "bad_records": sum(record.bad_records for record in records),
        "bad_examples": [example for record in records for example in record.bad_examples],
    }
    replace_manifest(output, manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.pretokenize_pretrain_data",
        description="Tokenize text, JSON, Parquet and tables into .bin shards.",
    )
    parser.add_argument("--data_dir", required=True, help="directory with the raw text")
    parser.add_argument("--tokenizer_dir", required=True, help="directory of the tokenizer")
    parser.add_argument("--output_dir", help="where the .bin files go (default: data_dir)")
    add_corpus_arguments(parser)
    parser.add_argument("--valid_ratio", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--shard_mb", type=float, default=256.0, help="MB of text in a shard (default: 256, about 100 MB of tokens)"
    )
    parser.add_argument("--max_bad_records", type=int, default=100, help="stop beyond so many (default: 100)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        if not args.shard_mb * 1e6 < 2**63:
            raise ValueError("--shard_mb is too large")
        job = Job(
            corpus_from(args, args.data_dir), args.output_dir or args.data_dir, args.tokenizer_dir, args.valid_ratio,
            int(args.shard_mb * 1e6), args.max_bad_records,
        )  # fmt: skip
        manifest = pretokenize(job, args.num_workers)
    except (ValueError, OSError) as error:
        print(f"pretokenize: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "pretokenize: a worker process was killed, perhaps for memory; the same command goes on where it stopped, "
            "with a smaller --num_workers if it was memory",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("pretokenize: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print_summary(manifest, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
