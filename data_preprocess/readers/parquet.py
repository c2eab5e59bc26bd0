"""Parquet: a record is a row, and a piece is some row groups. Only the columns that are wanted are decoded."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data_preprocess.readers import limits
from data_preprocess.readers.corpus import Corpus
from data_preprocess.readers.documents import documents_of
from data_preprocess.readers.items import Item, Unreadable, one_line, too_long
from data_preprocess.readers.pieces import Piece, identity_of
from data_preprocess.readers.reader import Reader
from utils.files import sha256_of_file

_ROWS, _BATCH_BYTES, _DICTIONARY_BYTES = 256, 1 << 24, 1 << 26
_NO_VALUE = (ArithmeticError, LookupError, TypeError, ValueError, pyarrow.ArrowException)
"""Exceptions that Arrow raises for a value that Python cannot hold: invalid UTF-8, nanoseconds, a day before the year
1."""


class ParquetReader(Reader):
    endings = well_known = (".parquet",)
    may_be_compressed = False

    def pieces(self, path: Path, name: str, unit_bytes: int) -> Iterator[Piece]:
        """Row groups, neighbours together up to about `unit_bytes` of uncompressed data."""
        metadata, _ = _contents(path, name)
        start, gathered = 0, 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).total_byte_size
            if gathered and gathered + size > unit_bytes:
                yield Piece(name, start, group, gathered)
                start, gathered = group, 0
            gathered += size
        if metadata.num_row_groups:
            yield Piece(name, start, metadata.num_row_groups, gathered)

    def identity(self, path: Path, piece: Piece) -> bytes:
        _, schema = _contents(path, piece.path)
        with _opened(path) as file:
            names = file.schema_arrow.names
            groups = [_chunks(file, group, names) for group in range(piece.start, piece.end)]
        if not all(groups):
            return identity_of(piece, sha256_of_file(path) + schema)
        chunks = list(itertools.chain.from_iterable(groups))
        starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in chunks]
        end = max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks))
        if min(starts) < 0:
            raise ValueError(f"{piece.path} has a damaged table of contents: mend or remove it")
        return identity_of(piece, sha256_of_file(path, min(starts), end) + schema)

    def read(self, corpus: Corpus, piece: Piece, report: Callable[[int], None]) -> Iterator[Item]:
        return documents_of(piece.path, "row", _rows(corpus.path(piece), piece, corpus, report), corpus.fields)


def _contents(path: Path, name: str) -> tuple[pyarrow.parquet.FileMetaData, str]:
    """A file's metadata, and its schema as text.

    Args:
        name: name of the file in messages.
    Raises:
        ValueError: the file is not Parquet.
    """
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        return metadata, str(metadata.schema.to_arrow_schema())
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{name} is not a Parquet file ({one_line(error)}): mend or remove it") from None


def _rows(
    path: Path, piece: Piece, corpus: Corpus, report: Callable[[int], None]
) -> Iterator[tuple[int, dict | Unreadable]]:
    """Numbered rows of a piece's row groups."""
    try:
        with _opened(path) as file:
            names = file.schema_arrow.names
            corpus.require_columns(piece.path, names)
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
        # Arrow reports damaged pages as OSError; a failing disk has an errno.
        raise error if error.errno else pyarrow.ArrowException(str(error)) from None


def _opened(path: Path) -> pyarrow.parquet.ParquetFile:
    """A file opened to be read page by page. By default, Arrow takes whole columns of a row group into memory."""
    return pyarrow.parquet.ParquetFile(path, buffer_size=limits.BUFFER_BYTES, pre_buffer=False)


def _chunks(
    file: pyarrow.parquet.ParquetFile, group: int, columns: list[str]
) -> list[pyarrow.parquet.ColumnChunkMetaData]:
    """Chunks of some columns of a row group, those of all parts of nested ones; none if they cannot be read."""
    try:
        # Asked for a column with a damaged description, Arrow's metadata ends the process; its reader raises.
        next(file.iter_batches(1, row_groups=[group], columns=columns), None)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        return []
    row_group, paths = file.metadata.row_group(group), [f"{column.path}." for column in file.schema]
    wanted = [any(path.startswith(f"{name}.") for name in columns) for path in paths]
    return [row_group.column(index) for index, is_wanted in enumerate(wanted) if is_wanted]


def _rows_at_once(file: pyarrow.parquet.ParquetFile, piece: Piece, columns: list[str]) -> int:
    """Number of rows that take _BATCH_BYTES on average in each row group, at most _ROWS. Besides them, one page is in
    memory as a whole, however large its writer made it."""
    at_once = _ROWS
    if piece.num_bytes * at_once <= _DICTIONARY_BYTES:
        return at_once
    for group in range(piece.start, piece.end):
        size, num_rows = 0, file.metadata.row_group(group).num_rows
        for chunk in _chunks(file, group, columns):
            size += chunk.total_uncompressed_size
            if chunk.has_dictionary_page:
                # Every row may hold the longest text of the dictionary, which may be almost all of it.
                share = (chunk.data_page_offset - chunk.dictionary_page_offset) / max(chunk.total_compressed_size, 1)
                at_once = min(at_once, _DICTIONARY_BYTES // max(int(share * chunk.total_uncompressed_size), 1))
        if num_rows:
            at_once = min(at_once, _BATCH_BYTES * num_rows // max(size, 1))
    return max(at_once, 1)


def _in_microseconds(column: pyarrow.Array) -> pyarrow.Array:
    """A column whose times Python can hold; without this, it would depend on pandas, which holds nanoseconds, whether
    a row can be read.

    Raises:
        ValueError: a time has nanoseconds.
    """
    kind = column.type
    if pyarrow.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pyarrow.timestamp("us", kind.tz))
    if pyarrow.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pyarrow.duration("us"))
    return column


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict | Unreadable]:
    """Rows of a batch as Python objects. If Python cannot hold some of them, they are converted one by one."""
    if batch.num_columns and batch.nbytes <= limits.LONGEST_RECORD:
        try:
            columns = [_in_microseconds(column) for column in batch.columns]
            return iter(pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist())
        except _NO_VALUE:
            pass
    return (_row_of(batch.slice(index, 1)) for index in range(batch.num_rows))


def _without_nulls(value: object) -> object:
    """Value without null fields. A column gives every object all the names that any of its objects has, so that a call,
    for one, shows arguments that it never had."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _row_of(batch: pyarrow.RecordBatch) -> dict | Unreadable:
    """Row of a batch that has one."""
    row, size = {}, 0
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            # A dictionary is shared by all rows.
            values = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            size += values.nbytes
            if size > limits.LONGEST_RECORD:
                return too_long()
            row[name] = _in_microseconds(values)[0].as_py()
        except _NO_VALUE as error:
            return Unreadable(f'the column "{name}": {one_line(error)}')
    return row
