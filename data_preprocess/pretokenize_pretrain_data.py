"""Tokenize a corpus: text files, source trees and JSON lines -> `.bin` shards (format: dataset/format.py).

    python -m data_preprocess.pretokenize_pretrain_data --data_dir D --tokenizer_dir T [--output_dir O]

Each document goes to the train or the valid set by the hash of its text, so that the same text never lands in both.
The work is cut into units; a unit's shards are named by its content, the tokenizer and the options. A run that was
killed goes on where it stopped: the same command skips the units whose record is there. The output does not depend
on --num_workers.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data_preprocess.readers import BadRecords, Unit, find_units, read_documents
from dataset.format import MANIFEST_NAME, SPLITS, BinHeader, BinWriter, read_bin_header, read_document_starts
from tokenizer import HFBBPETokenizer, load_tokenizer
from utils.files import atomic_write_json

_ENCODE_BATCH_BYTES = 1 << 20
_UNITS_DIR = ".pretokenize"


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; also what a unit's shards depend on, besides its text."""

    data_dir: str
    output_dir: str
    tokenizer_dir: str
    text_key: str
    valid_ratio: float


@dataclass(frozen=True)
class UnitRecord:
    """Written after a unit's shards: its existence says that they are whole."""

    shards: dict[str, str]
    """Set -> file name; a set that got no document is left out."""
    documents: int
    tokens: int
    text_bytes: int
    bad_records: int
    bad_examples: list[str]


def is_valid_document(text: str, valid_ratio: float) -> bool:
    """Whether a document belongs to the validation set: its hash, as a fraction of 2**64, is below the ratio."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < valid_ratio * 2.0**64


@functools.cache
def _tokenizer(directory: str) -> HFBBPETokenizer:
    """One tokenizer a process, however many units it works on."""
    return load_tokenizer(directory)


def _is_whole(path: Path) -> bool:
    try:
        read_document_starts(path)
    except ValueError:
        return False
    return True


def process_unit(job: Job, unit: Unit) -> UnitRecord:
    """Tokenize one unit, or return the record of an earlier run that did."""
    tokenizer = _tokenizer(job.tokenizer_dir)
    root, output = Path(job.data_dir), Path(job.output_dir)
    options = [tokenizer.fingerprint, job.text_key, job.valid_ratio]
    name = hashlib.sha256(json.dumps([unit.fingerprint(root), options]).encode()).hexdigest()[:16]
    record_path = output / _UNITS_DIR / f"{name}.json"
    if record_path.exists():
        record = UnitRecord(**json.loads(record_path.read_text()))
        if all(_is_whole(output / file) for file in record.shards.values()):
            return record

    bad = BadRecords()
    documents: list[str] = []
    with ExitStack() as stack:
        writers: dict[str, BinWriter] = {}

        def writer(split: str) -> BinWriter:
            if split not in writers:
                header = BinHeader(
                    vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, split=split,
                    tokenizer_fingerprint=tokenizer.fingerprint, valid_ratio=job.valid_ratio,
                )  # fmt: skip
                writers[split] = stack.enter_context(BinWriter(output / f"{split}-{name}.bin", header))
            return writers[split]

        def flush() -> None:
            for text, ids in zip(documents, tokenizer.encode_batch(documents)):
                split = "valid" if is_valid_document(text, job.valid_ratio) else "train"
                writer(split).add_document(ids, len(text.encode("utf-8")))
            documents.clear()

        pending_bytes = 0
        for piece in unit.pieces:
            for text in read_documents(root, piece, job.text_key, bad):
                documents.append(text)
                pending_bytes += len(text)
                if pending_bytes >= _ENCODE_BATCH_BYTES:
                    flush()
                    pending_bytes = 0
        flush()
    headers = {split: read_bin_header(output / f"{split}-{name}.bin") for split in SPLITS if split in writers}
    record = UnitRecord(
        shards={split: f"{split}-{name}.bin" for split in headers},
        documents=sum(header.num_documents for header in headers.values()),
        tokens=sum(header.num_tokens for header in headers.values()),
        text_bytes=sum(header.text_bytes for header in headers.values()),
        bad_records=bad.count,
        bad_examples=bad.examples,
    )
    atomic_write_json(record_path, asdict(record))
    return record


def _start_worker() -> None:
    """A worker ends with its parent, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One tokenizer thread a process: the processes already fill the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _process_units(job: Job, units: list[Unit], num_workers: int, max_bad_records: int) -> list[UnitRecord]:
    """Spread the units over processes; returns their records in the units' order.

    Raises:
        ValueError: a worker's error, with the file it was at, or more unreadable records than allowed.
    """
    records: dict[int, UnitRecord] = {}
    bad_records = 0
    # "spawn": forking a process that already runs the tokenizer's threads can deadlock.
    pool = ProcessPoolExecutor(min(num_workers, len(units)), multiprocessing.get_context("spawn"), _start_worker)
    progress = tqdm(
        total=sum(unit.num_bytes for unit in units), unit="B", unit_scale=True, desc="tokenizing", disable=None
    )
    try:
        futures = {pool.submit(process_unit, job, unit): index for index, unit in enumerate(units)}
        for future in as_completed(futures):
            index = futures[future]
            try:
                record = records[index] = future.result()
            except (ValueError, OSError) as error:
                raise ValueError(f"tokenizing stopped at {units[index].pieces[0].path}: {error}") from error
            progress.update(units[index].num_bytes)
            bad_records += record.bad_records
            if bad_records > max_bad_records:
                raise ValueError(
                    f"{bad_records} records could not be read, more than --max_bad_records {max_bad_records}; "
                    f"for example {record.bad_examples[0]}"
                )
    finally:
        # After an error or Ctrl-C, what has not begun is dropped.
        pool.shutdown(cancel_futures=True)
        progress.close()
    return [records[index] for index in range(len(units))]


