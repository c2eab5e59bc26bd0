"""Documents from files on disk, one at a time and in bounded memory.

    kind                                    a document is         cut into units by
    text, source code                       a file                file
    .jsonl .ndjson, .json of such lines     a line                byte range (compressed: file)
    the same, one array                     an element            file
    the same, objects spread over lines     an object             file
    .parquet                                a row                 row group
    .csv .tsv, the first line names them    a row                 file

All but Parquet also as .gz, .xz, .bz2 and .zst. A file of another kind is read as text if --include names its kind.
The input is cut into units of bounded size by the files alone, so that the cut does not depend on how many processes
work on it. A text may have any length; a record is refused, by its place, from LONGEST_RECORD on.
"""

import argparse
import codecs
import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from data_preprocess.decompress import COMPRESSION_SUFFIXES, DAMAGE, decompressed
from data_preprocess.folders import files_below
from dataset.format import MANIFEST_NAME, TOKEN_FILE_SUFFIXES
from utils.files import sha256_of_file
from utils.paths import absent

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .sh .sql".split()
)
JSON_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json"))
COLUMN_SEPARATORS = {".csv": ",", ".tsv": "\t"}

LONGEST_PART = 1 << 20
"""Characters; a longer document comes in several parts."""
LONGEST_RECORD = 1 << 26
"""Bytes of a line or of a Parquet row, characters of an array's element or of a table's row. A record is in memory as a
whole, several times over; what is longer is refused."""
_BUFFER_BYTES = 1 << 20
_PARQUET_ROWS, _PARQUET_BATCH_BYTES, _PARQUET_DICTIONARY_BYTES = 256, 1 << 24, 1 << 26
_OF_OTHER_KINDS = "files of other kinds"


class DamagedFile(Exception):
    """What follows cannot be read."""


_DAMAGE = (DamagedFile, csv.Error, *DAMAGE)
_NO_VALUE = (ArithmeticError, LookupError, TypeError, ValueError, pyarrow.ArrowException)
"""What Arrow raises of a value that Python cannot hold: a text that is not UTF-8, nanoseconds, a day before year 1."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a record that cannot be had."""

    why: str


def _too_long(what: str) -> Unreadable:
    return Unreadable(f"{what} than {LONGEST_RECORD / (1 << 20):,.0f} MiB: cut it, or give its text as a .txt file")


@dataclass(frozen=True)
class TextFields:
    """Which fields of a record are its text."""

    keys: tuple[str, ...] = ("text",)
    """In the order in which they are joined; those that a record lacks are left out."""
    separator: str = "\n"
    """What stands between two fields."""

    def text_of(self, record: object) -> str:
        """The record's text.

        Raises:
            ValueError: none of the fields is there, or one is no text.
        """
        names = " or ".join(f'"{key}"' for key in self.keys)
        if not isinstance(record, dict):
            raise ValueError("no object with fields")
        values = [value for key in self.keys if (value := record.get(key)) is not None]
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"no text under the key {names} (choose it with --text_key)")
        text = self.separator.join(value for value in values if value)
        # Half a surrogate pair, which JSON can spell and a wrong encoding becomes, is no text.
        text.encode("utf-8")
        return text


@dataclass(frozen=True)
class Corpus:
    """A directory with documents, and how they are read."""

    root: str
    fields: TextFields | None = TextFields()
    """None: records are wanted whole, and files without records are left out."""
    include: tuple[str, ...] = ("*",)
    """Patterns (as in a shell, "*" also matches "/") of the paths that are read."""
    exclude: tuple[str, ...] = ()
    """Patterns of the paths that are not, even if they are included."""
    columns: frozenset[str] | None = None
    """Of records that are wanted whole: the columns of a Parquet file that are read. The others stand in its records
    as None. None reads all."""

    def path(self, piece: "Piece") -> Path:
        return Path(self.root, piece.path)

    def chooses(self, path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in self.include) and not self.excludes(path)

    def excludes(self, path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in self.exclude)

    def wants(self, column: str) -> bool:
        """Whether a column of a table is looked at."""
        if self.fields is not None:
            return column in self.fields.keys
        return self.columns is None or column in self.columns

    def names_kind_of(self, path: str) -> bool:
        """Whether a chosen file is meant by its kind or its name, as by "*.pm" or "docs/README"; not by "zh/*"."""
        return any(fnmatch(path, pattern) and _names_a_kind(pattern) for pattern in self.include)


