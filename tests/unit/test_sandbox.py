"""Programs that a model might write, and worse ones: each is contained, and counts as failed."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evaluation.sandbox import Limits, Outcome, run

LIMITS = Limits(seconds=1.5, memory=256 << 20, disk=4 << 20)


def contained() -> str:
    """Why nothing can be contained here; empty if it can."""
    try:
        run("pass", LIMITS)
    except ValueError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(reason := contained()), reason=reason or "-")


def test_a_right_program_passes():
    assert run("def add(a, b):\n    return a + b\n\nassert add(1, 2) == 3\nprint('x' * 100)", LIMITS) == (True, "")
    # What is usual in such programs is there.
    usual = "import math, re, json, collections, itertools, typing, hashlib, heapq; open('f', 'w').write('x')"
    assert run(usual, LIMITS) == (True, "")
    assert run("import threading\nt = threading.Thread(target=print)\nt.start(); t.join()", LIMITS).passed


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 + 1 == 3, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("'\\ud800'.encode()", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0: "
                               "surrogates not allowed"),
        ("import sys; sys.exit(0)", "it left before its end"),
        ("import os; os._exit(0)", "it left before its end"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
    ],
)  # fmt: skip
def test_a_wrong_program_fails_with_its_reason(source: str, reason: str):
    assert run(source, LIMITS) == (False, reason)


@pytest.fixture
def outside() -> Iterator[Path]:
    """A file that everybody may write."""
    path = Path(f"/tmp/zero2all-outside-{os.getpid()}")
    path.write_text("mine")
    path.chmod(0o666)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening socket of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


HOSTILE = {
    "endless loop": "while True: pass",
    "endless wait, deaf to signals": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)"
    ),
    "memory": "a = []\nwhile True: a.append(bytearray(10_000_000))",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)",
    "writing outside": "open('{outside}', 'w').write('theirs')",
    "removing all": (
        "import os\nos.unlink('{outside}')\n"
        "import shutil; shutil.rmtree('/tmp', ignore_errors=True); shutil.rmtree(os.path.expanduser('~'))"
    ),
    "killing its parent": "import os, signal\nos.kill(os.getppid() or {pid}, signal.SIGKILL)",
    "killing everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill({pid}, signal.SIGKILL)",
    "printing without end": "import sys\nwhile True: print('x' * 1_000_000); print('x' * 1_000_000, file=sys.stderr)",
    "a file without end": "f = open('f', 'wb')\nwhile True: f.write(bytes(1_000_000)); f.flush()",
    "many files": "n = 0\nwhile True:\n    open(str(n), 'w').close(); n += 1",
    "a process that stays": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        open('left', 'w'); time.sleep(60)\nraise SystemExit(1)"
    ),
    "a debugger of others": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "claiming that it could not start": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'cannot start: no')\n    except OSError: pass"
    ),
    "memory of nobody": (
        "import ctypes\nc = ctypes.CDLL(None)\nc.shmat.restype = ctypes.c_void_p\n"
        "for _ in range(3):\n    name = c.shmget(0, ctypes.c_size_t(100 << 20), 0o1600)\n    assert name >= 0, 'none'\n"
        "    c.shmdt(ctypes.c_void_p(c.shmat(name, None, 0)))"
    ) if os.geteuid() == 0 else "raise SystemExit(1)",
    "becoming root": "import os\nos.setuid(0)\nraise SystemExit(1)" if os.geteuid() == 0 else "raise SystemExit(1)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name: str, outside: Path, server: socket.socket):
    before = {process.pid for process in psutil.process_iter()}
    source = HOSTILE[name]
    for word, value in (("{port}", server.getsockname()[1]), ("{outside}", outside), ("{pid}", os.getpid())):
        source = source.replace(word, str(value))
    start = time.monotonic()
    outcome = run(source, LIMITS)
    assert not outcome.passed and outcome.reason, outcome
    assert time.monotonic() - start < LIMITS.seconds + 8
    assert outside.read_text() == "mine"
    with pytest.raises(BlockingIOError):
        server.accept()
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"]) if process.pid not in before]
    assert not [command for command in left if any("program.py" in word for word in command or [])]


@pytest.mark.parametrize("instead", ["", "os.symlink('/etc/passwd', name)", "os.mkfifo(name)", "os.mkdir(name)"])
def test_a_program_decides_nothing_by_the_files_that_it_leaves(instead: str):
    replace = f"for name in os.listdir('.'):\n    try: os.unlink(name)\n    except OSError: continue\n    {instead}"
    start = time.monotonic()
    assert run(f"import os\n{replace}\nraise SystemExit('its own')", LIMITS) == (False, "its own")
    assert time.monotonic() - start < 8


def test_what_cannot_be_contained_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from evaluation import sandbox

    child = tmp_path / "child.py"
    child.write_text("def main(directory): raise OSError('unshare: Operation not permitted')")
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(ValueError, match=r"cannot contain a program \(OSError: unshare: Operation not permitted\)"):
        run("pass", LIMITS)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="on Linux alone"):
        run("pass", LIMITS)


def test_an_outcome_is_plain():
    assert Outcome(True, "") == (True, "")