def _remove_leftovers(directory: Path) -> None:
    """Delete the temporary files of runs that were killed; another run's, still alive, are left alone."""
    for path in [*directory.glob("*.tmp-*"), *(directory / _UNITS_DIR).glob("*.tmp-*")]:
        try:
            os.kill(int(path.name.rpartition("-")[2]), 0)
        except (ValueError, ProcessLookupError):
            path.unlink(missing_ok=True)
        except PermissionError:
            continue


def pretokenize(job: Job, num_workers: int, shard_mb: float, max_bad_records: int) -> dict:
    """Run the whole job and write its manifest, which lists the shards in the order of their inputs.

    Raises:
        ValueError: nothing to read, nothing held out, or more unreadable records than allowed.
    """
    root, output = Path(job.data_dir), Path(job.output_dir)
    if not 0.0 <= job.valid_ratio < 1.0:
        raise ValueError(f"--valid_ratio must be at least 0 and below 1, got {job.valid_ratio}")
    if not 1 <= shard_mb * 1e6 < 2**63 or num_workers < 1:
        raise ValueError("--shard_mb and --num_workers must be positive")
    units, others = find_units(root, int(shard_mb * 1e6))
    if others:
        suffixes = sorted({Path(path).suffix or "no suffix" for path in others})
        print(f"left out {len(others)} files of other kinds ({', '.join(suffixes)})", file=sys.stderr)
    tokenizer = load_tokenizer(job.tokenizer_dir)
    (output / _UNITS_DIR).mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output)
    records = _process_units(job, units, num_workers, max_bad_records)

    documents = sum(record.documents for record in records)
    if not documents:
        raise ValueError(f"{root} holds no text that could be read: every file is empty or unreadable")
    shards = {split: [r.shards[split] for r in records if split in r.shards] for split in SPLITS}
    if job.valid_ratio > 0 and not shards["valid"]:
        raise ValueError(
            f"none of the {documents} documents fell into the validation set: use a larger --valid_ratio than "
            f"{job.valid_ratio}, or 0 to go without"
        )
    if not shards["train"]:
        raise ValueError(f"all {documents} documents fell into the validation set: use a smaller --valid_ratio")
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
    _replace_manifest(output, manifest)
    return manifest


def _replace_manifest(output: Path, manifest: dict) -> None:
    """Write the manifest. Indexes of other shards than it lists go: training must not read old data through them."""
    path = output / MANIFEST_NAME
    old = json.loads(path.read_text()) if path.exists() else manifest
    if old.get("shards") != manifest["shards"]:
        for index in output.glob("*.ibin"):
            print(f"removed {index.name}, the index of earlier shards: build it again", file=sys.stderr)
            index.unlink()
    atomic_write_json(path, manifest)
    listed = {name for names in manifest["shards"].values() for name in names}
    unlisted = sorted(p.name for p in output.glob("*.bin") if p.name not in listed)
    if unlisted:
        print(
            f"{len(unlisted)} shards of earlier runs are not part of this data and may be deleted, for example "
            f"{unlisted[0]}",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.pretokenize_pretrain_data",
        description="Tokenize .txt files, source trees and .jsonl into .bin shards.",
    )
    parser.add_argument("--data_dir", required=True, help="directory with the raw text")
    parser.add_argument("--tokenizer_dir", required=True, help="directory of the tokenizer")
    parser.add_argument("--output_dir", help="where the .bin files go (default: data_dir)")
    parser.add_argument("--text_key", default="text", help="key of the text in a JSON record (default: text)")
    parser.add_argument("--valid_ratio", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--shard_mb", type=float, default=256.0, help="MB of text in a shard (default: 256)")
    parser.add_argument("--max_bad_records", type=int, default=100, help="stop beyond so many (default: 100)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    job = Job(args.data_dir, args.output_dir or args.data_dir, args.tokenizer_dir, args.text_key, args.valid_ratio)
    try:
        manifest = pretokenize(job, args.num_workers, args.shard_mb, args.max_bad_records)
    except (ValueError, OSError) as error:
        print(f"pretokenize: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretokenize: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    shown = manifest["bad_examples"][:10]
    for example in shown:
        print(f"skipped {example}", file=sys.stderr)
    if manifest["bad_records"] > len(shown):
        print(f"and {manifest['bad_records'] - len(shown)} more, see {MANIFEST_NAME}", file=sys.stderr)
    print(
        f"{manifest['documents']:,} documents, {manifest['text_bytes'] / 1e6:.1f} MB -> {manifest['tokens']:,} tokens "
        f"({manifest['text_bytes'] / manifest['tokens']:.2f} bytes a token) in "
        f"{len(manifest['shards']['train'])} train and {len(manifest['shards']['valid'])} valid shards; "
        f"{manifest['bad_records']} records skipped; {manifest['text_bytes'] / 1e6 / seconds:.1f} MB/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
