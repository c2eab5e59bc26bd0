"""Addresses that the launcher listens on, the meeting of nodes, and strangers' text in its store, which never becomes
code."""

import base64
import json
import pickle
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from parallel import launch, listen
from parallel.launch import Follower, Leader, MeetingPoint, find_meeting_point, parser_of_flags, seats
from parallel.listen import LOOPBACK, bind, own_address

# Interfaces of a host whose own name means loopback to it, as on Debian, and the names that it resolves.
INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1", "fe80::1%eth0"], "ib0": ["10.1.0.1"]}
NAMES = {"me": ["127.0.1.1"], "me-ib": ["10.1.0.1"], "other": ["10.0.0.2"], "both": ["10.0.0.9", "10.0.0.1"],
         "localhost": ["127.0.0.1"]}  # fmt: skip


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(names: list[str]) -> list[SimpleNamespace]:
        families = (socket.AF_INET6 if ":" in name else socket.AF_INET for name in names)
        return [SimpleNamespace(address=name, family=family) for name, family in zip(names, families)]

    interfaces = {name: addresses(own) for name, own in INTERFACES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    is_address = lambda name: name.replace(".", "").isdecimal() or ":" in name  # noqa: E731
    monkeypatch.setattr(listen, "addresses_of", lambda name: [name] if is_address(name) else NAMES.get(name, []))


@pytest.fixture(autouse=True)
def interfaces_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is left in this process's environment."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")


@pytest.mark.parametrize("wanted, local_addr, interface, expected", [
    ("10.0.0.1", None, None, "10.0.0.1"),
    ("me-ib", "10.0.0.1", None, "10.1.0.1"),
    ("both", None, None, "10.0.0.1"),
    ("127.0.0.2", None, None, "127.0.0.2"),
    ("localhost", None, None, "127.0.0.1"),
    ("me", "10.0.0.1", None, "10.0.0.1"),
    ("me", None, "ib0", "10.1.0.1"),
    ("me", None, None, None),
    ("other", None, "eth1", None),
    ("nowhere", "other", None, None),
])  # fmt: skip
def test_the_address_to_listen_on(host: None, wanted: str, local_addr: str, interface: str, expected: str | None):
    if expected is None:
        with pytest.raises(ValueError, match=f"^{wanted} .* is not an address of this machine .*10.0.0.1, 10.1.0.1"):
            own_address(wanted, local_addr, interface)
    else:
        assert own_address(wanted, local_addr, interface) == expected
        assert listen.interface_of(expected) == next(
            name for name, own in INTERFACES.items() if expected in own or (name == "lo" and expected[:4] == "127.")
        )


def place_of(*flags: str) -> MeetingPoint:
    place = find_meeting_point(parser_of_flags().parse_args([*flags, "t.py"]))
    if place.listening is not None:
        place.listening.close()
    return place


@pytest.mark.parametrize("flags", [
    ["--standalone"], [], ["--nnodes=1", "--rdzv_backend=c10d", "--rdzv_endpoint=10.0.0.9"],
    ["--master_addr=10.0.0.9", "--master_port=0"],
])  # fmt: skip
def test_one_node_listens_on_loopback(flags: list[str]):
    place = place_of(*flags)
    assert place.listening is not None and (place.host, place.nnodes) == (LOOPBACK, 1)


@pytest.mark.parametrize("flags, leads", [
    (["--rdzv_endpoint=127.0.0.3:{port}"], True),
    (["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.3:{port}", "--rdzv_conf=is_host=0,join_timeout=7"], False),
    (["--master_addr=127.0.0.3", "--master_port={port}", "--node_rank=0"], True),
    (["--master_addr=127.0.0.3", "--master_port={port}", "--node_rank=1"], False),
    (["--rdzv_endpoint=192.0.2.77:{port}"], False),
])  # fmt: skip
def test_the_node_that_leads(flags: list[str], leads: bool):
    with bind("127.0.0.3", 0) as free:
        port = free.getsockname()[1]
    place = place_of("--nnodes=2", *(flag.format(port=port) for flag in flags))
    assert (place.listening is not None, place.port) == (leads, port)
    assert place.timeout_s == (7 if "join_timeout" in str(flags) else 600)


@pytest.mark.parametrize("flags, sentence", [
    (["--nnodes=1:2"], "--nnodes=1:2: give one number"),
    (["--nnodes=two"], "--nnodes=two: give one number"),
    (["--standalone", "--nnodes=2"], "--standalone is for one machine"),
    (["--rdzv_backend=etcd"], "--rdzv_backend=etcd: leave it out"),
    (["--rdzv_conf=read_timeout=3"], "--rdzv_conf: read_timeout=3 has no meaning here"),
    (["--rdzv_conf=is_host=maybe"], "--rdzv_conf: is_host=maybe has no meaning here"),
    (["--nnodes=2", "--node_rank=2"], "--node_rank=2: with --nnodes=2 it counts from 0 to 1"),
    (["--nnodes=2", "--node_rank=1", "--rdzv_conf=is_host=1"], "--node_rank=1 contradicts is_host"),
    (["--nnodes=2", "--rdzv_endpoint=127.0.0.1:0"], "--rdzv_endpoint=127.0.0.1:0: several nodes must agree on a port"),
])  # fmt: skip
def test_flags_that_cannot_work(flags: list[str], sentence: str, capfd: pytest.CaptureFixture):
    assert launch.launch([*flags, "t.py"]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"launch: {sentence}") and said.count("\n") == 1


@pytest.mark.parametrize("local_addr, interface", [("10.1.0.1", "ib0"), ("me", None), ("other", None)])
def test_the_interface_of_a_node_that_follows(
    host: None, capfd: pytest.CaptureFixture, local_addr: str, interface: str | None
):
    """Its name may mean nothing to the host itself: then its route to the first host counts, and it says so."""
    place = place_of("--nnodes=2", "--rdzv_endpoint=10.0.0.9:1", f"--local_addr={local_addr}")
    assert (place.interface, place.listening) == (interface, None)
    said = capfd.readouterr().err
    assert said == (
        "" if interface else f"launch: --local_addr={local_addr} is not on this machine: using the address that "
        "reaches 10.0.0.9:1\n"
    )  # fmt: skip


def test_a_port_that_another_has(capfd: pytest.CaptureFixture):
    with bind(LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        assert launch.launch([f"--master_port={port}", "t.py"]) == 1
        assert f"launch: cannot listen at 127.0.0.1, port {port}: " in capfd.readouterr().err
        # Of two launchers on one machine without a chosen leader, the second one follows.
        assert place_of("--nnodes=2", f"--rdzv_endpoint=127.0.0.1:{port}").listening is None


@pytest.mark.parametrize("wishes, nnodes, expected", [
    ({}, 1, [0]),
    ({}, 2, [0, None]),
    ({1: None, 2: None}, 3, [0, 1, 2]),
    ({1: 2, 2: 1}, 3, [0, 2, 1]),
    ({1: None, 2: 1}, 3, [0, 2, 1]),
    ({1: 1, 2: 1}, 3, [0, 2, None]),
    ({1: None, 2: None, 3: None}, 3, [0, 1, 2]),
    ({1: 0, 2: 3, 3: -1}, 3, [0, None, None]),
])  # fmt: skip
def test_who_gets_which_rank(wishes: dict[int, int | None], nnodes: int, expected: list[int | None]):
    assert seats(wishes, nnodes) == expected


class Nodes:
    """Nodes of a job, each in a thread; a node's answers are (rank, number of nodes, port of the ranks' store)."""

    def __init__(self, nnodes: int, timeout_s: float = 20.0):
        self.nnodes, self.timeout = nnodes, timeout_s
        self.listening = bind(LOOPBACK, 0)
        self.port = self.listening.getsockname()[1]
        self.answers: dict[str, object] = {}
        self.threads: list[threading.Thread] = []
        self.kept: list[Leader | Follower] = []
        """The leader's store lives as long as the leader."""

    def start(self, name: str, node_rank: int | None = None, leads: bool = False, run_id: str = "job", times: int = 1):
        place = MeetingPoint(self.nnodes, node_rank, LOOPBACK, self.port, self.timeout)
        place.listening = self.listening if leads else None
        node = (Leader if leads else Follower)(place, run_id)
        self.kept.append(node)

        def meet() -> None:
            try:
                met = [node.next_rendezvous() for _ in range(times)]
                self.answers[name] = [(m.rank, m.world_size, m.bootstrap_store_info.master_port) for m in met]
            except RendezvousTimeoutError as error:
                self.answers[name] = str(error)

        self.threads.append(threading.Thread(target=meet))
        self.threads[-1].start()
        return node

    def stranger(self) -> dist.TCPStore:
        return dist.TCPStore(LOOPBACK, self.port, is_master=False, timeout=timedelta(seconds=5))

    def join(self) -> dict[str, object]:
        for thread in self.threads:
            thread.join(30)
        return self.answers


def test_nodes_meet_once_for_each_attempt():
    """By rank or by arrival; the ranks of a later attempt get a store without the last attempt's keys."""
    nodes = Nodes(3)
    nodes.start("third", node_rank=2, times=2)
    leader = nodes.start("first", leads=True, times=2)
    nodes.start("second", times=2)
    answers = nodes.join()
    assert [answers[name][0] for name in ("first", "second", "third")] == [(rank, 3, nodes.port) for rank in range(3)]
    again = {answers[name][1] for name in answers}
    assert {rank for rank, _, _ in again} == {0, 1, 2} and len({port for _, _, port in again} | {nodes.port}) == 2
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {a.ip for a in listening if a.port in {nodes.port, leader._of_ranks.port}} == {LOOPBACK}


def test_a_node_that_is_not_expected_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """It came too late, or belongs to another job, and says so."""
    monkeypatch.setattr(launch, "_CONNECT_S", 1.0)
    nodes = Nodes(2, timeout_s=1.5)
    nodes.start("stranger", run_id="another")
    nodes.start("leader", leads=True)
    nodes.start("second", node_rank=1)
    while "second" not in nodes.answers:
        time.sleep(0.01)
    nodes.start("late")
    answers = nodes.join()
    assert answers["leader"] == [(0, 2, nodes.port)] and answers["second"] == [(1, 2, nodes.port)]
    for name in ("late", "stranger"):
        assert "is another one, or has begun: are --rdzv_id and --nnodes the same everywhere" in answers[name]


def test_a_node_that_died_while_it_waited_has_lost_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_STALE_S", 0.5)
    nodes = Nodes(3)
    nodes.start("leader", leads=True)
    # Its ticket and its first beat, then nothing more.
    talk = dist.PrefixStore("nodes/job/1", nodes.stranger())
    talk.set(f"node/{talk.add('tickets', 1)}", json.dumps([None, 1]))
    nodes.start("again")
    time.sleep(0.8)
    assert not nodes.answers
    nodes.start("third")
    answers = nodes.join()
    assert {answers[name][0][0] for name in ("again", "third")} == {1, 2}


class Opener:
    """Code that runs when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_from_outside_is_never_loaded(tmp_path: Path):
    """Anybody who reaches the port while the nodes gather can write into the store, even under the keys that torchrun's
    rendezvous would load and this one reads; the nodes meet all the same."""
    hostile = pickle.dumps(Opener(tmp_path / "opened"))
    nodes = Nodes(2)
    nodes.start("leader", leads=True)
    store = nodes.stranger()
    for key in ("torch.rendezvous.job", "torch.rendezvous.none", "/torch.rendezvous.job"):
        store.set(key, base64.b64encode(hostile))
    talk = dist.PrefixStore("nodes/job/1", store)
    for content in (hostile, base64.b64encode(hostile), b"\xff", b"[", b"7", b"[[], {}]", b'["1", 2]', b"null"):
        talk.set(f"node/{talk.add('tickets', 1)}", content)
    nodes.start("second")
    assert nodes.join() == {"leader": [(0, 2, nodes.port)], "second": [(1, 2, nodes.port)]}
    assert not (tmp_path / "opened").exists()
