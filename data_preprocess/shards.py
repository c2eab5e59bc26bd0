"""Writing the shards of a data directory, and the manifest that lists them."""

import fcntl
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dataset.format import MANIFEST_NAME, PRETOKENIZE_COMMAND, SPLITS, BinHeader, BinWriter, read_manifest_of
from tokenizer import Tokenizer
from utils.files import atomic_write_json

NOTES_DIR = ".pretokenize"
NOTHING_READ = "holds no text that could be read"
MOST_UNREAD_FIELDS = 100
"""Number of names that are kept. Some records hold data in the names themselves, which never end."""
_FIELDS_A_LINE = 12


@dataclass(frozen=True)
class PartRecord:
    """Result of one part of the work."""

    shards: dict[str, str]
    """Set -> file name of its shard; a set that got nothing is left out."""
    items: int
    """Number of items of its unit that this part took, so that the next part knows where to go on."""
    is_last: bool
    """Whether the unit ends with this part."""
    totals: dict[str, int]
    """Name -> number of what the shards hold and what was left out; at least `documents`."""
    bad_records: int = 0
    bad_examples: list[str] = field(default_factory=list)
    dropped_examples: list[str] = field(default_factory=list)
    """Samples that were read but not taken, with the reason."""
    formats: dict[str, int] = field(default_factory=dict)
    """Layout -> number of records that were read as such."""
    unread_fields: dict[str, int] = field(default_factory=dict)
    """Field -> number of records in which it is not read."""


class PartWriter:
    """Writer of one part's shards: one for each set that gets a document, named after the part.

    As a context manager it completes them, or leaves none after an exception.
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


def set_of(content: bytes, valid_ratio: float) -> str:
    """Set that a content belongs to: valid, if its hash as a fraction of 2**64 is below the ratio."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "little") < valid_ratio * 2.0**64 else "train"


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Make the directory, keep other runs out of it, and delete the temporary files of killed ones.

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
        yield


def write_manifest(
    output: Path,
    tokenizer: Tokenizer,
    valid_ratio: float,
    parts: Sequence[PartRecord],
    source: object,
    more: Mapping = MappingProxyType({}),
) -> dict:
    """Check that both sets got something, and write the manifest and the tokenizer beside the shards.

    Args:
        source: origin of the documents, for messages.
        more: further entries of the manifest.
    Raises:
        ValueError: a set that should hold documents got none.
    """
    shards = {split: [part.shards[split] for part in parts if split in part.shards] for split in SPLITS}
    totals = {key: sum(part.totals[key] for part in parts) for key in (parts[0].totals if parts else ())}
    documents = totals.get("documents", 0)
    unreadable = reasons(sum(part.bad_records for part in parts), [e for part in parts for e in part.bad_examples])
    if not documents:
        raise ValueError(f"{source} {NOTHING_READ}: {unreadable or 'every file is empty'}")
    # The missing documents may be among the records that could not be read.
    besides = f" ({unreadable})" if unreadable else ""
    if not any(shards.values()):
        dropped = [example for part in parts for example in part.dropped_examples]
        example = f", for example {dropped[0]}" if dropped else ""
        raise ValueError(
            f"no sample is left of the {documents} records of {source}{example}: use a larger --max_seq_len{besides}"
        )
    if 0 < valid_ratio < 1 and documents == 1:
        raise ValueError(
            f"{source} holds one document, which cannot be in both sets: give more, or --valid_ratio 0{besides}"
        )
    if valid_ratio > 0 and not shards["valid"]:
        larger = max(0.1, min(2 * valid_ratio, (1 + valid_ratio) / 2))
        raise ValueError(
            f"none of the {documents} documents fell into the validation set: use a larger --valid_ratio than "
            f"{valid_ratio}, such as {larger:g}, or 0 to go without{besides}"
        )
    if valid_ratio < 1 and not shards["train"]:
        raise ValueError(
            f"all {documents} documents fell into the validation set: use a smaller --valid_ratio{besides}"
        )
    tokenizer.save_pretrained(output / "tokenizer")
    manifest = {
        "shards": shards,
        "valid_ratio": valid_ratio,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **totals,
        "bad_records": sum(part.bad_records for part in parts),
        "bad_examples": [example for part in parts for example in part.bad_examples],
        "dropped_examples": [example for part in parts for example in part.dropped_examples],
        **_what_was_read(parts),
        **more,
    }
    _replace_manifest(output, manifest)
    return manifest


