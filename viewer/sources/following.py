"""New lines of a file that grows. A file that was replaced or cut is read from its beginning."""

from dataclasses import dataclass

from runs.reslog import LONGEST_LINE
from viewer.sources.files import Files, FileState

_COMPARED_BYTES = 64
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class News:
    """What one look at a file has found."""

    lines: list[bytes]
    """Complete lines without their ends."""
    anew: bool = False
    """The file has been replaced: everything read before is void."""
    more: bool = False
    """There is more to read at once."""


class FollowedFile:
    """Reads the new lines of a growing file."""

    def __init__(self, path: str):
        self.path = path
        self.bytes_fetched = 0
        self._begin(None)

    def _begin(self, state: FileState | None) -> None:
        self._offset, self._tail, self._line, self._too_long = 0, b"", b"", False
        self._state = state

    def poll(self, files: Files) -> News:
        state = files.state(self.path)
        if state is None or state == self._state and state.size == self._offset:
            return News([])
        before, anew = self._state, False
        data = None
        if before is None or state.identity == before.identity and state.size >= self._offset:
            data = self._fetch(files, state)
        if data is None:
            anew = True
            self._begin(state)
            data = self._fetch(files, state) or b""
        self._state = state
        return self._read(data, state, anew)

    def _fetch(self, files: Files, state: FileState) -> bytes | None:
        """The bytes after our place, read together with some bytes before it. None if the latter differ from those that
        we read: a file that was replaced by a longer one would look like one that grew."""
        before = len(self._tail)
        size = before + min(state.size - self._offset, _CHUNK_BYTES)
        data = files.read(self.path, self._offset - before, size) if size else b""
        self.bytes_fetched += len(data)
        return data[before:] if data.startswith(self._tail) else None

    def _read(self, data: bytes, state: FileState, anew: bool) -> News:
        self._offset += len(data)
        self._tail = (self._tail + data)[-_COMPARED_BYTES:]
        *lines, self._line = (self._line + data).split(b"\n")
        if lines and self._too_long:
            lines[0], self._too_long = b"", False
        if len(self._line) > LONGEST_LINE:
            # A line that is too long is handed over once, cut off; the rest of it is dropped.
            if not self._too_long:
                lines.append(self._line[: LONGEST_LINE + 1])
            self._line, self._too_long = b"", True
        return News(lines, anew, more=bool(data) and self._offset < state.size)
