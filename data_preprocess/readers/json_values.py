"""JSON values of a stream, parsed one at a time: the elements of an array, or objects one after another."""

import codecs
import io
import json
import re
from collections.abc import Iterator

from data_preprocess.readers import limits
from data_preprocess.readers.items import DAMAGE, DamagedFile, Unreadable, too_long

_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OUTSIDE = re.compile(r'[^"\[\]{},]*+')


def _number(digits: str) -> int | float:
    # Python refuses to read thousands of digits. They are not text, and must not cost the rest of the file.
    return int(digits) if len(digits) < 1000 else float(digits)


class ArrayOfJson:
    """The elements of a JSON array, parsed one at a time."""

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        # Invalid UTF-8 becomes half surrogate pairs, so that only the record that holds them is refused.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._parse = json.JSONDecoder(parse_int=_number).raw_decode
        self._text, self._position, self._end = "", 0, False
        self._damage: Exception | None = None

    def __iter__(self) -> Iterator[object]:
        self._take("[")
        separator = self._next_character()
        while separator != "]":
            yield self._element()
            separator = self._next_character()
            if separator != "]":
                self._take(",")
        self._take("]")
        if self._next_character() or self._damage:
            raise self._damage or DamagedFile("there is more after the array")

    def _fill(self, characters: int) -> None:
        """Read until so many characters lie ahead, or the stream ends. Damage is reported once all text before it is
        used up."""
        parts = [self._text[self._position :]]
        ahead = len(parts[0])
        while ahead < characters and not self._end:
            try:
                data = self._stream.read1(limits.BUFFER_BYTES)
            except DAMAGE as error:
                data, self._damage = b"", error
            self._end = not data
            parts.append(self._decode(data, final=self._end))
            ahead += len(parts[-1])
        self._text, self._position = "".join(parts), 0

    def _next_character(self) -> str:
        """Next character that is not blank; empty at the end. It is not consumed."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._text) or self._end:
                return self._text[self._position : self._position + 1]
            self._fill(limits.BUFFER_BYTES)

    def _take(self, character: str) -> None:
        found = self._next_character()
        if found != character:
            raise self._damage or DamagedFile(f'"{found}" where "{character}" was due' if found else "it lacks its end")
        self._position += 1

    def _element(self) -> object:
        self._next_character()
        while True:
            ahead = len(self._text) - self._position
            try:
                value, end = self._parse(self._text, self._position)
            except json.JSONDecodeError as error:
                # If an element goes on beyond the text read so far, the parser complains near the end, or of a string.
                may_go_on = error.pos >= len(self._text) - 64 or error.msg.startswith("Unterminated string")
                if self._end or not may_go_on:
                    raise self._damage or DamagedFile(error.msg) from None
                if ahead > limits.LONGEST_RECORD:
                    self._pass_element()
                    return too_long()
            except RecursionError:
                self._pass_element()
                return Unreadable("too deeply nested")
            else:
                if end < len(self._text) or self._end:
                    is_too_long = end - self._position > limits.LONGEST_RECORD
                    self._position = end
                    return too_long() if is_too_long else value
            self._fill(max(ahead + 1, min(2 * ahead, limits.LONGEST_RECORD + 1)))

    def _pass_element(self) -> None:
        """Pass over an element by its brackets and strings, without keeping any of it."""
        depth, in_string = 0, False
        while True:
            self._position = (_IN_STRING if in_string else _OUTSIDE).match(self._text, self._position).end()
            # A backslash belongs to the character after it.
            if self._position + 1 >= len(self._text) and not self._end:
                self._fill(2)
                continue
            found = self._text[self._position : self._position + 1]
            if not found or found == "\\":
                raise self._damage or DamagedFile("it lacks its end")
            if found == '"':
                in_string = not in_string
            elif found in "[{":
                depth += 1
            elif depth == 0:
                return
            elif found in "]}":
                depth -= 1
            self._position += 1
            if found in "]}" and depth == 0:
                return


class ObjectsOfJson(ArrayOfJson):
    """JSON objects one after another, each spread over several lines."""

    def __iter__(self) -> Iterator[object]:
        while self._next_character():
            yield self._element()
        if self._damage:
            raise self._damage
