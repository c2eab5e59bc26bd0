"""The process that contains a program: sandbox.py starts it, by `main`. Needs nothing but Python.

    this process      new namespaces: users (unless root), mounts, network, IPC, host name, processes
      program         first process of its namespace: when it ends, the kernel ends all others there

What is not ours to decide stays with the kernel: there is no list of forbidden functions.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_NEW_OTHERS = 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""Processes, network, IPC, host name."""
_RECURSIVE, _PRIVATE, _BIND = 0x4000, 1 << 18, 0x1000
_NO_SUID, _NO_DEVICES = 2, 4
_MOUNT_SETATTR, _AT_CWD, _AT_RECURSIVE = 442, -100, 0x8000
"""The system call has the same number on all processors."""
_READ_ONLY, _SET_NO_SUID = 1, 2
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
_NOBODY = 65534
_FIRST_USER = 0x70000000
"""Users from here on own nothing. Each program has its own, as the kernel counts processes by user."""
_SAID = 2000
"""Last characters of what a program says that are read."""
_RUN = (
    "import os, runpy, sys; to, token = int(sys.argv[1]), sys.argv.pop().encode()\n"
    "sys.argv[:] = ['program.py']\n"
    "runpy.run_path('program.py', run_name='__main__')\n"
    "os.write(to, token)"
)
_libc = ctypes.CDLL(None, use_errno=True)


def _require(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _enter_namespaces() -> bool:
    """Leave the machine's namespaces; returns whether root did it."""
    is_root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    flags = _NEW_MOUNTS | _NEW_OTHERS | (0 if is_root else _NEW_USER)
    _require(_libc.unshare(flags), "unshare")
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return is_root


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    _require(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def _close_file_system(directory: str, disk: int) -> None:
    """Make everything read-only but a directory, which becomes an empty file system of `disk` bytes."""
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _SET_NO_SUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _require(_libc.syscall(_MOUNT_SETATTR, _AT_CWD, b"/", _AT_RECURSIVE, attributes, size), "mount_setattr")
    _mount("tmpfs", directory, "tmpfs", _NO_SUID | _NO_DEVICES, f"size={disk},nr_inodes=4096,mode=777")


def _python(directory: str) -> tuple[str, str]:
    """Path of the interpreter for a program, and of its libraries. They appear in the directory, as their own may be
    closed to other users: root's home is."""
    executable, prefix = os.path.realpath(sys._base_executable), os.path.realpath(sys.base_prefix)
    if os.path.commonpath([executable, prefix]) != prefix:
        return executable, ""
    seen = os.path.join(directory, "python")
    os.mkdir(seen)
    # As read-only as what it shows.
    _mount(prefix, seen, None, _BIND)
    return os.path.join(seen, os.path.relpath(executable, prefix)), os.path.join(seen, "lib")


def _bound_memory() -> None:
    """Bound the memory that counts for no process, as far as the kernel lets this one."""
    with suppress(OSError):
        # If the machine runs out of memory, programs go first.
        Path("/proc/self/oom_score_adj").write_text("1000")
    for name in ("shmall", "msgmni"):
        # System V's shared memory and messages, of this namespace.
        with suppress(OSError):
            Path("/proc/sys/kernel", name).write_text("0")


def _become_program(asked: dict, directory: str, is_root: bool, user: int, to: int, said: int) -> NoReturn:
    """Drop what this process may do, and become the program. It is the first of its namespace of processes.

    Args:
        to: where the program tells that it has come to its end.
        said: file that takes what it says of its failure.
    """
    # Some containers forbid it. Then it sees numbers of processes that it can reach in no way.
    with suppress(OSError):
        _mount("proc", "/proc", "proc", _NO_SUID | _NO_DEVICES)
    _bound_memory()
    python, libraries = _python(directory)
    os.chdir(directory)
    if is_root:
        os.setgroups([])
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            # The machine may itself be in a namespace that knows few users.
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    Path("program.py").write_bytes(asked["source"].encode("utf-8", "surrogatepass"))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(said, 2)
    os.set_inheritable(to, True)
    for limit, most in (
        (resource.RLIMIT_AS, asked["memory"]), (resource.RLIMIT_FSIZE, asked["disk"]), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(asked["seconds"]) + 1), (resource.RLIMIT_NOFILE, asked["files"]),
        (resource.RLIMIT_NPROC, asked["processes"]),
    ):  # fmt: skip
        resource.setrlimit(limit, (most, most))
    _require(_libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    # (A change of the user would undo this.)
    _require(_libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    os.execve(
        python, [python, "-I", "-B", "-c", _RUN, str(to), asked["token"]],
        {"PATH": os.defpath, "HOME": directory, "LD_LIBRARY_PATH": libraries, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _wait(pid: int, seconds: float) -> int | None:
    """Status of a process when it has ended; None: it took too long, and was ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _reason(status: int | None, said: str) -> str:
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "time limit"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    lines = [line for line in said.splitlines() if line.strip()]
    if os.WEXITSTATUS(status) == 1 and lines:
        return lines[-1]
    return f"exit code {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else "it left before its end"


def main(directory: str) -> None:
    """Run a program. What it is, and its limits, stand in a JSON object on standard input; how it ended, in one on
    standard output.

    Args:
        directory: an empty one, which becomes the only place that can be written.
    Raises:
        OSError: the program cannot be contained here.
    """
    asked = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    user = _FIRST_USER + os.getpid()
    is_root = _enter_namespaces()
    _close_file_system(directory, asked["disk"])
    # Without a name: the program could put something else in the place of a file, such as a link to /dev/zero.
    said = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    (from_program, to), (from_start, of_start) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(from_program)
            _become_program(asked, directory, is_root, user, to, said)
        except BaseException as error:
            # The program itself does not have this pipe, and can claim nothing.
            os.write(of_start, f"cannot start: {error}".encode())
            os._exit(1)
    os.close(to)
    os.close(of_start)
    status = _wait(pid, asked["seconds"])
    # All who could write are dead.
    if problem := os.read(from_start, _SAID):
        raise OSError(problem.decode(errors="replace"))
    passed = os.read(from_program, _SAID) == asked["token"].encode() and status == 0
    last = os.pread(said, _SAID, max(0, os.fstat(said).st_size - _SAID)).decode(errors="replace")
    json.dump({"passed": passed, "reason": "" if passed else _reason(status, last)}, sys.stdout)
