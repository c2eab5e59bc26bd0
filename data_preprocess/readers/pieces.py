"""Pieces: files, or parts of files that can be read independently."""

import json
import os
from dataclasses import dataclass

from data_preprocess.readers.compression import COMPRESSION_SUFFIXES


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one that can be read independently."""

    path: str
    """Path of the file, relative to the data directory."""
    start: int
    end: int
    """Range [start, end) of the file. JSON lines: the bytes in which the lines begin. Parquet: the row groups. Other
    kinds: the whole file."""
    num_bytes: int
    """Approximate size of the work."""


def identity_of(piece: Piece, content: str) -> bytes:
    """A piece's share of its unit's fingerprint.

    Args:
        content: checksum of the bytes that reading the piece looks at.
    """
    return json.dumps([piece.path, piece.start, piece.end, content]).encode()


def ending_of(path: str) -> str:
    """The ending that tells a file's kind, in lower case: ".jsonl" of "a/B.JSONL.gz"."""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSION_SUFFIXES else ending
