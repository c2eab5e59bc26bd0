"""Documents from files on disk, one at a time and in bounded memory.

    kind                                    a document is         cut into units by
    text, source code                       a file                file
    .jsonl .ndjson, .json of such lines     a line                byte range (compressed: file)
    .json, one array                        an element            file
    .parquet                                a row                 row group
    .csv .tsv, the first line names them    a row                 file

All but Parquet also as .gz, .xz and .zst. The input is cut into units of bounded size by the files alone, so that the
cut does not depend on how many processes work on it.
"""

import argparse
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from dataset.format import MANIFEST_NAME, TOKEN_FILE_SUFFIXES
from utils.files import sha256_of_file

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .sh .sql".split()
)
JSON_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json"))
COLUMN_SEPARATORS = {".csv": ",", ".tsv": "\t"}
COMPRESSION_SUFFIXES = frozenset((".gz", ".xz", ".zst"))

LONGEST_PART = 1 << 20
"""Characters; a longer document comes in several parts."""
_BUFFER_BYTES, _BLOCK_BYTES = 1 << 20, 1 << 16
_PARQUET_ROWS = 256
_LONGEST_FIELD = 1 << 28
"""Characters of an array's element or a table's field: what is longer lacks its end."""


class DamagedFile(Exception):
    """What follows cannot be read."""


_DAMAGE = (DamagedFile, EOFError, zlib.error, lzma.LZMAError, csv.Error, pyarrow.ArrowException)


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

    def path(self, piece: "Piece") -> Path:
        return Path(self.root, piece.path)

    def chooses(self, path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in self.include) and not any(
            fnmatch(path, pattern) for pattern in self.exclude
        )


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


def list_inputs(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Chosen files that can be read, and those of other kinds: sorted paths relative to the root.

    Hidden files and folders, tokenizer folders below the root, links that lead nowhere, and the files that
    pretokenizing writes are passed over.
    """
    inputs, others = [], []
    root = corpus.root
    for directory, folders, files in os.walk(root):
        if "tokenizer.json" in files and Path(directory) != Path(root):
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(files):
            full = os.path.join(directory, name)
            relative = os.path.relpath(full, root)
            ours = name == MANIFEST_NAME or Path(name).suffix in TOKEN_FILE_SUFFIXES or ".tmp-" in name
            if ours or name.startswith(".") or not corpus.chooses(relative) or not os.path.isfile(full):
                continue
            holds_text = _kind(name)[0] in TEXT_SUFFIXES and corpus.fields is not None
            if holds_text or holds_records(name):
                inputs.append(relative)
            else:
                others.append(relative)
    return sorted(inputs), sorted(others)


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


def find_units(corpus: Corpus, unit_bytes: int) -> tuple[list[Unit], list[str]]:
    """The units of a corpus, and the files of other kinds that they leave out.

    Raises:
        ValueError: no such directory, or nothing in it that can be read.
    """
    if not os.path.isdir(corpus.root):
        raise ValueError(f"{corpus.root} is not a directory")
    inputs, others = list_inputs(corpus)
    units = plan_units(corpus.root, inputs, unit_bytes)
    if not units:
        wanted = "text: put .txt, .jsonl, .json, .parquet, .csv or source files"
        if corpus.fields is None:
            wanted = "records: put .jsonl, .json, .parquet or .csv files"
        raise ValueError(
            f"{corpus.root} holds no {wanted} into it"
            + ("" if corpus.include == ("*",) and not corpus.exclude else ", or choose others with --include")
        )
    return units, others


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
        yield from _documents(piece, "row", _parquet_rows(path, piece, fields, report), fields)
        return
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        stream = _decompressed(file, path.suffix.lower()) if compressed else file
        progress = _Progress(file, piece.start, report)
        if kind in TEXT_SUFFIXES:
            yield from _text_file(piece, stream, progress)
        elif kind in COLUMN_SEPARATORS:
            rows = _table_rows(piece, stream, COLUMN_SEPARATORS[kind], fields)
            yield from _documents(piece, "row", progress.follow(rows), fields)
        elif kind == ".json" and _holds_array(path):
            yield from _documents(piece, "record", progress.follow(enumerate(_Array(stream))), fields)
        elif kind == ".json" and not piece.start and _holds_one_object(path):
            yield from _documents(piece, "", iter([(0, stream.read())]), fields)
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


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        read = gzip.GzipFile(fileobj=file).read1
    elif suffix == ".xz":
        read = lzma.LZMAFile(file).read1
    else:
        read = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd").read
    return io.BufferedReader(_Decompressed(read), _BUFFER_BYTES)


class _Decompressed(io.RawIOBase):
    """Gives out little at once, so that what lies before a damaged place is read; damage is an EOFError."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self._read(min(len(buffer), _BLOCK_BYTES))
        except OSError as error:
            # What the system reports has a number; the rest is what gzip and Arrow say of damaged content.
            raise error if error.errno else EOFError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)


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
    """The texts of numbered records, or the records. A record is an object, or the bytes of a line of JSON."""
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
        try:
            if isinstance(record, bytes):
                record = json.loads(record)
        except (ValueError, RecursionError) as error:
            yield BadRecord(place(piece.path, counts, number), f"not a JSON line ({_one_line(error)})")
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
                why = f"not UTF-8 ({error.reason} at or after byte {position})"
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


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream):
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _lines_of_range(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines by the byte at which they begin. A line belongs to the range in which it begins."""
    if piece.start:
        file.seek(piece.start - 1)
        file.readline()
    while (offset := file.tell()) < piece.end:
        line = file.readline()
        if not line:
            raise ValueError(f"{piece.path} became shorter while it was read: run the command again")
        if offset == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield offset, line


class _Array:
    """The elements of a JSON array, parsed one at a time."""

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        # What is not UTF-8 becomes half surrogate pairs, by which only the record that holds them is refused.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        # Only texts are wanted: no digits of a number are too many.
        self._parse = json.JSONDecoder(parse_int=float).raw_decode
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
                if self._end or not may_go_on or ahead > _LONGEST_FIELD:
                    raise self._damage or DamagedFile(error.msg) from None
            except RecursionError:
                raise DamagedFile("too deeply nested") from None
            else:
                if end < len(self._text) or self._end:
                    self._position = end
                    return value
            self._fill(2 * ahead)


def _start_of(path: Path) -> bytes:
    """The first bytes of a JSON file, blanks left out."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        try:
            start = (_decompressed(file, suffix) if suffix in COMPRESSION_SUFFIXES else file).read1(1 << 16)
        except _DAMAGE:
            return b""
    return start.removeprefix(codecs.BOM_UTF8).lstrip()


def _holds_array(path: Path) -> bool:
    return _start_of(path).startswith(b"[")


def _holds_one_object(path: Path) -> bool:
    """Whether a .json file is one object spread over lines, such as some program's settings, not an object a line."""
    first_line, _, rest = _start_of(path).partition(b"\n")
    return bool(rest.strip()) and not first_line.rstrip().endswith(b"}") and not rest.lstrip(b"\r\n").startswith(b"{")


def _table_rows(
    piece: Piece, stream: BinaryIO, separator: str, fields: TextFields | None
) -> Iterator[tuple[int, dict]]:
    # The default limit refuses fields longer than 128 KiB; without any, a lost quote would swallow the file.
    csv.field_size_limit(_LONGEST_FIELD)
    # What is not UTF-8 becomes half surrogate pairs, by which only the row that holds them is refused.
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.DictReader(lines, delimiter=separator)
        if rows.fieldnames is not None:
            _require_columns(piece.path, list(rows.fieldnames), fields)
            yield from enumerate(rows)
    finally:
        # Else the wrapper would close the file that others still ask for its position. Who stops in the middle may have
        # closed it already.
        with suppress(ValueError):
            lines.detach()


def _parquet_rows(
    path: Path, piece: Piece, fields: TextFields | None, report: Callable[[int], None]
) -> Iterator[tuple[int, dict]]:
    with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        _require_columns(piece.path, file.schema_arrow.names, fields)
        columns = [key for key in fields.keys if key in file.schema_arrow.names] if fields is not None else None
        groups = range(piece.start, piece.end)
        number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        total = max(sum(file.metadata.row_group(group).num_rows for group in groups), 1)
        reported = done = 0
        try:
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=list(groups), columns=columns):
                for row in _rows_of(batch):
                    yield number + done, row
                    done += 1
                so_far = piece.num_bytes * done // total
                report(so_far - reported)
                reported = so_far
        except OSError as error:
            # Arrow's word for damaged pages; a failing disk has an errno.
            raise error if error.errno else pyarrow.ArrowException(str(error)) from None


