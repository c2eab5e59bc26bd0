"""The first bytes of a file, and the encoding that they show if it is not UTF-8."""

import codecs
from pathlib import Path

from data_preprocess.readers.compression import decompressed, is_compressed
from data_preprocess.readers.items import DAMAGE

_BYTES = 1 << 16


def start_of(path: Path) -> bytes:
    """The first bytes of a file, decompressed; none if it is damaged there."""
    with open(path, "rb") as file:
        try:
            return (decompressed(file, path.name) if is_compressed(path.name) else file).read1(_BYTES)
        except DAMAGE:
            return b""


def foreign_encoding(start: bytes) -> str:
    """UTF-16 or UTF-32, if a file that begins like this is written in it; empty otherwise."""
    for encoding, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if start.startswith(marks):
            return encoding
    # Without a mark: in western text every other byte is 0, and the bytes between them hardly ever are.
    for encoding, zeros, others in (
        ("UTF-16LE", start[1:512:2], start[:512:2]),
        ("UTF-16BE", start[:512:2], start[1:512:2]),
    ):
        if zeros and zeros.count(0) > len(zeros) / 2 and others.count(0) < len(others) / 8:
            return encoding
    return ""
