"""The monitor's loop and command, with scripts instead of trainings: every way to end, every moment for a request to
stop, and failures around it."""

import dataclasses
import json
import logging
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
from typing import BinaryIO

import pytest

import monitor.status
import monitor_process
from monitor.claim import Holder, Monitor
from monitor.command import TrainCommand
from monitor.node import Launch, LocalNode
from monitor.policy import Rules
from monitor.status import Status, describe
from monitor.supervisor import Supervisor, SupervisorOptions
from monitor.watch import Limits
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT
from tests.unit.test_monitor_node import ROOT, is_alive, until
from utils.files import lock_file
from utils.ssh import LoginRefused, Unreachable

# Beginning of a script. RUN/launches holds a line for each launch: its flags. A script that calls ranks(2) becomes the
# launcher of two processes that go on after the call.
PRELUDE = f"""
import json, os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from runs.exits import write_exit_record
from runs.heartbeat import Heartbeat, write_stacks_on_signal
run = Path(next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--out_dir=")))
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
def ranks(number, wait=lambda ranks: max(process.wait() for process in ranks)):
    global world_size
    world_size = number
    if "RANK" not in os.environ:
        env = os.environ | {{"WORLD_SIZE": str(number)}}
        processes = [subprocess.Popen([sys.executable, *sys.argv], env=env | {{"RANK": str(r)}}) for r in range(number)]
        sys.exit(wait(processes))
def beat(phase, step):
    heartbeat = Heartbeat(run / "heartbeat", rank, world_size, os.environ["ZERO2ALL_LAUNCH"])
    heartbeat.beat(phase, step)
    return heartbeat
def leave(code, reason="", **more):
    write_exit_record(Path(os.environ["ZERO2ALL_EXIT_DIR"]), rank, code, reason, 3, world_size=world_size, **more)
    sys.exit(code)
def note(name, text=""):
    (run / f"{{name}}.part").write_text(str(text))
    os.replace(run / f"{{name}}.part", run / name)
if "RANK" not in os.environ:
    with open(run / "launches", "a") as file:
        file.write(" ".join(sys.argv[2:]) + "\\n")
launch = len((run / "launches").read_text().splitlines())
"""
FINISH = "\nbeat('step', 3); leave(0, 'finished')\n"
SLEEP = "\ntime.sleep(300)\n"


class Bench:
    def __init__(self, home: Path):
        self.home, self.run_dir = home, home / "my run"
        (self.run_dir / "monitor").mkdir(parents=True)
        self.supervisors: list[Supervisor] = []
        self.processes: list[subprocess.Popen] = []

    def command(self, body: str) -> list[str]:
        script = self.home / "my training.py"
        script.write_text(PRELUDE + body)
        return [sys.executable, str(script), f"--out_dir={self.run_dir}"]

    def supervisor(
        self, body: str, rules: Rules | None = None, node: LocalNode | None = None, **how: object
    ) -> Supervisor:
        options = SupervisorOptions(rules or Rules(backoff=0.01), **{"interval": 0.02, "show_output": False} | how)
        command = TrainCommand.parse(self.command(body))
        nodes = [node or LocalNode(self.run_dir)]
        self.supervisors.append(Supervisor(nodes, command, self.run_dir, options, None))
        return self.supervisors[-1]

    def monitor(self, body: str, *options: str, **how: object) -> subprocess.Popen:
        """The real command, in its own process group."""
        command = [sys.executable, str(ROOT / "monitor_process.py"), "--interval=0.05", *options, "--"]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True} | how
        self.processes.append(subprocess.Popen([*command, *self.command(body)], text=True, **how))
        return self.processes[-1]

    def noted(self, name: str) -> str:
        until((self.run_dir / name).exists, f"the note {name}")
        return (self.run_dir / name).read_text()

    @property
    def launches(self) -> list[str]:
        """Flags of each launch, without --out_dir."""
        path = self.run_dir / "launches"
        lines = path.read_text().splitlines() if path.exists() else []
        return [re.sub(r"--out_dir=.*my run *", "", line) for line in lines]

    @property
    def status(self) -> Status:
        return Status.read(self.run_dir)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for process in bench.processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    node = LocalNode(bench.run_dir)
    node.adopt()
    node.kill()
    for supervisor in bench.supervisors:
        supervisor.close()


