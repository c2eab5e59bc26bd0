"""Recognises full or unreachable disks by a training's last words. (For the monitor's own files, see utils.files.)"""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EROFS,
)  # fmt: skip
"""Errors of a file system whose server or disk does not answer."""


def is_full(reason: str) -> bool:
    """Whether a sentence speaks of a full disk or of a quota."""
    return any(os.strerror(number) in reason for number in FULL)


def is_of_a_disk(reason: str) -> bool:
    """Whether a sentence speaks of a disk that is full or does not answer. The same words may come from a socket."""
    return any(os.strerror(number) in reason for number in (*FULL, *_AWAY))
