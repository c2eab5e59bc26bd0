"""Registry of the readers, one for each kind of file. A new kind is one line here."""


from data_preprocess.readers.compression import is_compressed
from data_preprocess.readers.corpus import Corpus
from data_preprocess.readers.json_file import JsonReader
from data_preprocess.readers.parquet import ParquetReader
from data_preprocess.readers.pieces import ending_of
from data_preprocess.readers.reader import Reader
from data_preprocess.readers.table import TableReader
from data_preprocess.readers.text import TextReader

_TEXT = TextReader()
READERS: tuple[Reader, ...] = (_TEXT, JsonReader(), ParquetReader(), TableReader())
_BY_ENDING = {ending: reader for reader in READERS for ending in reader.endings}


def reader_of(path: str) -> Reader:
    """Reader of a file that a corpus takes, see is_readable. A file of unknown kind is read as text."""
    return _BY_ENDING.get(ending_of(path), _TEXT)


def holds_records(name: str) -> bool:
    """Whether a file of this name is of a kind that holds records."""
    reader = _BY_ENDING.get(ending_of(name))
    return reader is not None and reader.holds_records and (reader.may_be_compressed or not is_compressed(name))


def is_readable(corpus: Corpus, path: str) -> bool:
    """Whether a corpus takes a chosen file. It takes records; texts, unless it wants records whole; and as texts, files
    of unknown kind that --include names by their kind."""
    if corpus.fields is None or holds_records(path):
        return holds_records(path)
    reader = _BY_ENDING.get(ending_of(path))
    return corpus.names_kind_of(path) if reader is None else not reader.holds_records


def well_known_endings(of_records: bool) -> tuple[str, ...]:
    """Endings that messages and help texts name, of all kinds or only of those that hold records."""
    return tuple(
        ending for reader in READERS if reader.holds_records or not of_records for ending in reader.well_known
    )
