"""Compressed files as streams of bytes, in bounded memory."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import BinaryIO

import pyarrow

COMPRESSION_SUFFIXES = frozenset((".gz", ".xz", ".zst", ".bz2"))
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""Exceptions that reading a damaged file raises."""

_BUFFER_BYTES, _BLOCK_BYTES = 1 << 20, 1 << 16
_MOST_MEMORY = 1 << 28
"""Bytes that a file may ask for to be decompressed; `xz -9` asks for 65 MiB."""


def is_compressed(name: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return os.path.splitext(name)[1].lower() in COMPRESSION_SUFFIXES


def decompressed(file: BinaryIO, name: str) -> io.BufferedReader:
    """The content of a compressed file. Reading raises one of DAMAGE where it is damaged.

    Args:
        name: of the file; one of COMPRESSION_SUFFIXES ends it.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".gz":
        read = gzip.GzipFile(fileobj=file).read1
    elif suffix == ".xz":
        read = _Members(file, lambda: lzma.LZMADecompressor(memlimit=_MOST_MEMORY)).read
    elif suffix == ".bz2":
        read = _Members(file, bz2.BZ2Decompressor).read
    else:
        read = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd").read
    return io.BufferedReader(_Decompressed(read), _BUFFER_BYTES)


class _Members:
    """Compressed streams one behind the other, as `cat a.xz b.xz` makes them.

    Python's own readers for .xz and .bz2 take anything that is not a stream for the end of the file, so that a stream
    with damaged first bytes would be lost without a word.
    """

    def __init__(self, file: BinaryIO, start: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]):
        self._file, self._start = file, start
        self._member = start()

    def read(self, size: int) -> bytes:
        """Next bytes, at most `size` of them; none at the end."""
        while True:
            data = b""
            if self._member.eof:
                # Behind a stream there may be zeros up to a multiple of four bytes.
                data = self._member.unused_data.lstrip(b"\0")
                while not data:
                    if not (data := self._file.read(_BLOCK_BYTES)):
                        return b""
                    data = data.lstrip(b"\0")
                self._member = self._start()
            elif self._member.needs_input:
                data = self._file.read(_BLOCK_BYTES)
                if not data:
                    raise EOFError("it ends in the middle")
            if content := self._member.decompress(data, size):
                return content


class _Decompressed(io.RawIOBase):
    """Raw stream that gives out little at once, so that all content before a damaged place is read. Damage is an
    EOFError."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self._read(min(len(buffer), _BLOCK_BYTES))
        except OSError as error:
            # An error of the system has a number; gzip and Arrow report damaged content without one.
            raise error if error.errno else EOFError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)
