"""Kinds of faults between the monitor and a host of --hosts: connections that are cut, or refused for a while."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from random import Random

from tests.chaos.faults import OVER_SSH, kind, relaunched
from tests.chaos.run import UNREACHABLE_AFTER, Broken, Run
from tests.sshd import make_key

LONGEST = UNREACHABLE_AFTER / 3
"""Seconds for which a host refuses: too few for it to count as lost."""
NO_LINGERING = struct.pack("ii", 1, 0)
"""Value for SO_LINGER: closing a socket resets the connection."""

Refusal = Callable[[Run, Random], AbstractContextManager[None]]


@contextlib.contextmanager
def no_refusal(run: Run, random: Random) -> Iterator[None]:
    run.sshd.drop_connections()
    yield


@contextlib.contextmanager
def another_key(run: Run, random: Random) -> Iterator[None]:
    """The host accepts another key than ours."""
    keys = run.sshd.directory / "authorized_keys"
    ours = keys.read_text()
    keys.write_text(make_key(run.home / "another_key") + "\n")
    run.sshd.drop_connections()
    yield
    keys.write_text(ours)


@contextlib.contextmanager
def no_workdir(run: Run, random: Random) -> Iterator[None]:
    """The project is gone, as with a mount."""
    away = run.workdir.with_name("workdir-away")
    run.workdir.rename(away)
    run.sshd.drop_connections()
    yield
    away.rename(run.workdir)


@contextlib.contextmanager
def reset(run: Run, random: Random) -> Iterator[None]:
    """A server in sshd's place resets each connection: at once, or at the login (a host that shuts down)."""
    server, at_login = run.sshd, random.random() < 0.6
    port = server.port
    server.stop()
    with Resetting(server.listen, port, server.host_key() if at_login else None):
        yield
    server.start()
    if server.port != port:
        raise RuntimeError(f"port {port} was taken by somebody else")


class Resetting:
    """Listens, and resets connections.

    Args:
        host_key: file of a host's key, for continuing to the login; None: reset at once.
    """

    def __init__(self, address: str, port: int, host_key: object | None):
        self._listener, self._host_key = socket.create_server((address, port)), host_key
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        # Wakes the server up in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGERING)
                if self._host_key is not None:
                    self._until_login(connection)
                connection.close()

    def _until_login(self, connection: socket.socket) -> None:
        import paramiko

        asked = threading.Event()

        class Server(paramiko.ServerInterface):
            def check_auth_none(self, username: str) -> int:
                asked.set()
                connection.close()
                return paramiko.AUTH_FAILED

        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.PKey.from_path(self._host_key))
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            transport.start_server(server=Server())
            asked.wait(5)
        transport.close()


def refused(refusal: Refusal) -> Callable[[Run, Random], str]:
    """Monitoring goes on once the host accepts us again, and the job is the same."""

    def throw(run: Run, random: Random) -> str:
        old, seconds = run.launch(), random.uniform(1.0, LONGEST)
        with run.slowed():
            with refusal(run, random):
                until = time.monotonic() + seconds
                run.wait(lambda: time.monotonic() > until, "the monitor lives on while the host refuses it")
            step = run.step()
            run.wait(lambda: heard_of(run) > step, f"the monitor hears of a step after {step}")
        run.wait_progress(old, 1)
        return f"refused for {seconds:.1f} s, and heard of again in the same launch"

    return throw


def heard_of(run: Run) -> int:
    """The last step that the monitor knows of."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run.out_dir / "monitor" / "status.json").read_text())["step"] or 0
    return 0


kind("ssh_cut", setups=OVER_SSH)(refused(no_refusal))
kind("ssh_another_key", setups=OVER_SSH)(refused(another_key))
kind("ssh_no_workdir", setups=OVER_SSH)(refused(no_workdir))
kind("ssh_reset", setups=OVER_SSH)(refused(reset))


@kind("ssh_refused_and_dead", setups=OVER_SSH)
def ssh_refused_and_dead(run: Run, random: Random) -> str:
    """All processes die while the host refuses us: the next launch waits for it."""
    old, least = run.launch(), run.newest_step()
    refusal = random.choice((another_key, no_workdir, reset))
    with refusal(run, random):
        run.kill_all()
        until = time.monotonic() + random.uniform(1.0, LONGEST)
        run.wait(lambda: time.monotonic() > until, "the monitor lives on while the host refuses it")
        if run.launch():
            raise Broken("a launch on a host that refuses the monitor")
    return f"{refusal.__name__.replace('_', ' ')}: {relaunched(run, old, least)}"