def test_success_is_not_started_again(bench: Bench, said: pytest.LogCaptureFixture):
    assert bench.supervisor(FINISH).run() == OK
    assert len(bench.launches) == 1
    assert (bench.status.state, bench.status.attempt, bench.status.restarts) == ("finished", 1, 0)
    assert said.messages == ["launch 1", "finished"]


def test_a_launch_that_ends_between_two_looks_is_seen_whole(bench: Bench):
    """The first look comes after the end: the steps, the record and the output are still found."""
    supervisor = bench.supervisor("print('quick', flush=True)" + FINISH, interval=0.3)
    assert supervisor.run() == OK
    assert bench.status.step == 3


def test_wrong_input_is_not_tried_again(bench: Bench, said: pytest.LogCaptureFixture):
    assert bench.supervisor("leave(2, 'the sentence')").run() == WRONG_INPUT
    assert len(bench.launches) == 1
    assert said.messages[-1] == "refused: the sentence"
    assert (bench.status.state, bench.status.last_ending) == ("refused", "the sentence")


def test_a_command_that_cannot_be_started(bench: Bench, said: pytest.LogCaptureFixture):
    supervisor = bench.supervisor("")
    supervisor.command = TrainCommand.parse(["/no/such/python", "t.py", f"--out_dir={bench.run_dir}"])
    assert supervisor.run() == WRONG_INPUT
    assert said.messages[-1] == "refused: /no/such/python cannot be started: No such file or directory"


def test_a_crash_is_started_again_and_resumes_where_there_is_a_checkpoint(bench: Bench):
    body = """
beat("step", launch)
if launch == 2: (run / "ckpt" / "step-2").mkdir(parents=True)
if launch < 4: leave(1, "OSError: gone")
"""
    assert bench.supervisor(body + FINISH).run() == OK
    assert bench.launches == ["", "", "--resume", "--resume"]
    assert (bench.status.attempt, bench.status.restarts) == (4, 3)


def test_resume_is_not_said_twice(bench: Bench):
    (bench.run_dir / "ckpt" / "step-2").mkdir(parents=True)
    supervisor = bench.supervisor(FINISH)
    supervisor.command = TrainCommand.parse([*bench.command(FINISH), "--resume"])
    assert supervisor.run() == OK
    assert bench.launches == ["--resume"]


def test_the_traceback_of_a_crash_is_quoted(bench: Bench, said: pytest.LogCaptureFixture):
    body = "beat('step', 1); leave(1, 'OSError: gone', traceback='\\n'.join(f'line {n}' for n in range(40)))"
    assert bench.supervisor(body, Rules(max_restarts=0)).run() == CRASH
    text = said.text
    assert "line 39" in text and "line 10" in text and "line 9\n" not in text and "... 10 lines before" in text
    assert said.messages[-1] == "failed: gave up after 0 restarts: rank 0: OSError: gone"


def test_the_traceback_is_quoted_although_the_others_had_to_be_ended(bench: Bench, said: pytest.LogCaptureFixture):
    """One rank raises; the other waits for it in a collective until the monitor ends it. The first rank is to blame, so
    the ending must not be "killed, or out of memory"."""
    body = """
ranks(2)
beat("step", 1)
note(f"ready-{rank}")
if rank == 0: time.sleep(300)
while not (run / "ready-0").exists(): time.sleep(0.01)
leave(1, "OSError: gone", traceback="the traceback")
"""
    assert bench.supervisor(body, Rules(max_restarts=0), leave_grace=0.2).run() == CRASH
    assert "the traceback" in said.text
    assert "without a word" not in said.messages[-1]
    assert said.messages[-1].startswith("failed: gave up after 0 restarts: rank 1: OSError: gone")


