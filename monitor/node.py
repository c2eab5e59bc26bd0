"""The job on one machine: its processes, their signs of life, their ends.

    python -m monitor.node --run_dir RUN      serves one monitor over standard input and output, a JSON line each way

The second form runs on remote hosts behind SSH. The job is started in a session of its own and writes to a file, so it
outlives the connection and the monitor; whoever comes next finds it again by `RUN/monitor/job-N.json` and by a variable
in its environment, ZERO2ALL_LAUNCH, that all its processes inherit. N is the node's number, as nodes may share a disk.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from utils.checkpoint import RUN_MARK, list_checkpoints
from utils.exits import read_exit_records
from utils.files import atomic_write_json
from utils.heartbeat import read_heartbeats, stacks_path

PROTOCOL = 1
MONITOR_DIR = "monitor"
"""Folder in a run directory for what belongs to its monitor."""
_LOG_BYTES_AT_ONCE = 1 << 18
_LOGS_KEPT = 10
_STACKS_SECONDS = 3.0
_KILL_SECONDS = 10.0
_HEARTBEAT_KEYS = {"rank", "world_size", "pid", "phase", "step", "monotonic"}


@dataclass(frozen=True)
class Launch:
    """What to start on a node. Goes to remote hosts through SSH's standard input, not in argv: `env` may hold
    secrets."""

    token: str
    """Names this launch on this node: no other launch or node has it."""
    attempt: int
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeReport:
    """What a node sees of its job."""

    running: bool
    """The launcher, or one of its ranks, is alive."""
    launcher_alive: bool
    returncode: int | None
    """Of the launcher; None while it lives, or if it was started by an earlier monitor."""
    heartbeats: list[dict]
    """Of this launch's ranks here, each with "age" (seconds), "alive" and "stopped" (by a signal)."""
    exits: list[dict]
    """Exit records of this launch's ranks here."""
    log: str
    """What the job has printed since `log_end` of the last report."""
    log_end: int
    checkpoint: int | None
    """Step of the newest checkpoint."""
    checkpoint_bytes: int
    disk_free: int
    memory_available: int
    memory_total: int


