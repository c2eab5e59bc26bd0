"""Properties of this machine."""

import ctypes
import platform
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def cpu_name() -> str:
    """The processor's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def keep_freed_memory() -> bool:
    """Let the C library keep memory that is freed, where it is glibc; returns whether it does.

    By default it returns blocks of more than 32 MiB to the system, which hands them out again page by page, each filled
    with zeros: a step that allocates the same large tensors as the one before spends a tenth of its time on that.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Older versions accept no threshold above the default's limit.
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 32 << 20))
    return bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)) and kept
