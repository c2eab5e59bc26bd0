"""The questions that the viewer asks about files, on any machine."""

from dataclasses import dataclass
from typing import Protocol

from utils.text import plain


@dataclass(frozen=True)
class FileState:
    """What tells whether a file has changed."""

    size: int
    modified: float
    identity: int = 0
    """A number that differs between files; 0 where it cannot be known."""


class Files(Protocol):
    """The files of a machine. Reading fails with OSError, EOFError or SSHException."""

    def state(self, path: str) -> FileState | None:
        """State of a file; None if there is no such file."""

    def read(self, path: str, offset: int, size: int) -> bytes: ...
    def folders(self, path: str) -> list[str]:
        """Sorted names of the folders in a folder; empty if `path` is not a folder."""

    def now(self) -> float:
        """Seconds since 1970 by that machine's clock."""

    def connected(self) -> bool:
        """False if the last error concerns all files, not only the one that was asked for."""

    def close(self) -> None: ...


def is_of_one_file(error: OSError, files: Files) -> bool:
    """Whether an error concerns only one file, not the connection."""
    return not isinstance(error, (TimeoutError, ConnectionError)) and files.connected()


def why_unreadable(path: str, error: OSError) -> str:
    """A sentence for the user."""
    if isinstance(error, PermissionError):
        return f"{plain(path)} may not be read by this user"
    return f"{plain(path)} cannot be read: {plain(error.strerror or error)}"
