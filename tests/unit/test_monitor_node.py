"""The job on one machine, with small real processes: found, read, stopped and ended, whoever started it."""

import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import monitor.node
from monitor.claim import Holder, Monitor, TakenOver
from monitor.node import Launch, LocalNode, NodeReport, Obstacle, _lines, serve
from utils.files import lock_file

ROOT = Path(__file__).resolve().parent.parent.parent

# Beginning of a job's script, which is called with the run directory, and with a rank if it has started itself.
PRELUDE = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from runs.exits import write_exit_record
from runs.heartbeat import Heartbeat, write_stacks_on_signal
run, rank = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
token, exits = os.environ["ZERO2ALL_LAUNCH"], Path(os.environ["ZERO2ALL_EXIT_DIR"])
def beat(phase="step", step=0, world_size=1):
    heartbeat = Heartbeat(run / "heartbeat", rank, world_size, token)
    heartbeat.beat(phase, step)
    return heartbeat
def start_rank(rank, **how):
    return subprocess.Popen([sys.executable, sys.argv[0], str(run), str(rank)], **how)
def note(name, text=""):
    (run / f"{{name}}.part").write_text(str(text))
    os.replace(run / f"{{name}}.part", run / name)
"""


def until(condition: Callable[[], object], what: str = "") -> object:
    """The condition's first true value."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"did not come true: {what or condition}")


class Bench:
    """Makes nodes of one run directory, and jobs for them."""

    def __init__(self, home: Path):
        self.home, self.run_dir = home, home / "my run"
        self.run_dir.mkdir()
        self.made: list[LocalNode] = []
        self.launches = 0
        # Tests run side by side, and a job is found by its token.
        self.id = secrets.token_hex(4)

    def node(self, index: int = 0) -> LocalNode:
        self.made.append(LocalNode(self.run_dir, index))
        return self.made[-1]

    def launch(self, body: str, index: int = 0, **env: str) -> Launch:
        self.launches += 1
        script = self.home / f"job {self.launches}.py"
        script.write_text(PRELUDE + body)
        token = f"{self.launches}-{self.id}-{index}"
        return Launch(token, self.launches, [sys.executable, str(script), str(self.run_dir)], env)

    def start(self, body: str, index: int = 0, **env: str) -> LocalNode:
        node = self.node(index)
        node.start(self.launch(body, index, **env))
        return node

    def noted(self, name: str) -> str:
        """Text that the job wrote under this name; waits for it."""
        until((self.run_dir / name).exists, f"the note {name}")
        return (self.run_dir / name).read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for node in bench.made:
        node.release()
        node.kill()


def ended(node: LocalNode) -> NodeReport:
    return until(lambda: (report := node.poll(0)) and not report.running and report, "the job ended")


def whole_log(node: LocalNode) -> tuple[str, list[str]]:
    """Everything that an ended job printed, and the pieces in which it came."""
    pieces, at = [], 0
    while True:
        report = node.poll(at)
        if report.log_end == at:
            return "".join(pieces), pieces
        pieces.append(report.log)
        at = report.log_end


SLEEP = "\ntime.sleep(300)\n"


def test_a_job_from_its_start_to_its_end(bench: Bench):
    node = bench.start(
        """
beat("start", 0, 1)
heartbeat = beat("step", 4)
print("in", os.environ["COLOR"], sys.stdin.read() == "", os.getsid(0) == os.getpid(), flush=True)
note("ready")
while not (run / "go").exists(): time.sleep(0.01)
heartbeat.beat("end", 5)
write_exit_record(exits, 0, 0, "finished", 5, world_size=1)
print("to standard error", file=sys.stderr)
sys.exit(3)
""",
        COLOR="a = b c",
    )
    bench.noted("ready")
    report = node.poll(0)
    assert report.running and report.launcher_alive and report.returncode is None and report.exits == []
    # In its own session, Ctrl-C on the monitor's terminal does not reach it. With nothing to read, it cannot wait for a
    # key.
    assert report.log == "in a = b c True True\n"
    (beat,) = report.heartbeats
    assert (beat["phase"], beat["step"], beat["alive"], beat["stopped"]) == ("step", 4, True, False)
    assert 0 <= beat["age"] < 60
    (bench.run_dir / "go").touch()
    report = ended(node)
    assert (report.returncode, report.launcher_alive) == (3, False)
    assert [(beat["phase"], beat["step"], beat["alive"]) for beat in report.heartbeats] == [("end", 5, False)]
    assert [(record["code"], record["step"]) for record in report.exits] == [(0, 5)]
    assert whole_log(node)[0] == "in a = b c True True\nto standard error\n"
    assert report.disk_free > 0 and 0 < report.memory_available <= report.memory_total


