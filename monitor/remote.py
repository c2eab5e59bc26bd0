"""A node behind an SSH connection: `python -m monitor.node` runs there and is asked over its standard input.

The connection may drop at any time: the job goes on, and the next request connects again.
"""

import json
import shlex
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from monitor.hosts import Host
from monitor.node import PROTOCOL, Launch, NodeReport
from utils.ssh import SSHProblem, Unreachable, connect

_MOST_BYTES = 1 << 24


class RemoteNode:
    """The job on a host of the hosts file; what LocalNode is for this machine.

    All methods raise SSHProblem where the host cannot be reached, ValueError where the request is wrong, and OSError
    where the host could not do it now.
    """

    def __init__(self, host: Host, run_dir: str, index: int, timeout_s: float = 10.0):
        self.host, self.run_dir, self.index = host, run_dir, index
        self.name = f"{host.host}:{host.port}" if host.port else host.host
        self._timeout = timeout_s
        self._client = self._channel = None
        self._buffer = b""
        self._connecting: Future | None = None
        self._thread = ThreadPoolExecutor(1, f"ssh-{host.host}")

    def open(self, confirm: Callable[[str, str, str], bool] | None = None) -> None:
        """Connect and start the server on the host.

        Args:
            confirm: asked about the key of a host that is not known yet, see utils/ssh.py.
        Raises:
            ValueError: the host has no zero2all of this version where the hosts file says.
        """
        self._drop()
        self._client = connect(self.host.target, confirm=confirm, timeout_s=self._timeout)
        command = (
            f"cd {shlex.quote(self.host.workdir)} && exec {shlex.quote(self.host.python)} -m monitor.node "
            f"--run_dir {shlex.quote(self.run_dir)} --index {self.index}"
        )
        try:
            self._channel = self._client.get_transport().open_session(timeout=self._timeout)
            self._channel.exec_command(command)
            hello = self._exchange({"do": "hello"}, 3 * self._timeout)["answer"]
        except Exception as error:
            # paramiko's own errors are many; whichever it was, there is no connection.
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
            raise ValueError(f"{self.name} has another version of zero2all: bring {self.host.workdir} up to date")

    def _complaint(self) -> str:
        """Last line that the host's shell or Python wrote to standard error."""
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
        """Have a connection, made in a thread of its own where there is none.

        Raises:
            Unreachable: not `wait`, and it is not there yet.
        """
        if self._connecting is None and self._channel is None:
            self._connecting = self._thread.submit(self.open)
        if self._connecting is None:
            return
        if not wait and not self._connecting.done():
            raise Unreachable(f"{self.name}: connecting again")
        attempt, self._connecting = self._connecting, None
        attempt.result()

    def _request(self, do: str, timeout_s: float | None = None, wait: bool = True, **more: object) -> object:
        self._connect_again(wait)
        try:
            answer = self._exchange({"do": do, **more}, timeout_s or self._timeout)
        except (OSError, EOFError, json.JSONDecodeError) as error:
            # An answer that comes too late must not be taken for the next one's.
            self._drop()
            if isinstance(error, SSHProblem):
                raise
            raise Unreachable(f"{self.name} does not answer") from None
        if "failure" in answer:
            raise OSError(f"{self.name}: {answer['failure']}")
        if "answer" not in answer:
            raise ValueError(f"{self.name}: {answer.get('problem')}")
        return answer["answer"]

    def poll(self, log_from: int) -> NodeReport:
        """As LocalNode's; does not wait for a connection that is gone, but has it made meanwhile."""
        return NodeReport(**self._request("poll", min(self._timeout, 5.0), wait=False, log_from=log_from))

    def start(self, launch: Launch) -> None:
        self._request("start", launch=asdict(launch))

    def adopt(self) -> dict | None:
        return self._request("adopt")

    def holds_checkpoint(self) -> bool:
        return self._request("holds_checkpoint")

    def stacks(self) -> str:
        return self._request("stacks", timeout_s=30.0)

    def stop(self) -> None:
        self._request("stop")

    def kill(self) -> None:
        self._request("kill", timeout_s=30.0)

    def close(self) -> None:
        """End the connection, not the job."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._drop()


