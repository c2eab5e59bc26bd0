"""Which monitor has a run: one at a time, wherever it runs. The claim lies beside the job, in RUN/monitor/.

    claim.json     the monitor: a random id, host, pid, since. The file changed at the monitor's last contact.
    .claim-lock    a shared lock of every process that serves this monitor here (LocalNode's own process, or
                   `python -m monitor.node` behind SSH)

A claim holds while a server has the lock, and until LEASE_SECONDS after the last contact. So an outage of the
connection neither hands the job to a second monitor nor locks the first one out.
"""

import errno
import fcntl
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from utils.files import atomic_write_json, try_lock
from utils.small_files import is_number, parse_json, read_small

LEASE_SECONDS = 300.0
"""Time for which a silent monitor keeps a run."""
_CONTACT_SECONDS = 2.0
"""Least time between two writes of the last contact."""
_SHARE_SECONDS = 2.0
_LONGEST, _LATEST = 1 << 16, 1e11
"""Largest size of a claim in bytes; latest time that a clock can show, in seconds since 1970."""


class TakenOver(Exception):
    """Another monitor has the run; this one must not touch it."""


@dataclass(frozen=True)
class Monitor:
    """A monitor, with all that is needed to find out on its machine whether it is still alive."""

    id: str
    host: str
    pid: int
    since: float
    """When it claimed the run, in seconds since 1970."""
    machine: str = ""
    boot: str = ""
    pid_space: str = ""
    started: float = 0.0
    """When the process was started, by its machine's clock."""

    @staticmethod
    def of_this_process() -> "Monitor":
        return Monitor(
            secrets.token_hex(8), socket.gethostname(), os.getpid(), time.time(), _text("/etc/machine-id"),
            _text("/proc/sys/kernel/random/boot_id"), _pid_space(), psutil.Process().create_time(),
        )  # fmt: skip

    @staticmethod
    def read(value: object) -> "Monitor | None":
        """The monitor that a JSON value describes; None if it describes none."""
        kinds = {"id": str, "host": str, "pid": int, "since": (int, float), "machine": str, "boot": str,
                 "pid_space": str, "started": (int, float)}  # fmt: skip
        if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in kinds.items()):
            return None
        if not is_number(value["since"], 0.0, _LATEST):
            return None
        return Monitor(**{name: value[name] for name in kinds})

    def is_known_dead(self, here: "Monitor") -> bool:
        """Whether `here` can tell that this monitor is dead: both are on one machine, and its process or boot is
        over."""
        if not here.boot or not self.boot or self.host != here.host:
            return False
        if self.boot != here.boot:
            # A machine has one boot at a time. Without an id it could be another machine.
            return bool(here.machine) and self.machine == here.machine
        if not here.pid_space or self.pid_space != here.pid_space:
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Holder:
    """The monitor that has a run, as its files show it."""

    monitor: Monitor | None
    """None: the claim cannot be read."""
    is_served: bool
    """Whether a process there holds the lock for it."""
    silent: float
    """Seconds since its last contact."""

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(value: dict) -> "Holder":
        return Holder(Monitor.read(value["monitor"]), bool(value["is_served"]), float(value["silent"]))

    def __str__(self) -> str:
        if self.monitor is None:
            return f"a monitor that was there {self.silent:.0f} s ago"
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.monitor.since))
        return (
            f"the monitor on {self.monitor.host} (pid {self.monitor.pid}), since {since}, last there "
            f"{self.silent:.0f} s ago"
        )


class Claim:
    """The claim of this process on a run directory, for the monitor that it is or serves.

    Args:
        home: RUN/monitor.
    """

    def __init__(self, home: Path):
        self._path, self._lock_path = home / "claim.json", home / ".claim-lock"
        self._lock: BinaryIO | None = None
        self._mine: Monitor | None = None
        self._touched = -_CONTACT_SECONDS

    def take(self, who: Monitor, instead_of: str = "") -> Holder | None:
        """Claim the run. Returns None if it is ours now, otherwise its holder.

        Args:
            instead_of: id of a monitor that is known to be dead, whose lease no longer counts.
        Raises:
            OSError: the claim cannot be written now.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for reading, too: NFS shares only the lock of such a file.
        lock = open(self._lock_path, "a+b")
        try:
            is_free = try_lock(lock, fcntl.LOCK_EX)
            holder = self._read()
            owner = holder.monitor if holder is not None else None
            if owner is not None and owner.id == who.id:
                # Another server of ours may hold the lock as well: one whose connection broke, or another node's.
                _share(lock)
            elif not is_free:
                return Holder(owner, True, holder.silent if holder is not None else 0.0)
            elif owner is not None and holder.silent < LEASE_SECONDS and owner.id != instead_of:
                return holder
            else:
                # A damaged file names no monitor whose lease could count, and no process serves it.
                atomic_write_json(self._path, asdict(who))
                # A monitor that gets in between reads the file, and finds a lease that has just begun.
                _share(lock)
            self._let_go()
            self._lock, self._mine, lock = lock, who, None
            self.touch()
            return None
        finally:
            if lock is not None:
                lock.close()

    def _read(self) -> Holder | None:
        """The holder that the file names; None if there is no file."""
        try:
            silent = max(time.time() - self._path.stat().st_mtime, 0.0)
            monitor = Monitor.read(parse_json(read_small(self._path, _LONGEST)))
        except FileNotFoundError:
            return None
        except ValueError:
            monitor = None
        return Holder(monitor, False, silent)

    def check(self) -> None:
        """Check that the run is still ours.

        Raises:
            TakenOver: another monitor has claimed it.
        """
        if self._mine is None:
            return
        try:
            holder = self._read()
        except OSError:
            # No other monitor can write there either.
            return
        if holder is not None and holder.monitor is not None and holder.monitor.id != self._mine.id:
            raise TakenOver(str(holder))

    def touch(self) -> None:
        """Record a contact of the monitor, without using room on the disk."""
        if self._mine is None or time.monotonic() - self._touched < _CONTACT_SECONDS:
            return
        self._touched = time.monotonic()
        try:
            os.utime(self._path)
        except FileNotFoundError:
            # Somebody deleted the file.
            self._write_again()
        except OSError:
            return

    def _write_again(self) -> None:
        try:
            atomic_write_json(self._path, asdict(self._mine))
        except OSError:
            return

    def release(self) -> None:
        """Give the run up, if it is still ours."""
        if self._mine is None:
            return
        try:
            self.check()
            self._path.unlink(missing_ok=True)
        except (TakenOver, OSError):
            pass
        self._mine = None
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock = None


def _share(lock: BinaryIO) -> None:
    """Take the lock together with other processes of the same monitor. An exclusive lock lasts only a moment."""
    deadline = time.monotonic() + _SHARE_SECONDS
    while not try_lock(lock, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise OSError(errno.EAGAIN, "its claim is locked")
        time.sleep(0.02)


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _pid_space() -> str:
    """The namespace within which process numbers are unique: a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
