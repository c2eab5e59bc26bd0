"""Files that are either whole or absent: write under a temporary name, flush, rename."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_PASSING = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY,
    errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EREMOTEIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
})  # fmt: skip
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system without locks."""
_LOCK_POLL_S = 0.1


def is_passing(error: OSError) -> bool:
    """Whether the same call may work later although the command stays the same: a full disk, a network file system that
    is away. (A missing file or a folder without permission is a user's mistake.)"""
    return error.errno in _PASSING


def fsync_dir(directory: Path) -> None:
    """Flush a directory, so that a rename inside it survives a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` in one step. A reader sees the old file or the new one, never a part.

    `durable=False` skips the flush: for files that matter only while the machine is up (heartbeats).
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        fsync_dir(path.parent)


def atomic_write_json(path: Path, value: object, durable: bool = True) -> None:
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), durable)


def try_lock(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if it is free; returns whether this worked. On a file system without locks it always does."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise


def lock_file(path: Path, taken: str, patience_s: float = 0.0) -> BinaryIO:
    """Lock a file, which is made if need be, until the returned file is closed or the process ends. On a file system
    without locks, a warning takes its place.

    Args:
        patience_s: how long to wait while another process holds it: a dying process may need a moment to let go.
    Raises:
        ValueError: another process, still alive, holds it; `taken` is the message.
    """
    file, deadline, said = open(path, "ab"), time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise ValueError(taken) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            logger.warning("%s cannot be locked (%s): make sure that nothing else works there", path, error.strerror)
            return file
        if not said:
            logger.warning("%s is held by another process: waiting up to %.0f s for it", path, patience_s)
            said = True
        time.sleep(_LOCK_POLL_S)


def sha256_of_file(path: Path, start: int = 0, end: int | None = None) -> str:
    """Hex sha256 of the bytes [start, end) of a file, read in pieces of 8 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        left = None if end is None else end - start
        while left is None or left > 0:
            piece = file.read(1 << 23 if left is None else min(1 << 23, left))
            if not piece:
                break
            digest.update(piece)
            left = None if left is None else left - len(piece)
    return digest.hexdigest()
