"""Troubles that pass by themselves, or once somebody has made room: disks and file systems over a network."""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
    errno.ENETDOWN, errno.ENETUNREACH,
)  # fmt: skip
"""What a file system answers whose server or disk does not."""
_SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def passes(error: OSError) -> bool:
    """Whether it is worth while to try the same again later."""
    return error.errno in (*FULL, *_AWAY, *_SCARCE)


def is_full(reason: str) -> bool:
    """Whether a sentence speaks of a disk that is full, or of a quota."""
    return any(os.strerror(number) in reason for number in FULL)


def is_of_a_disk(reason: str) -> bool:
    """Whether a sentence speaks of a disk that is full or does not answer; it may also be that of a socket."""
    return any(os.strerror(number) in reason for number in (*FULL, *_AWAY, errno.EROFS))
