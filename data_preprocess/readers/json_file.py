"""JSON: records in lines, in one array, or as objects spread over several lines. The file's beginning tells which.

Lines can be cut at any byte, since a line belongs to the piece in which it begins.
"""

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from data_preprocess.readers.compression import is_compressed
from data_preprocess.readers.documents import documents_of
from data_preprocess.readers.first_bytes import start_of
from data_preprocess.readers.items import Item
from data_preprocess.readers.json_lines import end_of_line, lines, lines_of_range
from data_preprocess.readers.json_values import ArrayOfJson, ObjectsOfJson
from data_preprocess.readers.pieces import Piece, ending_of, identity_of
from data_preprocess.readers.reader import OpenPiece, StreamReader
from utils.files import sha256_of_file

_MAY_BE_ANYTHING = ".json"
"""Ending of files that may hold their records in any way; by the other endings, lines are the rule."""
_LINES, _ARRAY, _OBJECTS = "lines", "array", "objects"


class JsonReader(StreamReader):
    endings = (".jsonl", ".ndjson", _MAY_BE_ANYTHING)
    well_known = (".jsonl", ".json")

    def pieces(self, path: Path, name: str, unit_bytes: int) -> Iterator[Piece]:
        size = path.stat().st_size
        if size <= unit_bytes or is_compressed(name) or _shape(name, start_of(path)) != _LINES:
            yield from super().pieces(path, name, unit_bytes)
            return
        for start in range(0, size, unit_bytes):
            end = min(start + unit_bytes, size)
            yield Piece(name, start, end, end - start)

    def identity(self, path: Path, piece: Piece) -> bytes:
        if is_compressed(piece.path):
            content = sha256_of_file(path)
        else:
            # The byte before is looked at, too, and the last line is read to its end.
            content = sha256_of_file(path, max(piece.start - 1, 0), end_of_line(path, piece.end))
        shape = _LINES
        if ending_of(piece.path) != _MAY_BE_ANYTHING and not piece.start:
            shape = _shape(piece.path, start_of(path))
        # Other shapes were not always understood under these endings, and work of that time must not be taken over.
        return identity_of(piece, content) + (shape.encode() if shape != _LINES else b"")

    def items(self, opened: OpenPiece) -> Iterator[Item]:
        piece, stream, fields = opened.piece, opened.stream, opened.corpus.fields
        shape = _LINES if piece.start else _shape(piece.path, opened.start)
        if shape == _ARRAY:
            yield from documents_of(piece.path, "record", opened.follow(enumerate(ArrayOfJson(stream))), fields)
        elif shape == _OBJECTS:
            objects = opened.follow(enumerate(ObjectsOfJson(stream)))
            # The first one of a .json file is often all of it.
            first = "" if ending_of(piece.path) == _MAY_BE_ANYTHING else "record"
            yield from documents_of(piece.path, first, itertools.islice(objects, 1), fields)
            yield from documents_of(piece.path, "record", objects, fields)
        elif opened.is_compressed:
            yield from documents_of(piece.path, "line", opened.follow(lines(stream)), fields)
        else:
            yield from documents_of(piece.path, "byte", opened.follow(lines_of_range(stream, piece)), fields)


def _shape(path: str, start: bytes) -> str:
    """Arrangement of the records in a JSON file: in lines, in one array, or as objects spread over several lines, as
    some programs write their settings."""
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    first_line, _, rest = start.partition(b"\n")
    first_line, rest = first_line.rstrip(), rest.strip()
    may_be_anything = ending_of(path) == _MAY_BE_ANYTHING
    if start.startswith(b"["):
        # A first line that is a list by itself is one bad record among lines.
        return _LINES if not may_be_anything and rest and _is_json(first_line) else _ARRAY
    if not rest or first_line.endswith(b"}") or rest.startswith(b"{"):
        return _LINES
    # Lines inside an object end like this; a damaged line may end in any way.
    goes_on = first_line.startswith(b"{") and first_line.endswith((b"{", b"[", b","))
    return _OBJECTS if goes_on or may_be_anything else _LINES


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
