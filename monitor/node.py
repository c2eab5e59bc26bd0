"""The job on one machine: its processes, their heartbeats and their ends.

    python -m monitor.node --run_dir RUN      serves one monitor over standard input and output, one JSON line each way

The command runs on remote hosts behind SSH. A job is started in a session of its own and writes to a file, so it
outlives the connection and the monitor. The next monitor finds it by `RUN/monitor/job-N.json` and by an environment
variable, ZERO2ALL_LAUNCH, that all its processes inherit. N is the node's number, as nodes may share a disk.
`RUN/monitor/claim.json` says which monitor has the job (monitor/claim.py).
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from checkpoint.folder import list_checkpoints
from monitor.claim import LEASE_SECONDS, Claim, Holder, Monitor, TakenOver
from monitor.passing import FULL
from runs.exits import read_exit_records
from runs.heartbeat import read_heartbeats
from runs.layout import RunPaths, stacks_file
from utils.files import atomic_write_json, is_passing, try_lock
from utils.paths import a_path, expand
from utils.small_files import is_whole, parse_json, read_small

PROTOCOL = 2
_LOG_BYTES_AT_ONCE = 1 << 18
_LOGS_KEPT = 10
_LONGEST_JSON, _LARGEST_PID = 1 << 20, 1 << 22
"""Limit in bytes for a file of a monitor; the greatest number that Linux gives to a process."""
_STACKS_SECONDS = 3.0
_KILL_SECONDS = 10.0
_ALONE_SECONDS = 20.0
_PROBE_BYTES = 1 << 16
_LEAST_DISK_BYTES = 1 << 24
"""Room for logs and records besides a checkpoint."""
_HEARTBEAT_KEYS = {"rank", "world_size", "pid", "phase", "step", "monotonic"}


@dataclass(frozen=True)
class Launch:
    """A job to start on a node. It reaches remote hosts through SSH's standard input, not in argv, as `env` may hold
    secrets."""

    token: str
    """Name of this launch on this node; no other launch or node has it."""
    attempt: int
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeReport:
    """A node's view of its job."""

    running: bool
    """Whether the launcher or one of its ranks is alive."""
    launcher_alive: bool
    returncode: int | None
    """Exit code of the launcher; None while it lives, or if an earlier monitor started it."""
    heartbeats: list[dict]
    """Heartbeats of this launch's ranks here, each with "age" (seconds), "alive" and "stopped" (by a signal)."""
    exits: list[dict]
    """Exit records of this launch's ranks here."""
    log: str
    """Output of the job since `log_end` of the last report."""
    log_end: int
    checkpoint: int | None
    """Step of the newest checkpoint."""
    checkpoint_bytes: int
    disk_free: int | None
    """Bytes; None: the disk does not say."""
    memory_available: int
    memory_total: int


@dataclass(frozen=True)
class Obstacle:
    """A reason why nothing can be launched on a node now."""

    kind: str
    """"processes" of an earlier launch, the "disk", or the "lock" of the run directory."""
    reason: str
    """A sentence."""


