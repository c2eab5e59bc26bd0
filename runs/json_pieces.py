"""Reads a large JSON file value by value, so that it takes no more memory than its largest value."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Protocol

_PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_BROKEN = "is broken: it is not whole JSON"


class TooLarge(ValueError):
    """The file or its list is larger than the reader allows."""


class Readable(Protocol):
    """A binary file, or something like it."""

    def read(self, size: int, /) -> bytes: ...


class JSONPieces:
    """The values of a JSON file, one after another.

    Args:
        file: a binary file with UTF-8 text.
        longest: characters; a longer value is refused.
        most: bytes; a longer file is refused.
    """

    def __init__(self, file: Readable, longest: int, most: int):
        self._file, self._longest, self._largest, self._left = file, longest, most, most
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def members(self, listed: str) -> Iterator[tuple[str, object]]:
        """Key and value of each member of the file's object. The list under the key `listed` yields each element by
        itself.

        Raises:
            ValueError: the file is not an object, or is broken or too large; the text belongs behind the file's name.
            OSError, EOFError, zlib.error: the file cannot be read.
        """
        if not self._skip("{"):
            raise ValueError("is not a JSON object" if self._next() else _BROKEN)
        if not self._skip("}"):
            while True:
                key = self._value()
                if not isinstance(key, str):
                    raise ValueError(_BROKEN)
                self._expect(":")
                if key == listed and self._skip("["):
                    yield from ((key, element) for element in self._elements())
                else:
                    yield key, self._value()
                if self._skip("}"):
                    break
                self._expect(",")
        if self._next():
            raise ValueError(_BROKEN)

    def _elements(self) -> Iterator[object]:
        if self._skip("]"):
            return
        while True:
            yield self._value()
            if self._skip("]"):
                return
            self._expect(",")

    def _value(self) -> object:
        self._next()
        # Then the whole value is in memory, unless it is too long: a piece of a number would look like a number.
        self._fill(self._longest + 1)
        try:
            value, end = self._scan(self._text, self._at)
        except (ValueError, RecursionError):
            end = len(self._text) if not self._ended else -1
            value = None
        if end - self._at > self._longest:
            raise ValueError(f"holds a value of more than {self._longest:,} characters, or is broken")
        if end < 0:
            raise ValueError(_BROKEN)
        self._at = end
        return value

    def _expect(self, character: str) -> None:
        if not self._skip(character):
            raise ValueError(_BROKEN)

    def _skip(self, character: str) -> bool:
        if self._next() != character:
            return False
        self._at += 1
        return True

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._fill(1)
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "the pattern also matches nothing"
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""

    def _fill(self, wanted: int) -> None:
        """Read until `wanted` characters lie ahead, or the file ends."""
        if self._ended or len(self._text) - self._at >= wanted:
            return
        pieces, ahead = [self._text[self._at :]], len(self._text) - self._at
        # Read some more, so that the rest need not be moved for each value.
        while ahead < wanted + 3 * _PIECE_BYTES and not self._ended:
            data = self._file.read(_PIECE_BYTES)
            self._left -= len(data)
            if self._left < 0:
                raise TooLarge(f"is larger than {self._largest >> 20} MiB")
            try:
                pieces.append(self._utf8.decode(data, final=not data))
            except UnicodeDecodeError:
                raise ValueError(_BROKEN) from None
            ahead += len(pieces[-1])
            self._ended = not data
        self._text, self._at = "".join(pieces), 0
