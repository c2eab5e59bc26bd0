"""A real OpenSSH server for tests, on a free port of this machine."""

import getpass
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from utils.ssh import SSHTarget

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:/usr/bin")


def missing() -> str:
    """Reason why tests with an SSH server cannot run here; empty if they can."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        return "needs OpenSSH's sshd and ssh-keygen"
    if importlib.util.find_spec("paramiko") is None:
        return "needs paramiko"
    return ""


def make_key(path: Path, key_type: str = "ed25519", passphrase: str = "") -> str:
    """Write a key pair to `path` and `path`.pub, replacing an older one; returns the public key as "type base64"."""
    for old in (path, Path(f"{path}.pub")):
        old.unlink(missing_ok=True)
    # One round of key derivation: tests have no time for more.
    options = ["-N", passphrase, "-a", "1", "-C", path.name, *(["-b", "2048"] if key_type == "rsa" else [])]
    subprocess.run(["ssh-keygen", "-q", "-t", key_type, *options, "-f", path], check=True)
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    """Fingerprint as OpenSSH writes it: SHA256:..."""
    shown = subprocess.run(["ssh-keygen", "-l", "-f", path], check=True, capture_output=True, text=True)
    return shown.stdout.split()[1]


def free_port(address: str = "127.0.0.1") -> int:
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def empty_home(directory: Path, monkeypatch) -> Path:
    """A home directory without keys, known hosts and configuration, and no SSH agent."""
    home = directory / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


def _without_penalties() -> list[str]:
    """Setting that keeps sshd (from 9.8 on) from refusing an address after failed logins, which tests make often."""
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr)
    return ["PerSourcePenalties no"] if version and (int(version[1]), int(version[2])) >= (9, 8) else []


def _descendants(pid: int) -> list[int]:
    """Processes below `pid`, the youngest last."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


class Sshd:
    """An sshd with its own keys and files in `directory`, where the current user may log in with `client_key`.

    Args:
        directory: is created; the server's messages are in its sshd.log.
        host_keys: types of host keys: ed25519, ecdsa, rsa.
        listen: the address to listen on.
        prefix: a command that runs the server, such as ["ip", "netns", "exec", "a"].
        passwords: whether a password is accepted; without PAM, only root's sshd can check one.
        settings: further lines of sshd_config, which override the ones here.
        log_level: log level of sshd.log.
    """

    def __init__(
        self,
        directory: Path,
        host_keys: Sequence[str] = ("ed25519",),
        listen: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        passwords: bool = False,
        settings: Sequence[str] = (),
        log_level: str = "VERBOSE",
    ):
        self.directory, self.listen, self.prefix = directory, listen, list(prefix)
        self.user, self.port = getpass.getuser(), free_port()
        directory.mkdir(parents=True, exist_ok=True)
        self.client_key, self.known_hosts = directory / "client_key", directory / "known_hosts"
        self.log, self._pid_file, self._config = (directory / n for n in ("sshd.log", "sshd.pid", "sshd_config"))
        self._host_keys = tuple(host_keys)
        (directory / "authorized_keys").write_text(make_key(self.client_key) + "\n")
        self._make_host_keys()
        self._settings = [
            *settings,
            f"ListenAddress {listen}",
            f"PidFile {self._pid_file}",
            f"AuthorizedKeysFile {directory / 'authorized_keys'}",
            f"LogLevel {log_level}",
            f"PasswordAuthentication {'yes' if passwords else 'no'}",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "UsePAM no",
            "StrictModes no",
            "Subsystem sftp internal-sftp",
            *_without_penalties(),
        ]
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Sshd":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def host_key(self, key_type: str | None = None) -> Path:
        return self.directory / f"host_{key_type or self._host_keys[0]}"

    def _make_host_keys(self) -> None:
        public = {key_type: make_key(self.host_key(key_type), key_type) for key_type in self._host_keys}
        self.public_keys: dict[str, str] = public

    @property
    def known_as(self) -> str:
        """The server's name in known_hosts."""
        return f"[{self.listen}]:{self.port}"

    def known_hosts_line(self, key_type: str | None = None) -> str:
        return f"{self.known_as} {self.public_keys[key_type or self._host_keys[0]]}\n"

    def target(self, **fields) -> SSHTarget:
        """The way to this server; `fields` override its defaults."""
        usual = dict(host=self.listen, port=self.port, user=self.user)
        usual |= dict(key_file=str(self.client_key), known_hosts=str(self.known_hosts))
        return SSHTarget(**usual | fields)

    def start(self) -> None:
        """Start the server and wait until it listens."""
        if os.geteuid() == 0:
            # Directory of sshd's unprivileged part, compiled in; the package of a running daemon makes it.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for _ in range(5):
            if self._try_to_start():
                self.known_hosts.write_text("".join(map(self.known_hosts_line, self._host_keys)))
                return
            self.port = free_port()
        raise RuntimeError(f"sshd does not start:\n{self.log.read_text()}")

    def _try_to_start(self) -> bool:
        keys = [f"HostKey {self.host_key(key_type)}" for key_type in self._host_keys]
        self._config.write_text("\n".join([f"Port {self.port}", *self._settings, *keys, ""]))
        self._pid_file.unlink(missing_ok=True)
        command = [*self.prefix, SSHD, "-D", "-e", "-f", self._config]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            # sshd writes its PID file when it has begun to listen, which cannot be seen from another network namespace.
            if self._pid_file.exists() and self._pid_file.read_text().strip():
                return True
            time.sleep(0.01)
        self._process.kill()
        self._process.wait()
        return False

    def _connections(self) -> list[int]:
        """Processes of sshd that serve connections, without the commands that they have started."""
        found = []
        for pid in _descendants(int(self._pid_file.read_text())):
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                    found.append(pid)
            except OSError:
                continue
        return found

    def drop_connections(self) -> int:
        """Cut all connections; returns the number of ended processes. The server accepts new ones."""
        pids = self._connections()
        self.signal_connections(signal.SIGKILL)
        deadline = time.monotonic() + 2
        while set(pids) & set(self._connections()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(pids)

    def signal_connections(self, number: signal.Signals) -> None:
        """Send a signal to the processes that serve connections: after SIGSTOP the server is silent but stays
        connected."""
        for pid in self._connections():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        """End the server and its connections."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self.drop_connections()
            try:
                os.kill(int(self._pid_file.read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                self._process.kill()
        self._process.wait(timeout=10)
        self._process = None

    def restart(self, host_keys: Sequence[str] | None = None, new_host_key: bool = True) -> None:
        """Stop, and start again on the same port, by default with new host keys, while `known_hosts` keeps the old
        ones."""
        known = self.known_hosts.read_text()
        port = self.port
        self.stop()
        self._host_keys = tuple(host_keys or self._host_keys)
        if new_host_key:
            self._make_host_keys()
        self.start()
        assert self.port == port, f"port {port} was taken by somebody else"
        self.known_hosts.write_text(known)
