"""Documents from files on disk, one at a time.

Text files and source code (one document a file) and JSON lines (one document a line). The input is first cut into
units of bounded size, by the files alone, so that the cut does not depend on how many processes work on it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataset.format import MANIFEST_NAME, TOKEN_FILE_SUFFIXES
from utils.files import sha256_of_file

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .sh .sql".split()
)
JSONL_SUFFIXES = frozenset((".jsonl",))


def _is_json_lines(path: str) -> bool:
    return Path(path).suffix.lower() in JSONL_SUFFIXES


def _end_of_line(path: Path, position: int) -> int:
    """Where the line that holds the byte before `position` ends."""
    with open(path, "rb") as file:
        file.seek(position - 1)
        file.readline()
        return file.tell()


@dataclass(frozen=True)
class Piece:
    """A whole text file, or the bytes [start, end) of a JSON-lines file: the lines that begin in that range."""

    path: str
    """Relative to the data directory."""
    start: int
    end: int


@dataclass(frozen=True)
class Unit:
    """Work of bounded size, done by one process and written as one shard of each set."""

    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)

    def fingerprint(self, root: Path) -> str:
        """Hex sha256 of the unit's content and names."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            start, end = piece.start, piece.end
            if _is_json_lines(piece.path):
                # What the reader looks at: the byte before, and the last line to its end.
                start, end = max(start - 1, 0), _end_of_line(root / piece.path, end)
            content = sha256_of_file(root / piece.path, start, end)
            digest.update(json.dumps([piece.path, piece.start, piece.end, content]).encode())
        return digest.hexdigest()


@dataclass
class BadRecords:
    """Records that could not be read: how many, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        self.count += 1
        if len(self.examples) < 20:
            self.examples.append(f"{where}: {why}")


def list_inputs(root: Path) -> tuple[list[str], list[str]]:
    """Files below `root` that can be read, and those of other kinds: sorted paths relative to it.

    Hidden folders, tokenizer folders below the root, links that lead nowhere, and the files that pretokenizing writes
    are passed over.
    """
    inputs, others = [], []
    for directory, folders, files in os.walk(root):
        if "tokenizer.json" in files and Path(directory) != root:
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            full = os.path.join(directory, name)
            relative = os.path.relpath(full, root)
            if name == MANIFEST_NAME or suffix in TOKEN_FILE_SUFFIXES or ".tmp-" in name or not os.path.isfile(full):
                continue
            if suffix in TEXT_SUFFIXES or suffix in JSONL_SUFFIXES:
                inputs.append(relative)
            else:
                others.append(relative)
    return sorted(inputs), sorted(others)


def plan_units(root: Path, paths: list[str], unit_bytes: int) -> list[Unit]:
    """Cut the files into units of about `unit_bytes`: neighbours together, long JSON-lines files in ranges."""
    units, current, current_bytes = [], [], 0
    for path in paths:
        size = os.path.getsize(root / path)
        step = unit_bytes if _is_json_lines(path) else max(size, 1)
        for start in range(0, size, step):
            piece = Piece(path, start, min(start + step, size))
            if current and current_bytes + piece.end - piece.start > unit_bytes:
                units.append(Unit(tuple(current)))
                current, current_bytes = [], 0
            current.append(piece)
            current_bytes += piece.end - piece.start
    if current:
        units.append(Unit(tuple(current)))
    return units


def find_units(root: Path, unit_bytes: int) -> tuple[list[Unit], list[str]]:
    """The units of a corpus, and the files of other kinds that they leave out.

    Raises:
        ValueError: no such directory, or nothing in it that can be read.
    """
    if not root.is_dir():
        raise ValueError(f"--data_dir {root} is not a directory")
    inputs, others = list_inputs(root)
    units = plan_units(root, inputs, unit_bytes)
    if not units:
        raise ValueError(f"{root} holds no text: put .txt, .jsonl or source files into it")
    return units, others


def read_documents(root: Path, piece: Piece, text_key: str, bad: BadRecords) -> Iterator[str]:
    """The documents of one piece. Unreadable ones are noted in `bad`, empty ones passed over.

    Raises:
        ValueError: the file changed since the units were planned.
    """
    if _is_json_lines(piece.path):
        yield from _read_json_lines(root / piece.path, piece, text_key, bad)
        return
    try:
        text = (root / piece.path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        bad.add(piece.path, f"not UTF-8 ({error.reason} at byte {error.start})")
        return
    if text:
        yield text


def _read_json_lines(path: Path, piece: Piece, text_key: str, bad: BadRecords) -> Iterator[str]:
    with open(path, "rb") as file:
        if piece.start:
            # A line belongs to the range in which it begins: skip the one that began before.
            file.seek(piece.start - 1)
            file.readline()
        while (offset := file.tell()) < piece.end:
            line = file.readline()
            where = f"{piece.path} at byte {offset}"
            if not line:
                raise ValueError(f"{piece.path} became shorter while it was read: run the command again")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record.get(text_key) if isinstance(record, dict) else None
                if isinstance(text, str):
                    # Half a surrogate pair, which JSON can spell, is no text.
                    text.encode("utf-8")
            except (ValueError, RecursionError) as error:
                bad.add(where, f"not a JSON line ({error})")
                continue
            if not isinstance(text, str):
                bad.add(where, f'no text under the key "{text_key}" (choose it with --text_key)')
            elif text:
                yield text
