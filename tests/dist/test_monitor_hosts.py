"""monitor_process.py over SSH. The two hosts are real sshd of this machine: on two addresses, or in two network
namespaces with their own file systems."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

import monitor.remote
import monitor_process
from checkpoint.folder import list_checkpoints
from monitor.command import TrainCommand
from monitor.hosts import read_hosts
from monitor.remote import RemoteNode
from monitor.supervisor import Supervisor, SupervisorOptions
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks
from tests.dist.test_runs import run_cases
from tests.runs import elsewhere, final_state, out_dir, records, same_bits
from tests.sshd import Sshd, free_port, missing

ROOT = Path(monitor_process.__file__).parent
SECRET = "correct-horse-battery-staple"
STEPS = 300
NAMESPACE = "z2a"

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def reference(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of an undisturbed run on two ranks."""
    flags = [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path_factory.mktemp('hosts') / 'reference'}",
        f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu", "--train_batch_size=2",
        "--gradient_accumulation_steps=2", "--valid_iters=2", f"--max_iters={STEPS}", "--num_threads=1",
        "--sample_tokens=4",
        "--save_interval=40", "--log_interval=10", *TINY_MODEL,
    ]  # fmt: skip
    assert run_ranks(2, run_cases, [flags]) == [[0]] * 2
    return flags


def write_hosts(path: Path, servers: list[Sshd], **more: object) -> Path:
    hosts = [
        {"host": server.listen, "port": server.port, "user": server.user, "key_file": str(server.client_key),
         "known_hosts": str(server.known_hosts), "workdir": str(ROOT), "python": sys.executable,
         "env": {"GLOO_SOCKET_IFNAME": "lo", "SERVICE_TOKEN": SECRET}} | more.get(server.listen, {})
        for server in servers
    ]  # fmt: skip
    path.write_text(yaml.safe_dump({"hosts": hosts, "rendezvous_port": free_port()}))
    return path


