"""One run under monitor_process.py, as the campaign sees it: processes, steps, the monitor's messages."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from checkpoint.folder import Checkpoint, list_checkpoints
from runs.heartbeat import read_heartbeats
from tests.chaos.read_errors import ReadErrors
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.sshd import Sshd, free_port

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"
"""Folder beside the tokens, of the weights below an adapter."""
PATIENCE = 150.0
"""Seconds within which everything awaited must happen, even on a loaded machine."""
HANG_AFTER, FIRST_STEP = 3.0, 20.0
UNREACHABLE_AFTER = 8.0
SAVE_INTERVAL, MOST_SKIPPED, REPLICA_CHECK = 5, 12, 10
"""Steps between saves; most skipped steps in a row; steps between comparisons of the replicas."""
MONITOR_FLAGS = [
    f"--hang_after={HANG_AFTER}", f"--first_step_timeout={FIRST_STEP}", "--start_timeout=120", "--save_timeout=20",
    f"--validate_timeout={FIRST_STEP}",
    "--backoff=0.1", "--max_backoff=0.5", "--max_restarts=1000", "--max_without_progress=100", "--interval=0.1",
    "--max_go_back=100", f"--unreachable_after={UNREACHABLE_AFTER}",
]  # fmt: skip


class Broken(Exception):
    """A promise that was not kept."""


class RunOver(Exception):
    """The run finished before the fault could show."""


@dataclass(frozen=True)
class Setup:
    """A configuration whose undisturbed runs have equal bits."""

    name: str
    world_size: int
    flags: tuple[str, ...] = ()
    over_ssh: bool = False
    """Whether the monitor reaches this machine by --hosts."""
    has_adapter: bool = False
    """Whether an adapter for frozen weights is trained."""

    def size(self, dimension: str) -> int:
        """Ranks of a dimension of the mesh, by its flag."""
        flag = f"--{dimension}="
        return next((int(given.removeprefix(flag)) for given in self.flags if given.startswith(flag)), 1)

    @property
    def loss_ranks(self) -> tuple[int, ...]:
        """Ranks that compute losses: those of a pipeline's last stage."""
        stage = self.world_size // self.size("pipeline_model_parallel_size")
        return tuple(range(self.world_size - stage, self.world_size))

    @property
    def hook_remembers(self) -> bool:
        """Whether checkpoints hold state of the communication."""
        return "--use_powerSGD_hook" in self.flags

    @property
    def weights_files(self) -> tuple[str, str]:
        """Files of a checkpoint: the weights (a pattern of fnmatch), and what they are."""
        if self.has_adapter:
            return "adapter_model.safetensors", "adapter_config.json"
        is_cut = any("_model_parallel_size=" in flag or flag.startswith("--data_parallel=") for flag in self.flags)
        return "model-*.safetensors" if is_cut else "model.safetensors", "config.json"


BUCKETS = ("--bucket_size=20000",)
POWERSGD = ("--use_powerSGD_hook", "--matrix_approximation_rank=4")
PIPE = ("--pipeline_model_parallel_size=2",)
LORA = ("--lora_r=8", "--lora_target_modules=all-linear", "--lora_dropout=0.1")
SETUPS = {
    setup.name: setup
    for setup in (
        Setup("ddp2", 2, BUCKETS),
        Setup("ddp1", 1, BUCKETS),
        Setup("zero1", 2, (*BUCKETS, "--use_distributed_optimizer")),
        Setup("powersgd", 2, (*BUCKETS, *POWERSGD)),
        Setup("ssh1", 1, BUCKETS, over_ssh=True),
        Setup("lora2", 2, (*BUCKETS, *LORA), has_adapter=True),
        Setup("fsdp2", 2, ("--data_parallel=fsdp",)),
        Setup("fsdp2_kept", 2, ("--data_parallel=fsdp", "--no-reshard_after_forward")),
        Setup("hsdp4", 4, ("--data_parallel=hsdp", "--ranks_per_machine=2")),
        Setup("fsdp2_lora", 2, ("--data_parallel=fsdp", *LORA), has_adapter=True),
        Setup("tp2pp2", 4, (*BUCKETS, *PIPE, "--tensor_model_parallel_size=2")),
        Setup("pp2ddp", 4, (*BUCKETS, *PIPE, *POWERSGD)),
    )
}


