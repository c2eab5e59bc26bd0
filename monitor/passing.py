"""Disks that are full or away, as a training's last words tell of them. (Of the monitor's own files: utils.files.)"""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EROFS,
)  # fmt: skip
"""What a file system answers whose server or disk does not."""


def is_full(reason: str) -> bool:
    """Whether a sentence speaks of a disk that is full, or of a quota."""
    return any(os.strerror(number) in reason for number in FULL)


def is_of_a_disk(reason: str) -> bool:
    """Whether a sentence speaks of a disk that is full or does not answer; it may also be that of a socket."""
    return any(os.strerror(number) in reason for number in (*FULL, *_AWAY))
