"""Failing reads in the processes of a run, by means of read_errors.c."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from errno import EACCES, EIO, ESTALE
from pathlib import Path

SOURCE = Path(__file__).with_name("read_errors.c")
ERRORS = {"EIO": EIO, "ESTALE": ESTALE, "EACCES": EACCES}


def build_library(directory: Path) -> Path:
    """Compile read_errors.c.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or none that can build it.
    """
    library = directory / "read_errors.so"
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True,
                   capture_output=True, text=True)  # fmt: skip
    return library


class ReadErrors:
    """Errors that can be switched on and off.

    Args:
        library: from `build_library`.
        home: gets the control file, and the record of failed calls.
    """

    def __init__(self, library: Path, home: Path):
        self._library, self._control = library, home / "read_errors"
        self._hits = home / "read_errors.hits"

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the processes in which reads may fail."""
        return {"LD_PRELOAD": str(self._library), "READ_ERRORS": str(self._control)}

    @contextlib.contextmanager
    def armed(self, error: str, *patterns: str, who: str = "all", what: str = "any") -> Iterator[None]:
        """Within the context, calls fail on paths that match a pattern (of fnmatch, where * also matches a slash).

        Args:
            error: one of ERRORS.
            who: "ranks", "others" (monitor, torchrun) or "all".
            what: "list" (directories), "open", "read", "stat" or "any".
        """
        self._hits.unlink(missing_ok=True)
        new = self._control.with_name("read_errors.new")
        new.write_text("".join(f"{ERRORS[error]} {who} {what} {pattern}\n" for pattern in patterns))
        new.replace(self._control)
        try:
            yield
        finally:
            self._control.unlink()

    def hits(self) -> int:
        """Number of calls that have failed since the errors were armed."""
        return len(self._hits.read_bytes().splitlines()) if self._hits.exists() else 0
