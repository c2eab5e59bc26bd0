"""Readers: one for each kind of file. A reader names the endings of its files, cuts them where they can be cut, and
yields their documents or records with their places.

A new kind is a subclass in a file of its own, and a line in registry.py. Most derive from StreamReader and write
`records` alone; table.py is the shortest example.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from data_preprocess.readers import limits
from data_preprocess.readers.compression import decompressed, is_compressed
from data_preprocess.readers.corpus import Corpus
from data_preprocess.readers.documents import documents_of
from data_preprocess.readers.first_bytes import foreign_encoding, start_of
from data_preprocess.readers.items import BadRecord, Item, Unreadable
from data_preprocess.readers.pieces import Piece, identity_of
from utils.files import sha256_of_file

Numbered = tuple[int, object]
"""A number and its record: an object, the bytes of a line of JSON, or Unreadable."""


class Reader(ABC):
    """One kind of file."""

    endings: tuple[str, ...] = ()
    """Endings of the files, in lower case, with the dot. Another one may follow that says how a file is compressed."""
    well_known: tuple[str, ...] = ()
    """Endings that messages and help texts name as examples."""
    holds_records = True
    """Whether a file holds records with fields; otherwise it is one text."""
    may_be_compressed = True

    def pieces(self, path: Path, name: str, unit_bytes: int) -> Iterator[Piece]:
        """Pieces of a file, each about `unit_bytes` large; by default the whole file.

        Args:
            name: path of the file, relative to the data directory.
        """
        size = path.stat().st_size
        yield Piece(name, 0, size, size)

    def identity(self, path: Path, piece: Piece) -> bytes:
        """Identity of a piece for fingerprints: its place, and the checksum of the bytes that reading it looks at."""
        return identity_of(piece, sha256_of_file(path))

    @abstractmethod
    def read(self, corpus: Corpus, piece: Piece, report: Callable[[int], None]) -> Iterator[Item]:
        """All items of a piece, in order. Damage is an item, never an exception.

        Args:
            report: called with the number of bytes of the file that were read since the last call.
        Raises:
            ValueError: the user must decide something first, such as which column holds the text.
        """


class OpenPiece:
    """A piece that is being read: its decompressed stream, and the progress in its file."""

    def __init__(self, corpus: Corpus, piece: Piece, start: bytes, file, report: Callable[[int], None]):
        self.corpus, self.piece, self.start = corpus, piece, start
        self.is_compressed = is_compressed(piece.path)
        self.stream = decompressed(file, piece.path) if self.is_compressed else file
        self._file, self._last, self._report = file, piece.start, report

    def follow(self, records: Iterator[Numbered]) -> Iterator[Numbered]:
        """The same records; progress is reported as they go by."""
        for record in records:
            self.report()
            yield record

    def report(self, at_end: bool = False) -> None:
        """Report how far the file itself was read, whatever decompresses or parses it."""
        position = self._file.tell()
        if at_end:
            self._report(max(position - self._last, 0))
        elif position - self._last >= limits.BUFFER_BYTES:
            self._report(position - self._last)
            self._last = position


class StreamReader(Reader):
    """A kind of file that holds UTF-8 and is read from front to back."""

    counts = "record"
    """Word for what the numbers of records count, as in the message `a.csv row 17`."""

    def read(self, corpus: Corpus, piece: Piece, report: Callable[[int], None]) -> Iterator[Item]:
        path = corpus.path(piece)
        start = start_of(path)
        if encoding := foreign_encoding(start):
            if not piece.start:
                advice = f"convert it with `iconv -f {encoding} -t UTF-8`"
                yield BadRecord(piece.path, f"{encoding}, but only UTF-8 is read: {advice}")
            report(piece.num_bytes)
            return
        with open(path, "rb", buffering=limits.BUFFER_BYTES) as file:
            opened = OpenPiece(corpus, piece, start, file, report)
            yield from self.items(opened)
            opened.report(at_end=True)

    def items(self, opened: OpenPiece) -> Iterator[Item]:
        """The documents or records of an open piece."""
        return documents_of(opened.piece.path, self.counts, opened.follow(self.records(opened)), opened.corpus.fields)

    def records(self, opened: OpenPiece) -> Iterator[tuple[int, dict | bytes | Unreadable]]:
        """Numbered records of an open piece. Raises DamagedFile if the rest cannot be read."""
        raise NotImplementedError