def test_ranks_that_do_not_follow_a_dead_one_are_ended(bench: Bench):
    body = """
ranks(2)
beat("step", launch)
note(f"ready-{rank}", os.getpid())
if launch == 2: leave(0, "finished")
if rank == 0: time.sleep(300)
while not (run / "ready-0").exists(): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert bench.supervisor(body, leave_grace=0.2).run() == OK
    assert len(bench.launches) == 2
    assert "rank 1 ended without a word" in bench.status.last_ending or bench.status.state == "finished"
    assert not is_alive(int(bench.noted("ready-0")))


def test_a_launcher_that_does_not_end_after_its_ranks(bench: Bench):
    """All ranks have finished and said so; the launcher hangs."""
    body = "ranks(2, wait=lambda ranks: [rank.wait() for rank in ranks] and time.sleep(300))" + FINISH
    supervisor = bench.supervisor(body, leave_grace=0.2)
    assert run_for(supervisor, 30.0) == OK


def run_for(supervisor: Supervisor, seconds: float) -> int | None:
    """The exit code, or None if there is none in this time; nothing is left running."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(supervisor.run()), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        supervisor.request_stop()
        supervisor.request_stop()
        thread.join(60)
        return None
    return codes[0] if codes else None


def test_a_hang_is_ended_with_all_stacks(bench: Bench, said: pytest.LogCaptureFixture):
    body = """
ranks(2)
def hangs_here():
    note(f"ready-{rank}")
    time.sleep(300)
heartbeat = beat("step", launch)
if launch == 2: leave(0, "finished")
write_stacks_on_signal(run / "heartbeat", rank)
hangs_here()
"""
    assert bench.supervisor(body, limits=Limits(first_step=1.0)).run() == OK
    hang = next(message for message in said.messages if message.startswith("hang: "))
    assert "in phase step at step 1; 1.0 s are the limit" in hang
    stacks = next(message for message in said.messages if message.startswith("stacks:"))
    assert stacks.count("in hangs_here") == 2
    assert len(bench.launches) == 2


def test_a_launch_without_a_sign_of_life_is_ended(bench: Bench, said: pytest.LogCaptureFixture):
    body = "if launch == 1: time.sleep(300)" + FINISH
    assert bench.supervisor(body, limits=Limits(start=1.0)).run() == OK
    assert "hang: no rank gave a sign of life within 1 s of the launch" in said.messages


def test_a_loss_that_is_not_finite_goes_back(bench: Bench):
    body = """
beat("step", launch)
if launch == 1: leave(1, "FloatingPointError: nan", non_finite_until=24)
if launch == 2: os.kill(os.getpid(), signal.SIGKILL)
if launch == 3: leave(1, "OSError: of another kind")
"""
    assert bench.supervisor(body + FINISH).run() == OK
    assert bench.launches == ["", "--resume_at_sample=24", "", ""]


def test_asked_to_stop_before_anything_began(bench: Bench):
    supervisor = bench.supervisor(FINISH)
    supervisor.request_stop()
    assert supervisor.run() == STOPPED
    assert bench.launches == []
    assert bench.status.state == "stopped"