class LocalNode:
    """The job on this machine.

    Args:
        run_dir: the run directory, as this machine names it.
        index: the node's number.
        name: in messages.
    """

    def __init__(self, run_dir: Path, index: int = 0, name: str = "this machine"):
        self.run_dir, self.index, self.name = run_dir, index, name
        self.home = run_dir / MONITOR_DIR
        self._job_file = self.home / f"job-{index}.json"
        self._process: subprocess.Popen | None = None
        self._job: dict | None = None
        self._sizes: dict[Path, int] = {}

    def start(self, launch: Launch) -> None:
        """
        Raises:
            ValueError: there is no such command.
            OSError: it cannot be started now (a full disk).
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self._forget_old_launches()
        exits, log = self.home / f"exit-{launch.token}", self.home / f"launch-{launch.attempt}-{self.index}.log"
        exits.mkdir()
        self._process = None
        self._job = {"token": launch.token, "attempt": launch.attempt, "pid": 0, "log": log.name}
        # Before anything runs: a job that no file names could not be found again.
        atomic_write_json(self._job_file, self._job)
        env = os.environ | launch.env | {"ZERO2ALL_LAUNCH": launch.token, "ZERO2ALL_EXIT_DIR": str(exits.resolve())}
        try:
            with open(log, "wb") as output:
                self._process = subprocess.Popen(
                    launch.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                    start_new_session=True,
                )  # fmt: skip
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"{launch.command[0]} cannot be started: {error.strerror}") from None
        self._job["pid"] = self._process.pid
        atomic_write_json(self._job_file, self._job)

    def _forget_old_launches(self) -> None:
        for path in self.home.glob(f"exit-*-{self.index}"):
            shutil.rmtree(path, ignore_errors=True)
        logs = sorted(self.home.glob(f"launch-*-{self.index}.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[: -_LOGS_KEPT + 1]:
            path.unlink(missing_ok=True)

    def adopt(self) -> dict | None:
        """Take over the job that an earlier monitor or connection left; {"token", "attempt"} if it is still running.
        Of one that has ended meanwhile, `poll` has the records and the output."""
        try:
            job = json.loads(self._job_file.read_text())
            self._job = {key: job[key] for key in ("token", "attempt", "pid", "log")}
        except (OSError, ValueError, KeyError, TypeError):
            self._job = self._job_by_environment()
        if self._job is None or not self._processes():
            return None
        return {key: self._job[key] for key in ("token", "attempt")}

    def _job_by_environment(self) -> dict | None:
        """What the job file would say of a job of this run that is alive: its processes know their launch."""
        for process in psutil.process_iter():
            try:
                env = process.environ()
            except (psutil.Error, OSError):
                continue
            token, exits = env.get("ZERO2ALL_LAUNCH", ""), Path(env.get("ZERO2ALL_EXIT_DIR", ""))
            if exits != (self.home / f"exit-{token}").resolve() or not token.endswith(f"-{self.index}"):
                continue
            attempt = int(token.partition("-")[0])
            job = {"token": token, "attempt": attempt, "pid": 0, "log": f"launch-{attempt}-{self.index}.log"}
            members = self._processes_of(token)
            pids = {member.pid for member in members}
            job["pid"] = next((member.pid for member in members if _parent(member) not in pids), 0)
            return job
        return None

    def _processes(self) -> list[psutil.Process]:
        """All processes of the job, whoever their parent is now."""
        return self._processes_of(self._job["token"]) if self._job is not None else []

    def _processes_of(self, token: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get("ZERO2ALL_LAUNCH") == token and process.pid != os.getpid():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def _heartbeats(self) -> list[dict]:
        """Of this launch's ranks on this node."""
        now, found = time.monotonic(), []
        for record in read_heartbeats(self.run_dir / "heartbeat"):
            if record.get("launch") != self._job["token"] or not _HEARTBEAT_KEYS <= set(record):
                continue
            status = _status_of(record["pid"], self._job["token"])
            record |= {"age": now - record["monotonic"], "alive": status is not None,
                       "stopped": status == psutil.STATUS_STOPPED}  # fmt: skip
            found.append(record)
        return sorted(found, key=lambda record: record["rank"])

    def poll(self, log_from: int) -> NodeReport:
        """
        Args:
            log_from: `log_end` of the last report of this launch; 0 at first.
        """
        returncode = self._process.poll() if self._process is not None else None
        launcher_alive = self._job is not None and (
            returncode is None if self._process is not None
            else _status_of(self._job["pid"], self._job["token"]) is not None
        )  # fmt: skip
        heartbeats = self._heartbeats() if self._job is not None else []
        running = launcher_alive or any(record["alive"] for record in heartbeats)
        if self._job is not None and not running:
            # Ranks that have not beaten yet are only found by a look at all processes.
            running = bool(self._processes())
        exits = read_exit_records(self.home / f"exit-{self._job['token']}") if self._job is not None else []
        log, log_end = self._read_log(log_from, whole_lines=running)
        step, size = self._newest_checkpoint()
        memory = psutil.virtual_memory()
        return NodeReport(
            running, launcher_alive, returncode, heartbeats, exits, log, log_end, step, size,
            psutil.disk_usage(str(_existing(self.run_dir))).free, memory.available, memory.total,
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
        # Whole lines while more may come, so that no character is cut and lines of several nodes do not mix.
        end = content.rfind(b"\n") + 1
        if not whole_lines or (not end and len(content) == _LOG_BYTES_AT_ONCE):
            end = len(content)
        return content[:end].decode(errors="replace"), start + end

    def _newest_checkpoint(self) -> tuple[int | None, int]:
        checkpoints = list_checkpoints(self.run_dir / "ckpt")
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
        return self._newest_checkpoint()[0] is not None

    def stacks(self) -> str:
        """The Python stacks of all ranks, which they write themselves on SIGUSR1; ranks that are stopped are let go on
        for that."""
        if self._job is None:
            return ""
        waiting = []
        for record in self._heartbeats():
            if record["alive"]:
                path = stacks_path(self.run_dir / "heartbeat", record["rank"])
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
        """Ask the ranks to save and end. Not through torchrun, which before torch 2.13 kills after 30 seconds."""
        if self._job is None:
            return
        pids = [record["pid"] for record in self._heartbeats() if record["alive"]]
        if not pids:
            # Ranks that have not beaten yet, as the launcher's children; or the launcher is the only rank.
            processes, launcher = self._processes(), self._job["pid"]
            ranks = [process for process in processes if _parent(process) == launcher]
            pids = [process.pid for process in ranks or processes]
        for pid in pids:
            _send(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End all processes of the job at once."""
        deadline = time.monotonic() + _KILL_SECONDS
        while (processes := self._processes()) and time.monotonic() < deadline:
            for process in processes:
                _send(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        if self._process is not None:
            try:
                self._process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                # It waits inside the kernel (a dead disk); whoever starts the next launch will see.
                return

    def close(self) -> None:
        """Nothing to let go of: the job is ended by `kill` alone."""


def _status_of(pid: int, token: str) -> str | None:
    """A process of the launch: its state; None if it is gone."""
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
    """Whether something was written, and nothing more comes."""
    size = path.stat().st_size if path.exists() else 0
    if size <= before:
        return False
    time.sleep(0.1)
    return path.stat().st_size == size


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _answer(node: LocalNode, request: dict) -> object:
    do = request["do"]
    if do == "hello":
        return {"protocol": PROTOCOL, "is_run": (node.run_dir / RUN_MARK).exists()}
    if do == "start":
        return node.start(Launch(**request["launch"]))
    if do == "poll":
        return node.poll(request["log_from"]).__dict__
    return getattr(node, {"adopt": "adopt", "stacks": "stacks", "stop": "stop", "kill": "kill",
                          "holds_checkpoint": "holds_checkpoint"}[do])()  # fmt: skip


def serve(node: LocalNode, requests: Iterator[str]) -> Iterator[str]:
    """Answer each request line, until there are no more, with {"answer"}; {"problem"}: the request is wrong; or
    {"failure"}: this machine could not do it now."""
    for line in requests:
        try:
            yield json.dumps({"answer": _answer(node, json.loads(line))})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield json.dumps({"problem": str(error) or type(error).__name__})
        except OSError as error:
            yield json.dumps({"failure": str(error)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m monitor.node", description="Serve a monitor on another machine: JSON lines in and out."
    )
    parser.add_argument("--run_dir", required=True, help="run directory on this machine")
    parser.add_argument("--index", type=int, default=0, help="number of this node")
    args = parser.parse_args(argv)
    # The job is ended by request alone, not because the connection's terminal is gone.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    node = LocalNode(Path(args.run_dir), args.index)
    # The connection may have dropped in the middle of a launch.
    node.adopt()
    for line in serve(node, iter(sys.stdin.readline, "")):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
