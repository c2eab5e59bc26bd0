"""Claims of a run: one monitor claims it, keeps it while served or within its lease, and another may take it over
afterwards."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from monitor.claim import LEASE_SECONDS, Claim, Holder, Monitor, TakenOver
from utils.files import lock_file

ROOT = Path(__file__).resolve().parent.parent.parent


def monitor(name: str, **values: object) -> Monitor:
    return replace(Monitor.of_this_process(), id=name, **values)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "monitor"


def age(home: Path, seconds: float) -> None:
    """Make the last contact so long ago."""
    os.utime(home / "claim.json", (time.time() - seconds,) * 2)


@pytest.fixture
def served_elsewhere(home: Path) -> Iterator[subprocess.Popen]:
    """Monitor "first" holds the run, in its own process."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from dataclasses import replace; from pathlib import Path; from monitor.claim import *
claim = Claim(Path(sys.argv[1]))
assert claim.take(replace(Monitor.of_this_process(), id="first")) is None
print("taken", flush=True); sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"taken\n"
    yield process
    process.kill()
    process.wait()


def test_locks_as_nfs_gives_them(home: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS grants a shared lock only for a file open for reading, and an exclusive one only for a file open for
    writing."""
    flock = fcntl.flock

    def strict(file: BinaryIO, kind: int) -> None:
        if (kind & fcntl.LOCK_SH and not file.readable()) or (kind & fcntl.LOCK_EX and not file.writable()):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", strict)
    claim = Claim(home)
    assert claim.take(monitor("first")) is None
    assert Claim(home).take(monitor("first")) is None
    assert Claim(home).take(monitor("second")).is_served


def test_without_locks_the_lease_counts(home: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Claim(home).take(monitor("first")) is None
    assert Claim(home).take(monitor("second")).monitor.id == "first"
    age(home, 2 * LEASE_SECONDS)
    assert Claim(home).take(monitor("second")) is None
    # A process that trains there is told, and trains.
    lock_file(home / ".lock", "taken").close()


def test_the_second_is_told_who_has_it(home: Path, served_elsewhere: subprocess.Popen):
    """The server's lock counts even if the first monitor has not been heard of for long."""
    age(home, 10 * LEASE_SECONDS)
    holder = Claim(home).take(monitor("second"))
    assert holder.is_served and holder.monitor.id == "first" and holder.monitor.pid == served_elsewhere.pid
    assert f"(pid {served_elsewhere.pid}), since {time.strftime('%Y-')}" in str(holder)
    assert Holder.from_json(json.loads(json.dumps(holder.to_json()))) == holder


def test_a_lease_is_kept_for_who_is_out_of_reach(home: Path, served_elsewhere: subprocess.Popen):
    """Its connection and the process that served it are gone: nobody else gets the run, and the first gets it again."""
    served_elsewhere.kill()
    served_elsewhere.wait()
    age(home, 0.9 * LEASE_SECONDS)
    holder = Claim(home).take(monitor("second"))
    assert not holder.is_served and holder.silent == pytest.approx(0.9 * LEASE_SECONDS, abs=5)
    again = Claim(home)
    assert again.take(monitor("first")) is None
    again.check()
    # The first monitor is back: the lease counts from here.
    assert time.time() - (home / "claim.json").stat().st_mtime < 60


@pytest.mark.parametrize("how", ["the lease is over", "it is known to be dead", "it has let go"])
def test_the_run_is_free_again(home: Path, how: str):
    first, second = Claim(home), Claim(home)
    assert first.take(monitor("first")) is None
    if how == "it has let go":
        first.release()
    else:
        first._let_go()
        age(home, 1.1 * LEASE_SECONDS if how == "the lease is over" else 1.0)
    assert second.take(monitor("second"), "first" if how == "it is known to be dead" else "") is None
    second.check()
    # If the first comes back, it notices, and does not take the run back.
    if how != "it has let go":
        with pytest.raises(TakenOver, match="the monitor on .* since"):
            first.check()
        assert Claim(home).take(monitor("first")).monitor.id == "second"
        first.release()
    second.check()
    assert json.loads((home / "claim.json").read_text())["id"] == "second"


def test_several_servers_of_one_monitor(home: Path, served_elsewhere: subprocess.Popen):
    """Two nodes on one disk; or a new connection, while the host has not noticed that the old one is gone."""
    assert Claim(home).take(monitor("first")) is None


def test_of_two_that_come_at_once_one_gets_it(home: Path):
    """(The lock tells threads apart as it does processes.)"""
    barrier, names = threading.Barrier(4), ("a", "b", "c", "d")
    claims = {name: Claim(home) for name in names}

    def take(name: str) -> bool:
        barrier.wait()
        return claims[name].take(monitor(name)) is None

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            taken = dict(zip(names, pool.map(take, names)))
            assert sorted(taken.values()) == [False, False, False, True]
            claims[max(taken, key=taken.get)].release()


CENTURIES = json.dumps({"id": "x", "host": "h", "pid": 1, "since": 1e300, "machine": "", "boot": "", "pid_space": "",
                        "started": 0.0})  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"id": 3}', "\xff", "[" * 50_000, CENTURIES])
def test_a_damaged_claim_names_nobody(home: Path, content: str):
    home.mkdir()
    (home / "claim.json").write_bytes(content.encode("latin-1"))
    claim = Claim(home)
    assert claim.take(monitor("second")) is None
    (home / "claim.json").write_bytes(content.encode("latin-1"))
    # While the claim is served, the lock counts.
    assert Claim(home).take(monitor("third")).is_served
    claim.check()


def test_a_claim_that_was_swept_away_is_written_again(home: Path):
    claim = Claim(home)
    claim.take(monitor("first"))
    (home / "claim.json").unlink()
    claim._touched = -1e9
    claim.touch()
    assert json.loads((home / "claim.json").read_text())["id"] == "first"


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "values, is_dead",
    [
        ({}, False),
        ({"pid": dead_pid()}, True),
        # Its number now belongs to another process.
        ({"started": 1.0}, True),
        # Numbers from another container or machine mean nothing here.
        ({"pid": dead_pid(), "pid_space": "pid:[1]"}, False),
        ({"pid": dead_pid(), "host": "elsewhere"}, False),
        ({"boot": "of yesterday"}, True),
        ({"boot": "of yesterday", "machine": "another"}, False),
        ({"boot": "of yesterday", "machine": "", "here": {"machine": ""}}, False),
        ({"pid": dead_pid(), "boot": ""}, False),
    ],
)
def test_who_is_known_to_be_dead(values: dict, is_dead: bool):
    named = {"boot": "of today", "machine": "this", "pid_space": "pid:[7]"}
    here = monitor("here", **named | values.pop("here", {}))
    assert monitor("other", **named | values).is_known_dead(here) == is_dead