class Monitored:
    """The monitor as a process, with the visible state of its run."""

    def __init__(self, hosts: Path, flags: list[str], log: Path, *options: str):
        self.run_dir, self.log = out_dir(flags), log
        command = [
            sys.executable, "monitor_process.py", "--hosts", str(hosts), "--hang_after", "4", "--interval", "0.5",
            *options, "--", "torchrun", "--nproc_per_node=1", "train_my_ddp.py", *flags,
        ]  # fmt: skip
        with open(log, "ab") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, what: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def status(self) -> dict:
        try:
            return json.loads((self.run_dir / "monitor" / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def end(self, seconds: float = 180.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output()) from None


def beat(run_dir: Path, rank: int) -> dict:
    try:
        return json.loads((run_dir / "heartbeat" / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return {"step": -1, "phase": "", "launch": "", "pid": 0}


def training(run_dir: Path, attempt: int, step: int = 0) -> bool:
    now = beat(run_dir, 0)
    return now["launch"].startswith(f"{attempt}-") and now["phase"] == "step" and now["step"] >= step


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Processes whose command names the run directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(run_dir) in word for word in process.cmdline()):
                found.append(process)
    return found


def ends_everywhere(run_dir: Path) -> bool:
    """Whether nothing of the run is left; the process that served the monitor needs a moment to see that its connection
    ended."""
    deadline = time.monotonic() + 10
    while processes_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes_of(run_dir) == []


def kill_node(launch: str) -> int:
    """SIGKILL every process of a launch on one node."""
    killed = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("ZERO2ALL_LAUNCH") == launch:
                process.kill()
                killed += 1
    return killed


def secrets_in_sight(run_dir: Path, log: Path) -> list[str]:
    """Places where the secret of the hosts file can be read: command lines of all processes, and files of the run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(SECRET in word for word in process.cmdline()):
                found.append(f"process {process.pid}")
    for path in [log, *run_dir.rglob("*")]:
        # The run goes on meanwhile: heartbeats are replaced, old checkpoints deleted.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if SECRET.encode() in path.read_bytes():
                found.append(str(path))
    return found


@pytest.mark.slow
def test_two_hosts(reference: list[str], tmp_path: Path):
    """The run is started over SSH; the connections drop, which changes nothing; it is stopped on request and started
    again; one node is killed; the run finishes with the undisturbed run's bits, and nothing is left running."""
    flags = elsewhere(reference, tmp_path / "run")
    run_dir, log = out_dir(flags), tmp_path / "log"
    with Sshd(tmp_path / "a") as first, Sshd(tmp_path / "b", listen="127.0.0.2") as second:
        hosts = write_hosts(tmp_path / "hosts.yaml", [first, second])
        monitor = Monitored(hosts, flags, log)
        monitor.wait_for(lambda: training(run_dir, 1, 20))
        assert first.drop_connections() and second.drop_connections()
        seen = monitor.status()["updated"]
        step = beat(run_dir, 0)["step"]
        # Both hosts are heard of again, with a later step of the same launch.
        monitor.wait_for(lambda: monitor.status().get("updated", 0) > seen + 1 and monitor.status()["step"] > step)
        assert monitor.status()["attempt"] == 1 and monitor.status()["ranks"] == 2
        assert secrets_in_sight(run_dir, log) == []
        monitor.process.send_signal(signal.SIGTERM)
        assert monitor.end() == 75, monitor.output()
        assert ends_everywhere(run_dir)
        stopped_at = list_checkpoints(run_dir / "ckpt")[-1].step
        assert step < stopped_at < STEPS

        monitor = Monitored(hosts, flags, log)
        monitor.wait_for(lambda: training(run_dir, 2, stopped_at + 45))
        assert kill_node(beat(run_dir, 1)["launch"]) >= 2
        assert monitor.end() == 0, monitor.output()
    assert f"launch 2 with --resume\n[{first.listen}:{first.port}]" in monitor.output()
    assert "rank 1 ended without a word" in monitor.output() and "launch 3 with --resume" in monitor.output()
    assert ends_everywhere(run_dir) and secrets_in_sight(run_dir, log) == []
    check_losses(flags, reference)
    assert same_bits(final_state(flags, STEPS), final_state(reference, STEPS))


def check_losses(flags: list[str], reference: list[str]) -> None:
    """Equal, bit for bit, where the undisturbed run logged one; a stop adds a record of its own step."""
    seen, expected = ({r["step"]: r["loss"] for r in records(f, "train")} for f in (flags, reference))
    assert {step: seen.get(step) for step in expected} == expected


def refusal(hosts: Path, run_dir: Path, capsys: pytest.CaptureFixture) -> str:
    """Last line of a monitor that must end with 2 before anything runs."""
    command = ["--hosts", str(hosts), "--", "torchrun", "train_my_ddp.py", f"--out_dir={run_dir}", "--data_dir=none"]
    assert monitor_process.main(command) == 2
    assert not (run_dir / "ckpt").exists()
    return capsys.readouterr().out.splitlines()[-1]


def test_hosts_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """An unknown or changed host key, a wrong login, a wrong folder: one sentence, and nothing is started."""
    run_dir, path = tmp_path / "run", tmp_path / "hosts.yaml"
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with Sshd(tmp_path / "a") as server:
        line = refusal(write_hosts(path, [server], **{server.listen: {"workdir": "/nowhere"}}), run_dir, capsys)
        assert "/nowhere" in line and "does not run" in line
        line = refusal(write_hosts(path, [server], **{server.listen: {"python": "no-such-python"}}), run_dir, capsys)
        assert "no-such-python" in line and "not found" in line
        other = tmp_path / "other_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
        line = refusal(write_hosts(path, [server], **{server.listen: {"key_file": str(other)}}), run_dir, capsys)
        assert server.user in line and server.listen in line
        server.restart()
        line = refusal(write_hosts(path, [server]), run_dir, capsys)
        assert "SHA256:" in line and "ssh-keygen -R" in line
        server.known_hosts.write_text("")
        line = refusal(write_hosts(path, [server]), run_dir, capsys)
        assert "SHA256:" in line and "is unknown" in line
    line = refusal(write_hosts(path, [server]), run_dir, capsys)
    assert f"{server.listen}" in line and "refuses connections" in line


SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from runs.exits import write_exit_record
from runs.heartbeat import Heartbeat
run = Path(next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--out_dir=")))
heartbeat, step = Heartbeat(run / "heartbeat", 0, 1, os.environ["ZERO2ALL_LAUNCH"]), 0
while not (run / "go").exists():
    step += 1
    heartbeat.beat("step", step)
    time.sleep(0.05)
write_exit_record(Path(os.environ["ZERO2ALL_EXIT_DIR"]), 0, 0, "finished", step, world_size=1)
"""
"""A fake training that looks real to a monitor."""


def test_a_host_that_refuses_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The host's logins fail, then its folder is gone, for longer than a host may be silent. Nobody ends the job or
    takes it over meanwhile, and in the end the monitor sees it finish."""
    monkeypatch.setattr(monitor.remote, "_LATER", 0.3)
    monkeypatch.setattr(monitor.remote, "_LATER_AT_MOST", 0.3)
    monkeypatch.setattr(logging.getLogger("monitor"), "propagate", True)
    caplog.set_level(logging.INFO, "monitor")
    run_dir, script, workdir = tmp_path / "run", tmp_path / "train.py", tmp_path / "workdir"
    (run_dir / "monitor").mkdir(parents=True)
    script.write_text(SCRIPT)
    workdir.symlink_to(ROOT)
    command = TrainCommand.parse([sys.executable, str(script), f"--out_dir={run_dir}"])
    with Sshd(tmp_path / "a") as server:
        hosts = read_hosts(write_hosts(tmp_path / "hosts.yaml", [server], **{server.listen: {"workdir": str(workdir)}}))
        node = RemoteNode(hosts.hosts[0], str(run_dir), 0)
        node.open()
        options = SupervisorOptions(interval=0.1, unreachable_after=0.5, show_output=False)
        supervisor, codes = Supervisor([node], command, run_dir, options, hosts), []
        thread = threading.Thread(target=lambda: codes.append(supervisor.run()), daemon=True)
        thread.start()

        def until(what: Callable[[], object]) -> None:
            deadline = time.monotonic() + 60
            while not what():
                assert time.monotonic() < deadline and thread.is_alive(), caplog.text
                time.sleep(0.02)

        def refused(begin: Callable[[], object], end: Callable[[], object], sentence: str) -> None:
            lost, seen = (caplog.text.count(text) for text in ("has not answered for", "is seen again"))
            begin()
            server.drop_connections()
            until(lambda: sentence in caplog.text and caplog.text.count("has not answered for") > lost)
            end()
            until(lambda: caplog.text.count("is seen again") > seen)

        try:
            until(lambda: (supervisor.status.step or 0) > 3)
            job, keys = beat(run_dir, 0), server.directory / "authorized_keys"
            ours = keys.read_text()
            refused(lambda: keys.write_text(""), lambda: keys.write_text(ours), "refuses the login")
            # Another monitor, on the host itself: it cannot know that the first is dead, and the first is not.
            other = subprocess.run(
                [sys.executable, "monitor_process.py", "--", sys.executable, script, f"--out_dir={run_dir}"], cwd=ROOT,
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert other.returncode == 2 and f"(pid {os.getpid()}), since " in other.stdout, other.stdout
            away = tmp_path / "away"
            refused(lambda: workdir.rename(away), lambda: away.rename(workdir), "does not run in")
            assert {name: beat(run_dir, 0)[name] for name in ("pid", "launch")} == {
                name: job[name] for name in ("pid", "launch")
            }
            (run_dir / "go").touch()
            thread.join(60)
            assert codes == [0], caplog.text
        finally:
            supervisor.request_stop()
            supervisor.request_stop()
            thread.join(60)
            supervisor.close()
    assert caplog.messages[-1] == "finished" and supervisor.policy.restarts == 0


def system(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=30)


def remove_stale_namespaces() -> None:
    """Remove namespaces of killed tests, whose addresses would be taken for ours."""
    for path in Path("/run/netns").glob(f"{NAMESPACE}*"):
        pid = path.name.removeprefix(NAMESPACE)[:-1]
        if not psutil.pid_exists(int(pid)):
            for command in (f"ip link del {link_to(path.name)}", f"ip netns del {path.name}"):
                with contextlib.suppress(subprocess.SubprocessError):
                    system(command)


def link_to(namespace: str) -> str:
    """This host's end of the link to a namespace."""
    return f"m{namespace.removeprefix(NAMESPACE)}"


@contextlib.contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Two hosts that reach each other over a link `data`, and this host over separate links."""
    remove_stale_namespaces()
    names = [f"{NAMESPACE}{os.getpid()}{end}" for end in "ab"]
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names):
            system(f"ip netns add {name}")
            stack.callback(system, f"ip netns del {name}")
            system(f"ip link add {link_to(name)} type veth peer name admin netns {name}")
            # Deleting the namespace would do so too, at some later time.
            stack.callback(system, f"ip link del {link_to(name)}")
            system(f"ip addr add 10.78.{number}.1/24 dev {link_to(name)} && ip link set {link_to(name)} up")
            inside = f"ip netns exec {name}"
            system(f"{inside} ip addr add 10.78.{number}.2/24 dev admin && {inside} ip link set admin up")
            system(f"{inside} ip link set lo up")
        system(f"ip link add data netns {names[0]} type veth peer name data netns {names[1]}")
        for number, name in enumerate(names):
            system(f"ip netns exec {name} ip addr add 10.79.0.{number + 1}/24 dev data")
            system(f"ip netns exec {name} ip link set data up")
        yield names


def wait_until_it_answers(server: Sshd) -> None:
    """Over a link that was made just now."""
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((server.listen, server.port), timeout=1).close()
            return
        except OSError as error:
            assert time.monotonic() < deadline, f"{error}\n{server.log.read_text()}"
            time.sleep(0.05)


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with two_namespaces():
            return True
    except subprocess.SubprocessError:
        return False


@pytest.mark.soak
def test_a_link_is_cut_between_hosts_without_a_common_file_system(reference: list[str], tmp_path: Path):
    """The ranks hang, because nothing tells them that the link is gone. The monitor notices, ends both hosts, and
    restarts once they reach each other: the undisturbed run's bits."""
    if not can_make_namespaces():
        pytest.skip("needs root and network namespaces")
    flags = elsewhere(reference, tmp_path / "run")
    run_dir, log = out_dir(flags), tmp_path / "log"
    run_dir.mkdir()
    with two_namespaces() as names, contextlib.ExitStack() as stack:
        servers, disks = [], []
        for number, name in enumerate(names):
            disks.append(tmp_path / f"disk-{number}")
            disks[-1].mkdir()
            # Each host sees its own disk under the name of the run directory.
            own_disk = f"mount --make-rprivate / && mount --bind {disks[-1]} {run_dir} && exec \"$@\""
            prefix = ["ip", "netns", "exec", name, "sh", "-c", own_disk, "sh"]
            servers.append(stack.enter_context(
                Sshd(tmp_path / name, listen=f"10.78.{number}.2", prefix=prefix)
            ))  # fmt: skip
            wait_until_it_answers(servers[-1])
        data_link = {"env": {"GLOO_SOCKET_IFNAME": "data"}}
        more = {s.listen: data_link | {"address": f"10.79.0.{n + 1}"} for n, s in enumerate(servers)}
        monitor = Monitored(write_hosts(tmp_path / "hosts.yaml", servers, **more), flags, log)
        monitor.wait_for(lambda: training(disks[0], 1, 100))
        system(f"ip netns exec {names[0]} ip link set data down")
        monitor.wait_for(lambda: monitor.status().get("attempt") == 2)
        system(f"ip netns exec {names[0]} ip link set data up")
        assert monitor.end() == 0, monitor.output()
    output = monitor.output()
    assert "hang: no sign of life from rank" in output
    assert output.count("finish_grad_sync") + output.count("all_sum") >= 2, "the stacks of both ranks are in the log"
    steps = [[checkpoint.step for checkpoint in list_checkpoints(disk / "ckpt")] for disk in disks]
    assert steps[0] == steps[1]
    for disk in disks:
        assert not list((disk / "ckpt").glob(".*"))
    check_losses(elsewhere(flags, disks[0]), reference)
    assert same_bits(final_state(elsewhere(flags, disks[0]), STEPS), final_state(reference, STEPS))
    weights = [(disk / "ckpt" / f"step-{STEPS}" / "model.safetensors").read_bytes() for disk in disks]
    assert weights[0] == weights[1]
