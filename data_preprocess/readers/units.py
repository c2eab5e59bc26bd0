"""Units: a corpus cut into work of bounded size, by its files alone. And the reading of a unit."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_preprocess.readers.corpus import Corpus
from data_preprocess.readers.items import Item
from data_preprocess.readers.listing import list_inputs, print_left_out
from data_preprocess.readers.pieces import Piece
from data_preprocess.readers.registry import reader_of, well_known_endings
from dataset.format import MANIFEST_NAME
from utils.paths import absent


@dataclass(frozen=True)
class Unit:
    """Work for one process, of bounded size unless it is one large file that cannot be cut."""

    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    def fingerprint(self, corpus: Corpus) -> str:
        """Hex sha256 of the unit's content and of its files' names."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(reader_of(piece.path).identity(corpus.path(piece), piece))
        return digest.hexdigest()


def plan_units(root: str, paths: list[str], unit_bytes: int) -> list[Unit]:
    """Cut files into units of about `unit_bytes`: small neighbours share one, long files are cut where they can be."""
    units, current, current_bytes = [], [], 0
    for path in paths:
        for piece in _pieces(Path(root, path), path, unit_bytes):
            if current and current_bytes + piece.num_bytes > unit_bytes:
                units.append(Unit(tuple(current)))
                current, current_bytes = [], 0
            current.append(piece)
            current_bytes += piece.num_bytes
    if current:
        units.append(Unit(tuple(current)))
    return units


def _pieces(path: Path, name: str, unit_bytes: int) -> Iterator[Piece]:
    """The pieces of a file; none if it is empty."""
    if path.stat().st_size:
        yield from reader_of(name).pieces(path, name, unit_bytes)


def find_units(corpus: Corpus, unit_bytes: int) -> tuple[list[Unit], dict[str, str]]:
    """Units of a corpus, and path -> reason for the files that they leave out.

    Raises:
        ValueError: the directory does not exist, or nothing in it can be read.
    """
    if not Path(corpus.root).exists():
        raise ValueError(absent(corpus.root))
    if not Path(corpus.root).is_dir():
        raise ValueError(f"{corpus.root} is a file: give the directory that it lies in")
    inputs, left_out = list_inputs(corpus)
    units = plan_units(corpus.root, inputs, unit_bytes)
    if not units:
        print_left_out(left_out)
        if (Path(corpus.root) / MANIFEST_NAME).exists():
            raise ValueError(f"{corpus.root} is pretokenized and holds tokens: give the directory with the raw data")
        raise ValueError(
            f"{corpus.root} holds no {_wanted(corpus)} into it"
            + ("" if corpus.include == ("*",) and not corpus.exclude else ", or choose others with --include")
        )
    return units, left_out


def _wanted(corpus: Corpus) -> str:
    """Advice on what to put into a directory in which nothing can be read."""
    if corpus.fields is None:
        *endings, last = well_known_endings(of_records=True)
        return f"records: put {', '.join(endings)} or {last} files"
    return f"text: put {', '.join(well_known_endings(of_records=False))} or source files"


def read_unit(corpus: Corpus, unit: Unit, on_bytes: Callable[[int], None] | None = None) -> Iterator[Item]:
    """All items of a unit, in order: documents without the empty ones, or records if they are wanted whole.

    Args:
        on_bytes: called with the number of bytes of the files that were read since the last call, for progress.
    Raises:
        ValueError: a table without the wanted columns, or a file that changed since the units were planned.
    """
    for piece in unit.pieces:
        yield from read_piece(corpus, piece, on_bytes)


def read_piece(corpus: Corpus, piece: Piece, on_bytes: Callable[[int], None] | None = None) -> Iterator[Item]:
    """All items of a piece, see read_unit."""
    yield from reader_of(piece.path).read(corpus, piece, on_bytes or (lambda _: None))