def test_ages_grow_and_do_not_follow_the_wall_clock(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    node = bench.start("beat()\nnote('ready')" + SLEEP)
    bench.noted("ready")
    first = node.poll(0).heartbeats[0]["age"]
    # Somebody sets the clock a day back.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    until(lambda: first < node.poll(0).heartbeats[0]["age"] < first + 60)


def test_the_log_comes_in_whole_lines(bench: Bench):
    node = bench.start(
        """
print("one\\ntwo\\nthr", end="", flush=True); note("a")
while not (run / "go").exists(): time.sleep(0.01)
print("ee", flush=True); note("b")
"""
        + SLEEP
    )
    bench.noted("a")
    report = node.poll(0)
    assert (report.log, report.log_end) == ("one\ntwo\n", 8)
    assert node.poll(8).log == "" and node.poll(8).log_end == 8
    (bench.run_dir / "go").touch()
    bench.noted("b")
    assert (node.poll(8).log, node.poll(8).log_end) == ("three\n", 14)


def test_the_last_line_is_not_lost_without_a_line_end(bench: Bench):
    """A process is killed in the middle of a line, or a library prints its last words without a newline."""
    node = bench.start("print('one\\nlast words', end='', flush=True)")
    ended(node)
    assert whole_log(node)[0] == "one\nlast words"


def test_a_huge_log_and_a_huge_line(bench: Bench):
    """In pieces that fit a message, without a gap."""
    node = bench.start("print('a' * 700_000); print('b' * 10); [print(f'{n:09}') for n in range(60_000)]")
    ended(node)
    text, pieces = whole_log(node)
    assert text == "a" * 700_000 + "\n" + "b" * 10 + "\n" + "".join(f"{n:09}\n" for n in range(60_000))
    assert max(map(len, pieces)) <= 1 << 18


def test_bytes_that_are_not_text(bench: Bench):
    node = bench.start("os.write(1, b'a\\xff\\xfe\\x00b\\n' + 'grün\\n'.encode())")
    ended(node)
    assert whole_log(node)[0] == "a��\0bgrün\n".replace("b", "b\n", 1)


TREE = """
if rank == 0:
    beat()
    middle = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], start_new_session=True); time.sleep({})"
    grandchild = [sys.executable, sys.argv[0], str(run), "7"]
    # One whose parent lives, one whose parent is gone.
    for seconds in (300, 0):
        subprocess.Popen([sys.executable, "-c", middle.format(seconds), *grandchild], start_new_session=True)
    # One that does not mind being asked.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    note(f"grandchild-{os.getpid()}", os.getpid())
time.sleep(300)
"""


def test_kill_ends_the_whole_tree_and_nothing_else(bench: Bench):
    """Orphaned grandchildren in their own sessions, and stopped processes, end, too."""
    node, other = bench.start(TREE), bench.start("note('other', os.getpid())" + SLEEP, index=1)
    notes = until(lambda: len(found := list(bench.run_dir.glob("grandchild-*[0-9]"))) == 2 and found)
    pids = [int(path.read_text()) for path in notes] + [node.poll(0).heartbeats[0]["pid"]]
    os.kill(pids[0], signal.SIGSTOP)
    node.kill()
    assert not any(is_alive(pid) for pid in pids)
    assert not node.poll(0).running
    assert is_alive(int(bench.noted("other"))) and other.poll(0).running


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_launchers_exit_code_is_known_after_it_was_killed(bench: Bench):
    node = bench.start("note('ready')" + SLEEP)
    bench.noted("ready")
    node.kill()
    assert node.poll(0).returncode == -signal.SIGKILL


def test_killing_again_does_nothing(bench: Bench):
    node = bench.start("pass")
    ended(node)
    node.kill()
    node.kill()
    assert node.poll(0).returncode == 0


LAUNCHER = """
if len(sys.argv) == 2:
    signal.signal(signal.SIGTERM, lambda *_: note("launcher-was-asked"))
    ranks = [start_rank(rank, start_new_session=True) for rank in (0, 1)]
    note("launcher", os.getpid())
    sys.exit(max(process.wait() for process in ranks))
"""


def test_ranks_outlive_their_launcher(bench: Bench):
    """torchrun was killed: its ranks go on, in their own sessions, and must be found before another launch."""
    node = bench.start(LAUNCHER + "beat(world_size=2)\nnote(f'ready-{rank}')" + SLEEP)
    for rank in (0, 1):
        bench.noted(f"ready-{rank}")
    os.kill(int(bench.noted("launcher")), signal.SIGKILL)
    report = until(lambda: not (report := node.poll(0)).launcher_alive and report)
    assert report.running and report.returncode == -signal.SIGKILL
    assert [beat["alive"] for beat in report.heartbeats] == [True, True]
    node.kill()
    assert [beat["alive"] for beat in node.poll(0).heartbeats] == [False, False]


def test_ranks_that_have_not_beaten_yet_are_found_too(bench: Bench):
    node = bench.start(LAUNCHER + "note(f'ready-{rank}', os.getpid())" + SLEEP)
    pids = [int(bench.noted(f"ready-{rank}")) for rank in (0, 1)]
    os.kill(int(bench.noted("launcher")), signal.SIGKILL)
    report = until(lambda: not (report := node.poll(0)).launcher_alive and report)
    assert report.running and report.heartbeats == []
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ended(node)


def test_a_rank_that_nobody_reaps_is_gone(bench: Bench):
    """The rank is a zombie, because its launcher does not reap it."""
    node = bench.start("if len(sys.argv) == 2:\n    start_rank(0)\n    time.sleep(300)\nbeat()")
    until(lambda: [beat["alive"] for beat in node.poll(0).heartbeats] == [False])
    assert node.poll(0).running


@pytest.mark.parametrize("damaged", [False, True])
def test_another_monitor_takes_the_job_over(bench: Bench, damaged: bool):
    """Even if the file that names the job is damaged, because its processes know their launch. Otherwise the first
    launch would refuse a second, and nobody would watch it (seen in the chaos campaign)."""
    first = bench.start("beat(step=6)\nprint('hello', flush=True)\nnote('ready')" + SLEEP)
    bench.noted("ready")
    second = bench.node()
    if damaged:
        (second.home / "job-0.json").write_bytes(b"\0garbage")
        assert bench.node(1).adopt() is None
    assert second.adopt() == {"token": f"1-{bench.id}-0", "attempt": 1}
    report = second.poll(0)
    assert report.running and report.launcher_alive and report.returncode is None
    assert (report.log, report.heartbeats[0]["step"]) == ("hello\n", 6)
    second.kill()
    assert not second.poll(0).running and not second.poll(0).launcher_alive
    # Its parent is process 1, which would not be there any more.
    assert first.poll(0).running is False


JOB = {"token": "1-x-0", "attempt": 1, "pid": 1, "log": "launch-1-0.log"}
ODD_JOBS = [JOB | odd for odd in ({"pid": 10**40}, {"pid": True}, {"log": "/etc/hostname"}, {"log": "../x"})]


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", "{}", '{"token": "x"}', '"x"', "null", "\xff", "[" * 100_000, *map(json.dumps, ODD_JOBS)],
)
def test_nothing_to_take_over(bench: Bench, content: str | None):
    node = bench.node()
    if content is not None:
        node.home.mkdir()
        (node.home / "job-0.json").write_bytes(content.encode("latin-1"))
    assert node.adopt() is None
    report = node.poll(0)
    assert not report.running and report.log == ""


def test_a_job_that_has_ended_is_not_taken_over_but_read(bench: Bench):
    """The connection dropped, and the job ended before the next one."""
    ended(bench.start("beat(step=5)\nwrite_exit_record(exits, 0, 0, 'finished', 5)\nprint('done')"))
    node = bench.node()
    assert node.adopt() is None
    report = node.poll(0)
    assert not report.running and not report.launcher_alive
    assert ([beat["step"] for beat in report.heartbeats], report.log) == ([5], "done\n")
    assert [record["code"] for record in report.exits] == [0]


def test_a_process_that_has_got_the_number_of_the_old_job_is_left_alone(bench: Bench):
    """After a reboot, the job file still names a number, which some other process now has."""
    node = bench.start("beat()\nnote('ready')" + SLEEP)
    bench.noted("ready")
    path = node.home / "job-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "0-of-yesterday-0"}))
    later = bench.node()
    assert later.adopt() is None
    later.kill()
    later.stop()
    assert node.poll(0).running


def test_a_heartbeat_whose_number_another_process_has_is_dead(bench: Bench):
    node = bench.start("beat()\nnote('ready')" + SLEEP)
    bench.noted("ready")
    path = bench.run_dir / "heartbeat" / "rank-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    assert [beat["alive"] for beat in node.poll(0).heartbeats] == [False]
    # It is not signalled: this process would end.
    assert node.stacks() == ""


def test_what_an_older_launch_left_is_not_believed(bench: Bench):
    ended(bench.start("beat(step=9)\nwrite_exit_record(exits, 0, 0, 'finished', 9)\nprint('old')"))
    node = bench.start("note('ready')" + SLEEP)
    bench.noted("ready")
    report = node.poll(0)
    assert (report.heartbeats, report.exits, report.log) == ([], [], "")
    # There were two ranks then; now there is one.
    assert not list(node.home.glob("exit-1-*"))


def test_a_few_logs_of_earlier_launches_stay(bench: Bench):
    node = bench.node()
    for _ in range(12):
        node.start(bench.launch("pass", **{"PYTHONDONTWRITEBYTECODE": "1"}))
        node.kill()
    numbers = sorted(int(path.name.split("-")[1]) for path in node.home.glob("launch-*.log"))
    assert numbers == list(range(3, 13))
    assert len(list(node.home.glob("exit-*"))) == 1


STOPS_WHEN_ASKED = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
beat()
note(f"ready-{rank}")
while not asked: time.sleep(0.01)
write_exit_record(exits, rank, 75, "stopped on request", 3)
sys.exit(75)
"""


def test_the_request_to_stop_goes_to_the_ranks(bench: Bench):
    """The request does not go to torchrun, which before torch 2.13 kills its ranks 30 seconds later."""
    node = bench.start(LAUNCHER + STOPS_WHEN_ASKED)
    for rank in (0, 1):
        bench.noted(f"ready-{rank}")
    node.stop()
    report = ended(node)
    assert [record["code"] for record in report.exits] == [75, 75]
    assert report.returncode == 75
    assert not (bench.run_dir / "launcher-was-asked").exists()


def test_the_request_to_stop_reaches_a_run_without_a_launcher(bench: Bench):
    node = bench.start(STOPS_WHEN_ASKED)
    bench.noted("ready-0")
    node.stop()
    assert ended(node).returncode == 75


def test_the_request_to_stop_reaches_a_run_that_has_children(bench: Bench):
    """With `python train_my_ddp.py` and a helper process, the request goes to the training, not to the helper."""
    body = "helper = subprocess.Popen(['sleep', '300'])\n" + STOPS_WHEN_ASKED.replace(
        "sys.exit(75)", "note('helper', helper.poll()); helper.kill(); sys.exit(75)"
    )
    node = bench.start(body)
    bench.noted("ready-0")
    node.stop()
    assert ended(node).returncode == 75
    assert bench.noted("helper") == "None"


def test_helpers_of_ranks_are_not_asked_to_stop(bench: Bench):
    """A rank needs its compiler's or loader's processes until it has saved."""
    body = "helper = subprocess.Popen(['sleep', '300'])\n" + STOPS_WHEN_ASKED.replace(
        "write_exit", "time.sleep(0.2); note(f'helper-{rank}', helper.poll()); helper.kill(); write_exit"
    )
    node = bench.start(LAUNCHER + body)
    for rank in (0, 1):
        bench.noted(f"ready-{rank}")
    node.stop()
    ended(node)
    assert [bench.noted(f"helper-{rank}") for rank in (0, 1)] == ["None", "None"]


def test_a_launcher_without_ranks_is_asked_itself(bench: Bench):
    node = bench.start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\nnote('ready')" + SLEEP)
    bench.noted("ready")
    node.stop()
    assert ended(node).returncode == 9


def test_the_stacks_of_all_ranks(bench: Bench):
    """One rank waits, one is stopped by a signal, one does not answer."""
    body = """
if len(sys.argv) == 2:
    ranks = [start_rank(rank) for rank in (0, 1, 2)]
    sys.exit(max(process.wait() for process in ranks))
heartbeat = beat("save" if rank == 2 else "step", 4, 3)
if rank < 2:
    write_stacks_on_signal(run / "heartbeat", rank)
else:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
def waits_in_a_function_of_its_own():
    note(f"ready-{rank}", os.getpid())
    time.sleep(300)
waits_in_a_function_of_its_own()
"""
    node = bench.start(body)
    pids = [int(bench.noted(f"ready-{rank}")) for rank in range(3)]
    os.kill(pids[1], signal.SIGSTOP)
    until(lambda: [beat["stopped"] for beat in node.poll(0).heartbeats] == [False, True, False])
    for _ in range(2):
        # Only new lines each time.
        parts = node.stacks().split("\nrank ")
        assert len(parts) == 3
        assert [part.count("in waits_in_a_function_of_its_own") for part in parts] == [1, 1, 0]
        assert parts[0].startswith(f"rank 0 (pid {pids[0]}), step 4, no sign of life for ")
        assert parts[2].startswith(f"2 (pid {pids[2]}), save 4") and "it did not answer" in parts[2]
        stopped, pids[1] = f"1 (pid {pids[1]}, stopped by a signal), step 4", pids[1]
        assert parts[1].startswith(stopped)
        os.kill(pids[1], signal.SIGSTOP)
        until(lambda: node.poll(0).heartbeats[1]["stopped"])


def test_a_command_that_does_not_exist(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    node = bench.node()
    monkeypatch.setenv("HOME", "/no/home")
    with pytest.raises(ValueError, match="^/no/home/venv/bin/python cannot be started"):
        node.start(Launch(f"0-{bench.id}-0", 1, ["~/venv/bin/python", "t.py"]))
    with pytest.raises(ValueError, match="^/no/such/python cannot be started: No such file or directory$"):
        node.start(Launch(f"1-{bench.id}-0", 1, ["/no/such/python", "t.py"]))
    assert not node.poll(0).running
    node.stop()
    node.kill()
    assert node.stacks() == ""
    # The next launch is not disturbed by it.
    node.start(bench.launch("print('works')"))
    assert whole_log_of_ended(node) == "works\n"


def whole_log_of_ended(node: LocalNode) -> str:
    ended(node)
    return whole_log(node)[0]


def test_no_job_is_left_that_nobody_could_find(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """The disk is full at the moment of the launch: a job that is not recorded must not run."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor.node, "atomic_write_json", full)
    node, launch = bench.node(), bench.launch("note('ready')" + SLEEP)
    try:
        node.start(launch)
    except (ValueError, OSError):
        pass
    left = processes_of(launch.token)
    for process in left:
        process.kill()
    assert not left


def processes_of(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ZERO2ALL_LAUNCH") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_two_nodes_on_one_disk(bench: Bench):
    """Each sees only its own ranks, records, log and job, and ends only its own."""
    body = """
rank = int(os.environ["MY_RANK"])
beat(world_size=2)
write_exit_record(exits, rank, 1, f"of {rank}", 3)
print("I am", rank, flush=True)
note(f"ready-{rank}")
time.sleep(300)
"""
    nodes = [bench.start(body, index=index, MY_RANK=str(index)) for index in (0, 1)]
    for rank in (0, 1):
        bench.noted(f"ready-{rank}")
    for rank, node in enumerate(nodes):
        report = node.poll(0)
        assert [beat["rank"] for beat in report.heartbeats] == [rank]
        assert [record["rank"] for record in report.exits] == [rank]
        assert report.log == f"I am {rank}\n"
        assert bench.node(rank).adopt()["token"] == f"{rank + 1}-{bench.id}-{rank}"
    nodes[0].kill()
    assert not nodes[0].poll(0).running and nodes[1].poll(0).running
    # Starting again on the first does not clear away files of the second.
    nodes[0].start(bench.launch("pass", 0))
    assert nodes[1].poll(0).exits and nodes[1].poll(0).log


def test_the_newest_checkpoint(bench: Bench):
    node = bench.node()
    assert not node.holds_checkpoint()
    for step in (2, 10):
        (bench.run_dir / "ckpt" / f"step-{step}").mkdir(parents=True)
        (bench.run_dir / "ckpt" / f"step-{step}" / "model.safetensors").write_bytes(b"x" * 10 * step)
    (bench.run_dir / "ckpt" / ".tmp-step-12-ab").mkdir()
    assert node.holds_checkpoint()
    assert (node.poll(0).checkpoint, node.poll(0).checkpoint_bytes) == (10, 100)


def test_a_run_directory_that_does_not_exist_yet(tmp_path: Path):
    node = LocalNode(tmp_path / "a" / "b")
    report = node.poll(0)
    assert not report.running and report.disk_free > 0 and report.checkpoint is None
    assert not (tmp_path / "a").exists()


def ask(node: LocalNode, *requests: object) -> list[dict]:
    lines = (request if isinstance(request, str) else json.dumps(request) for request in requests)
    answers = list(serve(node, lines))
    assert not any("\n" in answer for answer in answers)
    return [json.loads(answer) for answer in answers]


def test_serving_a_monitor_elsewhere(bench: Bench):
    """All methods of LocalNode, by lines of JSON."""
    node, launch = bench.node(), bench.launch("beat(step=3)\nprint('grün', flush=True)\nnote('ready')" + SLEEP)
    hello, adopted, started = ask(node, {"do": "hello"}, {"do": "adopt"}, {"do": "start", "launch": launch.__dict__})
    assert hello == {"answer": {"protocol": monitor.node.PROTOCOL, "is_run": False}}
    assert adopted == {"answer": None} and started == {"answer": None}
    bench.noted("ready")
    polled, holds, stacks, stop = ask(
        node, {"do": "poll", "log_from": 0}, {"do": "holds_checkpoint"}, {"do": "adopt"}, {"do": "stop"}
    )
    report = NodeReport(**polled["answer"])
    assert report.running and report.log == "grün\n" and report.heartbeats[0]["step"] == 3
    assert holds == {"answer": False} and stacks["answer"]["attempt"] == 1 and stop == {"answer": None}
    ended(node)
    assert ask(node, {"do": "stacks"}, {"do": "kill"}) == [{"answer": ""}, {"answer": None}]


BAD_REQUESTS = [
    "no json", "", "[]", "3", "null", "{}", '{"do": "format the disk"}', '{"do": "close"}', '{"do": ["poll"]}',
    '{"do": "poll"}', '{"do": "start"}', '{"do": "start", "launch": {"token": "x"}}',
    '{"do": "start", "launch": {"token": "x", "attempt": 1, "command": ["/no/such"]}}',
]  # fmt: skip


@pytest.mark.parametrize("request_line", BAD_REQUESTS)
def test_a_bad_request_gets_a_sentence_and_the_server_goes_on(bench: Bench, request_line: str):
    problem, after = ask(bench.node(), request_line, {"do": "holds_checkpoint"})
    assert list(problem) == ["problem"] and problem["problem"]
    assert after == {"answer": False}


def test_the_server_ends_with_its_input_and_the_job_goes_on(bench: Bench):
    """The connection is gone."""
    command = [sys.executable, "-m", "monitor.node", "--run_dir", str(bench.run_dir), "--index", "0"]
    launch = bench.launch("beat()\nnote('ready')" + SLEEP)
    requests = json.dumps({"do": "hello"}) + "\n" + json.dumps({"do": "start", "launch": launch.__dict__}) + "\n"
    served = subprocess.run(command, input=requests, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert served.returncode == 0, served.stderr
    assert [list(json.loads(line)) for line in served.stdout.splitlines()] == [["answer"], ["answer"]]
    bench.noted("ready")
    node = bench.node()
    assert node.adopt() == {"token": launch.token, "attempt": launch.attempt}
    assert node.poll(0).running


HALF_DEAD = """
import ctypes, threading
threading.Thread(target=lambda: time.sleep(300)).start()
note("leader", os.getpid())
ctypes.CDLL(None).pthread_exit(None)
"""
"""The first thread ends, so that the process looks like a zombie; another thread goes on, and with it all locks."""


def test_a_zombie_whose_threads_live_is_not_gone(bench: Bench):
    node = bench.start(HALF_DEAD)
    leader = psutil.Process(int(bench.noted("leader")))
    until(lambda: leader.status() == psutil.STATUS_ZOMBIE, "the first thread has ended")
    # (Its parent, which is this process, cannot reap it, because threads live.)
    assert node.poll(0).running
    later = bench.node()
    assert later.adopt() is not None and later.obstacle(False).kind == "processes"
    later.clear()
    assert later.obstacle(False) is None and not later._processes()


def test_no_launch_begins_beside_the_processes_of_any_other(bench: Bench):
    """Processes of a launch that no file names any more count, too."""
    node = bench.start("beat()\nnote('ready', os.getpid())" + SLEEP)
    pid = int(bench.noted("ready"))
    path = node.home / "job-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": f"9-{bench.id}-0"}))
    later = bench.node()
    assert later.adopt() is None
    obstacle = later.obstacle(False)
    assert obstacle.kind == "processes" and f"(pid {pid})" in obstacle.reason
    bench.node(1).clear()
    assert is_alive(pid), "another node's"
    later.clear()
    assert not is_alive(pid) and later.obstacle(False) is None


