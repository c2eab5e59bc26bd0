"""Files on this machine."""

import os
import posixpath
import stat
import time

from viewer.sources.files import FileState


class LocalFiles:
    """Answers to `Files` on this machine."""

    def state(self, path: str) -> FileState | None:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileState(found.st_size, found.st_mtime, found.st_ino) if stat.S_ISREG(found.st_mode) else None

    def read(self, path: str, offset: int, size: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def folders(self, path: str) -> list[str]:
        try:
            # DirEntry.is_dir would raise for a link into a folder that may not be read.
            return sorted(name for name in os.listdir(path) if os.path.isdir(posixpath.join(path, name)))
        except OSError:
            return []

    def now(self) -> float:
        return time.time()

    def connected(self) -> bool:
        return True

    def close(self) -> None:
        pass
