"""Programs that a model wrote, run where they can do no harm. Linux only.

    run -> sandbox_child.py: namespaces, mounts, limits, another user -> python program.py

A program has no network, sees no process but its own, can write nowhere but into a small file system in memory that
ends with it, and has limits of time, memory, files and processes. Started by root, it runs as a user that owns nothing.
It has Python's standard library. What it prints is thrown away, but for the end of what it says of its failure.

A program passes if it comes to its end: one that leaves early, by `os._exit(0)` for instance, fails.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](sys.argv[2])"
_GRACE_S = 10.0
"""Time that the child may take beyond the program's, to start and to end it."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Time by the clock, and of the processor."""
    memory: int = 1 << 30
    """Bytes of addresses a process."""
    disk: int = 32 << 20
    """Bytes of all files that it writes; they are in memory."""
    processes: int = 16
    """Processes and threads at a time."""
    files: int = 64
    """Open files a process."""


class Outcome(NamedTuple):
    """How a program ended."""

    passed: bool
    reason: str
    """If it failed: "time limit", "exit code 3", "signal 11" or the last line that it said, such as an exception."""


def run(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a program in Python, whose text is given.

    Raises:
        ValueError: this machine cannot contain it; nothing was run.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError("programs of a model are run on Linux alone, where they can be contained: use such a machine")
    asked = json.dumps({"source": source, "token": os.urandom(16).hex(), **asdict(limits)})
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        # A user of its own cannot enter a directory that only its owner may.
        os.chmod(directory, 0o755)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START, _CHILD, directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env={"PATH": os.defpath},
        )  # fmt: skip
        try:
            told, error = child.communicate(asked.encode("utf-8", "surrogatepass"), limits.seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            # Its namespace of processes ends with it.
            child.kill()
            child.communicate()
            return Outcome(False, "time limit")
    if child.returncode:
        lines = error.decode(errors="replace").split("\n")
        raise ValueError(
            f"this machine cannot contain a program ({' '.join(lines[-2:]).strip()}): run as root, or allow user "
            f"namespaces, on Linux 5.12 or later"
        )
    answer = json.loads(told)
    return Outcome(answer["passed"], answer["reason"])