def test_who_works_in_the_run_directory_is_in_the_way(bench: Bench):
    node = bench.node()
    assert node.obstacle(False) is None
    lock = lock_file(bench.run_dir / ".lock", "")
    assert node.obstacle(False) == Obstacle(
        "lock", f"another process works in {bench.run_dir} on this machine, and holds its .lock"
    )
    lock.close()
    assert node.obstacle(False) is None
    assert os.listdir(node.home) == []


@pytest.mark.parametrize(
    "number, sentence",
    [(28, r"this machine has \S+ MB of disk left for .* \(No space left on device\), and 17 MB are needed"),
     (122, r"this machine has \S+ MB of disk left for .* \(Disk quota exceeded\), and 17 MB are needed"),
     (5, "my run on this machine cannot be written: Input/output error"),
     (116, "my run on this machine cannot be written: Stale file handle")],
)  # fmt: skip
def test_a_disk_that_takes_nothing_is_in_the_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
):
    node, original = bench.node(), os.fsync

    def fsync(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    obstacle = node.obstacle(False)
    assert obstacle.kind == "disk" and re.search(sentence, obstacle.reason), obstacle.reason
    monkeypatch.setattr(os, "fsync", original)
    assert node.obstacle(False) is None


def test_room_for_a_checkpoint_is_required_only_after_a_full_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """A run with failing saves goes on, so a small disk is its own affair unless the disk was full before."""
    node, checkpoint = bench.node(), bench.run_dir / "ckpt" / "step-3"
    checkpoint.mkdir(parents=True)
    with open(checkpoint / "model.safetensors", "wb") as file:
        file.truncate(500_000_000)
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=400_000_000))
    assert node.obstacle(False) is None
    obstacle = node.obstacle(True)
    assert obstacle.kind == "disk"
    assert f"has 400 MB of disk left for {bench.run_dir}, and 517 MB are needed, for a checkpoint" in obstacle.reason
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=600_000_000))
    assert node.obstacle(True) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"rank": "x"}', '{"rank": 0, "code": 1}', "\xff"])