STOPS_WHEN_ASKED = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
beat("step", 3)
note(f"ready-{rank}", os.getpid())
while not asked: time.sleep(0.01)
(run / "ckpt" / "step-3").mkdir(parents=True, exist_ok=True)
leave(75, "stopped on request")
"""


def test_asked_to_stop_while_it_runs(bench: Bench, said: pytest.LogCaptureFixture):
    supervisor = bench.supervisor("ranks(2)" + STOPS_WHEN_ASKED)
    stop_when(supervisor, lambda: all((bench.run_dir / f"ready-{rank}").exists() for rank in (0, 1)))
    assert supervisor.run() == STOPPED
    assert (bench.status.state, bench.status.checkpoint, len(bench.launches)) == ("stopped", 3, 1)
    assert said.messages[-2:] == ["asked to stop: the ranks save and end", "stopped: stopped on request"]


def test_asked_to_stop_at_once_does_not_end_an_earlier_monitors_job_without_saving(bench: Bench):
    """The monitor is restarted beside a running job, and the machine goes down at the same moment."""
    first = LocalNode(bench.run_dir)
    supervisor = bench.supervisor(STOPS_WHEN_ASKED)
    first.start(Launch(f"1-{secrets.token_hex(4)}-0", 1, bench.command(STOPS_WHEN_ASKED)))
    pid = int(bench.noted("ready-0"))
    supervisor.request_stop()
    assert supervisor.run() == STOPPED
    # Either the job was asked and has saved, or it was left alone.
    assert (bench.run_dir / "ckpt" / "step-3").exists() or is_alive(pid)


def test_asked_to_stop_between_two_launches(bench: Bench):
    supervisor = bench.supervisor("beat('step', 1); leave(1, 'OSError: gone')", Rules(backoff=300.0))
    stop_when(supervisor, lambda: bench.status.state == "waiting")
    assert supervisor.run() == STOPPED
    assert (bench.status.last_ending, len(bench.launches)) == ("stopped on request between two launches", 1)


def stop_when(supervisor: Supervisor, condition: object) -> None:
    def wait() -> None:
        until(lambda: (supervisor.run_dir / "monitor" / "status.json").exists() and condition())
        supervisor.request_stop()

    threading.Thread(target=wait, daemon=True).start()


def test_asked_to_stop_while_it_starts(bench: Bench):
    """No rank has a handler yet: they end at once, and there is nothing to save."""
    supervisor = bench.supervisor("note('importing')" + SLEEP)
    stop_when(supervisor, (bench.run_dir / "importing").exists)
    assert supervisor.run() == STOPPED
    assert bench.status.last_ending == "stopped on request before the first step"


def test_a_job_that_does_not_stop_is_killed_in_the_end(bench: Bench):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); beat('step', 1); note('ready', os.getpid())" + SLEEP
    supervisor = bench.supervisor(body, stop_timeout=0.3)
    stop_when(supervisor, (bench.run_dir / "ready").exists)
    assert supervisor.run() == CRASH
    assert bench.status.last_ending.startswith("did not end cleanly when asked to stop: ")
    assert not is_alive(int(bench.noted("ready")))


def test_asked_twice_it_ends_at_once(bench: Bench):
    body = "signal.signal(signal.SIGTERM, lambda *_: note('asked')); beat('step', 1); note('ready')\n"
    supervisor = bench.supervisor(body + "while True: time.sleep(1)")
    stop_when(supervisor, (bench.run_dir / "ready").exists)
    stop_when(supervisor, (bench.run_dir / "asked").exists)
    assert supervisor.run() == CRASH


class FarNode(LocalNode):
    """A node that can be out of reach."""

    problem: Exception | None = None

    def holds_checkpoint(self) -> bool:
        if self.problem is not None:
            raise self.problem
        return super().holds_checkpoint()

    def adopt(self) -> dict | None:
        if self.problem is not None:
            raise self.problem
        return super().adopt()


def test_asked_to_stop_while_it_waits_for_a_host(bench: Bench):
    """After a crash, before the next launch: nothing runs, and nothing is lost."""
    node = FarNode(bench.run_dir)
    supervisor = bench.supervisor("beat('step', 1); leave(1, 'OSError: gone')", node=node)
    decide = supervisor.policy.decide

    def decide_and_lose_the_host(*arguments: object) -> object:
        node.problem = Unreachable("far does not answer")
        return decide(*arguments)

    supervisor.policy.decide = decide_and_lose_the_host
    stop_when(supervisor, lambda: bench.status.last_ending == "far does not answer")
    assert supervisor.run() == STOPPED


def test_a_host_that_refuses_from_the_start_is_a_sentence(bench: Bench):
    """The key was removed between the first connection and the first look."""
    node = FarNode(bench.run_dir)
    node.problem = LoginRefused("far refuses the login")
    supervisor = bench.supervisor(FINISH, node=node)
    assert supervisor.run() == WRONG_INPUT
    assert (bench.status.state, bench.status.last_ending) == ("refused", "far refuses the login")


def test_a_full_disk_at_the_launch_is_not_a_wrong_command(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """The monitor reports it and tries again, since somebody may make room. Above all, it must not die."""
    original, problems = Path.mkdir, [OSError(28, "No space left on device")]

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        if path.name.startswith("exit-") and problems:
            raise problems.pop()
        original(path, *arguments, **options)

    supervisor = bench.supervisor(FINISH)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert supervisor.run() == OK
    assert bench.status.restarts == 1


def test_waiting_for_the_next_launch_does_not_look_dead(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """`--status` calls a monitor dead that has not written for half a minute, but the monitor may wait for five."""
    monkeypatch.setattr(monitor.status, "_STALE_SECONDS", 1.0)
    monkeypatch.setattr(monitor.supervisor, "_STATUS_SECONDS", 0.1)
    supervisor = bench.supervisor("leave(1, 'OSError: gone')", Rules(backoff=300.0))
    seen: list[str] = []

    def looks_dead_or_waits_long() -> bool:
        if bench.status.state != "waiting":
            return False
        seen.append(describe(bench.status, None, time.time())[0])
        return seen[-1].startswith("no monitor") or len(seen) > 300

    stop_when(supervisor, looks_dead_or_waits_long)
    assert supervisor.run() == STOPPED
    assert seen[-1].startswith("waiting: ")


def test_the_number_of_steps_is_this_launchs(bench: Bench):
    """A finished run is extended: config.yaml is the old one until the training has started."""
    (bench.run_dir / "config.yaml").write_text("derived: {max_iters: 3}\n")
    body = """
