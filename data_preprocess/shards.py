"""Writing the `.bin` shards of a data directory, and the manifest that lists them."""

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from dataset.format import MANIFEST_NAME, SPLITS, BinHeader, BinWriter
from tokenizer import Tokenizer
from utils.files import atomic_write_json

NOTES_DIR = ".pretokenize"


class PartWriter:
    """The shards of one part of the work: one of each set that gets a document, named after it.

    As a context manager it completes them, or after an exception leaves none.
    """

    def __init__(self, output: Path, name: str, tokenizer: Tokenizer, valid_ratio: float):
        self._output, self._name, self._tokenizer, self._valid_ratio = output, name, tokenizer, valid_ratio
        self._writers: dict[str, BinWriter] = {}
        self._stack = ExitStack()

    def add_document(
        self,
        split: str,
        ids: list[int] | np.ndarray,
        text_bytes: int,
        source: tuple[str, str],
        record: int,
        continued: bool = False,
    ) -> None:
        """Append a document to a set, see BinWriter."""
        if split not in self._writers:
            header = BinHeader(
                vocab_size=self._tokenizer.vocab_size, eod_id=self._tokenizer.eod_id, split=split,
                tokenizer_fingerprint=self._tokenizer.fingerprint, valid_ratio=self._valid_ratio,
            )  # fmt: skip
            path = self._output / f"{split}-{self._name}.bin"
            self._writers[split] = self._stack.enter_context(BinWriter(path, header))
        self._writers[split].add_document(ids, text_bytes, source, record, continued)

    @property
    def names(self) -> dict[str, str]:
        """Set -> file name."""
        return {split: self._writers[split].path.name for split in SPLITS if split in self._writers}

    def totals(self) -> dict[str, int]:
        """Documents, tokens and text bytes, once the shards are complete."""
        headers = [writer.header for writer in self._writers.values()]
        return {
            "documents": sum(header.num_documents for header in headers),
            "tokens": sum(header.num_tokens for header in headers),
            "text_bytes": sum(header.text_bytes for header in headers),
        }

    def __enter__(self) -> "PartWriter":
        self._stack.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)


@contextmanager
def sole_writer(output: Path) -> Iterator[Path]:
    """Make the directory, keep other runs out of it, and delete the temporary files of those that were killed.

    Yields:
        a folder in it for notes on the work.
    Raises:
        ValueError: another run is writing there.
    """
    notes = output / NOTES_DIR
    notes.mkdir(parents=True, exist_ok=True)
    with open(notes / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {output}: wait for it, or stop it") from None
        for directory in (output, notes, output / "tokenizer"):
            for path in directory.glob("*.tmp-*"):
                path.unlink(missing_ok=True)
        yield notes


def check_sets(shards: dict[str, list[str]], documents: int, valid_ratio: float) -> None:
    """Raise ValueError if a set that should hold documents got none."""
    if valid_ratio > 0 and not shards["valid"]:
        raise ValueError(
            f"none of the {documents} documents fell into the validation set: use a larger --valid_ratio than "
            f"{valid_ratio}, or 0 to go without"
        )
    if not shards["train"]:
        raise ValueError(f"all {documents} documents fell into the validation set: use a smaller --valid_ratio")


def replace_manifest(output: Path, manifest: dict) -> None:
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


def print_summary(manifest: dict, seconds: float) -> None:
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