def test_exit_records_that_are_none_are_passed_over(bench: Bench, content: str):
    """Such records ended the monitor, and with it a live job."""
    node = bench.start("write_exit_record(exits, 1, 0, 'finished', 5)\nnote('exits', exits)" + SLEEP)
    (Path(bench.noted("exits")) / "rank-0.json").write_bytes(content.encode("latin-1"))
    assert [record["rank"] for record in node.poll(0).exits] == [1]


def test_a_checkpoint_folder_that_cannot_be_read_hides_no_sign_of_life(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    node = bench.start("beat(step=6)\nnote('ready')" + SLEEP)
    bench.noted("ready")

    def away(_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(monitor.node, "list_checkpoints", away)
    monkeypatch.setattr(psutil, "disk_usage", away)
    report = node.poll(0)
    assert report.heartbeats[0]["step"] == 6 and (report.checkpoint, report.disk_free) == (None, None)


def test_what_is_remembered_is_known_to_the_next(bench: Bench):
    node = bench.node()
    assert node.recall("a-note") is None
    node.remember("a-note", {"flags": ["a b"]})
    assert bench.node().recall("a-note") == {"flags": ["a b"]}
    for content in (b"", b"{", b"[]", b"\xff"):
        (node.home / "a-note.json").write_bytes(content)
        assert bench.node().recall("a-note") == {}


def test_a_request_that_is_still_at_work_is_not_passed_by(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """A launch on a slow disk: its connection drops, and the next one comes to end what is there. It finds the job that
    begins meanwhile, not nothing."""
    slow, original = bench.node(), monitor.node.atomic_write_json
    begun = threading.Event()

    def write_slowly(path: Path, value: object, **how: object) -> None:
        begun.set()
        time.sleep(0.5)
        original(path, value, **how)

    monkeypatch.setattr(monitor.node, "atomic_write_json", write_slowly)
    launch = bench.launch("note('ready')" + SLEEP)
    thread = threading.Thread(target=slow.start, args=(launch,))
    thread.start()
    begun.wait()
    later = bench.node()
    assert later.adopt() == {"token": launch.token, "attempt": launch.attempt}
    later.kill()
    thread.join()
    assert not later.poll(0).running


def who(name: str) -> Monitor:
    return dataclasses.replace(Monitor.of_this_process(), id=name)


def test_a_claimed_node_lets_nobody_else_touch_its_job(bench: Bench):
    """During an outage the first monitor's claim ran out, and a second took the job over: the first leaves it alone."""
    first, second = bench.node(), bench.node()
    assert first.claim(who("first")) is None
    launch = bench.launch("beat()\nnote('ready')" + SLEEP)
    first.start(launch)
    bench.noted("ready")
    assert second.claim(who("second")).is_served
    first._claim._let_go()
    assert second.claim(who("second"), instead_of="first") is None and second.adopt() is not None
    for touch in (first.kill, first.stop, first.clear, first.adopt, first.touch, lambda: first.poll(0),
                  lambda: first.start(bench.launch("pass")), lambda: first.obstacle(False)):  # fmt: skip
        with pytest.raises(TakenOver, match="the monitor on "):
            touch()
    assert second.poll(0).running
    second.kill()
    second.release()
    assert bench.node().claim(who("third")) is None


def test_claims_over_a_connection(bench: Bench):
    node, other = bench.node(), bench.node()
    claim = {"do": "claim", "who": dataclasses.asdict(who("first")), "instead_of": ""}
    assert ask(node, claim, claim, {"do": "touch"}) == [{"answer": None}] * 3
    (refused,) = ask(other, claim | {"who": dataclasses.asdict(who("second"))})
    holder = Holder.from_json(refused["answer"])
    assert holder.is_served and holder.monitor.id == "first"
    node._claim._let_go()
    assert ask(other, claim | {"who": dataclasses.asdict(who("second")), "instead_of": "first"}) == [{"answer": None}]
    for request in ({"do": "poll", "log_from": 0}, {"do": "kill"}, {"do": "stop"}):
        assert list(ask(node, request)[0]) == ["taken"]
    assert ask(other, {"do": "release"}) == [{"answer": None}]
    assert not (node.home / "claim.json").exists()


def test_lines_come_in_pieces_and_end_with_a_broken_connection():
    """The connection may stay open on this side for hours: a monitor that is silent for long has no claim any more."""
    reading, writing = os.pipe()
    lines = _lines(reading, patience=0.05)
    os.write(writing, b"one\ntw")
    assert next(lines) == "one"
    os.write(writing, b"o\nthree\n\xff\n")
    assert [next(lines), next(lines), next(lines)] == ["two", "three", "�"]
    assert list(lines) == []
    os.write(writing, b"four\nfi")
    os.close(writing)
    assert list(_lines(reading, patience=60)) == ["four"]
    os.close(reading)