def reasons(count: int, examples: Sequence[str]) -> str:
    """Sentence on the records that could not be read, with an example of each of three reasons; empty if all could be.

    Args:
        examples: texts of the form "place: reason".
    """
    if not count:
        return ""
    first = {example.partition(": ")[2]: example for example in reversed(examples)}
    chosen = [example for example in examples if first.get(example.partition(": ")[2]) is example][:3]
    records = "1 record" if count == 1 else f"{count} records"
    return f"{records} could not be read" + (f", for example {'; '.join(chosen)}" if chosen else "")


def _what_was_read(parts: Sequence[PartRecord]) -> dict:
    """Layouts of the records, and the fields that are not read, the most frequent first; {} for documents."""
    formats, unread = Counter(), Counter()
    for part in parts:
        formats.update(part.formats)
        unread.update(part.unread_fields)
    return {"formats": dict(formats.most_common()), "unread_fields": dict(unread.most_common())} if formats else {}


def _replace_manifest(output: Path, manifest: dict) -> None:
    """Write the manifest. Indexes of shards that it does not list are removed, lest a training read old data."""
    path = output / MANIFEST_NAME
    old = manifest
    if path.exists():
        try:
            old = read_manifest_of(output, PRETOKENIZE_COMMAND)
        except ValueError:
            # Its list is unknown, so that indexes may belong to other shards.
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            print(f"{path} was damaged: it is kept as {aside.name}", file=sys.stderr)
            old = {}
    if old.get("shards") != manifest["shards"]:
        for index in output.glob("*.ibin"):
            print(f"removed {index.name}, the index of earlier shards: build it again", file=sys.stderr)
            index.unlink()
    atomic_write_json(path, manifest)
    listed = {name for names in manifest["shards"].values() for name in names}
    shards = [*output.glob("*.bin"), *output.glob("*.safetensors")]
    unlisted = sorted(path.name for path in shards if path.name not in listed)
    if unlisted:
        print(
            f"{len(unlisted)} shards of earlier runs are not part of this data and may be deleted, for example "
            f"{unlisted[0]}",
            file=sys.stderr,
        )


@contextmanager
def waiting_writer(output: Path) -> Iterator[None]:
    """Context in which one process is at a time; the others wait."""
    with open(output / ".turn", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def print_skipped(manifest: dict) -> None:
    """Print some of the records and samples that were left out, and the fields that were not read."""
    for word, examples in (("skipped", manifest["bad_examples"]), ("dropped", manifest["dropped_examples"])):
        for example in examples[:10]:
            print(f"{word} {example}", file=sys.stderr)
        if len(examples) > 10:
            print(f"and more, see {MANIFEST_NAME}", file=sys.stderr)
    if formats := manifest.get("formats"):
        print(f"known formats: {_counted(formats)}", file=sys.stderr)
    if unread := manifest.get("unread_fields"):
        print(f"fields that are not read: {_counted(unread)}", file=sys.stderr)


def _counted(counts: Mapping[str, int]) -> str:
    """Names with their numbers; only some if there are many."""
    names = [f"{name} ({count:,})" for name, count in list(counts.items())[:_FIELDS_A_LINE]]
    line = "; ".join(names) + (f"; and more, see {MANIFEST_NAME}" if len(counts) > _FIELDS_A_LINE else "")
    return line.encode("utf-8", "backslashreplace").decode()


def print_summary(manifest: dict, seconds: float) -> None:
    print_skipped(manifest)
    print(
        f"{manifest['documents']:,} documents, {manifest['text_bytes'] / 1e6:.1f} MB -> {manifest['tokens']:,} tokens "
        f"({manifest['text_bytes'] / manifest['tokens']:.2f} bytes a token) in "
        f"{len(manifest['shards']['train'])} train and {len(manifest['shards']['valid'])} valid shards; "
        f"{manifest['bad_records']} records skipped; {manifest['text_bytes'] / 1e6 / seconds:.1f} MB/s"
    )