def training_flags(setup: Setup, data_dir: Path, out_dir: Path, steps: int) -> list[str]:
    """Steps take some tens of milliseconds, and every fifth is saved."""
    base = [f"--init_from={data_dir / BASE}"] if setup.has_adapter else []
    return [
        f"--data_dir={data_dir}", f"--out_dir={out_dir}", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
        f"--train_batch_size={8 // setup.world_size}", f"--gradient_accumulation_steps={max(2, setup.world_size)}",
        f"--max_iters={steps}", "--valid_iters=2", "--valid_interval=40", f"--save_interval={SAVE_INTERVAL}",
        "--learning_rate=1e-2", "--num_threads=1", "--sample_tokens=4", "--verify_data",
        f"--max_skipped_steps={MOST_SKIPPED}",
        f"--replica_check_interval={REPLICA_CHECK}", *TINY_MODEL, *base, *setup.flags,
    ]  # fmt: skip


def training_command(setup: Setup, script: str, flags: list[str]) -> list[str]:
    launcher, ranks = [sys.executable, "-m", "parallel.launch"], f"--nproc_per_node={setup.world_size}"
    return [*launcher, *([] if setup.over_ssh else ["--standalone"]), ranks, script, *flags]


def own_environment(home: Path) -> dict[str, str]:
    """Additional environment of a run's processes."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "CHAOS_DIR": str(home), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Process:
    pid: int
    launch: str
    is_rank: bool


@dataclass
class Seen:
    """Observations over the whole run."""

    launches: int = 0
    hangs: int = 0
    first_steps: list[float] = field(default_factory=list)
    """Seconds from each launch to its first step."""
    delays: list[float] = field(default_factory=list)
    """For each hang, seconds from SIGSTOP to the monitor's report, beyond the limit that the report names."""