time.sleep(0.3)
note("config.yaml", "derived: {max_iters: 9}")
beat("step", 3)
time.sleep(0.3)
"""
    assert bench.supervisor(body + FINISH).run() == OK
    assert bench.status.max_iters == 9


def test_the_command_from_end_to_end(bench: Bench):
    process = bench.monitor("print('hello', flush=True)" + FINISH)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == OK, output
    assert output.splitlines() == ["monitor: launch 1", "hello", "monitor: finished"]
    log = (bench.run_dir / "monitor" / "monitor.log").read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in log] == ["launch 1", "finished"]
    shown = subprocess.run(
        [sys.executable, ROOT / "monitor_process.py", "--status", bench.run_dir], capture_output=True, text=True
    )
    assert (shown.returncode, shown.stdout.splitlines()[:2]) == (OK, ["finished", "step 3"])


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--interval=0"], "monitor: --interval must lie in (0, 60]"),
        (["--backoff=-1"], "monitor: --backoff must be a number, and not negative, got -1.0"),
        (["--backoff=nan"], "monitor: --backoff must"),
        (["--save_timeout=inf"], "monitor: --save_timeout must"),
        (["--max_without_progress=0"], "monitor: --max_without_progress must be at least 1, got 0"),
        (["--give_up_after=-1"], "monitor: --give_up_after must be a number, and not negative, got -1.0"),
        (["--on_nonfinite=hope"], "monitor_process.py: argument --on_nonfinite: invalid choice: 'hope'"),
        (["--hosts=/no/such"], "monitor: --hosts needs a command that begins with python -m parallel.launch"),
    ],
)
def test_options_that_make_no_sense(bench: Bench, options: list[str], sentence: str):
    process = bench.monitor(FINISH, *options)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, bench.launches) == (WRONG_INPUT, [])
    assert output.splitlines()[-1].startswith(sentence), output


def test_without_a_command_or_a_script(bench: Bench):
    for words, sentence in (
        ([], "monitor: the training command is missing: write it after --"),
        (["--", "torchrun", "no.py"], "monitor: no.py does not exist: begin the monitor in the folder of"),
        (["--status", str(bench.home)], "monitor: no monitor has looked after"),
        (["--status", str(bench.home / "none")], f"monitor: {bench.home / 'none'} does not exist"),
        (["torchrun", "--nproc_per_node=2", "t.py"],
         "monitor_process.py: the training command goes behind --, as in: monitor_process.py -- torchrun ... (--help"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "monitor_process.py", *words], cwd=bench.home, capture_output=True, text=True
        )
        assert done.returncode == WRONG_INPUT
        assert (done.stdout + done.stderr).splitlines()[-1].startswith(sentence), done.stdout + done.stderr


def test_a_run_directory_given_from_here(bench: Bench):
    """Relative, and with a blank."""
    bench.command(FINISH)
    (bench.home / "a b").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "monitor_process.py", "--", sys.executable, "my training.py", "--out_dir=a b"],
        cwd=bench.home, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == OK, done.stdout + done.stderr
    assert Status.read(bench.home / "a b").state == "finished"


def test_ctrl_c_on_the_terminal_reaches_only_the_monitor(bench: Bench):
    """Ctrl-C goes to the whole process group; the monitor asks the ranks once, and they save."""
    body = "signal.signal(signal.SIGINT, lambda *_: note('interrupted'))\n" + STOPS_WHEN_ASKED
    process = bench.monitor(body)
    bench.noted("ready-0")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert (bench.run_dir / "ckpt" / "step-3").exists()
    assert not (bench.run_dir / "interrupted").exists()
    assert output.splitlines()[-1] == "monitor: stopped: stopped on request"


def test_nohup_is_respected(bench: Bench):
    """A monitor that ignores the end of its terminal goes on when it ends."""
    body = "beat('step', 3)\nnote('ready')\nwhile not (run / 'go').exists(): time.sleep(0.01)"
    process = bench.monitor(
        "signal.signal(signal.SIGTERM, lambda *_: leave(75, 'stopped'))\n" + body + FINISH,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    bench.noted("ready")
    process.send_signal(signal.SIGHUP)
    # Two looks later, it would have asked the ranks to stop.
    updated = bench.status.updated
    until(lambda: process.poll() is not None or bench.status.updated > updated + 0.5)
    (bench.run_dir / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == OK, output


@pytest.mark.parametrize("what", ["full disk", "closed pipe"])
def test_a_monitor_that_cannot_print_goes_on(bench: Bench, what: str):
    """Its output goes to a full disk, or to a program that is gone: no reason to abandon the run."""
    body = """