class LocalNode:
    """The job on this machine. After a claim for a monitor, all methods but `claim` and `release` raise TakenOver if
    another monitor has claimed the run since.

    Args:
        run_dir: the run directory as this machine names it.
        index: the node's number.
        name: the node's name in messages.
    """

    def __init__(self, run_dir: Path, index: int = 0, name: str = "this machine"):
        self.run_dir, self.index, self.name = run_dir, index, name
        self.home = RunPaths(run_dir).monitor_dir
        self._job_file = self.home / f"job-{index}.json"
        self._process: subprocess.Popen | None = None
        self._job: dict | None = None
        self._sizes: dict[Path, int] = {}
        self._claim = Claim(self.home)

    def claim(self, who: Monitor, instead_of: str = "") -> Holder | None:
        """See Claim.take.

        Raises:
            ValueError: the run directory cannot be written, and that will not pass.
            OSError: the run directory cannot be written now.
        """
        try:
            return self._claim.take(who, instead_of)
        except OSError as error:
            if is_passing(error):
                raise
            raise ValueError(f"{self.run_dir} cannot be written: {error.strerror}") from None

    def release(self) -> None:
        self._claim.release()

    def touch(self) -> None:
        """Record that the monitor is there."""
        self._claim.check()
        self._claim.touch()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclude other processes while the job is changed. A request whose connection has dropped may still be at work
        in a process of its own, and the next request must not overtake it."""
        self._claim.check()
        try:
            file = open(self.home / f".work-{self.index}", "ab")
        except OSError:
            # Nothing was ever started here, or the disk is full. A job must be ended all the same.
            yield
            return
        with file:
            deadline = time.monotonic() + _ALONE_SECONDS
            while not try_lock(file):
                if time.monotonic() > deadline:
                    raise OSError(f"an earlier request to {self.name} is still at work")
                time.sleep(0.05)
            yield

    def start(self, launch: Launch) -> None:
        """Start a job.

        Raises:
            ValueError: there is no such command.
            OSError: the job cannot be started now, for instance because the disk is full.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._start(launch)

    def _start(self, launch: Launch) -> None:
        self._forget_old_launches()
        exits, log = self.home / f"exit-{launch.token}", self.home / f"launch-{launch.attempt}-{self.index}.log"
        exits.mkdir()
        self._process = None
        self._job = {"token": launch.token, "attempt": launch.attempt, "pid": 0, "log": log.name}
        # This comes before anything runs: a job without a file could not be found again.
        atomic_write_json(self._job_file, self._job)
        env = os.environ | launch.env | {"ZERO2ALL_LAUNCH": launch.token, "ZERO2ALL_EXIT_DIR": str(exits.resolve())}
        # No shell expands the interpreter of a hosts file.
        words = [expand(launch.command[0]), *launch.command[1:]]
        with open(log, "wb") as output:
            try:
                self._process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                    start_new_session=True,
                )  # fmt: skip
            except (FileNotFoundError, PermissionError) as error:
                raise ValueError(f"{words[0]} cannot be started: {error.strerror}") from None
        self._job["pid"] = self._process.pid
        atomic_write_json(self._job_file, self._job)

    def _forget_old_launches(self) -> None:
        for path in self.home.glob(f"exit-*-{self.index}"):
            shutil.rmtree(path, ignore_errors=True)
        logs = sorted(self.home.glob(f"launch-*-{self.index}.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[: -_LOGS_KEPT + 1]:
            path.unlink(missing_ok=True)

    def adopt(self) -> dict | None:
        """Take over the job that an earlier monitor or connection left. Returns {"token", "attempt"} if it is still
        running. If it has ended, `poll` gives its records and output."""
        with self._alone():
            self._job = self._read_job() or self._job_by_environment()
            if self._job is None or not self._processes():
                return None
            return {key: self._job[key] for key in ("token", "attempt")}

    def _read_job(self) -> dict | None:
        """The job in the job file; None if the file names none."""
        try:
            job = parse_json(read_small(self._job_file, _LONGEST_JSON))
        except (OSError, ValueError):
            return None
        if not isinstance(job, dict) or not isinstance(job.get("token"), str) or not isinstance(job.get("log"), str):
            return None
        # The log must be one of ours, since it is shown.
        is_ours = Path(job["log"]).name == job["log"] and is_whole(job.get("attempt")) and is_whole(
            job.get("pid"), 0, _LARGEST_PID
        )
        return {key: job[key] for key in ("token", "attempt", "pid", "log")} if is_ours else None

    def _job_by_environment(self) -> dict | None:
        """The living job of this run, found by its processes' environment, as the job file would describe it."""
        for _, token in self._leftovers():
            number = token.partition("-")[0]
            if not number.isdecimal():
                continue
            attempt = int(number)
            job = {"token": token, "attempt": attempt, "pid": 0, "log": f"launch-{attempt}-{self.index}.log"}
            members = self._processes_of(token)
            pids = {member.pid for member in members}
            job["pid"] = next((member.pid for member in members if _parent(member) not in pids), 0)
            return job
        return None

    def _leftovers(self) -> Iterator[tuple[psutil.Process, str]]:
        """All processes on this node that a launch of this run has left, with the token of that launch."""
        for process in psutil.process_iter():
            env = _environment(process)
            token, exits = env.get("ZERO2ALL_LAUNCH", ""), Path(env.get("ZERO2ALL_EXIT_DIR", ""))
            if not token.endswith(f"-{self.index}") or process.pid == os.getpid():
                continue
            if exits == (self.home / f"exit-{token}").resolve():
                yield process, token

    def _processes(self) -> list[psutil.Process]:
        """All processes of the job, whatever their parent is now."""
        return self._processes_of(self._job["token"]) if self._job is not None else []

    def _processes_of(self, token: str) -> list[psutil.Process]:
        return [
            process for process in psutil.process_iter()
            if process.pid != os.getpid() and _environment(process).get("ZERO2ALL_LAUNCH") == token
        ]  # fmt: skip

    def clear(self) -> None:
        """End all processes that earlier launches left here. `obstacle` says whether some remain."""
        with self._alone():
            _end(lambda: [process for process, _ in self._leftovers()])
            self._reap()

    def obstacle(self, after_full_disk: bool) -> Obstacle | None:
        """The reason why nothing can be launched now, if there is one.

        Args:
            after_full_disk: require room for a checkpoint, too.
        """
        self._claim.check()
        if left := [process.pid for process, _ in self._leftovers()]:
            return Obstacle(
                "processes", f"{len(left)} process{'es' if len(left) > 1 else ''} of an earlier launch on {self.name} "
                f"cannot be ended (pid {', '.join(map(str, left[:8]))}): waiting inside the kernel, for a disk say",
            )  # fmt: skip
        problem, (_, size), free = self._write_problem(), self._newest_checkpoint(), self._disk_free()
        needed = size + _LEAST_DISK_BYTES
        is_full = problem is not None and problem.errno in FULL
        if is_full or (after_full_disk and free is not None and free < needed):
            why = f" ({problem.strerror})" if problem is not None else ""
            return Obstacle(
                "disk", f"{self.name} has {_megabytes(free)} of disk left for {self.run_dir}{why}, and "
                f"{_megabytes(needed)} are needed, for a checkpoint and the logs: make room",
            )  # fmt: skip
        if problem is not None:
            return Obstacle("disk", f"{self.run_dir} on {self.name} cannot be written: {problem.strerror}")
        if self._is_run_locked():
            return Obstacle("lock", f"another process works in {self.run_dir} on {self.name}, and holds its .lock")
        return None

    def _write_problem(self) -> OSError | None:
        path = self.home / f".probe-{self.index}"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return None

    def _disk_free(self) -> int | None:
        """Free bytes for the run; None if that cannot be known."""
        try:
            return psutil.disk_usage(str(_existing(self.run_dir))).free
        except OSError:
            return None

    def _is_run_locked(self) -> bool:
        """Whether a training, or a command that changes checkpoints, works in the run directory (checkpoint.folder)."""
        try:
            with open(RunPaths(self.run_dir).lock, "rb") as file:
                return not try_lock(file, fcntl.LOCK_SH)
        except OSError:
            # There is no lock file, or the file system has no locks. The training will find out.
            return False

    def recall(self, name: str) -> dict | None:
        """A value that `remember` wrote. None: there is none; empty: it cannot be read."""
        try:
            value = parse_json(read_small(self.home / f"{name}.json", _LONGEST_JSON))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def remember(self, name: str, value: dict) -> None:
        """Keep a value for later monitors."""
        self._claim.check()
        self.home.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.home / f"{name}.json", value)

    def _heartbeats(self) -> list[dict]:
        """Heartbeats of this launch's ranks on this node."""
        now, found = time.monotonic(), []
        for record in read_heartbeats(RunPaths(self.run_dir).heartbeat_dir):
            if record.get("launch") != self._job["token"] or not _HEARTBEAT_KEYS <= set(record):
                continue
            status = _status_of(record["pid"], self._job["token"])
            record |= {"age": now - record["monotonic"], "alive": status is not None,
                       "stopped": status == psutil.STATUS_STOPPED}  # fmt: skip
            found.append(record)
        return sorted(found, key=lambda record: record["rank"])

    def poll(self, log_from: int) -> NodeReport:
        """A report on the job.

        Args:
            log_from: `log_end` of the last report of this launch; 0 at first.
        """
        self.touch()
        returncode = self._process.poll() if self._process is not None else None
        launcher_alive = self._job is not None and (
            returncode is None if self._process is not None
            else _status_of(self._job["pid"], self._job["token"]) is not None
        )  # fmt: skip
        heartbeats = self._heartbeats() if self._job is not None else []
        running = launcher_alive or any(record["alive"] for record in heartbeats)
        if self._job is not None and not running:
            # Ranks without a heartbeat yet are found only among all processes.
            running = bool(self._processes())
        exits = read_exit_records(self.home / f"exit-{self._job['token']}") if self._job is not None else []
        log, log_end = self._read_log(log_from, whole_lines=running)
        step, size = self._newest_checkpoint()
        memory = psutil.virtual_memory()
        return NodeReport(
            running, launcher_alive, returncode, heartbeats, exits, log, log_end, step, size, self._disk_free(),
            memory.available, memory.total,
        )  # fmt: skip

    def _read_log(self, start: int, whole_lines: bool) -> tuple[str, int]:
        if self._job is None:
            return "", start
        try:
            with open(self.home / self._job["log"], "rb") as file:
                file.seek(start)
                content = file.read(_LOG_BYTES_AT_ONCE)
        except OSError:
            return "", start
        # While more may come, only whole lines: no character is cut, and lines of several nodes do not mix.
        end = content.rfind(b"\n") + 1
        if not whole_lines or (not end and len(content) == _LOG_BYTES_AT_ONCE):
            end = len(content)
        return content[:end].decode(errors="replace"), start + end

    def _newest_checkpoint(self) -> tuple[int | None, int]:
        """(step, bytes); (None, 0) if there is none, or that cannot be known."""
        try:
            checkpoints = list_checkpoints(RunPaths(self.run_dir).ckpt_dir)
        except OSError:
            return None, 0
        if not checkpoints:
            return None, 0
        path = checkpoints[-1].path
        if path not in self._sizes:
            try:
                self._sizes = {path: sum(file.stat().st_size for file in path.iterdir())}
            except OSError:
                return checkpoints[-1].step, 0
        return checkpoints[-1].step, self._sizes[path]

    def holds_checkpoint(self) -> bool:
        """Whether the run has a checkpoint here.

        Raises:
            OSError: this cannot be known now.
        """
        return bool(list_checkpoints(RunPaths(self.run_dir).ckpt_dir))

    def stacks(self) -> str:
        """The Python stacks of all ranks, which these write themselves on SIGUSR1. Stopped ranks are continued for
        that."""
        if self._job is None:
            return ""
        waiting = []
        for record in self._heartbeats():
            if record["alive"]:
                path = RunPaths(self.run_dir).heartbeat_dir / stacks_file(record["rank"])
                before = path.stat().st_size if path.exists() else 0
                _send(record["pid"], signal.SIGUSR1)
                if record["stopped"]:
                    _send(record["pid"], signal.SIGCONT)
                waiting.append((record, path, before))
        deadline, texts = time.monotonic() + _STACKS_SECONDS, []
        for record, path, before in waiting:
            while not _has_settled(path, before) and time.monotonic() < deadline:
                time.sleep(0.05)
            text = path.read_bytes()[before:].decode(errors="replace") if path.exists() else ""
            stopped = ", stopped by a signal" if record["stopped"] else ""
            texts.append(
                f"rank {record['rank']} (pid {record['pid']}{stopped}), {record['phase']} {record['step']}, no sign of "
                f"life for {record['age']:.0f} s:\n{text or '  it did not answer'}"
            )
        return "\n".join(texts)

    def stop(self) -> None:
        """Ask the ranks to save and end. torchrun is not asked, since before torch 2.13 it kills after 30 seconds."""
        self._claim.check()
        if self._job is None:
            return
        pids = [record["pid"] for record in self._heartbeats() if record["alive"]]
        if not pids:
            # Ranks without a heartbeat yet are children of the launcher, or the launcher is the only rank.
            processes, launcher = self._processes(), self._job["pid"]
            ranks = [process for process in processes if _parent(process) == launcher]
            pids = [process.pid for process in ranks or processes]
        for pid in pids:
            _send(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End all processes of the job at once, and wait until they are gone, but not for ever: see `obstacle`."""
        with self._alone():
            _end(self._processes)
            self._reap()

    def _reap(self) -> None:
        if self._process is not None:
            # The process may wait inside the kernel for a dead disk.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_SECONDS)

    def close(self) -> None:
        """Give up the claim. Only `kill` ends the job."""
        self.release()


def _end(find: Callable[[], list[psutil.Process]]) -> None:
    """Send SIGKILL until `find` finds no more processes, but not for ever."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (processes := find()) and time.monotonic() < deadline:
        for process in processes:
            _send(process.pid, signal.SIGKILL)
        time.sleep(0.05)


def _environment(process: psutil.Process) -> dict[str, str]:
    """Environment of a living process. A process whose first thread has ended looks like a zombie, but its other
    threads may still compute, write and hold locks. Empty if the process is gone, or its environment may not be
    read."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.environ()
    except (psutil.Error, OSError):
        return {}
    threads = Path(f"/proc/{process.pid}/task")
    try:
        for thread in threads.iterdir():
            if (thread / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                pairs = (thread / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
                return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    except OSError:
        # The process has ended meanwhile.
        return {}
    return {}


def _megabytes(size: int | None) -> str:
    return "an unknown amount" if size is None else f"{size / 1e6:,.0f} MB"


def _status_of(pid: int, token: str) -> str | None:
    """State of a process of the launch; None if it is gone."""
    try:
        process = psutil.Process(pid)
        status = process.status()
        if status == psutil.STATUS_ZOMBIE or process.environ().get("ZERO2ALL_LAUNCH") != token:
            return None
        return status
    except (psutil.Error, OSError):
        return None


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _send(pid: int, signum: int) -> None:
    if pid <= 0:
        return
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def _has_settled(path: Path, before: int) -> bool:
    """Whether the file has grown and grows no more."""
    size = path.stat().st_size if path.exists() else 0
    if size <= before:
        return False
    time.sleep(0.1)
    return path.stat().st_size == size


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


_PLAIN = ("adopt", "stacks", "stop", "kill", "clear", "holds_checkpoint", "release", "touch")
"""Requests without arguments."""


def _answer(node: LocalNode, request: dict) -> object:
    do = request["do"]
    if do == "hello":
        return {"protocol": PROTOCOL, "is_run": RunPaths(node.run_dir).mark.exists()}
    if do == "claim":
        who = Monitor.read(request["who"])
        if who is None:
            raise ValueError("a claim must say whose it is")
        holder = node.claim(who, request["instead_of"])
        return None if holder is None else holder.to_json()
    node.touch()
    if do == "start":
        return node.start(Launch(**request["launch"]))
    if do == "poll":
        return node.poll(request["log_from"]).__dict__
    if do == "obstacle":
        obstacle = node.obstacle(request["after_full_disk"])
        return None if obstacle is None else obstacle.__dict__
    if do == "recall":
        return node.recall(request["name"])
    if do == "remember":
        return node.remember(request["name"], request["value"])
    return getattr(node, {name: name for name in _PLAIN}[do])()


def serve(node: LocalNode, requests: Iterator[str]) -> Iterator[str]:
    """Answer each request line with {"answer"}, {"problem"} (the request is wrong), {"failure"} (this machine could not
    do it now) or {"taken"} (another monitor has the run)."""
    for line in requests:
        try:
            yield json.dumps({"answer": _answer(node, json.loads(line))})
        except TakenOver as error:
            yield json.dumps({"taken": str(error)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield json.dumps({"problem": str(error) or type(error).__name__})
        except OSError as error:
            yield json.dumps({"failure": error.strerror or str(error), "errno": error.errno})


def _lines(fd: int, patience: float) -> Iterator[str]:
    """Incoming lines, until the input ends or none comes for `patience` seconds: a broken connection may leave its end
    here open for hours, and with it the claim."""
    buffer = b""
    while select.select([fd], [], [], patience)[0] and (piece := os.read(fd, 1 << 16)):
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m monitor.node", description="Serve a monitor on another machine: JSON lines in and out."
    )
    parser.add_argument("--run_dir", type=a_path, required=True, help="run directory on this machine")
    parser.add_argument("--index", type=int, default=0, help="number of this node")
    args = parser.parse_args(argv)
    # Only a request ends the job, not the loss of the connection's terminal.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    node = LocalNode(Path(args.run_dir), args.index)
    # The connection may have dropped in the middle of a launch.
    with contextlib.suppress(OSError):
        node.adopt()
    with contextlib.suppress(BrokenPipeError):
        for line in serve(node, _lines(sys.stdin.fileno(), LEASE_SECONDS)):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
