"""Lines of JSON, known by their number or by the byte at which they begin."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_preprocess.readers import limits
from data_preprocess.readers.items import Unreadable, too_long
from data_preprocess.readers.pieces import Piece


def lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Numbered lines of a stream, without blank ones."""
    number = 0
    while line := _next_line(stream):
        if number == 0 and isinstance(line, bytes):
            line = line.removeprefix(codecs.BOM_UTF8)
        if isinstance(line, Unreadable) or line.strip():
            yield number, line
        number += 1


def lines_of_range(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Lines of a piece with the byte at which each begins. A line belongs to the piece in which it begins."""
    if piece.start:
        file.seek(piece.start - 1)
        _pass_line(file)
    while (offset := file.tell()) < piece.end:
        line = _next_line(file)
        if not line:
            raise ValueError(f"{piece.path} became shorter while it was read: run the command again")
        if offset == 0 and isinstance(line, bytes):
            line = line.removeprefix(codecs.BOM_UTF8)
        if isinstance(line, Unreadable) or line.strip():
            yield offset, line


def end_of_line(path: Path, position: int) -> int:
    """End of the line that holds the byte before `position`."""
    with open(path, "rb") as file:
        file.seek(position - 1)
        _pass_line(file)
        return file.tell()


def _next_line(stream: BinaryIO) -> bytes | Unreadable:
    """The next line; empty at the end."""
    line = stream.readline(limits.LONGEST_RECORD + 1)
    if len(line) <= limits.LONGEST_RECORD or line.endswith(b"\n"):
        return line
    del line
    _pass_line(stream)
    return too_long()


def _pass_line(stream: BinaryIO) -> None:
    """Read to the end of a line, in parts, since the "line" of a JSON array may be the whole file."""
    while (part := stream.readline(limits.BUFFER_BYTES)) and not part.endswith(b"\n"):
        pass
