"""Launch, watch, end, launch again: the loop of monitor_process.py over the nodes of a run."""

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from monitor.command import TrainCommand, shutdown_flags
from monitor.hosts import Hosts
from monitor.node import Launch, NodeReport
from monitor.policy import Decision, Ending, Policy, Rules, classify
from monitor.status import Status, planned_steps
from monitor.watch import Limits, Watch
from utils.exits import CRASH, OK, STOPPED, WRONG_INPUT
from utils.ssh import HostKeyRefused, LoginRefused, SSHProblem

logger = logging.getLogger("monitor")
T = TypeVar("T")

_ENDED = {OK: "finished", STOPPED: "stopped", WRONG_INPUT: "refused", CRASH: "failed"}
_LOW_MEMORY = 0.05
_SPARE_DISK_BYTES = 1 << 28
_STATUS_SECONDS = 5.0
"""The status file is written at least this often."""
_TRACEBACK_LINES = 30


class Node(Protocol):
    """LocalNode or RemoteNode."""

    index: int
    name: str

    def start(self, launch: Launch) -> None: ...
    def adopt(self) -> dict | None: ...
    def poll(self, log_from: int) -> NodeReport: ...
    def holds_checkpoint(self) -> bool: ...
    def stacks(self) -> str: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Options:
    rules: Rules = Rules()
    limits: Limits = Limits()
    interval: float = 1.0
    """Seconds between looks."""
    leave_grace: float = 15.0
    """Seconds that ranks may live on after another has died or ended."""
    stop_timeout: float = 1800.0
    """Seconds from the request to stop until the job is killed."""
    unreachable_after: float = 120.0
    """Seconds without an answer after which a host counts as lost."""
    hosts_timeout: float = 3600.0
    """Seconds to wait for hosts before a launch."""
    show_output: bool = True


