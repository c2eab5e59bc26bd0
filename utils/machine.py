"""Properties of this machine, and the program's version on it."""

import ctypes
import platform
import re
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


def commit_of(root: Path) -> str:
    """The commit that a checkout by git is at, without the changes made since; empty if it is none. git itself need not
    be there."""
    try:
        git = root / ".git"
        if git.is_file():
            # A further worktree: "gitdir: PATH", whose branches lie with the first one's.
            git = root / git.read_text(encoding="utf-8").partition("gitdir: ")[2].strip()
        shared = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.partition("ref: ")[2]
        if name and (shared / name).exists():
            head = (shared / name).read_text(encoding="utf-8").strip()
        elif name:
            packed = (shared / "packed-refs").read_text(encoding="utf-8").splitlines()
            head = next((line.partition(" ")[0] for line in packed if line.endswith(f" {name}")), "")
    except (OSError, UnicodeDecodeError):
        return ""
    return head if re.fullmatch("[0-9a-f]{40,64}", head) else ""
