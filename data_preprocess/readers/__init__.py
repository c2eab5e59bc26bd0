"""Documents from files on disk, one at a time and in bounded memory.

    kind                                    a document is         cut into units by           reader
    text, source code                       a file                file                        text.py
    .jsonl .ndjson, .json of such lines     a line                byte range                  json_file.py
                                                                  (compressed: file)
    the same, one array                     an element            file
    the same, objects spread over lines     an object             file
    .parquet                                a row                 row group                   parquet.py
    .csv .tsv, the first line names them    a row                 file                        table.py

Except for Parquet, all may be compressed: .gz, .xz, .bz2, .zst. A file of another kind is read as text if --include
names its kind. The input is cut into units of bounded size by its files alone, so that the cut does not depend on the
number of processes. A text may have any length; a record longer than LONGEST_RECORD (limits.py) is refused, with its
place.

    folders.py -> listing.py -> units.py -> registry.py -> a reader -> documents.py -> items
"""

from data_preprocess.readers.corpus import (
    Corpus,
    TextFields,
    add_corpus_arguments,
    add_file_arguments,
    chosen_files,
    corpus_from,
)
from data_preprocess.readers.items import BadRecord, BadRecords, Document, Item, Record, place
from data_preprocess.readers.listing import list_inputs, print_left_out
from data_preprocess.readers.pieces import Piece
from data_preprocess.readers.registry import holds_records, well_known_endings
from data_preprocess.readers.units import Unit, find_units, plan_units, read_piece, read_unit

__all__ = [
    "BadRecord",
    "BadRecords",
    "Corpus",
    "Document",
    "Item",
    "Piece",
    "Record",
    "TextFields",
    "Unit",
    "add_corpus_arguments",
    "add_file_arguments",
    "chosen_files",
    "corpus_from",
    "find_units",
    "holds_records",
    "list_inputs",
    "place",
    "plan_units",
    "print_left_out",
    "read_piece",
    "read_unit",
    "well_known_endings",
]
