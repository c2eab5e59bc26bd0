"""A corpus: which files of a directory are read, which of their fields are text, and the flags that say so."""

import argparse
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from data_preprocess.readers.pieces import Piece


@dataclass(frozen=True)
class TextFields:
    """Fields of a record that are its text."""

    keys: tuple[str, ...] = ("text",)
    """Names of the fields, in the order in which they are joined; a record may lack some of them."""
    separator: str = "\n"
    """Text between two fields."""

    def text_of(self, record: object) -> str:
        """The record's text.

        Raises:
            ValueError: none of the fields is there, or one is not text.
        """
        names = " or ".join(f'"{key}"' for key in self.keys)
        if not isinstance(record, dict):
            raise ValueError("not an object with fields")
        values = [value for key in self.keys if (value := record.get(key)) is not None]
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"no text under the key {names} (choose it with --text_key)")
        text = self.separator.join(value for value in values if value)
        # JSON can spell half a surrogate pair, and bytes of another encoding become some: neither is text.
        text.encode("utf-8")
        return text


@dataclass(frozen=True)
class Corpus:
    """A directory with documents, and how they are read."""

    root: str
    fields: TextFields | None = TextFields()
    """None if records are wanted whole; files without records are left out then."""
    include: tuple[str, ...] = ("*",)
    """Patterns (as in a shell, "*" also matches "/") of the paths that are read."""
    exclude: tuple[str, ...] = ()
    """Patterns of the paths that are not read, even if they are included."""
    columns: frozenset[str] | None = None
    """Columns of a Parquet file that are read where records are wanted whole; the others stand in them as None. None
    reads all."""

    def path(self, piece: Piece) -> Path:
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

    def require_columns(self, path: str, columns: list[str]) -> None:
        """Check that a table has the columns that are wanted.

        Raises:
            ValueError: no column for the text, or two of one name.
        """
        wanted = [name for name in columns if self.wants(name)]
        if self.fields is not None and not wanted:
            raise ValueError(
                f'{path} has no column "{",".join(self.fields.keys)}" but {", ".join(columns)}: choose with '
                f"--text_key, or leave such files out with --exclude"
            )
        if twice := next((name for name in wanted if wanted.count(name) > 1), None):
            raise ValueError(f'{path} has two columns "{twice}": rename one, or leave such files out with --exclude')

    def names_kind_of(self, path: str) -> bool:
        """Whether a pattern chooses a file by its kind or its name, as "*.pm" or "docs/README" do; not "zh/*"."""
        return any(fnmatch(path, pattern) and _names_a_kind(pattern) for pattern in self.include)


def _names_a_kind(pattern: str) -> bool:
    name = pattern.rpartition("/")[2]
    return ("." in name and name.rpartition(".")[2] != "*") or not set(name) & set("*?[")


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose files; `chosen_files` takes them."""
    parser.add_argument("--include", default="*", metavar="PATTERNS", help="read only these files: '*.jsonl,zh/*'")
    parser.add_argument("--exclude", default="", metavar="PATTERNS", help="leave out these files: '*.csv,test/*'")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how documents are read; `corpus_from` takes them."""
    parser.add_argument(
        "--text_key", default="text", metavar="KEY[,KEY...]",
        help="field of a record that holds the text, or several that are joined (default: text)",
    )  # fmt: skip
    parser.add_argument(
        "--text_separator",
        default="\\n",
        help="text between several fields; \\n and \\t are understood (default: a line end)",
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
