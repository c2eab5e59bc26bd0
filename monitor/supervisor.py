"""Launches, watches, ends and launches again: the loop of monitor_process.py over the nodes of a run.

Only time that the monitor has lived through counts: from one look to the next, no more than a look takes. So nothing
that stops this process or the whole machine (a laptop that is shut) brings a deadline nearer.

A silent host is not a reason to end a job: the ranks on the other hosts show what its ranks do, as they stand still
without them. Before each launch the monitor looks at all nodes, and goes on watching a job that is alive on all of
them.
"""

import contextlib
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from monitor.claim import LEASE_SECONDS, Holder, Monitor, TakenOver
from monitor.command import TrainCommand, shutdown_flags
from monitor.hosts import HostsFile
from monitor.node import Launch, NodeReport, Obstacle
from monitor.passing import is_full, is_of_a_disk
from monitor.policy import Decision, LaunchEnd, Policy, Rules, classify
from monitor.rewind import Rewind
from monitor.status import Status, planned_steps
from monitor.watch import Limits, Silence, Watch
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT
from runs.layout import RunPaths
from utils.files import is_passing
from utils.ssh import HostKeyRefused, LoginRefused, SSHProblem

logger = logging.getLogger("monitor")
T = TypeVar("T")

_ENDED = {OK: "finished", STOPPED: "stopped", WRONG_INPUT: "refused", CRASH: "failed"}
_LOW_MEMORY = 0.05
_SPARE_DISK_BYTES = 1 << 28
_STATUS_SECONDS = 5.0
"""Longest time between two writes of the status file."""
_TOUCH_SECONDS = 30.0
"""Longest time without a contact to the nodes."""
_LOOK_AGAIN_SECONDS = 5.0
"""Time between two looks at the obstacles of a launch."""
_LONGEST_LOOK = 2.0
"""Seconds that a look may take besides twice the interval; a longer look counts as so much."""
_MOST_SILENT = 70.0
"""Seconds of silence after which a monitor that has a run is not at work: longer than the longest interval."""
_KILL_PATIENCE = 60.0
_LOG_OF_A_LAUNCH = re.compile(r"launch-(\d{1,9})-\d+\.log")
_TRACEBACK_LINES = 30


class Node(Protocol):
    """A LocalNode or a RemoteNode."""

    index: int
    name: str

    def claim(self, who: Monitor, instead_of: str = "") -> Holder | None: ...
    def release(self) -> None: ...
    def touch(self) -> None: ...
    def start(self, launch: Launch) -> None: ...
    def adopt(self) -> dict | None: ...
    def clear(self) -> None: ...
    def obstacle(self, after_full_disk: bool) -> Obstacle | None: ...
    def poll(self, log_from: int) -> NodeReport: ...
    def holds_checkpoint(self) -> bool: ...
    def recall(self, name: str) -> dict | None: ...
    def remember(self, name: str, value: dict) -> None: ...
    def stacks(self) -> str: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class SupervisorOptions:
    """How a run is looked after."""

    rules: Rules = Rules()
    limits: Limits = Limits()
    interval: float = 1.0
    """Seconds between two looks."""
    leave_grace: float = 15.0
    """Seconds for which ranks may live on after another has died or ended, unless they are about to end, too."""
    stop_timeout: float = 1800.0
    """Seconds from the request to stop until the job is killed."""
    unreachable_after: float = 120.0
    """Seconds without an answer after which a host counts as lost."""
    lock_timeout: float = 30.0
    """Seconds for which the first launch waits for another process in the run directory."""
    show_output: bool = True


