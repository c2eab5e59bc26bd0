"""The monitor in times of trouble, with made-up nodes and clock: hosts that do not answer, pauses of its own, full
disks, other monitors, ranks that take long to exit."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import monitor.supervisor
from monitor.claim import LEASE_SECONDS, Holder, Monitor, TakenOver
from monitor.command import TrainCommand
from monitor.node import Launch, NodeReport, Obstacle
from monitor.policy import Rules
from monitor.status import Status
from monitor.supervisor import Supervisor, SupervisorOptions
from monitor.watch import Limits
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT
from utils.ssh import LoginRefused, Unreachable

LONG = 600.0
"""Seconds; far beyond all limits for the silence of a host or a rank."""


class World:
    """Time that passes while the monitor sleeps, and the events in it."""

    def __init__(self):
        self.now, self.end = 1000.0, 1000.0 + 300 * LONG
        self._events: list[tuple[float, Callable[[], object]]] = []
        self.status: Status | None = None

    def at(self, second: float, *actions: Callable[[], object]) -> None:
        """Seconds since the beginning."""
        self._events += [(1000.0 + second, action) for action in actions]

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [event for event in self._events if event[0] <= self.now]
        self._events = [event for event in self._events if event[0] > self.now]
        for _, action in sorted(due, key=lambda event: event[0]):
            action()
        assert self.now < self.end, "the monitor does not end"

    @property
    def second(self) -> float:
        return self.now - 1000.0

    def take_status(self, status: Status) -> None:
        """Replaces the file, which would be written thousands of times."""
        status.updated, self.status = self.now, replace(status)


@dataclass
class Rank:
    rank: int
    phase: str = "step"
    alive: bool = True
    lived: float = 0.0
    """Time of its last heartbeat before it fell silent; NaN: it gives one each second."""
    code: int | None = None


@dataclass
class FakeNode:
    """One host of a job with `ranks_of` ranks per node, which make a step per second."""

    world: World
    index: int = 0
    world_size: int = 1
    out_of_reach: Exception | None = None
    holder: Holder | None = None
    obstacle_now: Obstacle | None = None
    start_problem: Exception | None = None
    saved: bool = False
    log: list[tuple[float, str]] = field(default_factory=list)
    notes: dict[str, dict] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    exits: list[dict] = field(default_factory=list)
    on_start: Callable[["FakeNode"], object] = lambda node: None
    returncode: int | None = None
    born: float = 0.0

    @property
    def name(self) -> str:
        return f"host{self.index}"

    def did(self, what: str) -> list[float]:
        return [at for at, action in self.log if action == what]

    def _note(self, what: str) -> None:
        if self.out_of_reach is not None:
            raise self.out_of_reach
        self.log.append((self.world.second, what))

    def claim(self, who: Monitor, instead_of: str = "") -> Holder | None:
        self._note("claim")
        holder = self.holder
        return None if holder is not None and holder.monitor and holder.monitor.id == instead_of else holder

    def release(self) -> None:
        self._note("release")

    def touch(self) -> None:
        self._note("touch")

    def start(self, launch: Launch) -> None:
        self._note("start")
        if self.start_problem is not None:
            raise self.start_problem
        self.launches.append(launch)
        self.born, self.exits = self.world.now, []
        self.ranks = [Rank(self.index, lived=math.nan)]
        self.on_start(self)

    def adopt(self) -> dict | None:
        self._note("adopt")
        return {"token": self.launches[-1].token, "attempt": self.launches[-1].attempt} if self.running else None

    @property
    def running(self) -> bool:
        return any(rank.alive for rank in self.ranks)

    def clear(self) -> None:
        self._note("clear")
        self._end()

    def kill(self) -> None:
        self._note("kill")
        self._end()

    def _end(self) -> None:
        for rank in self.ranks:
            rank.alive = False

    def obstacle(self, after_full_disk: bool) -> Obstacle | None:
        self._note("obstacle after a full disk" if after_full_disk else "obstacle")
        return self.obstacle_now

    def holds_checkpoint(self) -> bool:
        self._note("look")
        return self.saved

    def recall(self, name: str) -> dict | None:
        self._note("recall")
        return self.notes.get(name)

    def remember(self, name: str, value: dict) -> None:
        self._note("remember")
        self.notes[name] = value

    def stacks(self) -> str:
        self._note("stacks")
        return ""

    def stop(self) -> None:
        self._note("stop")
        self.end(STOPPED)

    def close(self) -> None:
        self._note("close")

    def end(self, code: int, reason: str = "", rank: int = 0) -> None:
        """The rank leaves its record and ends."""
        self.record(code, reason, rank)
        self.ranks[rank].alive = False

    def record(self, code: int, reason: str = "", rank: int = 0) -> None:
        self.exits.append({"rank": self.ranks[rank].rank, "code": code, "reason": reason, "time": self.world.now})

    def freeze(self) -> None:
        for rank in self.ranks:
            rank.lived = self._last_beat(rank)

    def thaw(self) -> None:
        for rank in self.ranks:
            rank.lived = math.nan

    def _last_beat(self, rank: Rank) -> float:
        return math.floor(self.world.now) if math.isnan(rank.lived) else rank.lived

    def poll(self, log_from: int) -> NodeReport:
        self._note("poll")
        beats = []
        for rank in self.ranks:
            at = self._last_beat(rank)
            beat = {
                "rank": rank.rank, "world_size": self.world_size, "pid": 7, "launch": self.launches[-1].token,
                "phase": rank.phase, "step": int(at - self.born), "monotonic": at, "age": self.world.now - at,
                "alive": rank.alive, "stopped": False,
            }  # fmt: skip
            beats.append(beat if rank.code is None else beat | {"code": rank.code})
        gb = 1 << 30
        running = self.running
        return NodeReport(
            running, running, self.returncode, beats, list(self.exits), "", 0, None, 0, 100 * gb, 8 * gb, 8 * gb
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    fake = SimpleNamespace(sleep=world.sleep, time=lambda: world.now, monotonic=lambda: world.now)
    monkeypatch.setattr(monitor.supervisor, "time", fake)
    monkeypatch.setattr(Status, "write", lambda status, run_dir: world.take_status(status))
    return world


def nodes_of(world: World, count: int) -> list[FakeNode]:
    return [FakeNode(world, index, count) for index in range(count)]


def supervise(
    world: World, nodes: list[FakeNode], run_dir: Path, flags: tuple[str, ...] = (), **how: object
) -> Supervisor:
    (run_dir / "monitor").mkdir(exist_ok=True)
    command = TrainCommand.parse(["python", "t.py", f"--out_dir={run_dir}", *flags])
    options = SupervisorOptions(**{"show_output": False, "interval": 2.0} | how)
    supervisor = Supervisor(nodes, command, run_dir, options, None, lambda: world.now)
    supervisor._pool = Inline()
    return supervisor


class Inline:
    """Run in the monitor's own thread: a simulated hour has thousands of looks."""

    map = staticmethod(map)

    def submit(self, work: Callable, *arguments: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def all_do(nodes: list[FakeNode], what: str, *arguments: object) -> Callable[[], None]:
    return lambda: [getattr(node, what)(*arguments) for node in nodes] and None


def lose(world: World, node: FakeNode, begin: float, end: float) -> None:
    world.at(begin, lambda: setattr(node, "out_of_reach", Unreachable(f"{node.name} does not answer")))
    world.at(end, lambda: setattr(node, "out_of_reach", None))


@pytest.mark.parametrize("lost", [[1], [0, 1]])
def test_a_job_trains_on_through_an_outage_of_the_connection(world: World, said, tmp_path: Path, lost: list[int]):
    """No answer for half an hour from a host, or from all: the ranks that can be seen show that the others live, too.
    Nothing is ended, nothing is started, and everything is as before."""
    nodes = nodes_of(world, 2)
    for index in lost:
        lose(world, nodes[index], 100, 100 + 2 * LONG)
    world.at(3 * LONG, all_do(nodes, "end", OK))
    supervisor = supervise(world, nodes, tmp_path)
    assert supervisor.run() == OK
    assert [len(node.launches) for node in nodes] == [1, 1] and supervisor.policy.restarts == 0
    # (At the very end, ended processes are cleared away.)
    assert all(at >= 3 * LONG for node in nodes for at in node.did("kill"))
    for index in lost:
        assert f"host{index} has not answered for 120 s: the job is left alone" in said.text
        assert f"host{index} is seen again" in said.text


def test_the_status_tells_of_an_outage_and_of_its_end(world: World, tmp_path: Path):
    node, seen = FakeNode(world), []
    lose(world, node, 100, LONG)
    for second in (50, LONG - 10, LONG + 10):
        world.at(second, lambda: seen.append((world.status.state, world.status.last_ending)))
    world.at(2 * LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert seen == [("running", ""), ("waiting", "host0 did not answer for 120 s"), ("running", "")]


def test_a_host_is_lost_and_its_ranks_with_it(world: World, said, tmp_path: Path):
    """The ranks that can be seen stand still: they are ended, and nothing is launched before all hosts answer. Remains
    on the lost host are ended first."""
    nodes = nodes_of(world, 2)
    lose(world, nodes[1], 100, 5 * LONG)
    world.at(100, nodes[0].freeze)
    world.at(6 * LONG, all_do(nodes, "end", OK))
    supervisor = supervise(world, nodes, tmp_path)
    assert supervisor.run() == OK
    assert "hang: no sign of life from rank 0" in said.text and "waiting: host1 does not answer" in said.text
    hang = next(at for at in nodes[0].did("kill"))
    assert 100 + 60 < hang < 100 + 60 + 10
    starts = [node.did("start")[1] for node in nodes]
    assert all(5 * LONG <= start < 5 * LONG + 60 for start in starts)
    assert nodes[1].did("clear")[1] >= 5 * LONG
    # Waiting does not count as time without progress.
    assert 4 * LONG < supervisor._waited < 5 * LONG


def test_look_before_you_kill(world: World, said, tmp_path: Path):
    """A job stood still for so long that it was about to be ended, but its host fell silent just then. When it answers
    again, the job has gone on: it is left alone."""
    node = FakeNode(world)
    kill = node.kill

    def kill_in_vain() -> None:
        node.kill, node.out_of_reach = kill, Unreachable("host0 does not answer")
        world.at(world.second + LONG / 2, node.thaw)
        world.at(world.second + LONG, lambda: setattr(node, "out_of_reach", None))
        raise node.out_of_reach

    node.kill = kill_in_vain
    world.at(100, node.freeze)
    world.at(3 * LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert len(node.launches) == 1 and node.did("kill")[0] >= 3 * LONG
    assert "hang: " in said.text and "launch 1 goes on: watching it again" in said.text


@pytest.mark.parametrize("ranks_too", [False, True])
@pytest.mark.parametrize("second", [0.5, 3.3, 100.0, 100.9])
def test_a_pause_of_the_monitor_judges_nobody(world: World, tmp_path: Path, ranks_too: bool, second: float):
    """SIGSTOP, or a laptop that is shut: ten minutes pass between two looks. The ranks may have stood still, too, and
    look equally old; they go on a little later than the monitor."""
    nodes = nodes_of(world, 2)

    def pause() -> None:
        if ranks_too:
            all_do(nodes, "freeze")()
            world.at(world.second + LONG + 20, *(node.thaw for node in nodes))
        world.now += LONG

    world.at(second, pause)
    world.at(2 * LONG, all_do(nodes, "end", OK))
    assert supervise(world, nodes, tmp_path).run() == OK
    assert [len(node.launches) for node in nodes] == [1, 1]
    assert all(at >= 2 * LONG for node in nodes for at in node.did("kill"))


def test_a_pause_in_the_middle_of_a_look(world: World, tmp_path: Path):
    """The pause falls between a node's answer and its evaluation."""
    node = FakeNode(world)
    poll, paused = node.poll, []

    def slow_poll(log_from: int) -> NodeReport:
        report = poll(log_from)
        if world.second > 50 and not paused:
            paused.append(True)
            world.now += LONG
        return report

    node.poll = slow_poll
    world.at(2 * LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert paused and len(node.launches) == 1 and node.did("kill")[0] >= 2 * LONG


def test_a_hang_that_began_in_a_pause_is_still_one(world: World, said, tmp_path: Path):
    node = FakeNode(world, on_start=lambda node: len(node.launches) > 1 and node.end(OK))
    world.at(100, node.freeze, lambda: setattr(world, "now", world.now + LONG))
    assert supervise(world, [node], tmp_path).run() == OK
    assert "hang: " in said.text
    assert LONG + 100 + 60 - 10 < node.did("kill")[0] < LONG + 100 + 60 + 20


def test_the_request_to_stop_is_heard_when_the_host_answers_again(world: World, tmp_path: Path):
    """The request went out once, while nobody could hear it, and the monitor waited half an hour for nothing."""
    nodes = nodes_of(world, 2)
    supervisor = supervise(world, nodes, tmp_path)
    lose(world, nodes[1], 100, 400)
    nodes[0].stop = lambda: nodes[0]._note("stop")
    world.at(150, supervisor.request_stop)
    world.at(410, lambda: nodes[0].end(STOPPED))
    assert supervisor.run() == STOPPED
    assert len(nodes[0].did("stop")) == 1 and 400 <= nodes[1].did("stop")[0] < 405


@pytest.mark.parametrize("again", [None, 160.0])
def test_a_host_that_never_hears_the_request_to_stop(world: World, said, tmp_path: Path, again: float | None):
    """The monitor ends anyway, at once on a second request, and names what it leaves behind."""
    node = FakeNode(world)
    supervisor = supervise(world, [node], tmp_path)
    lose(world, node, 100, 99 * LONG)
    world.at(150, supervisor.request_stop)
    if again is not None:
        world.at(again, supervisor.request_stop)
    assert supervisor.run() == CRASH
    assert said.messages[-1] == (
        "failed: did not end cleanly when asked to stop: host0 did not answer, and what may still run there goes on"
    )
    assert world.second < (165 if again else 300)


def test_a_launch_that_only_some_hosts_got_is_ended_and_tried_again(world: World, tmp_path: Path):
    """The answer of one host was lost."""
    nodes = nodes_of(world, 2)
    nodes[1].start_problem = Unreachable("host1 does not answer")
    world.at(0.5, lambda: setattr(nodes[1], "start_problem", None))
    world.at(100, all_do(nodes, "end", OK))
    assert supervise(world, nodes, tmp_path).run() == OK
    assert [len(node.launches) for node in nodes] == [2, 1]


def test_what_is_wrong_before_ranks_have_lived_is_wrong_and_later_may_pass(world: World, tmp_path: Path):
    """The file system with the interpreter is not mounted again yet."""
    first, later = FakeNode(world), FakeNode(world)
    gone = ValueError("python cannot be started: No such file or directory")
    first.start_problem = gone
    assert supervise(world, [first], tmp_path).run() == WRONG_INPUT
    later.start_problem = None
    world.at(100, lambda: (later.end(CRASH, "OSError: gone"), setattr(later, "start_problem", gone)))
    world.at(LONG, lambda: setattr(later, "start_problem", None))
    world.at(2 * LONG, lambda: later.end(OK))
    assert supervise(world, [later], tmp_path).run() == OK
    assert len(later.launches) == 2


def test_a_launcher_that_refuses_alone_is_wrong_before_ranks_have_lived_and_later_may_pass(
    world: World, said, tmp_path: Path
):
    """After a reboot, the first host's name or network is not there yet."""

    def refuse(node: FakeNode) -> None:
        node.ranks, node.returncode = [], WRONG_INPUT

    first, later = FakeNode(world, on_start=refuse), FakeNode(world)
    assert supervise(world, [first], tmp_path).run() == WRONG_INPUT

    def heal() -> None:
        later.on_start, later.returncode = lambda node: None, None

    world.at(100, lambda: (later.end(CRASH, "OSError: gone"), setattr(later, "on_start", refuse)))
    world.at(LONG, heal)
    world.at(2 * LONG, lambda: later.end(OK))
    assert supervise(world, [later], tmp_path).run() == OK
    assert len(later.launches) > 2


def test_a_job_found_on_some_hosts_is_stopped_there_though_others_are_silent(world: World, said, tmp_path: Path):
    """The monitor was killed, and its successor is asked to stop while it waits for a host."""
    nodes = nodes_of(world, 2)
    all_do(nodes, "start", Launch("3-abc-0", 3, [], {}))()
    supervisor = supervise(world, nodes, tmp_path)
    claim = nodes[1].claim

    def claim_then_fall_silent(*arguments: object) -> None:
        claim(*arguments)
        nodes[1].out_of_reach = Unreachable("host1 does not answer")

    nodes[1].claim = claim_then_fall_silent
    world.at(30, supervisor.request_stop)
    assert supervisor.run() == CRASH
    assert nodes[0].did("stop") and not nodes[0].running
    assert "host1 did not answer" in said.messages[-1]


def test_no_log_of_an_earlier_launch_is_written_over(world: World, tmp_path: Path):
    """The status file is of another version, or unreadable."""
    node = FakeNode(world)
    supervisor = supervise(world, [node], tmp_path)
    for name in ("launch-4-0.log", "launch-11-1.log", "launch-x-0.log"):
        (tmp_path / "monitor" / name).touch()
    (tmp_path / "monitor" / "status.json").write_text("{}")
    world.at(10, lambda: node.end(OK))
    assert supervisor.run() == OK and node.launches[0].attempt == 12


def test_a_host_that_is_claimed_hears_of_the_monitor_while_it_waits_for_the_next(world: World, tmp_path: Path):
    nodes = nodes_of(world, 2)
    lose(world, nodes[1], 0, LONG)
    nodes[1].out_of_reach = Unreachable("host1 does not answer")
    supervisor = supervise(world, nodes, tmp_path)
    world.at(LONG - 10, supervisor.request_stop)
    supervisor.run()
    contacts = [at for at, _ in nodes[0].log]
    assert max(b - a for a, b in zip(contacts, contacts[1:])) < 60 < LEASE_SECONDS


def test_a_node_that_answers_nonsense_is_not_the_end(world: World, said, tmp_path: Path):
    """Files of the run are damaged: the job trains on."""
    node = FakeNode(world)
    world.at(50, lambda: setattr(node, "out_of_reach", ValueError("host0: 'rank'")))
    world.at(200, lambda: setattr(node, "out_of_reach", None))
    world.at(LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert len(node.launches) == 1 and said.text.count("host0 cannot be looked at: host0: 'rank'") == 1


FULL = "OSError: [Errno 28] No space left on device"


def test_a_full_disk_is_waited_for(world: World, said, tmp_path: Path):
    """The disk fills up on a Friday evening: when somebody makes room on Monday, the run goes on, and no try is
    spent."""
    no_room = Obstacle("disk", "host0 has 3 MB of disk left for r, and 900 MB are needed, for a checkpoint")
    node = FakeNode(world)
    world.at(100, lambda: (node.end(CRASH, FULL), setattr(node, "obstacle_now", no_room)))
    world.at(4 * LONG, lambda: setattr(node, "obstacle_now", None))
    world.at(5 * LONG, lambda: node.end(OK))
    supervisor = supervise(world, [node], tmp_path)
    assert supervisor.run() == OK
    assert len(node.launches) == 2 and supervisor.policy.restarts == 0
    assert 4 * LONG <= node.did("start")[1] < 4 * LONG + 60
    assert said.text.count(f"waiting: {no_room.reason}") == 1
    # Room for a checkpoint is required, not only for a line of a log.
    assert node.did("obstacle after a full disk") and node.did("obstacle")


def test_a_full_disk_that_has_room_is_a_crash_like_others(world: World, tmp_path: Path):
    """Another disk is full, such as /tmp: nothing tells when that is over."""
    node = FakeNode(world, on_start=lambda node: node.end(CRASH, FULL))
    supervisor = supervise(world, [node], tmp_path, rules=Rules(give_up_after=4 * LONG))
    assert supervisor.run() == CRASH
    assert world.second < 5 * LONG and supervisor.policy.restarts > 10


@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("kind", ["lock", "processes", "disk"])
def test_what_stands_in_the_way_is_waited_for(world: World, said, tmp_path: Path, kind: str, proved: bool):
    """A prune takes long, or a rank waits inside the kernel. If a lock in a run was not ours before, the training may
    complain in the end."""
    node, in_the_way = FakeNode(world), Obstacle(kind, "in the way")
    end = 2 * LONG
    if proved:
        world.at(50, lambda: (node.end(CRASH, "OSError: gone"), setattr(node, "obstacle_now", in_the_way)))
    else:
        node.obstacle_now = in_the_way
    world.at(end, lambda: setattr(node, "obstacle_now", None))
    world.at(2 * end, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    begun = node.did("start")[-1]
    assert 30 <= begun < 40 if kind == "lock" and not proved else end <= begun < end + 60
    assert said.text.count("waiting: in the way") == 1


def test_a_crash_loop_has_its_end_after_hours_not_after_seconds(world: World, said, tmp_path: Path):
    node = FakeNode(world, on_start=lambda node: node.end(CRASH, "OSError: gone"))
    assert supervise(world, [node], tmp_path, rules=Rules(give_up_after=4 * LONG)).run() == CRASH
    assert 4 * LONG <= world.second < 5 * LONG
    assert "launches in a row without a new step: rank 0: OSError: gone" in said.messages[-1]


@pytest.mark.parametrize("code", [OK, STOPPED])
def test_a_rank_that_takes_long_to_leave_has_its_time(world: World, tmp_path: Path, code: int):
    """The first rank lets a logger finish; the others have ended long ago."""
    nodes = nodes_of(world, 2)
    world.at(100, lambda: setattr(nodes[0].ranks[0], "phase", "end"), nodes[0].freeze, lambda: nodes[1].end(code))
    world.at(150, lambda: nodes[0].end(code))
    assert supervise(world, nodes, tmp_path).run() == code
    assert all(at >= 150 for node in nodes for at in node.did("kill"))


@pytest.mark.parametrize("code", [OK, STOPPED])
def test_a_rank_that_does_not_leave_at_all_has_finished_all_the_same(world: World, said, tmp_path: Path, code: int):
    """Everything was saved: repeating it could only lead to the same place."""
    nodes = nodes_of(world, 2)

    def leave() -> None:
        for node in nodes:
            node.ranks[0].phase, node.ranks[0].code = "end", code
        nodes[0].freeze()
        nodes[1].end(code)

    world.at(100, leave)
    assert supervise(world, nodes, tmp_path).run() == code
    assert [len(node.launches) for node in nodes] == [1, 1]
    assert "hang: no sign of life from rank 0" in said.text
    assert Limits().end < nodes[0].did("kill")[0] - 100 < Limits().end + 10


def test_a_save_that_is_in_flight_when_a_rank_fails_has_its_time(world: World, tmp_path: Path):
    """The rank has left its record and finishes the save, from which the next launch goes on."""
    node = FakeNode(world)
    rank = lambda: node.ranks[0]  # noqa: E731
    world.at(100, lambda: (node.record(CRASH, "OSError: gone"), setattr(rank(), "phase", "save")), node.freeze)
    world.at(300, lambda: setattr(rank(), "alive", False))
    world.at(LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert len(node.launches) == 2 and node.did("kill")[0] >= 300


BEST = ("--resume_from=best", "--seed=1")


def flags_of(node: FakeNode) -> list[list[str]]:
    """Flags that the monitor added to each launch."""
    return [[word for word in launch.command if word.startswith("--resume")] for launch in node.launches]


def test_to_go_back_to_the_best_is_done_once(world: World, said, tmp_path: Path):
    """The first launch that makes steps settles it for every later launch or monitor. It happens again after somebody
    has deleted the note, or with another command."""
    node = FakeNode(world, saved=True)
    world.at(100, lambda: node.end(CRASH, "OSError: gone"))
    world.at(200, lambda: node.end(STOPPED))
    assert supervise(world, [node], tmp_path, BEST).run() == STOPPED
    back, on = ["--resume_from=best", "--resume"], ["--resume_from=best", "--resume", "--resume_from=last"]
    assert flags_of(node) == [back, on]
    assert "--resume_from=best was followed once, by launch 1: going on from the newest checkpoint; to go back again, "
    assert f"delete {tmp_path}/monitor/went-back.json on host0" in said.text

    def again(*flags: str) -> list[str]:
        node.on_start = lambda node: world.at(world.second + 50, lambda: node.end(STOPPED))
        assert supervise(world, [node], tmp_path, flags).run() == STOPPED
        return flags_of(node)[-1]

    assert again(*BEST) == on
    assert again(*BEST[:1], "--seed=2") == back
    assert again(*BEST[:1], "--seed=2") == on
    node.notes.clear()
    assert again(*BEST) == back
    node.notes["went-back"] = {}
    assert again(*BEST) == on, "what cannot be read may say that it was done: nothing is thrown away for that"
    assert again("--seed=1") == ["--resume"]


def test_a_launch_that_dies_before_its_first_step_has_not_gone_back(world: World, tmp_path: Path):
    node = FakeNode(world, saved=True)

    def start(node: FakeNode) -> None:
        if len(node.launches) == 1:
            node.ranks[0].phase = "start"
            world.at(world.second + 20, lambda: node.end(CRASH, "ConnectionError: a name could not be resolved"))
        else:
            world.at(world.second + 20, lambda: node.end(OK))

    node.on_start = start
    assert supervise(world, [node], tmp_path, BEST).run() == OK
    assert flags_of(node) == [["--resume_from=best", "--resume"]] * 2


@pytest.mark.parametrize("phase, goes_back", [("start", True), ("step", False)])
def test_a_monitor_that_died_before_it_could_note_that(world: World, tmp_path: Path, phase: str, goes_back: bool):
    """The ranks' own heartbeats say whether they had begun, even those of an ended launch."""
    node = FakeNode(world, saved=True)
    node.remember("went-back", {"flags": [f"--out_dir={tmp_path}", *BEST], "launch": "1-ab", "done": False})
    node.start(Launch("1-ab-0", 1, []))
    node.ranks[0].phase = phase
    node.end(CRASH, "")
    node.exits.clear()
    node.on_start = lambda node: world.at(world.second + 50, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path, BEST).run() == OK
    assert ("--resume_from=last" not in flags_of(node)[-1]) == goes_back
    assert node.notes["went-back"]["done"] == (True if goes_back else False)


def test_a_job_that_is_taken_over_goes_back_no_second_time(world: World, said, tmp_path: Path):
    node = FakeNode(world, saved=True)
    node.remember("went-back", {"flags": [f"--out_dir={tmp_path}", *BEST], "launch": "1-ab", "done": False})
    node.start(Launch("1-ab-0", 1, []))
    world.at(100, lambda: node.end(CRASH, "OSError: gone"))
    world.at(200, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path, BEST).run() == OK
    assert flags_of(node)[-1] == ["--resume_from=best", "--resume", "--resume_from=last"]
    # A launch that another command left running was not asked for, and the monitor says so.
    node.start(Launch("3-cd-0", 3, []))
    world.at(world.second + 100, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path, ("--resume_from=best",)).run() == OK
    assert said.text.count("--resume_from=best takes effect with the next launch") == 1


def other(**values: object) -> Monitor:
    return replace(Monitor.of_this_process(), id="other", host="elsewhere", pid=4711, **values)


def test_a_second_monitor_is_told_whose_the_run_is_and_touches_nothing(world: World, said, tmp_path: Path):
    nodes = nodes_of(world, 2)
    nodes[1].holder = Holder(other(), True, 1.0)
    assert supervise(world, nodes, tmp_path).run() == WRONG_INPUT
    assert "host1: the monitor on elsewhere (pid 4711), since " in said.messages[-1]
    assert {action for node in nodes for _, action in node.log} == {"claim", "release"}
    # The status file may be the other monitor's.
    assert world.status is None and world.second < 1


def test_a_lease_is_waited_for(world: World, said, tmp_path: Path):
    """Nobody serves the other monitor: its connection is gone, and maybe the monitor is, too."""
    node = FakeNode(world, holder=Holder(other(), False, 100.0))
    world.at(LEASE_SECONDS - 100, lambda: setattr(node, "holder", None))
    world.at(LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert LEASE_SECONDS - 100 <= node.did("start")[0] < LEASE_SECONDS - 90
    assert "its time is up in 200 s" in said.text


def test_a_monitor_that_comes_back_within_its_lease_keeps_the_run(world: World, said, tmp_path: Path):
    node = FakeNode(world, holder=Holder(other(), False, 100.0))
    world.at(60, lambda: setattr(node, "holder", Holder(other(), True, 0.5)))
    assert supervise(world, [node], tmp_path).run() == WRONG_INPUT
    assert 60 <= world.second < 70 and not node.did("start") and not node.did("kill")


def test_a_monitor_that_is_known_to_be_dead_is_not_waited_for(world: World, monkeypatch, tmp_path: Path):
    """The same command after a kill, on the same machine."""
    node = FakeNode(world, holder=Holder(other(), False, 1.0))
    monkeypatch.setattr(Monitor, "is_known_dead", lambda self, here: self.id == "other")
    world.at(LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK
    assert node.did("start")[0] < 1


@pytest.mark.parametrize("second", [50, 1000])
def test_a_monitor_whose_run_was_taken_over_steps_back(world: World, said, tmp_path: Path, second: int):
    """While it watches, or while it waits for the next launch."""
    nodes = nodes_of(world, 2)
    world.at(900, all_do(nodes, "end", CRASH, "OSError: gone"))
    taken = TakenOver("host1: the monitor on elsewhere (pid 4711), since today")
    world.at(second, lambda: setattr(nodes[1], "out_of_reach", taken))
    rules = Rules(backoff=500.0)
    assert supervise(world, nodes, tmp_path, rules=rules).run() == WRONG_INPUT
    assert said.messages[-1].startswith("another monitor has taken over: this one steps back and leaves the job")
    assert "elsewhere (pid 4711)" in said.messages[-1]
    assert all(second > 900 and at < second for node in nodes for at in node.did("kill"))
    assert world.second < second + 40


def test_a_claim_is_kept_up_while_nothing_is_launched(world: World, tmp_path: Path):
    node = FakeNode(world)
    world.at(10, lambda: node.end(CRASH, "OSError: gone"))
    world.at(2 * LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path, rules=Rules(backoff=LONG, max_backoff=LONG)).run() == OK
    contacts = [at for at, _ in node.log]
    assert max(b - a for a, b in zip(contacts, contacts[1:])) < 60 < LEASE_SECONDS


def test_a_disk_that_is_full_when_the_run_is_claimed(world: World, tmp_path: Path):
    node = FakeNode(world, out_of_reach=OSError(28, "No space left on device"))
    world.at(LONG, lambda: setattr(node, "out_of_reach", None))
    world.at(2 * LONG, lambda: node.end(OK))
    assert supervise(world, [node], tmp_path).run() == OK


def test_a_login_that_is_refused_at_first_is_wrong(world: World, said, tmp_path: Path):
    node = FakeNode(world, out_of_reach=LoginRefused("host0 refuses the login"))
    assert supervise(world, [node], tmp_path).run() == WRONG_INPUT
    assert said.messages[-1] == "refused: host0 refuses the login"
