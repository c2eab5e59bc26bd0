"""A node behind a connection that fails in every way, with a made-up network: the meaning of each failure, and the time
of the next try."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import monitor.remote
import monitor_process
from monitor.claim import Monitor, TakenOver
from monitor.hosts import HostEntry
from monitor.node import LocalNode, serve
from monitor.remote import RemoteNode
from monitor.status import Status
from monitor.supervisor import Supervisor
from utils.ssh import BrokeOff, HostKeyRefused, LoginRefused, SSHProblem, SSHTarget, Unreachable

REFUSED = LoginRefused("me@far:22 refuses the login (tried a key; the host accepts publickey): check the user name")
CHANGED = HostKeyRefused("the key of far has changed: it now shows ssh-ed25519 SHA256:x")
UNKNOWN = HostKeyRefused("far is unknown and shows the key ssh-ed25519 SHA256:x")
CUT = BrokeOff("far:22 can be reached, but no SSH connection can be made, check the port: it closed the connection")
SILENT = Unreachable("far:22 does not answer within 10 s: check the address, the network and firewalls")
NO_FOLDER = b"sh: 1: cd: can't cd to /w\n"


class Channel:
    """An SSH channel to `python -m monitor.node`, or to a shell that only complains."""

    def __init__(self, network: "Network"):
        self._network, self._out = network, b""
        self._node = LocalNode(network.run_dir)

    def exec_command(self, command: str) -> None:
        self._network.commands.append(command)

    def settimeout(self, seconds: float) -> None:
        pass

    def sendall(self, content: bytes) -> None:
        if self._network.complaint is None and not self._network.is_cut:
            self._out += b"".join(line.encode() + b"\n" for line in serve(self._node, content.decode().splitlines()))

    def recv(self, most: int) -> bytes:
        if self._network.is_cut:
            raise TimeoutError
        piece, self._out = self._out[:most], self._out[most:]
        return piece

    def makefile_stderr(self, mode: str) -> SimpleNamespace:
        return SimpleNamespace(read=lambda most: self._network.complaint or b"")

    def close(self) -> None:
        self._node.close()


class Network:
    def __init__(self, run_dir: Path):
        self.run_dir, self.now = run_dir, 1000.0
        self.problem: Exception | None = None
        self.complaint: bytes | None = None
        self.is_cut = False
        self.commands: list[str] = []
        self.attempts: list[float] = []

    def connect(self, target: SSHTarget, **_: object) -> SimpleNamespace:
        self.attempts.append(self.now - 1000.0)
        if self.problem is not None:
            raise self.problem
        channel = Channel(self)
        transport = SimpleNamespace(open_session=lambda timeout: channel)
        return SimpleNamespace(get_transport=lambda: transport, close=lambda: None)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network(tmp_path / "run")
    monkeypatch.setattr(monitor.remote, "connect", network.connect)
    return network


@pytest.fixture
def node(network: Network) -> Iterator[RemoteNode]:
    node = RemoteNode(HostEntry("far", "/w"), str(network.run_dir), 0, clock=lambda: network.now)
    yield node
    node.close()


def fail(network: Network, how: Exception | bytes | None) -> None:
    network.problem = how if isinstance(how, Exception) else None
    network.complaint = how if isinstance(how, bytes) else None


@pytest.mark.parametrize("how", [REFUSED, CHANGED, UNKNOWN, CUT, SILENT, NO_FOLDER])
def test_the_first_contact_says_what_is_wrong(network: Network, node: RemoteNode, how: Exception | bytes):
    fail(network, how)
    with pytest.raises(ValueError if isinstance(how, bytes) else type(how)):
        node.open()


@pytest.mark.parametrize(
    "how, delays",
    # fail2ban locks out after five failures in ten minutes.
    [(SILENT, [1, 2, 4, 8, 15, 15]), *((how, [60, 120, 240, 300, 300]) for how in (REFUSED, CHANGED, UNKNOWN, CUT)),
     (NO_FOLDER, [60, 120, 240]), (OSError(24, "Too many open files"), [60, 120])],
)  # fmt: skip
def test_after_that_it_is_out_of_reach(
    network: Network, node: RemoteNode, said: pytest.LogCaptureFixture, how: Exception | bytes, delays: list[int]
):
    """Any answer may be due to a reboot: an account that the network does not know yet, a folder that is not mounted.
    The host is asked again, less often if it may object, and taken as it is when it answers."""
    node.open()
    node.holds_checkpoint()
    node._drop()
    fail(network, how)
    network.attempts.clear()
    while len(network.attempts) <= len(delays):
        with pytest.raises(Unreachable, match="far"):
            node.holds_checkpoint()
        network.now += 0.5
    waits = [after - before for before, after in zip(network.attempts, network.attempts[1:])]
    assert waits == pytest.approx(delays, abs=0.6)
    within = [sum(at <= other < at + 600 for other in network.attempts) for at in network.attempts]
    assert max(within) < 5 or how is SILENT
    # One line, not one each time; silence alone is reported only if it lasts.
    assert said.text.count("its job goes on, and it is tried again in") == (0 if how is SILENT else 1)
    assert said.text.count("Nothing is sent to it until its key is the known one") == isinstance(how, HostKeyRefused)
    fail(network, None)
    network.now += 300
    assert node.holds_checkpoint() is False
    assert "far answers again" in said.text
    # The next trouble starts counting afresh.
    node._drop()
    fail(network, how)
    for _ in range(2):
        with pytest.raises(Unreachable):
            node.holds_checkpoint()
    network.now += delays[0]
    before = len(network.attempts)
    with pytest.raises(Unreachable):
        node.holds_checkpoint()
    assert len(network.attempts) == before + 1


def test_a_poll_does_not_wait_for_a_connection(network: Network, node: RemoteNode):
    node.open()
    network.is_cut = True
    with pytest.raises(Unreachable, match="far does not answer"):
        node.poll(0)
    network.is_cut = False
    with contextlib.suppress(Unreachable):
        # (It may be quick.)
        node.poll(0)
    wait([node._connecting] if node._connecting else [])
    assert node.poll(0).running is False
    assert len(network.attempts) == 2


def who(name: str) -> Monitor:
    return replace(Monitor.of_this_process(), id=name)


def test_a_new_connection_claims_what_the_old_one_had(network: Network, node: RemoteNode):
    """Within the lease, even though the host has not noticed that the old connection is gone."""
    node.open()
    assert node.claim(who("first")) is None
    node._drop()
    assert node.holds_checkpoint() is False
    with pytest.raises(ValueError, match="far: "):
        node._request("no such request")
    other = LocalNode(network.run_dir)
    assert other.claim(who("second")).is_served
    node.release()
    assert other.claim(who("second")) is None


def test_a_monitor_that_was_displaced_learns_so_with_its_next_connection(network: Network, node: RemoteNode):
    node.open()
    node.claim(who("first"))
    node._drop()
    (network.run_dir / "monitor" / "claim.json").unlink()
    other = LocalNode(network.run_dir)
    # The process that served the first monitor there has ended with its connection.
    (network.run_dir / "monitor" / ".claim-lock").unlink()
    assert other.claim(who("second")) is None
    for touch in (node.holds_checkpoint, node.kill):
        with pytest.raises(TakenOver, match="far: the monitor on "):
            touch()


def test_failures_keep_their_number(network: Network, node: RemoteNode, monkeypatch: pytest.MonkeyPatch):
    """The number tells the monitor a full disk from other failures."""
    node.open()

    def full(self: LocalNode) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalNode, "holds_checkpoint", full)
    with pytest.raises(OSError, match="far: No space left on device") as caught:
        node.holds_checkpoint()
    assert caught.value.errno == 28 and not isinstance(caught.value, SSHProblem)


def build(home: Path) -> Supervisor:
    (home / "hosts.yaml").write_text("hosts: [{host: far, workdir: /w}]")
    words = ["--hosts", str(home / "hosts.yaml"), "--", "torchrun", "t.py", f"--out_dir={home / 'run'}"]
    return monitor_process.build(*monitor_process.parse_arguments(words))


@pytest.mark.parametrize("how", [SILENT, REFUSED, NO_FOLDER])
def test_a_new_monitor_waits_for_hosts_that_the_last_one_had_reached(
    network: Network, tmp_path: Path, how: Exception | bytes
):
    """The machines have been switched on again, in any order. A host that was never reached is a mistake."""
    fail(network, how)
    (tmp_path / "run" / "monitor").mkdir(parents=True)
    with pytest.raises((ValueError, SSHProblem)):
        build(tmp_path)
    Status("running", hosts=["far"]).write(tmp_path / "run")
    (node,) = build(tmp_path).nodes
    with pytest.raises(Unreachable, match="far"):
        node.claim(who("first"))
    fail(network, None)
    node._next_attempt = 0.0
    assert node.claim(who("first")) is None
    node.close()


def test_a_host_with_another_version_is_told(network: Network, node: RemoteNode, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(monitor.node, "PROTOCOL", 1)
    with pytest.raises(ValueError, match="far has another version of zero2all in /w than this monitor"):
        node.open()
    assert "-m monitor.node" in network.commands[0]


def test_the_home_directory_is_the_hosts(network: Network, node: RemoteNode):
    node.host, node.run_dir = replace(node.host, workdir="~/my zero2all", python="~/venv/bin/python"), "~/runs/a"
    node.open()
    assert network.commands[0].startswith("cd ~/'my zero2all' && exec ~/venv/bin/python -m monitor.node ")
    # The option takes a path as any command does.
    assert "--run_dir '~/runs/a'" in network.commands[0]
    node.close()