def _names_a_kind(pattern: str) -> bool:
    name = pattern.rpartition("/")[2]
    return ("." in name and name.rpartition(".")[2] != "*") or not set(name) & set("*?[")


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for which files are read; `chosen_files` takes them."""
    parser.add_argument("--include", default="*", metavar="PATTERNS", help="read only these files: '*.jsonl,zh/*'")
    parser.add_argument("--exclude", default="", metavar="PATTERNS", help="leave out these files: '*.csv,test/*'")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for how documents are read; `corpus_from` takes them."""
    parser.add_argument(
        "--text_key", default="text", metavar="KEY[,KEY...]",
        help="field of a record that holds the text, or several that are joined (default: text)",
    )  # fmt: skip
    parser.add_argument(
        "--text_separator",
        default="\\n",
        help="between several fields; \\n and \\t are understood (default: a line end)",
    )
    add_file_arguments(parser)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def chosen_files(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """`include` and `exclude` of a corpus, as the flags say."""
    return {"include": _words(args.include), "exclude": _words(args.exclude)}


def corpus_from(args: argparse.Namespace, root: str) -> Corpus:
    """The corpus at `root`, read as the flags say.

    Raises:
        ValueError: --text_key names nothing.
    """
    if not (keys := _words(args.text_key)):
        raise ValueError("--text_key names no field")
    separator = args.text_separator.replace("\\n", "\n").replace("\\t", "\t")
    return Corpus(root, TextFields(keys, separator), **chosen_files(args))


@dataclass(frozen=True)
class Piece:
    """A file, or a part of it that can be read by itself."""

    path: str
    """Relative to the data directory."""
    start: int
    end: int
    """JSON lines: the bytes [start, end), for the lines that begin there. Parquet: row groups. Else the whole file."""
    num_bytes: int
    """About the size of the work."""


@dataclass(frozen=True)
class Unit:
    """Work of bounded size, unless it is one large file that cannot be cut; done by one process."""

    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    def fingerprint(self, corpus: Corpus) -> str:
        """Hex sha256 of the unit's content and names."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            content = _content_sha256(corpus.path(piece), piece)
            digest.update(json.dumps([piece.path, piece.start, piece.end, content]).encode())
            kind, _ = _kind(piece.path)
            if kind in JSON_SUFFIXES and kind != ".json":
                # Those that are no lines were not always understood.
                shape = _shape(kind, _start_of(corpus.path(piece))) if not piece.start else _LINES
                digest.update(shape.encode() if shape != _LINES else b"")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or a part of a very long one."""

    text: str
    path: str
    """Of its file, relative to the data directory."""
    counts: str
    """What `record` counts in this file: "byte", "line", "record" or "row"; "" if the file is the document."""
    record: int
    continued: bool = False
    """The next part follows."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it stands in its file. What is not valid UTF-8 in it may have become half surrogate pairs."""

    value: object
    path: str
    counts: str
    record: int
    """As in Document."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read."""

    where: str
    why: str

    def __str__(self) -> str:
        # Names of files and fields may be no valid Unicode.
        return f"{self.where}: {self.why}".encode("utf-8", "backslashreplace").decode()


@dataclass
class BadRecords:
    """Records that could not be read: how many, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Path -> why of files that were not looked at, see list_inputs."""

    def add(self, bad: BadRecord) -> None:
        self.count += 1
        if len(self.examples) < 20:
            self.examples.append(str(bad))


def place(path: str, counts: str, record: int) -> str:
    """ "a.jsonl at byte 17", "a.parquet row 3", or just the path."""
    return {"": path, "byte": f"{path} at byte {record}"}.get(counts, f"{path} {counts} {record}")


def holds_records(name: str) -> bool:
    """Whether a file of this name is of a kind that holds records."""
    kind, compressed = _kind(name)
    return kind in JSON_SUFFIXES or kind in COLUMN_SEPARATORS or (kind == ".parquet" and not compressed)


def list_inputs(corpus: Corpus) -> tuple[list[str], dict[str, str]]:
    """Chosen files that can be read, as sorted paths relative to the root; and path -> why of what is left out.

    Hidden files and folders and the files that pretokenizing writes are passed over.

    Raises:
        OSError: a folder cannot be listed.
    """
    inputs: list[str] = []
    left_out: dict[str, str] = {}

    def is_chosen(path: str) -> bool:
        return corpus.chooses(path) and (not _is_ours(path) or _is_text_by_name(corpus, path))

    for file in files_below(corpus.root, is_chosen, corpus.excludes):
        if file.problem:
            # Of what a link was to lead to, nobody knows whether it is chosen.
            if not corpus.excludes(file.path):
                left_out[file.path] = file.problem
        elif holds_records(file.path) or _is_text_by_name(corpus, file.path):
            inputs.append(file.path)
        else:
            left_out[file.path] = _OF_OTHER_KINDS
    return inputs, left_out


def _is_ours(path: str) -> bool:
    """Whether a file is one that pretokenizing writes, by its name."""
    name = Path(path).name
    of_ours = name == MANIFEST_NAME or Path(name).suffix in TOKEN_FILE_SUFFIXES
    return of_ours or re.search(r"\.tmp-\d+$", name) is not None


def _is_text_by_name(corpus: Corpus, path: str) -> bool:
    """Whether a file that holds no records is to be read as a text."""
    if corpus.fields is None:
        return False
    kind, _ = _kind(path)
    return kind in TEXT_SUFFIXES or (kind != ".parquet" and corpus.names_kind_of(path))


def print_left_out(left_out: dict[str, str]) -> None:
    """A line about each reason why files were left out."""
    for reason in sorted(set(left_out.values())):
        paths = [path for path in left_out if left_out[path] == reason]
        if reason == _OF_OTHER_KINDS:
            names = ", ".join(sorted({Path(path).suffix or "no suffix" for path in paths}))
        else:
            names = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        line = f"left out {len(paths)} {reason} ({names})"
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def plan_units(root: str, paths: list[str], unit_bytes: int) -> list[Unit]:
    """Cut the files into units of about `unit_bytes`: neighbours together, long files in parts where they can be."""
    units, current, current_bytes = [], [], 0
    for path in paths:
        for piece in _pieces(Path(root), path, unit_bytes):
            if current and current_bytes + piece.num_bytes > unit_bytes:
                units.append(Unit(tuple(current)))
                current, current_bytes = [], 0
            current.append(piece)
            current_bytes += piece.num_bytes
    if current:
        units.append(Unit(tuple(current)))
    return units


def find_units(corpus: Corpus, unit_bytes: int) -> tuple[list[Unit], dict[str, str]]:
    """The units of a corpus, and path -> why of the files that they leave out.

    Raises:
        ValueError: no such directory, or nothing in it that can be read.
    """
    if not Path(corpus.root).exists():
        raise ValueError(absent(corpus.root))
    if not Path(corpus.root).is_dir():
        raise ValueError(f"{corpus.root} is a file: give the directory that it lies in")
    inputs, left_out = list_inputs(corpus)
    units = plan_units(corpus.root, inputs, unit_bytes)
    if not units:
        wanted = "text: put .txt, .jsonl, .json, .parquet, .csv or source files"
        if corpus.fields is None:
            wanted = "records: put .jsonl, .json, .parquet or .csv files"
        print_left_out(left_out)
        if (Path(corpus.root) / MANIFEST_NAME).exists():
            raise ValueError(f"{corpus.root} is pretokenized and holds tokens: give the directory with the raw data")
        raise ValueError(
            f"{corpus.root} holds no {wanted} into it"
            + ("" if corpus.include == ("*",) and not corpus.exclude else ", or choose others with --include")
        )
    return units, left_out


Item = Document | Record | BadRecord


def read_unit(corpus: Corpus, unit: Unit, on_bytes: Callable[[int], None] | None = None) -> Iterator[Item]:
    """Everything in a unit, in its order: documents (empty ones are passed over), or records if they are wanted whole.

    Args:
        on_bytes: called with the bytes of the files that were read since the last call, for progress.
    Raises:
        ValueError: a table without the wanted columns, or a file that changed since the units were planned.
    """
    for piece in unit.pieces:
        yield from read_piece(corpus, piece, on_bytes)


def read_piece(corpus: Corpus, piece: Piece, on_bytes: Callable[[int], None] | None = None) -> Iterator[Item]:
    """What `read_unit` does, for one piece."""
    kind, compressed = _kind(piece.path)
    path, fields, report = corpus.path(piece), corpus.fields, on_bytes or (lambda _: None)
    if kind == ".parquet":
        yield from _documents(piece, "row", _parquet_rows(path, piece, corpus, report), fields)
        return
    start = _start_of(path)
    if encoding := _foreign_encoding(start):
        if not piece.start:
            advice = f"convert it with `iconv -f {encoding} -t UTF-8`"
            yield BadRecord(piece.path, f"{encoding}, but only UTF-8 is read: {advice}")
        report(piece.num_bytes)
        return
    shape = _shape(kind, start) if kind in JSON_SUFFIXES and not piece.start else _LINES
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        stream = decompressed(file, path.suffix.lower()) if compressed else file
        progress = _Progress(file, piece.start, report)
        if kind in COLUMN_SEPARATORS:
            rows = _table_rows(piece, stream, COLUMN_SEPARATORS[kind], corpus)
            yield from _documents(piece, "row", progress.follow(rows), fields)
        elif kind not in JSON_SUFFIXES:
            yield from _text_file(piece, stream, progress)
        elif shape == _ARRAY:
            yield from _documents(piece, "record", progress.follow(enumerate(_Array(stream))), fields)
        elif shape == _OBJECTS:
            objects = progress.follow(enumerate(_Objects(stream)))
            # The first one of a .json file is often all of it.
            yield from _documents(piece, "" if kind == ".json" else "record", itertools.islice(objects, 1), fields)
            yield from _documents(piece, "record", objects, fields)
        elif compressed:
            yield from _documents(piece, "line", progress.follow(_lines(stream)), fields)
        else:
            yield from _documents(piece, "byte", progress.follow(_lines_of_range(file, piece)), fields)
        progress.end()


def _kind(path: str) -> tuple[str, bool]:
    """(suffix that tells the kind, whether it is compressed)."""
    plain = Path(path.lower())
    if plain.suffix in COMPRESSION_SUFFIXES:
        return plain.with_suffix("").suffix, True
    return plain.suffix, False


class _Progress:
    """Reports how far a file was read, whatever decompresses or parses it."""

    def __init__(self, file: BinaryIO, start: int, report: Callable[[int], None]):
        self._file, self._last, self._report = file, start, report

    def follow(self, items: Iterator) -> Iterator:
        for item in items:
            self.update()
            yield item

    def update(self) -> None:
        position = self._file.tell()
        if position - self._last >= _BUFFER_BYTES:
            self._report(position - self._last)
            self._last = position

    def end(self) -> None:
        self._report(max(self._file.tell() - self._last, 0))


def _documents(
    piece: Piece, counts: str, records: Iterator[tuple[int, object]], fields: TextFields | None
) -> Iterator[Item]:
    """The texts of numbered records, or the records. One is an object, the bytes of a line of JSON, or Unreadable."""
    last = None
    while True:
        try:
            number, record = next(records)
        except StopIteration:
            return
        except _DAMAGE as error:
            after = f"{piece.path} after {counts} {last}" if last is not None else piece.path
            yield BadRecord(after, f"damaged, what follows is lost ({_one_line(error)})")
            return
        last = number
        if isinstance(record, Unreadable):
            yield BadRecord(place(piece.path, counts, number), record.why)
            continue
        try:
            if isinstance(record, bytes):
                record = json.loads(record)
        except (ValueError, RecursionError) as error:
            is_foreign = isinstance(error, UnicodeDecodeError)
            why = "not UTF-8: convert it, for example with iconv" if is_foreign else _one_line(error)
            yield BadRecord(place(piece.path, counts, number), f"not a JSON line ({why})")
            continue
        if fields is None:
            yield Record(record, piece.path, counts, number)
            continue
        try:
            text = fields.text_of(record)
        except ValueError as error:
            yield BadRecord(place(piece.path, counts, number), _one_line(error))
            continue
        if text:
            yield from _in_parts(text, piece.path, counts, number)


def _one_line(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "not valid Unicode"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _text_file(piece: Piece, stream: BinaryIO, progress: _Progress) -> Iterator[Document | BadRecord]:
    """A file as one document. One that turns out damaged is left out, or ends there if parts of it are away already."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, position, given_away = "", 0, False
    while True:
        try:
            data = stream.read(LONGEST_PART)
            text += decode(data, final=not data)
        except (*_DAMAGE, UnicodeDecodeError) as error:
            if given_away:
                yield Document(text, piece.path, "", 0)
            why = f"damaged ({_one_line(error)})"
            if isinstance(error, UnicodeError):
                why = f"not UTF-8 ({error.reason} at or after byte {position}): convert it, for example with iconv"
            yield BadRecord(piece.path, f"{why}, what follows is lost" if given_away else why)
            return
        position += len(data)
        progress.update()
        if not data:
            break
        while len(text) > LONGEST_PART:
            end = _cut(text)
            yield Document(text[:end], piece.path, "", 0, continued=True)
            text, given_away = text[end:], True
    if text:
        yield Document(text, piece.path, "", 0)


def _in_parts(text: str, path: str, counts: str, record: int) -> Iterator[Document]:
    while len(text) > LONGEST_PART:
        end = _cut(text)
        yield Document(text[:end], path, counts, record, continued=True)
        text = text[end:]
    yield Document(text, path, counts, record)


def _cut(text: str) -> int:
    """Where a text longer than LONGEST_PART is cut: after a line that is followed by no blank, where no token of
    byte-level BPE crosses, if there is one in the second half."""
    end = LONGEST_PART
    while (end := text.rfind("\n", LONGEST_PART // 2, end) + 1) > 0:
        if not text[end].isspace():
            return end
        end -= 1
    return LONGEST_PART


def _next_line(stream: BinaryIO) -> bytes | Unreadable:
    """The next line; empty at the end."""
    line = stream.readline(LONGEST_RECORD + 1)
    if len(line) <= LONGEST_RECORD or line.endswith(b"\n"):
        return line
    del line
    _pass_line(stream)
    return _too_long("longer")


def _pass_line(stream: BinaryIO) -> None:
    """Read to the end of a line, in pieces: it may be the whole file."""
    while (piece := stream.readline(_BUFFER_BYTES)) and not piece.endswith(b"\n"):
        pass


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | Unreadable]]:
    number = 0
    while line := _next_line(stream):
        if number == 0 and isinstance(line, bytes):
            line = line.removeprefix(codecs.BOM_UTF8)
        if isinstance(line, Unreadable) or line.strip():
            yield number, line
        number += 1


def _lines_of_range(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Lines by the byte at which they begin. A line belongs to the range in which it begins."""
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


_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OUTSIDE = re.compile(r'[^"\[\]{},]*+')


def _number(digits: str) -> int | float:
    # Python refuses to read thousands of digits. They are no text, and must not cost the rest of the file.
    return int(digits) if len(digits) < 1000 else float(digits)


class _Array:
    """The elements of a JSON array, parsed one at a time."""

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        # What is not UTF-8 becomes half surrogate pairs, by which only the record that holds them is refused.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._parse = json.JSONDecoder(parse_int=_number).raw_decode
        self._text, self._position, self._end = "", 0, False
        self._damage: Exception | None = None

    def __iter__(self) -> Iterator[object]:
        self._take("[")
        separator = self._next_character()
        while separator != "]":
            yield self._element()
            separator = self._next_character()
            if separator != "]":
                self._take(",")
        self._take("]")
        if self._next_character() or self._damage:
            raise self._damage or DamagedFile("there is more after the array")

    def _fill(self, characters: int) -> None:
        """Read until so many lie ahead, or the stream ends. Damage waits until what was read before it is used up."""
        parts = [self._text[self._position :]]
        ahead = len(parts[0])
        while ahead < characters and not self._end:
            try:
                data = self._stream.read1(_BUFFER_BYTES)
            except _DAMAGE as error:
                data, self._damage = b"", error
            self._end = not data
            parts.append(self._decode(data, final=self._end))
            ahead += len(parts[-1])
        self._text, self._position = "".join(parts), 0

    def _next_character(self) -> str:
        """That is no blank; empty at the end. It stays ahead."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._text) or self._end:
                return self._text[self._position : self._position + 1]
            self._fill(_BUFFER_BYTES)

    def _take(self, character: str) -> None:
        found = self._next_character()
        if found != character:
            raise self._damage or DamagedFile(f'"{found}" where "{character}" was due' if found else "it lacks its end")
        self._position += 1

    def _element(self) -> object:
        self._next_character()
        while True:
            ahead = len(self._text) - self._position
            try:
                value, end = self._parse(self._text, self._position)
            except json.JSONDecodeError as error:
                # Of an element that goes on beyond what was read, the parser complains near the end, or of a string.
                may_go_on = error.pos >= len(self._text) - 64 or error.msg.startswith("Unterminated string")
                if self._end or not may_go_on:
                    raise self._damage or DamagedFile(error.msg) from None
                if ahead > LONGEST_RECORD:
                    self._pass_element()
                    return _too_long("longer")
            except RecursionError:
                self._pass_element()
                return Unreadable("too deeply nested")
            else:
                if end < len(self._text) or self._end:
                    is_too_long = end - self._position > LONGEST_RECORD
                    self._position = end
                    return _too_long("longer") if is_too_long else value
            self._fill(max(ahead + 1, min(2 * ahead, LONGEST_RECORD + 1)))

    def _pass_element(self) -> None:
        """Go behind an element by its brackets and strings, without keeping any of it."""
        depth, in_string = 0, False
        while True:
            self._position = (_IN_STRING if in_string else _OUTSIDE).match(self._text, self._position).end()
            # A backslash belongs to the character behind it.
            if self._position + 1 >= len(self._text) and not self._end:
                self._fill(2)
                continue
            found = self._text[self._position : self._position + 1]
            if not found or found == "\\":
                raise self._damage or DamagedFile("it lacks its end")
            if found == '"':
                in_string = not in_string
            elif found in "[{":
                depth += 1
            elif depth == 0:
                return
            elif found in "]}":
                depth -= 1
            self._position += 1
            if found in "]}" and depth == 0:
                return


class _Objects(_Array):
    """JSON objects one behind another, each spread over lines."""

    def __iter__(self) -> Iterator[object]:
        while self._next_character():
            yield self._element()
        if self._damage:
            raise self._damage


def _start_of(path: Path) -> bytes:
    """The first bytes of a file."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        try:
            return (decompressed(file, suffix) if suffix in COMPRESSION_SUFFIXES else file).read1(1 << 16)
        except _DAMAGE:
            return b""


def _foreign_encoding(start: bytes) -> str:
    """UTF-16 or UTF-32, if a file that begins so is written in it; empty if not."""
    for encoding, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if start.startswith(marks):
            return encoding
    # Without a mark: every other byte of western text is 0, and the others hardly ever.
    for encoding, zeros, others in (
        ("UTF-16LE", start[1:512:2], start[:512:2]),
        ("UTF-16BE", start[:512:2], start[1:512:2]),
    ):
        if zeros and zeros.count(0) > len(zeros) / 2 and others.count(0) < len(others) / 8:
            return encoding
    return ""


_LINES, _ARRAY, _OBJECTS = "lines", "array", "objects"


def _shape(kind: str, start: bytes) -> str:
    """How the records of a JSON file lie in it: in lines, in one array, or as objects spread over lines, such as some
    program's settings.

    Args:
        kind: its suffix; lines are the rule unless it is ".json".
    """
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    first_line, _, rest = start.partition(b"\n")
    first_line, rest = first_line.rstrip(), rest.strip()
    if start.startswith(b"["):
        # A first line that is a list by itself is one bad record among lines.
        return _LINES if kind != ".json" and rest and _is_json(first_line) else _ARRAY
    if not rest or first_line.endswith(b"}") or rest.startswith(b"{"):
        return _LINES
    # Lines inside an object end so; a line that is damaged ends anyhow.
    goes_on = first_line.startswith(b"{") and first_line.endswith((b"{", b"[", b","))
    return _OBJECTS if goes_on or kind == ".json" else _LINES


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _table_rows(
    piece: Piece, stream: BinaryIO, separator: str, corpus: Corpus
) -> Iterator[tuple[int, dict | Unreadable]]:
    # The default limit refuses fields longer than 128 KiB; without any, a lost quote would swallow the file.
    csv.field_size_limit(LONGEST_RECORD)
    # What is not UTF-8 becomes half surrogate pairs, by which only the row that holds them is refused.
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    bounded = _LinesOfRows(lines)
    try:
        rows = csv.DictReader(bounded, delimiter=separator)
        if rows.fieldnames is not None:
            _require_columns(piece.path, list(rows.fieldnames), corpus)
            for number, row in enumerate(rows):
                bounded.row_ends()
                more = row.pop(None, [])
                yield number, _too_many_cells(len(row), more) if any(more) else row
    finally:
        # Else the wrapper would close the file that others still ask for its position. Who stops in the middle may have
        # closed it already.
        with suppress(ValueError):
            lines.detach()


def _too_many_cells(columns: int, more: list[str]) -> Unreadable:
    # What follows a comma that nobody quoted would be lost, and what comes before it taken for the whole.
    return Unreadable(
        f"{columns + len(more)} cells for {columns} columns: a text with the separator in it needs quotes"
    )


class _LinesOfRows:
    """Lines of a table. A row may hold many, if they are quoted, but not more than LONGEST_RECORD characters."""

    def __init__(self, lines: io.TextIOWrapper):
        self._lines, self._left = lines, LONGEST_RECORD

    def row_ends(self) -> None:
        self._left = LONGEST_RECORD

    def __iter__(self) -> Iterator[str]:
        while line := self._lines.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                # Where the next row begins cannot be told: a quote may have been lost, or be due only now.
                raise DamagedFile(f"the next row is {_too_long('longer').why}")
            yield line


def _parquet_rows(
    path: Path, piece: Piece, corpus: Corpus, report: Callable[[int], None]
) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of a piece's row groups. Only the columns that are wanted are decoded."""
    try:
        with _opened(path) as file:
            names = file.schema_arrow.names
            _require_columns(piece.path, names, corpus)
            columns = [name for name in names if corpus.wants(name)]
            others = dict.fromkeys(names) if corpus.fields is None else {}
            groups = range(piece.start, piece.end)
            number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            total = max(sum(file.metadata.row_group(group).num_rows for group in groups), 1)
            reported = done = 0
            for batch in file.iter_batches(
                _rows_at_once(file, piece, columns), row_groups=list(groups), columns=columns
            ):
                for row in _rows_of(batch):
                    if corpus.fields is None and isinstance(row, dict):
                        row = others | {name: _without_nulls(value) for name, value in row.items()}
                    yield number + done, row
                    done += 1
                so_far = piece.num_bytes * done // total
                report(so_far - reported)
                reported = so_far
    except OSError as error:
        # Arrow's word for damaged pages; a failing disk has an errno.
        raise error if error.errno else pyarrow.ArrowException(str(error)) from None


def _opened(path: Path) -> pyarrow.parquet.ParquetFile:
    """A file that is read page by page; by itself, Arrow would take whole columns of a row group into memory."""
    return pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _chunks(
    file: pyarrow.parquet.ParquetFile, group: int, columns: list[str]
) -> list[pyarrow.parquet.ColumnChunkMetaData]:
    """Some columns of a row group, nested ones in their parts; none if they cannot be read."""
    try:
        # Arrow ends the process when it is asked for a column whose description is damaged; its reader raises.
        next(file.iter_batches(1, row_groups=[group], columns=columns), None)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        return []
    row_group, paths = file.metadata.row_group(group), [f"{column.path}." for column in file.schema]
    wanted = [any(path.startswith(f"{name}.") for name in columns) for path in paths]
    return [row_group.column(index) for index, is_wanted in enumerate(wanted) if is_wanted]


def _rows_at_once(file: pyarrow.parquet.ParquetFile, piece: Piece, columns: list[str]) -> int:
    """As many as take _PARQUET_BATCH_BYTES on average in each row group, at most _PARQUET_ROWS. A page, however large
    its writer made it, is in memory as a whole besides."""
    at_once = _PARQUET_ROWS
    if piece.num_bytes * at_once <= _PARQUET_DICTIONARY_BYTES:
        return at_once
    for group in range(piece.start, piece.end):
        size, num_rows = 0, file.metadata.row_group(group).num_rows
        for chunk in _chunks(file, group, columns):
            size += chunk.total_uncompressed_size
            if chunk.has_dictionary_page:
                # Every row may be the longest of the dictionary's texts, about as long as all of it.
                share = (chunk.data_page_offset - chunk.dictionary_page_offset) / max(chunk.total_compressed_size, 1)
                at_once = min(at_once, _PARQUET_DICTIONARY_BYTES // max(int(share * chunk.total_uncompressed_size), 1))
        if num_rows:
            at_once = min(at_once, _PARQUET_BATCH_BYTES * num_rows // max(size, 1))
    return max(at_once, 1)


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict | Unreadable]:
    """The rows as Python has them; those that it cannot have are told apart one by one."""
    if batch.num_columns and batch.nbytes <= LONGEST_RECORD:
        try:
            return iter(batch.to_pylist())
        except _NO_VALUE:
            pass
    return (_row_of(batch.slice(index, 1)) for index in range(batch.num_rows))


def _without_nulls(value: object) -> object:
    """A column gives every object all the names that one of them has: arguments of a call that were not in it, say."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _row_of(batch: pyarrow.RecordBatch) -> dict | Unreadable:
    """The only row of a batch."""
    row, size = {}, 0
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            # A dictionary is shared by all rows.
            values = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            size += values.nbytes
            if size > LONGEST_RECORD:
                return _too_long("longer")
            row[name] = values[0].as_py()
        except _NO_VALUE as error:
            return Unreadable(f'the column "{name}": {_one_line(error)}')
    return row


def _require_columns(path: str, columns: list[str], corpus: Corpus) -> None:
    """
    Raises:
        ValueError: a table without a column for the text, or with two of one name.
    """
    wanted = [name for name in columns if corpus.wants(name)]
    if corpus.fields is not None and not wanted:
        raise ValueError(
            f'{path} has no column "{",".join(corpus.fields.keys)}" but {", ".join(columns)}: choose with --text_key, '
            f"or leave such files out with --exclude"
        )
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise ValueError(f'{path} has two columns "{twice}": rename one, or leave such files out with --exclude')


def _pieces(root: Path, path: str, unit_bytes: int) -> Iterator[Piece]:
    size = os.path.getsize(root / path)
    kind, compressed = _kind(path)
    if kind == ".parquet" and size:
        yield from _parquet_pieces(root, path, unit_bytes)
    elif (
        kind in JSON_SUFFIXES
        and not compressed
        and size > unit_bytes
        and _shape(kind, _start_of(root / path)) == _LINES
    ):
        for start in range(0, size, unit_bytes):
            end = min(start + unit_bytes, size)
            yield Piece(path, start, end, end - start)
    elif size:
        yield Piece(path, 0, size, size)


def _parquet_pieces(root: Path, path: str, unit_bytes: int) -> Iterator[Piece]:
    """Row groups, neighbours together up to about `unit_bytes` of uncompressed data."""
    metadata, _ = _parquet_contents(root / path, path)
    start, gathered = 0, 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if gathered and gathered + size > unit_bytes:
            yield Piece(path, start, group, gathered)
            start, gathered = group, 0
        gathered += size
    if metadata.num_row_groups:
        yield Piece(path, start, metadata.num_row_groups, gathered)


def _parquet_contents(path: Path, name: str) -> tuple[pyarrow.parquet.FileMetaData, str]:
    """A file's table of contents, and its schema as text.

    Args:
        name: of the file, for the sentence.
    Raises:
        ValueError: it has none.
    """
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        return metadata, str(metadata.schema.to_arrow_schema())
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{name} is not a Parquet file ({_one_line(error)}): mend or remove it") from None


def _content_sha256(path: Path, piece: Piece) -> str:
    """Of all bytes of a file that reading the piece looks at."""
    kind, compressed = _kind(piece.path)
    if kind == ".parquet":
        _, schema = _parquet_contents(path, piece.path)
        with _opened(path) as file:
            names = file.schema_arrow.names
            groups = [_chunks(file, group, names) for group in range(piece.start, piece.end)]
        if not all(groups):
            return sha256_of_file(path) + schema
        chunks = list(itertools.chain.from_iterable(groups))
        starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in chunks]
        end = max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks))
        if min(starts) < 0:
            raise ValueError(f"{piece.path} has a damaged table of contents: mend or remove it")
        return sha256_of_file(path, min(starts), end) + schema
    if kind in JSON_SUFFIXES and not compressed:
        # Also the byte before, and the last line to its end.
        return sha256_of_file(path, max(piece.start - 1, 0), _end_of_line(path, piece.end))
    return sha256_of_file(path)


def _end_of_line(path: Path, position: int) -> int:
    """Where the line that holds the byte before `position` ends."""
    with open(path, "rb") as file:
        file.seek(position - 1)
        # In pieces: the "line" of a JSON array may be the whole file.
        while piece := file.readline(_BUFFER_BYTES):
            if piece.endswith(b"\n"):
                break
        return file.tell()