def _rows_of(batch: pyarrow.RecordBatch) -> list[dict]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check that strings are UTF-8: as in tables, only the rows that hold others are refused.
        columns = {
            name: [value and value.decode("utf-8", "surrogateescape") for value in _as_bytes(column)]
            for name, column in zip(batch.schema.names, batch.columns)
        }
        return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _as_bytes(column: pyarrow.Array) -> list[bytes | None]:
    return column.cast(pyarrow.large_binary()).to_pylist()


def _require_columns(path: str, columns: list[str], fields: TextFields | None) -> None:
    if fields is not None and not set(columns) & set(fields.keys):
        wanted = ",".join(fields.keys)
        raise ValueError(
            f'{path} has no column "{wanted}" but {", ".join(columns)}: choose with --text_key, '
            f"or leave such files out with --exclude"
        )


def _pieces(root: Path, path: str, unit_bytes: int) -> Iterator[Piece]:
    size = os.path.getsize(root / path)
    kind, compressed = _kind(path)
    if kind == ".parquet" and size:
        yield from _parquet_pieces(root, path, unit_bytes)
    elif (
        kind in JSON_SUFFIXES
        and not compressed
        and size > unit_bytes
        and not (_holds_array(root / path) or (kind == ".json" and _holds_one_object(root / path)))
    ):
        for start in range(0, size, unit_bytes):
            end = min(start + unit_bytes, size)
            yield Piece(path, start, end, end - start)
    elif size:
        yield Piece(path, 0, size, size)


def _parquet_pieces(root: Path, path: str, unit_bytes: int) -> Iterator[Piece]:
    """Row groups, neighbours together up to about `unit_bytes` of uncompressed data."""
    try:
        metadata = pyarrow.parquet.read_metadata(root / path)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is not a Parquet file ({_one_line(error)}): mend or remove it") from None
    start, gathered = 0, 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if gathered and gathered + size > unit_bytes:
            yield Piece(path, start, group, gathered)
            start, gathered = group, 0
        gathered += size
    if metadata.num_row_groups:
        yield Piece(path, start, metadata.num_row_groups, gathered)


def _content_sha256(path: Path, piece: Piece) -> str:
    """Of all bytes of a file that reading the piece looks at."""
    kind, compressed = _kind(piece.path)
    if kind == ".parquet":
        metadata = pyarrow.parquet.read_metadata(path)
        chunks = [
            metadata.row_group(group).column(column)
            for group in range(piece.start, piece.end)
            for column in range(metadata.num_columns)
        ]
        starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in chunks]
        end = max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks))
        return sha256_of_file(path, min(starts), end) + str(metadata.schema.to_arrow_schema())
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
