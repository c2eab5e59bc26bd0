"""Items that reading yields: documents or whole records with their places, and records that could not be read."""

from dataclasses import dataclass, field

from data_preprocess.readers import limits
from data_preprocess.readers.compression import DAMAGE as DAMAGED_STREAM


class DamagedFile(Exception):
    """The rest of the file cannot be read."""


DAMAGE = (DamagedFile, *DAMAGED_STREAM)
"""Exceptions that end the reading of a file, but not of the corpus."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or a part of a very long one."""

    text: str
    path: str
    """Path of its file, relative to the data directory."""
    counts: str
    """What `record` counts in this file: "byte", "line", "record" or "row"; "" if the file is the document."""
    record: int
    continued: bool = False
    """The next part follows."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it stands in its file. Invalid UTF-8 may appear in it as half surrogate pairs."""

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
        # Names of files and fields may be invalid Unicode.
        return f"{self.where}: {self.why}".encode("utf-8", "backslashreplace").decode()


Item = Document | Record | BadRecord


@dataclass
class BadRecords:
    """Number of records that could not be read, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Path -> reason, for files that were not looked at; see list_inputs."""

    def add(self, bad: BadRecord) -> None:
        self.count += 1
        if len(self.examples) < 20:
            self.examples.append(str(bad))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a record that a reader could not take."""

    why: str


def too_long() -> Unreadable:
    """Stands for a record beyond LONGEST_RECORD."""
    size = limits.LONGEST_RECORD / (1 << 20)
    return Unreadable(f"longer than {size:,.0f} MiB: cut it, or give its text as a .txt file")


def place(path: str, counts: str, record: int) -> str:
    """Place of a record for a message: "a.jsonl at byte 17", "a.parquet row 3", or just the path."""
    return {"": path, "byte": f"{path} at byte {record}"}.get(counts, f"{path} {counts} {record}")


def one_line(error: Exception) -> str:
    """Text of an error, on one line of a report."""
    if isinstance(error, UnicodeError):
        return "not valid Unicode"
    return " ".join(str(error).split())[:200] or type(error).__name__
