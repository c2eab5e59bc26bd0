"""The end of every command's file: `run_main(main)`.

The reader of a command's output may leave (`| head`), the disk under it may be full, its encoding may lack a character,
or it may be closed from the start. None of these shows a traceback:

    a command that only prints     ends as if by SIGPIPE, with 141, as `cat` does; on a full disk with 1 and a sentence
    a command that does work       (`goes_on`) finishes its work without an audience; its exit code tells the result
    Ctrl-C                         130

A character that the encoding lacks is printed as its escape (`\\u4e2d`).
"""

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

INTERRUPTED, NOBODY_READS = 130, 141
"""As shells count: 128 and the signal, SIGINT or SIGPIPE."""


class _Output(io.FileIO):
    """The file under standard output or error. A write that cannot be done is lost or ends the command; it never fails.

    Args:
        goes_on: it is lost.
    """

    def __init__(self, descriptor: int, goes_on: bool):
        super().__init__(descriptor, "wb", closefd=False)
        self._goes_on, self._has_told = goes_on, False

    def write(self, data: bytes) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                written = super().write(left)
            except OSError as error:
                self._lose(error)
                break
            if written is None:
                # Another process that shares the file has made it non-blocking.
                select.select([], [self.fileno()], [])
            left = left[written or 0 :]
        return size

    def _lose(self, error: OSError) -> None:
        """
        Raises:
            SystemExit: the command has nothing left to do. Code that expects an OSError from its data does not catch
                it, and it comes once: at exit, Python writes the rest.
        """
        has_told, self._has_told = self._has_told, True
        if has_told or self.fileno() == 2:
            return
        if error.errno != errno.EPIPE:
            print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
        if not self._goes_on:
            raise SystemExit(NOBODY_READS if error.errno == errno.EPIPE else 1)


def run_main(main: Callable[[], int | None], goes_on: bool = False) -> NoReturn:
    """Run a command and end the process with its code.

    Args:
        goes_on: its work or its exit code matters even if nobody reads its output.
    """
    set_up_output(goes_on)
    try:
        try:
            code = main()
        except SystemExit as leaving:
            code = leaving.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def set_up_output(goes_on: bool) -> None:
    """Replace standard output and error by streams that behave as described above."""
    for descriptor in range(3):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        # Otherwise the next opened file would take this number, and a library's messages would go into it.
        os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As for arguments: code that needs valid text checks it itself.
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout = _stream(sys.stdout, goes_on)
    sys.stderr = _stream(sys.stderr, goes_on=True)


def _stream(old: io.TextIOWrapper | None, goes_on: bool) -> io.TextIOWrapper:
    """A stream like Python's own, which is None if it was closed when Python began."""
    if old is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    old.flush()
    raw = _Output(old.fileno(), goes_on)
    return io.TextIOWrapper(
        raw if old.write_through else io.BufferedWriter(raw), old.encoding, "backslashreplace",
        line_buffering=old.line_buffering, write_through=old.write_through,
    )  # fmt: skip


def visible(text: str) -> str:
    """Text without anything that a terminal would obey: control characters as their pictures. Half a surrogate pair,
    which a name in a broken record may hold, cannot be printed."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if 127 <= ord(c) < 160 else c
        for c in text
    )