class Supervisor:
    """Keeps one run going.

    Args:
        run_dir: the run directory on this machine, which has the status file.
        hosts: the hosts file of the remote nodes, in their order; None: one node, this machine.
        clock: seconds, as time.monotonic.
    """

    def __init__(
        self, nodes: list[Node], command: TrainCommand, run_dir: Path, options: SupervisorOptions,
        hosts: HostsFile | None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.nodes, self.command, self.run_dir, self.options, self.hosts = nodes, command, run_dir, options, hosts
        self.policy = Policy(options.rules)
        self._rewind = Rewind(nodes[0], command, run_dir)
        self.who = Monitor.of_this_process()
        self.status = Status(monitor_pid=os.getpid(), hosts=[node.name for node in nodes])
        self.stop_requested = False
        self._clock = clock
        self._pool = ThreadPoolExecutor(len(nodes), "nodes")
        self._stop_sent: float | None = None
        self._killed_at: float | None = None
        self._unasked = {node.index for node in nodes}
        self._warned: set[str] = set()
        self._plan: tuple[int, int | None] = (0, None)
        # Until the run is ours, the status file may belong to another monitor.
        self._is_claimed = False
        self._claimed: list[Node] = []
        # True once ranks have come to life: the command is right, and a problem may pass.
        self._is_proved = False
        self._waited = self._time = 0.0
        self._looked_at = self._touched_at = clock()
        self._after_full_disk = self._is_started = False
        self._last_ending = ""
        self._begin_launch(is_adopted=False)

    def _begin_launch(self, is_adopted: bool) -> None:
        self._looked_at = self._clock()
        self._reports: list[NodeReport | None] = [None] * len(self.nodes)
        self._beats: list[list[dict]] = [[] for _ in self.nodes]
        # The time of each node's last answer, by the clock and in watched time.
        self._answered = [(self._looked_at, self._time)] * len(self.nodes)
        self._silent: set[int] = set()
        self._silence = [Silence(is_adopted) for _ in self.nodes]
        self._watch = Watch(self.options.limits, self._time)
        self._leaving_since: float | None = None
        self._greatest_step: int | None = None
        self._world_size: int | None = None
        self._exits: dict[int, dict] = {}
        self._leaving: dict[int, int] = {}
        self._ended_by_us: frozenset[int] = frozenset()

    def request_stop(self) -> None:
        """End the run with a checkpoint; on a second request, at once. Called by a signal handler."""
        if self.stop_requested:
            self._stop_sent = -math.inf
        self.stop_requested = True

    def run(self) -> int:
        """Keep the run going until it is finished, stopped, refused or given up. Returns the exit code."""
        try:
            for node in self.nodes:
                if not self._claim(node):
                    return STOPPED
                # While we wait for the other nodes, this one must hear from us.
                self._claimed.append(node)
            self._is_claimed = True
            return self._run()
        except ValueError as error:
            # Only a claim raises this. The status file stays as it is: it may belong to the other monitor.
            logger.error("refused: %s", error)
            return WRONG_INPUT
        except TakenOver as error:
            self._is_claimed = False
            logger.error("another monitor has taken over: this one steps back and leaves the job as it is; %s", error)
            return WRONG_INPUT
        finally:
            self._release()

    def _release(self) -> None:
        for node in self.nodes:
            # If a node cannot be told, the lease runs out.
            with contextlib.suppress(OSError, ValueError, TakenOver):
                node.release()

    def _claim(self, node: Node) -> bool:
        """Claim the run on a node. False if the monitor is asked to stop while it waits. Nodes are claimed one after
        the other: of two monitors that begin at once, one gets the first node.

        Raises:
            ValueError: another monitor has the run, or the directory cannot be written.
        """
        started, told, instead_of = self._clock(), False, ""
        while True:
            try:
                holder = node.claim(self.who, instead_of)
                if holder is None:
                    return True
                is_dead = holder.monitor is not None and holder.monitor.is_known_dead(self.who)
                if is_dead and not holder.is_served and instead_of != holder.monitor.id:
                    instead_of = holder.monitor.id
                    continue
                # A process that serves a dead monitor will notice; a lease runs out.
                may_end = is_dead or not holder.is_served or holder.silent > _MOST_SILENT
                problem = f"{node.name}: {holder}, looks after {self.run_dir}"
                if not may_end or self._clock() - started > LEASE_SECONDS + _KILL_PATIENCE:
                    raise ValueError(f"{problem}: end that monitor first, or leave the run to it")
                problem += f"; if it does not come back, its time is up in {LEASE_SECONDS - holder.silent:.0f} s"
            except (HostKeyRefused, LoginRefused) as error:
                raise ValueError(str(error)) from None
            except OSError as error:
                problem = f"{node.name} cannot be claimed: {error.strerror or error}"
            if self.stop_requested:
                logger.info("stopped on request before a launch")
                return False
            if not told:
                logger.warning("waiting: %s", problem)
                told = True
            self._wait(min(_LOOK_AGAIN_SECONDS, 1.0))

    def _run(self) -> int:
        self.status.attempt = self._launches_before()
        flags: list[str] = []
        not_counted, rules = 0, self.options.rules
        while True:
            ending = self._one_launch(flags)
            self._after_full_disk = ending.code == CRASH and is_full(ending.reason)
            if why := self._disk_problem(ending):
                # The run is not to blame, so this does not count as a try: it goes on once the disk works.
                not_counted += 1
                self._tell_traceback(ending)
                logger.warning("launch %d ended: %s", self.status.attempt, ending.reason)
                self._last_ending = ending.reason
                self._set_state("waiting", why)
                self._wait(min(rules.backoff * 2.0 ** min(not_counted, 60), rules.max_backoff))
            else:
                not_counted = 0
                now = self._clock() - self._waited
                decision = self.policy.decide(ending, self._greatest_step, self.stop_requested, now)
                self._tell(ending, decision)
                if decision.exit_code is not None:
                    return decision.exit_code
                flags = decision.flags
                self._wait(decision.delay)
            if self.stop_requested:
                return self._end(STOPPED, f"stopped on request between two launches{self._left_behind()}")

    def _one_launch(self, flags: list[str]) -> LaunchEnd:
        """One launch or adopted job, from its beginning to the end of all its processes."""
        self._is_started = False
        try:
            if self._adopt() or self._launch(flags):
                ending = self._watch_launch()
            else:
                ending = LaunchEnd(STOPPED, f"stopped on request before a launch{self._left_behind()}")
        except (HostKeyRefused, LoginRefused, ValueError) as error:
            ending = LaunchEnd(CRASH if self._is_proved else WRONG_INPUT, str(error))
        except OSError as error:
            ending = LaunchEnd(CRASH, str(error))
        if self._is_started:
            self._each(lambda node: node.kill(), quietly=True)
        return ending

    def _left_behind(self) -> str:
        """A text for the last message if hosts are out of reach."""
        names = ", ".join(self.nodes[index].name for index in sorted(self._silent))
        return f"; {names} did not answer, and what may still run there goes on" if names else ""

    def _disk_problem(self, ending: LaunchEnd) -> str:
        """The problem of a node's disk, if it has ended the launch and still lasts."""
        if ending.code != CRASH or self.stop_requested or not is_of_a_disk(ending.reason):
            return ""
        obstacles = self._each(lambda node: node.obstacle(self._after_full_disk), quietly=True)
        return next((found.reason for found in obstacles if found is not None and found.kind == "disk"), "")

    def _launches_before(self) -> int:
        """Number of earlier launches, by the status file and by the logs. The logs count if the status file cannot be
        read or has another version: none of them must be overwritten."""
        numbers = [0]
        with contextlib.suppress(OSError, ValueError):
            numbers.append(Status.read(self.run_dir).attempt)
        with contextlib.suppress(OSError):
            names = os.listdir(RunPaths(self.run_dir).monitor_dir)
            numbers += [int(match[1]) for name in names if (match := _LOG_OF_A_LAUNCH.fullmatch(name))]
        return max(numbers)

    def _each(self, work: Callable[[Node], T], quietly: bool = False) -> list[T | None]:
        """Do something on all nodes at once.

        Args:
            quietly: a node with a problem answers None; otherwise its problem is raised after all have been asked.
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

    def _until(self, look: Callable[[], str]) -> bool:
        """Wait while `look` gives a reason, or a node or its disk is out of reach. This time does not count as time
        without progress. False if the monitor is asked to stop meanwhile."""
        told = ""
        while True:
            try:
                reason = look()
            except (HostKeyRefused, LoginRefused):
                raise
            except OSError as error:
                if not isinstance(error, SSHProblem) and not is_passing(error):
                    raise
                reason = str(error)
            if not reason or self.stop_requested:
                return not reason
            # The numbers in it change.
            if re.sub(r"\d", "", reason) != told:
                told = re.sub(r"\d", "", reason)
                logger.warning("waiting: %s", reason)
            self._set_state("waiting", reason)
            before = self._clock()
            self._wait(_LOOK_AGAIN_SECONDS)
            self._waited += self._clock() - before

    def _adopt(self) -> bool:
        """Take over a job that is alive on all nodes, even if only to stop it. An earlier monitor left it, or it went
        on while its hosts were out of reach."""
        found: list[dict | None] = []

        def look() -> str:
            found[:] = self._each(lambda node: node.adopt())
            return ""

        if not self._until(look):
            # The job must end where it runs, whether the other nodes answer or not.
            found = [job for job in self._each(lambda node: node.adopt(), quietly=True) if job]
        if not found or not all(found) or len({job["attempt"] for job in found}) != 1:
            return False
        attempt, watch = found[0]["attempt"], self._watch
        self._begin_launch(is_adopted=True)
        if attempt == self.status.attempt and self._is_proved:
            self._watch = watch
            logger.info("launch %d goes on: watching it again", attempt)
        else:
            logger.info("took over launch %d, which an earlier monitor left running", attempt)
        self._rewind.take_over(found[0]["token"].rpartition("-")[0])
        self.status.attempt, self._is_started = attempt, True
        self._last_ending = ""
        self._set_state("starting", "")
        return True

    def _launch(self, flags: list[str]) -> bool:
        """Start a launch. False, and nothing is started, if the monitor is asked to stop."""
        if self.stop_requested or not self._until(self._look_for_obstacles(self._clock())):
            return False
        self._set_state("starting", self._last_ending)
        self._begin_launch(is_adopted=False)
        resume = any(self._each(lambda node: node.holds_checkpoint()))
        launch = f"{self.status.attempt + 1}-{secrets.token_hex(4)}"
        added = ["--resume"] if resume and "--resume" not in self.command.flags else []
        added += self._rewind.flags_for(launch, resume) + flags
        if self.stop_requested:
            return False
        self.status.attempt += 1
        logger.info("launch %d%s", self.status.attempt, f" with {' '.join(added)}" if added else "")
        self._is_started = True
        self._each(lambda node: node.start(
            Launch(f"{launch}-{node.index}", self.status.attempt, *self._command_of(node.index, launch, added))
        ))  # fmt: skip
        return True

    def _look_for_obstacles(self, since: float) -> Callable[[], str]:
        """A function that ends the processes of earlier launches, and says why the next one cannot begin yet."""

        def look() -> str:
            self._each(lambda node: node.clear())
            found = [each for each in self._each(lambda node: node.obstacle(self._after_full_disk)) if each]
            if all(each.kind == "lock" for each in found) and not self._is_proved:
                # The other process is not ours. If it stays, the training says what to do about it.
                found = found if self._clock() - since < self.options.lock_timeout else []
            return found[0].reason if found else ""

        return look

    def _command_of(self, index: int, token: str, flags: list[str]) -> tuple[list[str], dict[str, str]]:
        """Command and environment for a node."""
        command, seconds = self.command, int(self.options.limits.save)
        if self.hosts is None:
            return command.words(None, ["--max_restarts=0", *shutdown_flags(command.launcher[0], seconds)], flags), {}
        host, first = self.hosts.hosts[index], self.hosts.hosts[0]
        rendezvous = [
            "--max_restarts=0", f"--nnodes={len(self.nodes)}", f"--node_rank={index}", f"--rdzv_id={token}",
            f"--rdzv_endpoint={first.reached_at}:{self.hosts.rendezvous_port}", f"--local_addr={host.reached_at}",
            f"--rdzv_conf=timeout={int(self.options.limits.start)}",
        ]  # fmt: skip
        return command.words(host.python, rendezvous, flags), host.env

    def _watch_launch(self) -> LaunchEnd:
        """Look at the nodes until none of them runs anything of this launch."""
        cause = None
        while True:
            if self.stop_requested:
                self._stop_nodes()
            self._look()
            running = [report is None or report.running for report in self._reports]
            seen = [index for index in range(len(self.nodes)) if index not in self._silent]
            lost = self._lost_hosts()
            if not any(running):
                return self._ending(cause)
            if seen and not any(running[index] for index in seen) and (cause or lost):
                # Before the next launch, the lost nodes are looked at, and what they still run is ended if needed.
                return self._ending(cause or lost)
            if self.stop_requested and (reason := self._cannot_stop(any(running[index] for index in seen))):
                return LaunchEnd(CRASH, reason)
            if cause is None:
                cause = self._overdue()
                if cause is not None:
                    self._on_hang(cause)
                elif self._is_half_dead(running):
                    key = f"half dead {self.status.attempt}"
                    self._warn_once(key, "some ranks have ended and others stay: ending them")
                    self._ended_by_us |= {beat["rank"] for beat in self._heartbeats() if beat["alive"]}
                    self._each(lambda node: node.kill(), quietly=True)
            elif self._is_well():
                # The job could not be ended, as its host fell silent, and has gone on meanwhile.
                logger.info("launch %d goes on: watching it again", self.status.attempt)
                cause = None
            else:
                self._each(lambda node: node.kill(), quietly=True)
            self._wait(self.options.interval)

    def _ending(self, cause: str | None) -> LaunchEnd:
        self._drain_logs()
        returncodes = [report.returncode if report else None for report in self._reports]
        exits = list(self._exits.values())
        ending = classify(exits, self._world_size, returncodes, cause, self._ended_by_us, self._leaving)
        if ending.code == WRONG_INPUT and not exits and self._is_proved:
            # Only the launcher refused, and its command has run before: perhaps the network is not up yet.
            return LaunchEnd(CRASH, ending.reason)
        return ending

    def _look(self) -> None:
        """Get a report from each node that answers, learn from it, and pass on the job's output."""

        def poll(index: int) -> NodeReport | None:
            last = self._reports[index]
            try:
                return self.nodes[index].poll(last.log_end if last else 0)
            except SSHProblem:
                # The user is told if it lasts.
                return None
            except (OSError, ValueError) as error:
                self._warn_once(f"poll {index}: {error}", "%s cannot be looked at: %s", self.nodes[index].name, error)
                return None

        reports = list(self._pool.map(poll, range(len(self.nodes))))
        now, longest = self._clock(), 2 * self.options.interval + _LONGEST_LOOK
        self._time += min(now - self._looked_at, longest)
        self._looked_at = now
        for index, report in enumerate(reports):
            if report is None:
                self._silent.add(index)
                continue
            self._silent.discard(index)
            watched = min(now - self._answered[index][0], longest)
            self._beats[index] = self._silence[index].judge(report.heartbeats, watched)
            self._reports[index], self._answered[index] = report, (now, self._time)
            self._pass_on(index, report)
            self._warn_of_shortage(index, report)
            self._exits |= {record["rank"]: record for record in report.exits}
        beats = self._heartbeats()
        self._watch.take(beats)
        for beat in beats:
            self._world_size = beat["world_size"]
            if beat["phase"] != "start":
                self._greatest_step = max(beat["step"], self._greatest_step or 0)
            if "code" in beat:
                self._leaving[beat["rank"]] = beat["code"]
        for record in self._exits.values():
            self._world_size = record.get("world_size", self._world_size)
        self._is_proved |= bool(beats)
        self._rewind.see(beats)
        self._update_status(beats)

    def _warn_once(self, key: str, text: str, *values: object) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(text, *values)

    def _heartbeats(self) -> list[dict]:
        """Heartbeats of all ranks; for a silent node, its last known ones."""
        return [beat for beats in self._beats for beat in beats]

    def _pass_on(self, index: int, report: NodeReport) -> None:
        if not self.options.show_output or not report.log or "output" in self._warned:
            return
        text = report.log
        if len(self.nodes) > 1:
            text = "".join(f"[{self.nodes[index].name}] {line}\n" for line in text.splitlines())
        try:
            print(text, end="", flush=True)
        except OSError:
            # A closed pipe or a full disk behind it is not a reason to end a run; RUN/monitor/ has the output anyway.
            self._warned.add("output")

    def _drain_logs(self) -> None:
        """Fetch the rest of the job's output before its end."""
        for index, node in enumerate(self.nodes):
            report = self._reports[index]
            while report is not None:
                try:
                    more = node.poll(report.log_end)
                except (OSError, ValueError):
                    break
                self._exits |= {record["rank"]: record for record in more.exits}
                if more.log_end == report.log_end:
                    break
                report = self._reports[index] = more
                self._pass_on(index, more)

    def _warn_of_shortage(self, index: int, report: NodeReport) -> None:
        """Before it kills: once each time that it gets scarce."""
        name, needed = self.nodes[index].name, 2 * report.checkpoint_bytes + _SPARE_DISK_BYTES
        free = math.inf if report.disk_free is None else report.disk_free
        shortages = {
            f"disk {index}": (free < needed,
                              f"{name}: {free / 1e9:.1f} GB of disk are left for {self.run_dir}; a "
                              f"checkpoint takes {report.checkpoint_bytes / 1e9:.1f} GB"),
            f"memory {index}": (report.memory_available < _LOW_MEMORY * report.memory_total,
                                f"{name}: {report.memory_available / 1e9:.1f} GB of memory are left of "
                                f"{report.memory_total / 1e9:.1f} GB"),
        }  # fmt: skip
        for key, (short, text) in shortages.items():
            if short and key not in self._warned:
                logger.warning("low: %s", text)
            (self._warned.add if short else self._warned.discard)(key)

    def _lost_hosts(self) -> str | None:
        """A sentence about hosts that have been silent for long. The user is told once each time."""
        limit = self.options.unreachable_after
        lost = {i for i in self._silent if self._time - self._answered[i][1] > limit}
        for index in range(len(self.nodes)):
            key, name = f"lost {index}", self.nodes[index].name
            if index in lost:
                self._warn_once(
                    key, "%s has not answered for %.0f s: the job is left alone, and watched where it can be seen",
                    name, limit,
                )  # fmt: skip
            elif index not in self._silent and key in self._warned:
                self._warned.discard(key)
                logger.info("%s is seen again", name)
        names = ", ".join(self.nodes[index].name for index in sorted(lost))
        return f"{names} did not answer for {limit:.0f} s" if lost else None

    def _overdue(self) -> str | None:
        """The problem, judged by the ranks that can be seen."""
        beats = [beat for index, beats in enumerate(self._beats) if index not in self._silent for beat in beats]
        if self._silent and not beats:
            return None
        return self._watch.overdue(beats, self._time)

    def _is_well(self) -> bool:
        """Whether all nodes answer, and all ranks are alive and in time."""
        beats = self._heartbeats()
        alive = len(beats) == self._world_size and all(beat["alive"] for beat in beats) and not self._exits
        return alive and not self._silent and self._overdue() is None

    def _is_half_dead(self, running: list[bool]) -> bool:
        """Whether some ranks have ended, and others, or the launcher, have not followed for a while. Ranks that are
        about to end may take as long as their phase."""
        beats = self._heartbeats()
        all_alive = all(running) and all(beat["alive"] for beat in beats)
        if (all_alive and not self._exits) or any(map(self._is_about_to_end, beats)):
            self._leaving_since = None
            return False
        if self._leaving_since is None:
            self._leaving_since = self._time
        return self._time - self._leaving_since > self.options.leave_grace

    def _is_about_to_end(self, beat: dict) -> bool:
        """Whether a rank is about to end: its loggers finish, or a save that was in flight when the rank failed."""
        return beat["alive"] and (beat["phase"] == "end" or (beat["phase"] == "save" and beat["rank"] in self._exits))

    def _on_hang(self, cause: str) -> None:
        logger.error("hang: %s", cause)
        for text in filter(None, self._each(lambda node: node.stacks(), quietly=True)):
            logger.error("stacks:\n%s", text.rstrip())
        self._each(lambda node: node.kill(), quietly=True)

    def _stop_nodes(self) -> None:
        if self._stop_sent is None:
            logger.info("asked to stop: the ranks save and end")
            self._set_state("stopping")
            self._stop_sent = self._time
        self._each(self._ask_to_stop, quietly=True)
        # If no rank has begun, there is nothing to save.
        patience = self.options.stop_timeout if self._heartbeats() else self.options.leave_grace
        if self._time - self._stop_sent > patience:
            if self._killed_at is None:
                logger.error("the job does not end by itself: killing it")
                self._killed_at = self._time
            self._each(lambda node: node.kill(), quietly=True)

    def _ask_to_stop(self, node: Node) -> None:
        """Ask a node to stop, once; again if it could not be reached."""
        if node.index in self._unasked:
            node.stop()
            self._unasked.discard(node.index)

    def _cannot_stop(self, is_seen_running: bool) -> str:
        """Why the job cannot be ended; empty while that has not been tried for long enough."""
        is_killed = self._killed_at is not None
        if is_seen_running:
            is_stuck = is_killed and self._time - self._killed_at > _KILL_PATIENCE
            return "the job cannot be ended, not even by force: it waits inside the kernel" if is_stuck else ""
        is_late = self._time - self._stop_sent > self.options.unreachable_after
        return self._left_behind().removeprefix("; ") if self._silent and (is_killed or is_late) else ""

    def _wait(self, seconds: float) -> None:
        deadline = self._clock() + seconds
        while (left := deadline - self._clock()) > 0:
            if self.stop_requested and self._stop_sent is None:
                return
            if self._is_claimed and time.time() - self.status.updated > _STATUS_SECONDS:
                self._write_status()
            if self._claimed and self._clock() - self._touched_at > _TOUCH_SECONDS:
                # Without this, the claim would run out while nothing is launched.
                self._touched_at = self._clock()
                self._each(lambda node: node.touch() if node in self._claimed else None, quietly=True)
            time.sleep(min(left, 0.2))

    def _update_status(self, beats: list[dict]) -> None:
        status = self.status
        if beats:
            behind = min(beats, key=lambda beat: beat["step"])
            status.phase, status.step, status.ranks = behind["phase"], behind["step"], len(beats)
        lost = self._lost_hosts()
        if lost and len(self._silent) == len(self.nodes) and status.state in ("starting", "running", "waiting"):
            status.state, status.last_ending = "waiting", lost
        elif beats and status.state in ("starting", "waiting"):
            status.state, status.last_ending = "running", self._last_ending
        status.seconds_per_step = self._watch.median_step or status.seconds_per_step
        steps = [report.checkpoint for report in self._reports if report and report.checkpoint is not None]
        status.checkpoint = max(steps, default=None)
        if beats and min(beat["step"] for beat in beats) > 0 or status.max_iters is None:
            # The training writes this file when it starts: before its first step, it may be that of the last launch.
            status.max_iters = self._planned_steps()
        self._write_status()

    def _planned_steps(self) -> int | None:
        """Number of steps of the whole run. The file is read again only when it has changed."""
        try:
            changed = RunPaths(self.run_dir).config.stat().st_mtime_ns
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
        if not self._is_claimed:
            return
        self.status.restarts = self.policy.restarts
        try:
            self.status.write(self.run_dir)
            self._warned.discard("status")
        except OSError as error:
            self._warn_once("status", "the status file cannot be written: %s", error)

    def _tell(self, ending: LaunchEnd, decision: Decision) -> None:
        self._tell_traceback(ending)
        if decision.exit_code is not None:
            self._end(decision.exit_code, decision.reason)
            return
        logger.warning(
            "launch %d ended: %s; starting again in %.0f s (restart %d)", self.status.attempt, ending.reason,
            decision.delay, self.policy.restarts,
        )  # fmt: skip
        self._last_ending = ending.reason
        self._set_state("waiting", ending.reason)

    def _tell_traceback(self, ending: LaunchEnd) -> None:
        for line in _shortened(ending.traceback):
            logger.error("  %s", line)

    def _end(self, code: int, reason: str) -> int:
        log = logger.info if code in (OK, STOPPED) else logger.error
        self._set_state(_ENDED[code], reason)
        # A reason may begin with the same word.
        log(reason if reason.partition(";")[0] == _ENDED[code] else f"{_ENDED[code]}: {reason}")
        return code

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self._pool.shutdown(wait=False)


def _shortened(traceback: str) -> Iterator[str]:
    lines = traceback.splitlines()
    if len(lines) > _TRACEBACK_LINES:
        yield f"... {len(lines) - _TRACEBACK_LINES} lines before"
    yield from lines[-_TRACEBACK_LINES:]