class Supervisor:
    """Keeps one run going.

    Args:
        run_dir: where the status file is, on this machine.
        hosts: of the remote nodes, in their order; None: one node, this machine.
    """

    def __init__(self, nodes: list[Node], command: TrainCommand, run_dir: Path, options: Options, hosts: Hosts | None):
        self.nodes, self.command, self.run_dir, self.options, self.hosts = nodes, command, run_dir, options, hosts
        self.policy = Policy(options.rules)
        self.status = Status(monitor_pid=os.getpid(), hosts=[node.name for node in nodes])
        self.stop_requested = False
        self._pool = ThreadPoolExecutor(len(nodes), "nodes")
        self._stop_sent: float | None = None
        self._warned: set[str] = set()
        self._plan: tuple[int, int | None] = (0, None)
        self._begin_launch()

    def _begin_launch(self) -> None:
        self._reports: list[NodeReport | None] = [None] * len(self.nodes)
        self._seen = [time.monotonic()] * len(self.nodes)
        self._watch = Watch(self.options.limits, time.monotonic())
        self._leaving_since: float | None = None
        self._greatest_step: int | None = None
        self._world_size: int | None = None
        self._exits: dict[int, dict] = {}
        self._ended_by_us: frozenset[int] = frozenset()

    def request_stop(self) -> None:
        """From a signal handler: end the run, with a checkpoint. A second time: at once."""
        if self.stop_requested:
            self._stop_sent = -math.inf
        self.stop_requested = True

    def run(self) -> int:
        """Until the run is finished, stopped, refused or given up; returns the exit code."""
        self.status.attempt = self._launches_before()
        flags: list[str] = []
        first = True
        while True:
            try:
                launched = (first and self._adopt()) or self._launch(flags)
                ending = self._watch_launch() if launched else Ending(STOPPED, "stopped on request before a launch")
            except (HostKeyRefused, LoginRefused, ValueError) as error:
                ending = Ending(WRONG_INPUT, str(error))
            except OSError as error:
                # A host out of reach, or a full disk.
                ending = Ending(CRASH, str(error))
            first = False
            self._each(lambda node: node.kill(), quietly=True)
            decision = self.policy.decide(ending, self._greatest_step, self.stop_requested)
            self._tell(ending, decision)
            if decision.exit_code is not None:
                return decision.exit_code
            flags = decision.flags
            self._wait(decision.delay)
            if self.stop_requested:
                self._end(STOPPED, "stopped on request between two launches")
                return STOPPED

    def _launches_before(self) -> int:
        try:
            return Status.read(self.run_dir).attempt
        except ValueError:
            return 0

    def _each(self, work: Callable[[Node], T], quietly: bool = False) -> list[T | None]:
        """Do something on all nodes at once.

        Args:
            quietly: a node that cannot be reached answers None; else the problem is raised, after all have been asked.
        """
        futures = [self._pool.submit(work, node) for node in self.nodes]
        answers: list[T | None] = []
        problems: list[Exception] = []
        for future in futures:
            try:
                answers.append(future.result())
            except (OSError, ValueError) as error:
                answers.append(None)
                problems.append(error)
        if problems and not quietly:
            raise problems[0]
        return answers

    def _adopt(self) -> bool:
        """Take over a job that is still running on all nodes from an earlier monitor, also if only to stop it."""
        self._wait_for_hosts()
        found = self._each(lambda node: node.adopt(), quietly=self.stop_requested)
        if all(found) and len({job["attempt"] for job in found}) == 1:
            self.status.attempt = found[0]["attempt"]
            logger.info("took over launch %d, which an earlier monitor left running", found[0]["attempt"])
            return True
        return False

    def _wait_for_hosts(self) -> None:
        """Until every node answers.

        Raises:
            SSHProblem: one does not, for too long, or refuses us.
        """
        deadline, told = time.monotonic() + self.options.hosts_timeout, False
        while not self.stop_requested:
            try:
                self._each(lambda node: node.holds_checkpoint())
                return
            except (HostKeyRefused, LoginRefused):
                raise
            except SSHProblem as error:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    logger.warning("waiting for a host: %s", error)
                    told = True
                self._set_state("waiting", str(error))
                self._wait(5.0)

    def _launch(self, flags: list[str]) -> bool:
        """False, and nothing started, if the monitor is asked to stop."""
        self._set_state("starting")
        self._wait_for_hosts()
        if self.stop_requested:
            return False
        # Whatever an earlier launch or monitor left there.
        self._each(lambda node: node.adopt() and node.kill())
        resume = any(self._each(lambda node: node.holds_checkpoint()))
        self._begin_launch()
        self.status.attempt += 1
        token = f"{self.status.attempt}-{secrets.token_hex(4)}"
        added = ["--resume"] if resume and "--resume" not in self.command.flags else []
        # --resume_from=best is meant for the first launch: each later one goes on from where the last one was.
        rewinds = self.command.flag("resume_from") not in (None, "last")
        added += (["--resume_from=last"] if resume and rewinds and self.policy.restarts else []) + flags
        if self.stop_requested:
            return False
        logger.info("launch %d%s", self.status.attempt, f" with {' '.join(added)}" if added else "")
        self._each(lambda node: node.start(
            Launch(f"{token}-{node.index}", self.status.attempt, *self._command_of(node.index, token, added))
        ))  # fmt: skip
        return True

    def _command_of(self, index: int, token: str, flags: list[str]) -> tuple[list[str], dict[str, str]]:
        """(command, environment) for a node."""
        command, seconds = self.command, int(self.options.limits.save)
        if self.hosts is None:
            return command.words(None, ["--max_restarts=0", *shutdown_flags(command.launcher[0], seconds)], flags), {}
        host, first = self.hosts.hosts[index], self.hosts.hosts[0]
        rendezvous = [
            "--max_restarts=0", f"--nnodes={len(self.nodes)}", "--rdzv_backend=c10d", f"--rdzv_id={token}",
            f"--rdzv_endpoint={first.reached_at}:{self.hosts.rendezvous_port}", f"--local_addr={host.reached_at}",
            f"--rdzv_conf=is_host={int(index == 0)},join_timeout={int(self.options.limits.start)}",
        ]  # fmt: skip
        return command.words(host.python, rendezvous, flags), host.env

    def _watch_launch(self) -> Ending:
        """Look at the nodes until none of them runs anything of this launch."""
        cause = None
        while True:
            if self.stop_requested:
                self._stop_nodes()
            self._look()
            running = [report is None or report.running for report in self._reports]
            if not any(running):
                self._drain_logs()
                returncodes = [report.returncode for report in self._reports]
                exits = list(self._exits.values())
                return classify(exits, self._world_size, returncodes, cause, self._ended_by_us)
            if cause is None:
                cause = self._lost_host() or self._watch.overdue(self._heartbeats(), time.monotonic())
                if cause is not None:
                    self._on_hang(cause)
                elif self._is_half_dead(running):
                    logger.warning("some ranks have ended and others stay: ending them")
                    self._ended_by_us |= {beat["rank"] for beat in self._heartbeats() if beat["alive"]}
                    self._each(lambda node: node.kill(), quietly=True)
            else:
                # A lost host cannot be killed; it is, before the next launch.
                self._each(lambda node: node.kill(), quietly=True)
                if self._lost_host():
                    return Ending(CRASH, cause)
            self._wait(self.options.interval)

    def _look(self) -> None:
        """One report from each node that answers; learn from it and pass on what the job printed."""

        def poll(index: int) -> NodeReport | None:
            last = self._reports[index]
            try:
                return self.nodes[index].poll(last.log_end if last else 0)
            except (HostKeyRefused, LoginRefused):
                raise
            except OSError:
                return None

        for index, report in enumerate(self._pool.map(poll, range(len(self.nodes)))):
            if report is not None:
                self._reports[index], self._seen[index] = report, time.monotonic()
                self._pass_on(index, report)
                self._warn_of_shortage(index, report)
                self._exits |= {record["rank"]: record for record in report.exits}
        beats = self._heartbeats()
        self._watch.take(beats)
        for beat in beats:
            self._world_size = beat["world_size"]
            if beat["phase"] != "start":
                self._greatest_step = max(beat["step"], self._greatest_step or 0)
        for record in self._exits.values():
            self._world_size = record.get("world_size", self._world_size)
        self._update_status(beats)

    def _heartbeats(self) -> list[dict]:
        """Of all ranks; of a host that does not answer, grown older."""
        now, beats = time.monotonic(), []
        for report, seen in zip(self._reports, self._seen):
            for beat in report.heartbeats if report else ():
                beats.append(beat | {"age": beat["age"] + now - seen})
        return beats

    def _pass_on(self, index: int, report: NodeReport) -> None:
        if not self.options.show_output or not report.log or "output" in self._warned:
            return
        text = report.log
        if len(self.nodes) > 1:
            text = "".join(f"[{self.nodes[index].name}] {line}\n" for line in text.splitlines())
        try:
            print(text, end="", flush=True)
        except OSError:
            # A closed pipe or a full disk behind it is no reason to end a run; all is in RUN/monitor/ anyway.
            self._warned.add("output")

    def _drain_logs(self) -> None:
        """The rest of what the job printed before it ended."""
        for index, node in enumerate(self.nodes):
            report = self._reports[index]
            while report is not None:
                try:
                    more = node.poll(report.log_end)
                except OSError:
                    break
                self._exits |= {record["rank"]: record for record in more.exits}
                if more.log_end == report.log_end:
                    break
                report = self._reports[index] = more
                self._pass_on(index, more)

    def _warn_of_shortage(self, index: int, report: NodeReport) -> None:
        """Before it kills: once each time that it gets scarce."""
        name, needed = self.nodes[index].name, 2 * report.checkpoint_bytes + _SPARE_DISK_BYTES
        shortages = {
            f"disk {index}": (report.disk_free < needed,
                              f"{name}: {report.disk_free / 1e9:.1f} GB of disk are left for {self.run_dir}; a "
                              f"checkpoint takes {report.checkpoint_bytes / 1e9:.1f} GB"),
            f"memory {index}": (report.memory_available < _LOW_MEMORY * report.memory_total,
                                f"{name}: {report.memory_available / 1e9:.1f} GB of memory are left of "
                                f"{report.memory_total / 1e9:.1f} GB"),
        }  # fmt: skip
        for key, (short, text) in shortages.items():
            if short and key not in self._warned:
                logger.warning("low: %s", text)
            (self._warned.add if short else self._warned.discard)(key)

    def _lost_host(self) -> str | None:
        now, limit = time.monotonic(), self.options.unreachable_after
        lost = [node.name for node, seen in zip(self.nodes, self._seen) if now - seen > limit]
        return f"{', '.join(lost)} did not answer for {limit:.0f} s" if lost else None

    def _is_half_dead(self, running: list[bool]) -> bool:
        """Whether some ranks have ended, and others, or the launcher, have not followed for a while."""
        all_alive = all(running) and all(beat["alive"] for beat in self._heartbeats())
        if all_alive and not self._exits:
            self._leaving_since = None
            return False
        self._leaving_since = self._leaving_since or time.monotonic()
        return time.monotonic() - self._leaving_since > self.options.leave_grace

    def _on_hang(self, cause: str) -> None:
        logger.error("hang: %s", cause)
        for text in filter(None, self._each(lambda node: node.stacks(), quietly=True)):
            logger.error("stacks:\n%s", text.rstrip())
        self._each(lambda node: node.kill(), quietly=True)

    def _stop_nodes(self) -> None:
        if self._stop_sent is None:
            logger.info("asked to stop: the ranks save and end")
            self._set_state("stopping")
            self._each(lambda node: node.stop(), quietly=True)
            self._stop_sent = time.monotonic()
            return
        waited = time.monotonic() - self._stop_sent
        # Where no rank has begun, there is nothing to save.
        if waited > (self.options.stop_timeout if self._heartbeats() else self.options.leave_grace):
            logger.error("the job does not end by itself: killing it")
            self._each(lambda node: node.kill(), quietly=True)
            self._stop_sent = math.inf

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.stop_requested and self._stop_sent is None:
                return
            if time.time() - self.status.updated > _STATUS_SECONDS:
                self._write_status()
            time.sleep(min(left, 0.2))

    def _update_status(self, beats: list[dict]) -> None:
        status = self.status
        if beats:
            behind = min(beats, key=lambda beat: beat["step"])
            status.phase, status.step, status.ranks = behind["phase"], behind["step"], len(beats)
            if status.state == "starting":
                status.state = "running"
        status.seconds_per_step = self._watch.median_step or status.seconds_per_step
        steps = [report.checkpoint for report in self._reports if report and report.checkpoint is not None]
        status.checkpoint = max(steps, default=None)
        if beats and min(beat["step"] for beat in beats) > 0 or status.max_iters is None:
            # The training writes it when it starts: before its first step, the file may be that of the last launch.
            status.max_iters = self._planned_steps()
        self._write_status()

    def _planned_steps(self) -> int | None:
        """Read again only when the file has changed."""
        try:
            changed = (self.run_dir / "config.yaml").stat().st_mtime_ns
        except OSError:
            return None
        if self._plan[0] != changed:
            self._plan = (changed, planned_steps(self.run_dir))
        return self._plan[1]

    def _set_state(self, state: str, why: str | None = None) -> None:
        self.status.state = state
        if why is not None:
            self.status.last_ending = why
        self._write_status()

    def _write_status(self) -> None:
        self.status.restarts = self.policy.restarts
        try:
            self.status.write(self.run_dir)
        except OSError as error:
            if "status" not in self._warned:
                self._warned.add("status")
                logger.warning("the status file cannot be written: %s", error)

    def _tell(self, ending: Ending, decision: Decision) -> None:
        for line in _shortened(ending.traceback):
            logger.error("  %s", line)
        if decision.exit_code is not None:
            self._end(decision.exit_code, decision.reason)
            return
        logger.warning(
            "launch %d ended: %s; starting again in %.0f s (restart %d)", self.status.attempt, ending.reason,
            decision.delay, self.policy.restarts,
        )  # fmt: skip
        self._set_state("waiting", ending.reason)

    def _end(self, code: int, reason: str) -> None:
        log = logger.info if code in (OK, STOPPED) else logger.error
        self._set_state(_ENDED[code], reason)
        log("%s: %s", _ENDED[code], reason) if reason != _ENDED[code] else log(reason)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self._pool.shutdown(wait=False)


def _shortened(traceback: str) -> Iterator[str]:
    lines = traceback.splitlines()
    if len(lines) > _TRACEBACK_LINES:
        yield f"... {len(lines) - _TRACEBACK_LINES} lines before"
    yield from lines[-_TRACEBACK_LINES:]