beat("step", launch)
print("much\\n" * 10_000, flush=True)
note("ready")
while not (run / "go").exists(): time.sleep(0.01)
if launch == 1: leave(1, "OSError: gone")
"""
    full = open("/dev/full", "w") if what == "full disk" else None
    process = bench.monitor(body + FINISH, "--backoff=0", stdout=full or subprocess.PIPE, stderr=subprocess.DEVNULL)
    if full:
        full.close()
    else:
        process.stdout.close()
    bench.noted("ready")
    (bench.run_dir / "go").touch()
    assert process.wait(60) == OK
    assert (bench.status.state, len(bench.launches)) == ("finished", 2)


def test_text_that_the_terminal_cannot_show(bench: Bench):
    body = "os.write(1, 'grün →\\n'.encode())" + FINISH
    process = bench.monitor(body, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == OK, output


def test_a_second_monitor_is_refused(bench: Bench):
    first = bench.monitor(STOPS_WHEN_ASKED)
    bench.noted("ready-0")
    second = bench.monitor(STOPS_WHEN_ASKED)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == WRONG_INPUT
    assert output.splitlines()[-1].startswith(f"monitor: another monitor looks after {bench.run_dir}: see ")
    assert first.poll() is None and len(bench.launches) == 1
    assert bench.status.monitor_pid == first.pid


def test_a_new_monitor_takes_over_after_the_old_one_was_killed(bench: Bench):
    first = bench.monitor(STOPS_WHEN_ASKED)
    pid = int(bench.noted("ready-0"))
    first.kill()
    first.wait()
    assert is_alive(pid)
    second = bench.monitor(STOPS_WHEN_ASKED)
    until(lambda: bench.status.monitor_pid == second.pid and bench.status.state == "running")
    assert (bench.status.attempt, bench.status.step) == (1, 3)
    second.terminate()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == STOPPED, output
    assert len(bench.launches) == 1
    assert output.splitlines()[0] == "monitor: took over launch 1, which an earlier monitor left running"


def test_the_file_of_the_job_names_it(bench: Bench):
    """The next monitor's information is there as soon as the job is."""
    first = bench.monitor(STOPS_WHEN_ASKED)
    pid = int(bench.noted("ready-0"))
    path = bench.run_dir / "monitor" / "job-0.json"
    assert json.loads(path.read_text())["attempt"] == 1
    # Its number is known a moment after it has begun.
    until(lambda: json.loads(path.read_text())["pid"] == pid)
    first.terminate()
    assert first.wait(60) == STOPPED


