"""Pieces: files, or parts of them that can be read each by itself."""

import json
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.readers.compression import is_compressed


@dataclass(frozen=True)
class Piece:
    """A file, or a part of it that can be read by itself."""

    path: str
    """Relative to the data directory."""
    start: int
    end: int
    """JSON lines: the bytes [start, end), for the lines that begin there. Parquet: row groups. Others: the whole
    file."""
    num_bytes: int
    """About the size of the work."""


def identity_of(piece: Piece, content: str) -> bytes:
    """A piece's share of its unit's fingerprint.

    Args:
        content: stands for the bytes that reading the piece looks at.
    """
    return json.dumps([piece.path, piece.start, piece.end, content]).encode()


def ending_of(path: str) -> str:
    """The ending that tells a file's kind, in lower case: ".jsonl" of "a/B.JSONL.gz"."""
    plain = Path(path.lower())
    return (plain.with_suffix("") if is_compressed(path) else plain).suffix