class Run:
    """Prepare a run.

    Args:
        home: directory of everything in this run, except that `out_dir` may be on its own disk.
        library: see `ReadErrors`; None: reads do not fail.
    """

    def __init__(
        self, home: Path, setup: Setup, data_dir: Path, steps: int, out_dir: Path | None = None,
        library: Path | None = None,
    ):  # fmt: skip
        self.home, self.setup, self.steps = home, setup, steps
        self.out_dir = out_dir or home / "run"
        home.mkdir(parents=True, exist_ok=True)
        self.read_errors = ReadErrors(library, home) if library is not None else None
        self.sshd = self._own_host() if setup.over_ssh else None
        self.may_leave_out: set[int] = set()
        """Positions in the stream before which a fault made the monitor leave out samples."""
        self.may_skip: set[int] = set()
        """Steps whose gradients a fault made non-finite."""
        self.data_dir = home / "data"
        shutil.copytree(data_dir, self.data_dir)
        self.seen, self.lines = Seen(), []
        self.ballast = self.out_dir.parent / "ballast"
        self._launched_at: dict[int, float] = {}
        self._stepped: set[str] = set()
        self.monitor: subprocess.Popen | None = None

    @property
    def ckpt_dir(self) -> Path:
        return self.out_dir / "ckpt"

    @property
    def environment(self) -> dict[str, str]:
        return own_environment(self.home) | (self.read_errors.environment if self.read_errors else {})

    @property
    def workdir(self) -> Path:
        """The project's directory in the hosts file."""
        return self.home / "workdir"

    def _own_host(self) -> Sshd:
        """This machine as a host of --hosts. A script in place of Python restores the environment that sshd does not
        pass on."""
        self.workdir.symlink_to(ROOT)
        python = self.home / "python"
        words = [f"{name}={value}" for name, value in self.environment.items()]
        python.write_text(f'#!/bin/sh\nexec env {shlex.join(words)} {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        server = Sshd(self.home / "ssh")
        server.start()
        host = {"host": server.listen, "port": server.port, "user": server.user, "key_file": str(server.client_key),
                "known_hosts": str(server.known_hosts), "workdir": str(self.workdir), "python": str(python),
                "env": {"GLOO_SOCKET_IFNAME": "lo"}}  # fmt: skip
        self._hosts_file.write_text(yaml.safe_dump({"hosts": [host], "rendezvous_port": free_port()}))
        return server

    @property
    def _hosts_file(self) -> Path:
        return self.home / "hosts.yaml"

    def another_monitor(self, *options: str, script: str = "") -> subprocess.Popen:
        """Start a monitor with the same command each time, except for its `options`."""
        script = script or ("tests/chaos/impatient_monitor.py" if self.setup.over_ssh else "monitor_process.py")
        flags = training_flags(self.setup, self.data_dir, self.out_dir, self.steps)
        command = training_command(self.setup, "tests/chaos/train_with_faults.py", flags)
        where = ["--hosts", str(self._hosts_file)] if self.setup.over_ssh else []
        return subprocess.Popen(
            [sys.executable, script, *MONITOR_FLAGS, *options, *where, "--", *command], cwd=ROOT,
            env=os.environ | self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip

    def start(self, *options: str, script: str = "") -> None:
        """Start the monitor whose messages are read from now on."""
        self.monitor = self.another_monitor(*options, script=script)
        self._reader = threading.Thread(target=self._read, args=(self.monitor,), daemon=True)
        self._reader.start()

    def _read(self, monitor: subprocess.Popen) -> None:
        with open(self.home / "output.txt", "a") as file:
            for line in monitor.stdout:
                now = time.time()
                self.lines.append((now, line.rstrip("\n")))
                file.write(f"{now:.3f} {line}")
                file.flush()
                if match := re.match(r"monitor: launch (\d+)(?: with|$)", line):
                    self.seen.launches += 1
                    self._launched_at[int(match[1])] = now
                self.seen.hangs += line.startswith("monitor: hang:")

    def said(self, pattern: str, since: int = 0) -> tuple[float, re.Match] | None:
        """(time, match) of the first line that matches, from line number `since` on."""
        for at, line in self.lines[since:]:
            if match := re.search(pattern, line):
                return at, match
        return None

    def processes(self) -> list[Process]:
        """All living processes of the training, found without the product's help."""
        mine, found = f"{self.out_dir.resolve()}/", []
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if env.get("ZERO2ALL_EXIT_DIR", "").startswith(mine) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(Process(process.pid, env["ZERO2ALL_LAUNCH"], "RANK" in env))
            except (psutil.Error, OSError):
                continue
        return found

    def launchers(self) -> list[int]:
        return [process.pid for process in self.processes() if not process.is_rank]

    def ranks(self) -> list[dict]:
        """The newest heartbeats of living ranks, in the order of ranks."""
        beats = [beat for beat in read_heartbeats(self.out_dir / "heartbeat") if psutil.pid_exists(beat["pid"])]
        newest = max(beats, key=lambda beat: beat["monotonic"], default=None)
        beats = [b for b in beats if b["launch"] == newest["launch"] and is_alive(b["pid"])] if newest else []
        return sorted(beats, key=lambda beat: beat["rank"])

    def launch(self) -> str:
        """Name of the launch whose ranks are all alive and past the start; empty if there is none."""
        beats = self.ranks()
        well = len(beats) == self.setup.world_size and all(beat["phase"] != "start" for beat in beats)
        return beats[0]["launch"] if well else ""

    def step(self) -> int:
        return max((beat["step"] for beat in self.ranks() if beat["phase"] != "start"), default=-1)

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.ckpt_dir)

    def newest_step(self) -> int:
        return max((checkpoint.step for checkpoint in self.checkpoints()), default=0)

    def records(self, name: str) -> list[dict]:
        """All records of this name ever written, superseded ones included."""
        found = []
        for line in (self.out_dir / "reslog.jsonl").read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found += [record] if record["name"] == name else []
        return found

    def wait(self, done: Callable[[], object], what: str, seconds: float = PATIENCE, may_end: bool = False) -> object:
        """Wait for a condition.

        Raises:
            RunOver: the monitor finished the run before.
            Broken: it ended otherwise, or `seconds` passed, or two launches were alive at once.
        """
        deadline, look = time.monotonic() + seconds, 0.0
        while not (answer := done()):
            self._note_first_step()
            if not may_end and self.monitor.poll() is not None:
                self._on_end(what)
            if time.monotonic() > look:
                look = time.monotonic() + 0.3
                self.check_one_launch()
            if time.monotonic() > deadline:
                raise Broken(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.01)
        self._note_first_step()
        return answer

    def _on_end(self, what: str) -> None:
        self._reader.join(5)
        if self.monitor.returncode == 0:
            raise RunOver
        last = self.lines[-1][1] if self.lines else ""
        raise Broken(f"the monitor ended with {self.monitor.returncode} ({last}) while waiting for: {what}")

    def check_one_launch(self) -> None:
        if len({process.launch for process in self.processes()}) > 1:
            time.sleep(0.1)
            launches = {process.launch for process in self.processes()}
            if len(launches) > 1:
                raise Broken(f"processes of several launches live at once: {', '.join(sorted(launches))}")

    def _note_first_step(self) -> None:
        launch = self.launch()
        if launch and launch not in self._stepped:
            self._stepped.add(launch)
            launched_at = self._launched_at.get(int(launch.partition("-")[0]))
            if launched_at is not None:
                self.seen.first_steps.append(time.time() - launched_at)

    def wait_step(self, step: int) -> None:
        self.wait(lambda: self.launch() and self.step() >= step, f"step {step}")

    def wait_new_launch(self, old: str, least: int) -> int:
        """Wait until a launch other than `old` makes steps; returns the step that it went on from.

        Args:
            least: a checkpoint of this step was there, so no step before it may be repeated.
        """
        self.wait(lambda: self.launch() not in ("", old), f"a new launch after {old}")
        start = self.records("start")[-1]["step"]
        if start < least:
            raise Broken(f"the new launch went on from step {start}, where a checkpoint of step {least} was whole")
        return start

    def wait_progress(self, launch: str, steps: int = 3) -> None:
        """Wait until the same launch has made some more steps."""
        target = self.step() + steps

        def done() -> bool:
            now = self.launch()
            if now not in ("", launch):
                raise Broken(f"launch {launch} was given up for {now}, without need")
            return bool(now) and self.step() >= target

        self.wait(done, f"{steps} more steps of launch {launch}")

    @contextlib.contextmanager
    def slowed(self, seconds: float = 0.2) -> Iterator[None]:
        """Within the context, each step takes longer, so that a slow fault does not take up the whole run."""
        file = self.home / "slow.new"
        file.write_text(str(seconds))
        file.replace(self.home / "slow")
        try:
            yield
        finally:
            (self.home / "slow").unlink()

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            send(pid, signal.SIGKILL)
        self.wait(lambda: not any(is_alive(pid) for pid in pids), "the killed processes are gone", 20, may_end=True)

    def kill_all(self) -> None:
        """Send a signal to every process of the training at once."""
        while processes := self.processes():
            self.kill([process.pid for process in processes])

    def kill_monitor(self) -> None:
        self.monitor.kill()
        self.monitor.wait()
        self._reader.join(5)

    def end_monitor(self, expected: int, what: str) -> None:
        """Wait until the monitor has ended by itself, with this code."""
        self.wait(lambda: self.monitor.poll() is not None, f"the end of the monitor: {what}", may_end=True)
        self._reader.join(5)
        if self.monitor.returncode != expected:
            code = self.monitor.returncode
            raise Broken(f"{what}: the monitor ended with {code} ({self.lines[-1][1]}) instead of {expected}")

    def clear(self) -> None:
        """Leave no process, whatever happened."""
        if self.monitor is not None and self.monitor.poll() is None:
            self.kill_monitor()
        if self.sshd is not None:
            self.sshd.stop()
        deadline = time.monotonic() + 20
        while (processes := self.processes()) and time.monotonic() < deadline:
            for process in processes:
                send(process.pid, signal.SIGKILL)
            time.sleep(0.1)


def send(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
