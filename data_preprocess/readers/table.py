"""Tables as text: a record is a row, and the first line names its fields."""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress

from data_preprocess.readers import limits
from data_preprocess.readers.items import DamagedFile, Unreadable, too_long
from data_preprocess.readers.pieces import ending_of
from data_preprocess.readers.reader import OpenPiece, StreamReader

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class TableReader(StreamReader):
    endings = tuple(_SEPARATORS)
    well_known = (".csv",)
    counts = "row"

    def records(self, opened: OpenPiece) -> Iterator[tuple[int, dict | Unreadable]]:
        # The default limit refuses fields longer than 128 KiB; without a limit, a lost quote would swallow the file.
        csv.field_size_limit(limits.LONGEST_RECORD)
        # Invalid UTF-8 becomes half surrogate pairs, so that only the row that holds them is refused.
        lines = io.TextIOWrapper(opened.stream, "utf-8-sig", errors="surrogateescape", newline="")
        bounded = _LinesOfRows(lines)
        try:
            rows = csv.DictReader(bounded, delimiter=_SEPARATORS[ending_of(opened.piece.path)])
            if rows.fieldnames is not None:
                opened.corpus.require_columns(opened.piece.path, list(rows.fieldnames))
                for number, row in enumerate(rows):
                    bounded.row_ends()
                    more = row.pop(None, [])
                    yield number, _too_many_cells(len(row), more) if any(more) else row
        except csv.Error as error:
            raise DamagedFile(str(error)) from None
        finally:
            # The wrapper must not close the file, whose position is still asked for. A caller that stopped early may
            # have closed it already.
            with suppress(ValueError):
                lines.detach()


def _too_many_cells(columns: int, more: list[str]) -> Unreadable:
    # The text after an unquoted comma would be lost, and the text before it taken for the whole.
    return Unreadable(
        f"{columns + len(more)} cells for {columns} columns: a text with the separator in it needs quotes"
    )


class _LinesOfRows:
    """Lines of a table. A row may hold many, if they are quoted, but not more than LONGEST_RECORD characters."""

    def __init__(self, lines: io.TextIOWrapper):
        self._lines, self._left = lines, limits.LONGEST_RECORD

    def row_ends(self) -> None:
        self._left = limits.LONGEST_RECORD

    def __iter__(self) -> Iterator[str]:
        while line := self._lines.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                # Nobody can say where the next row begins: a quote may have been lost, or may come only now.
                raise DamagedFile(f"the next row is {too_long().why}")
            yield line