@pytest.fixture
def ending_monitor(bench: Bench) -> Iterator[BinaryIO]:
    """A monitor that has done its work, but still holds the run."""
    Status("finished", os.getpid()).write(bench.run_dir)
    with lock_file(bench.run_dir / "monitor" / ".lock", "") as lock:
        yield lock


def test_a_monitor_that_is_just_ending_is_waited_for(bench: Bench, ending_monitor: BinaryIO):
    threading.Timer(0.5, ending_monitor.close).start()
    started = time.monotonic()
    monitor_process.claim(bench.run_dir).close()
    assert 0.4 < time.monotonic() - started < 20


@pytest.mark.parametrize("state, waits", [("finished", True), ("running", False), ("waiting", False)])
def test_a_monitor_at_work_is_not(
    bench: Bench, ending_monitor: BinaryIO, monkeypatch: pytest.MonkeyPatch, state: str, waits: bool
):
    monkeypatch.setattr(monitor_process, "_LOCK_PATIENCE", 0.5)
    Status(state, os.getpid()).write(bench.run_dir)
    started = time.monotonic()
    with pytest.raises(ValueError, match="^another monitor looks after .*: see monitor_process.py --status"):
        monitor_process.claim(bench.run_dir)
    assert (time.monotonic() - started > 0.4) == waits
    # On a request to stop it gives up waiting.
    assert not waits or monitor_process.claim(bench.run_dir, lambda: True) is None


def failing(number: int, times: int) -> Callable[..., None]:
    """Replaces Path.mkdir, which fails so many times."""
    original, left = Path.mkdir, [number] * times

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        if left and path.name == "monitor":
            raise OSError(left.pop(), os.strerror(number))
        original(path, *arguments, **options)

    return mkdir


@pytest.mark.parametrize("number, passes", [(28, True), (122, True), (5, True), (116, True), (13, False), (30, False)])
def test_a_run_directory_that_cannot_be_written_at_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
):
    """Full, over its quota, or gone: the monitor tries again. If it is not permitted, or read-only, the user must
    change that."""
    monkeypatch.setattr(Path, "mkdir", failing(number, 2))
    if passes:
        monitor_process.claim(bench.run_dir).close()
    else:
        with pytest.raises(ValueError, match=f"my run cannot be written: {os.strerror(number)}$"):
            monitor_process.claim(bench.run_dir)


def test_the_log_keeps_what_it_cannot_write(bench: Bench, monkeypatch: pytest.MonkeyPatch, said):
    path, original = bench.run_dir / "monitor" / "monitor.log", open

    def full(file: object, *arguments: object, **options: object) -> object:
        if file == path:
            raise OSError(28, "No space left on device")
        return original(file, *arguments, **options)

    logger = logging.getLogger("monitor")
    handler = monitor_process.SteadyLog(path)
    logger.addHandler(handler)
    try:
        logger.info("one")
        monkeypatch.setattr("builtins.open", full)
        logger.info("two")
        logger.info("three")
        monkeypatch.undo()
        # Even if the file was renamed in between.
        path.rename(path.with_name("old.log"))
        logger.info("four")
    finally:
        logger.removeHandler(handler)
    words = [line.split(" ", 3)[3] for line in path.read_text().splitlines()]
    problem = f"{path} cannot be written, its lines are kept: No space left on device"
    assert words == ["two", problem, "three", "four"]
    assert path.with_name("old.log").read_text().endswith("INFO one\n")
    assert said.messages.count(problem) == 1


def test_a_local_monitor_and_one_behind_ssh_see_each_other(bench: Bench):
    """One claims by itself, the other through `python -m monitor.node` on this host."""
    first = bench.monitor(STOPS_WHEN_ASKED)
    bench.noted("ready-0")
    second = dataclasses.asdict(dataclasses.replace(Monitor.of_this_process(), id="second"))
    requests = [{"do": "claim", "who": second, "instead_of": ""}]
    command = [sys.executable, "-m", "monitor.node", "--run_dir", bench.run_dir]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    served = subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=60)
    holder = Holder.from_json(json.loads(served.stdout)["answer"])
    assert holder.is_served and holder.monitor.pid == first.pid
    first.terminate()
    assert first.wait(60) == STOPPED
    served = subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert json.loads(served.stdout) == {"answer": None}
