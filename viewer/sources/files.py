"""What the viewer asks of a machine's files, wherever the machine is."""

from dataclasses import dataclass
from typing import Protocol

from utils.text import plain


@dataclass(frozen=True)
class FileState:
    size: int
    modified: float
    identity: int = 0
    """Another number, another file; 0 where that cannot be known."""


class Files(Protocol):
    """A machine's files. What cannot be read raises OSError, EOFError or SSHException."""

    def state(self, path: str) -> FileState | None:
        """None: there is no such file."""

    def read(self, path: str, offset: int, size: int) -> bytes: ...
    def folders(self, path: str) -> list[str]:
        """Names of the folders in a folder, sorted; none if it is none."""

    def now(self) -> float:
        """Seconds since 1970, by that machine's clock."""

    def connected(self) -> bool:
        """False: what was just raised means all files, not only the one that was asked for."""

    def close(self) -> None: ...


def is_of_one_file(error: OSError, files: Files) -> bool:
    """Whether only a file, rather than the connection, is the matter."""
    return not isinstance(error, (TimeoutError, ConnectionError)) and files.connected()


def why_unreadable(path: str, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{plain(path)} may not be read by this user"
    return f"{plain(path)} cannot be read: {plain(error.strerror or error)}"
