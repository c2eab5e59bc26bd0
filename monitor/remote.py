"""A node behind an SSH connection: `python -m monitor.node` runs there and takes requests on its standard input.

The connection may drop at any time: the job goes on, and the next request connects again. A host that was reached
before counts as out of reach whatever it answers now (no login, no folder, another key). It is asked again, soon if
nothing answers at the address, otherwise after minutes, since hosts shut out those who come too often. Nothing is sent
to a host whose key has changed until its key is the one in known_hosts.
"""

import json
import logging
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from monitor.claim import Holder, Monitor, TakenOver
from monitor.hosts import HostEntry
from monitor.node import PROTOCOL, Launch, NodeReport, Obstacle
from utils.paths import for_remote_shell
from utils.ssh import BrokeOff, HostKeyRefused, SSHProblem, Unreachable, connect

logger = logging.getLogger("monitor")

_MOST_BYTES = 1 << 24
_SOON, _SOON_AT_MOST = 1.0, 15.0
"""Seconds before the next attempt if nothing answered; doubled each time."""
_LATER, _LATER_AT_MOST = 60.0, 300.0
"""The same if something answered. fail2ban, by default, shuts out after five failures within ten minutes."""


class OtherVersion(ValueError):
    """The host has another version of zero2all."""


class RemoteNode:
    """The job on a host of the hosts file, with the methods of LocalNode.

    All methods raise SSHProblem if the host cannot be reached, ValueError if the request is wrong, OSError if the host
    could not do it now, and TakenOver if another monitor has the run.
    """

    def __init__(
        self, host: HostEntry, run_dir: str, index: int, timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.host, self.run_dir, self.index = host, run_dir, index
        self.name = f"{host.host}:{host.port}" if host.port else host.host
        self._timeout, self._clock = timeout_s, clock
        self._client = self._channel = None
        self._buffer = b""
        self._connecting: Future | None = None
        self._thread = ThreadPoolExecutor(1, f"ssh-{host.host}")
        self._who: Monitor | None = None
        self._was_open = False
        self._problem: SSHProblem | None = None
        self._next_attempt = self._delay = 0.0

    def open(self, confirm: Callable[[str, str, str], bool] | None = None) -> None:
        """Connect and start the server on the host.

        Args:
            confirm: is asked about the key of an unknown host, see utils/ssh.py.
        Raises:
            ValueError: the host has no zero2all of this version where the hosts file says.
            TakenOver: the run was claimed, and another monitor has claimed it since.
        """
        self._drop()
        self._client = connect(self.host.target, confirm=confirm, timeout_s=self._timeout)
        command = (
            f"cd {for_remote_shell(self.host.workdir)} && exec {for_remote_shell(self.host.python)} -m monitor.node "
            f"--run_dir {shlex.quote(self.run_dir)} --index {self.index}"
        )
        try:
            self._channel = self._client.get_transport().open_session(timeout=self._timeout)
            self._channel.exec_command(command)
            hello = self._exchange({"do": "hello"}, 3 * self._timeout)["answer"]
        except Exception as error:
            # paramiko has many errors of its own; after any of them there is no connection.
            complaint = self._complaint()
            self._drop()
            if isinstance(error, ValueError) or complaint:
                raise ValueError(
                    f"{self.name}: `{self.host.python} -m monitor.node` does not run in {self.host.workdir}: "
                    f"{complaint or error}"
                ) from None
            raise Unreachable(f"{self.name}: the connection was lost ({error})") from None
        if hello["protocol"] != PROTOCOL:
            self._drop()
            raise OtherVersion(
                f"{self.name} has another version of zero2all in {self.host.workdir} than this monitor: bring the "
                f"older one up to date, and start the monitor again"
            )
        self._claim_again()
        self._was_open = True

    def _claim_again(self) -> None:
        """Renew the claim over the new connection."""
        try:
            holder = self._claim("") if self._who is not None else None
        except (OSError, ValueError) as error:
            self._drop()
            raise Unreachable(f"{self.name}: {error}") from None
        if holder is not None:
            self._drop()
            raise TakenOver(f"{self.name}: {holder}")

    def expect(self, problem: OSError | ValueError) -> None:
        """Wait for a host that did not answer as it should, but is known to have answered an earlier monitor."""
        self._was_open = True
        self._out_of_reach(problem)

    def _complaint(self) -> str:
        """The last line that the host's shell or Python wrote to standard error."""
        try:
            self._channel.settimeout(2.0)
            text = self._channel.makefile_stderr("rb").read(4000).decode(errors="replace")
        except (OSError, AttributeError):
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "".join(c if c.isprintable() else "?" for c in lines[-1]) if lines else ""

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = self._channel = None
        self._buffer = b""

    def _exchange(self, request: dict, timeout_s: float) -> dict:
        self._channel.settimeout(timeout_s)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while b"\n" not in self._buffer:
            piece = self._channel.recv(1 << 16)
            if not piece or len(self._buffer) > _MOST_BYTES:
                raise Unreachable(f"{self.name}: the connection was lost")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _connect_again(self, wait: bool) -> None:
        """See that there is a connection; a new one is made in a thread of its own.

        Raises:
            Unreachable: the connection is not there yet and `wait` is false, or it is too soon to try again.
        """
        if self._connecting is None and self._channel is None:
            if self._clock() < self._next_attempt:
                raise self._problem
            self._connecting = self._thread.submit(self.open)
        if self._connecting is None:
            return
        if not wait and not self._connecting.done():
            raise Unreachable(f"{self.name}: connecting again")
        attempt, self._connecting = self._connecting, None
        try:
            attempt.result()
        except (OSError, ValueError) as error:
            if not self._was_open:
                raise
            raise self._out_of_reach(error) from None
        if self._problem is not None:
            logger.info("%s answers again", self.name)
        self._problem, self._next_attempt, self._delay = None, 0.0, 0.0

    def _out_of_reach(self, error: OSError | ValueError) -> Unreachable:
        """The problem that a failed attempt means for a host that was reached before. Also sets the time of the next
        attempt."""
        is_silent = isinstance(error, Unreachable) and not isinstance(error, BrokeOff)
        first, most = (_SOON, _SOON_AT_MOST) if is_silent else (_LATER, _LATER_AT_MOST)
        self._delay = min(max(2 * self._delay, first), most)
        self._next_attempt = self._clock() + self._delay
        text = str(error) if self.name in str(error) else f"{self.name}: {error}"
        if not is_silent and str(self._problem) != text:
            note = " Nothing is sent to it until its key is the known one." if isinstance(error, HostKeyRefused) else ""
            logger.warning("%s; its job goes on, and it is tried again in %.0f s.%s", text, self._delay, note)
        self._problem = Unreachable(text)
        return self._problem

    def _request(self, do: str, timeout_s: float | None = None, wait: bool = True, **more: object) -> object:
        self._connect_again(wait)
        return self._ask(do, timeout_s or self._timeout, **more)

    def _ask(self, do: str, timeout_s: float, **more: object) -> object:
        """Ask over the present connection."""
        try:
            answer = self._exchange({"do": do, **more}, timeout_s)
        except (OSError, EOFError, json.JSONDecodeError) as error:
            # A late answer must not be taken for that of the next request.
            self._drop()
            if isinstance(error, SSHProblem):
                raise
            raise Unreachable(f"{self.name} does not answer") from None
        if "taken" in answer:
            raise TakenOver(f"{self.name}: {answer['taken']}")
        if "failure" in answer:
            number, text = answer.get("errno"), f"{self.name}: {answer['failure']}"
            raise OSError(number, text) if number else OSError(text)
        if "answer" not in answer:
            raise ValueError(f"{self.name}: {answer.get('problem')}")
        return answer["answer"]

    def claim(self, who: Monitor, instead_of: str = "") -> Holder | None:
        """As LocalNode's. Each new connection renews the claim."""
        self._connect_again(wait=True)
        self._who, before = who, self._who
        try:
            holder = self._claim(instead_of)
        except (OSError, ValueError):
            self._who = before
            raise
        if holder is not None:
            self._who = before
        return holder

    def _claim(self, instead_of: str) -> Holder | None:
        answer = self._ask("claim", 3 * self._timeout, who=asdict(self._who), instead_of=instead_of)
        return None if answer is None else Holder.from_json(answer)

    def release(self) -> None:
        """Give up the claim if the host can be told; otherwise its lease runs out."""
        if self._who is not None and self._channel is not None:
            self._ask("release", self._timeout)
        self._who = None

    def touch(self) -> None:
        self._request("touch", wait=False)

    def poll(self, log_from: int) -> NodeReport:
        """As LocalNode's. Does not wait for a lost connection, which is made again meanwhile."""
        return NodeReport(**self._request("poll", min(self._timeout, 5.0), wait=False, log_from=log_from))

    def start(self, launch: Launch) -> None:
        self._request("start", timeout_s=60.0, launch=asdict(launch))

    def adopt(self) -> dict | None:
        return self._request("adopt", timeout_s=30.0)

    def clear(self) -> None:
        self._request("clear", timeout_s=60.0)

    def obstacle(self, after_full_disk: bool) -> Obstacle | None:
        answer = self._request("obstacle", timeout_s=30.0, after_full_disk=after_full_disk)
        return None if answer is None else Obstacle(**answer)

    def recall(self, name: str) -> dict | None:
        return self._request("recall", name=name)

    def remember(self, name: str, value: dict) -> None:
        self._request("remember", name=name, value=value)

    def holds_checkpoint(self) -> bool:
        return self._request("holds_checkpoint")

    def stacks(self) -> str:
        return self._request("stacks", timeout_s=30.0)

    def stop(self) -> None:
        self._request("stop")

    def kill(self) -> None:
        self._request("kill", timeout_s=60.0)

    def close(self) -> None:
        """End the connection, not the job."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._drop()
