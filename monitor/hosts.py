"""The hosts file, which lists the machines of a run in the order of their ranks.

    hosts:
      - host: gpu1.example.org      # as for ssh; ~/.ssh/config counts
        user: me                    # optional
        port: 22                    # optional
        key_file: ~/.ssh/id_ed25519 # optional; otherwise the agent and the usual keys
        workdir: ~/zero2all         # folder of train_my_ddp.py, where relative paths begin; ~ is the home there
        python: .venv/bin/python    # optional, default python3
        address: 10.0.0.1           # optional: the address for the other hosts; default: host
        env: {GLOO_SOCKET_IFNAME: eth0, OMP_NUM_THREADS: 4, FRACTION: "0.90"}   # whole numbers, or texts
      - ...
    rendezvous_port: 29400          # optional; on the first host
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from utils.files import is_passing
from utils.paths import absent, expand
from utils.small_files import is_whole, parse_yaml, read_small, shown
from utils.ssh import SSHTarget

_LONGEST_FILE = 1 << 20
"""Bytes: thousands of hosts."""


@dataclass(frozen=True)
class HostEntry:
    """One entry of the hosts file."""

    host: str
    workdir: str
    user: str | None = None
    port: int | None = None
    key_file: str | None = None
    known_hosts: str | None = None
    """A known_hosts file instead of the user's."""
    fingerprint: str | None = None
    """SHA256:... of the host's key, confirmed by other means. Without it, the user is asked about an unknown host, or
    the host is refused."""
    python: str = "python3"
    address: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    @property
    def target(self) -> SSHTarget:
        return SSHTarget(self.host, self.port, self.user, self.key_file, self.known_hosts, self.fingerprint)

    @property
    def reached_at(self) -> str:
        return self.address or self.host


@dataclass(frozen=True)
class HostsFile:
    hosts: list[HostEntry]
    rendezvous_port: int = 29400


_TYPES = {
    "host": str, "workdir": str, "user": str, "port": int, "key_file": str, "known_hosts": str, "fingerprint": str,
    "python": str, "address": str, "env": dict,
}  # fmt: skip

_TEXTS = ("workdir", "key_file", "known_hosts", "python", "address")
"""Keys whose values are checked here; SSHTarget checks the others."""


def read_hosts(path: Path) -> HostsFile:
    """The content of a hosts file.

    Raises:
        ValueError: the file is not a valid hosts file, or does not exist; one sentence.
        OSError: the file cannot be read now.
    """
    try:
        content = parse_yaml(read_small(path, _LONGEST_FILE))
    except OSError as error:
        if is_passing(error):
            raise
        is_gone = isinstance(error, FileNotFoundError)
        problem = absent(path) if is_gone else f"{path} cannot be read: {error.strerror}"
        raise ValueError(f"the hosts file {problem}") from None
    except ValueError as error:
        raise ValueError(f"the hosts file {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("hosts"), list) or not content["hosts"]:
        raise ValueError(f"{path} must hold `hosts:` with a list of hosts")
    if unknown := [_key(key) for key in content if key not in ("hosts", "rendezvous_port")]:
        raise ValueError(f"{path}: unknown: {', '.join(sorted(unknown)[:5])}")
    port = content.get("rendezvous_port", HostsFile.rendezvous_port)
    if not is_whole(port, 1, 65535):
        raise ValueError(f"{path}: rendezvous_port must be a port number, got {shown(port)}")
    hosts = [_read_host(path, number, entry) for number, entry in enumerate(content["hosts"], 1)]
    names = [(host.host, host.port, host.reached_at) for host in hosts]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a host is listed twice")
    return HostsFile(hosts, port)


def _read_host(path: Path, number: int, entry: object) -> HostEntry:
    where = f"{path}: host {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must hold `host:` and `workdir:`")
    for name in ("host", "workdir"):
        if name not in entry:
            raise ValueError(f"{where} lacks `{name}:`")
    for name, value in entry.items():
        if name == "password":
            raise ValueError(f"{where}: passwords have no place in a file: use a key, or ssh-agent")
        if name not in _TYPES:
            raise ValueError(f"{where}: {_key(name)} is unknown: {', '.join(_TYPES)} are known")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be of type {_TYPES[name].__name__}, got {shown(value)}")
        if name in _TEXTS and not (value.strip() and value.isprintable()):
            raise ValueError(f"{where}: {name} must be one line of text, got {shown(value)}")
    env = _read_env(where, entry.get("env", {}))
    try:
        # These two are files on this machine. workdir and python are on the host, which knows its own home directory.
        own = {name: expand(entry[name]) for name in ("key_file", "known_hosts") if name in entry}
        host = HostEntry(**{**entry, **own, "env": env})
        # SSHTarget refuses wrong names, ports and fingerprints.
        _ = host.target
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return host


def _read_env(where: str, entry: dict) -> dict[str, str]:
    """Environment variables as texts. Values that YAML reads as something other than what was written (`on`, 1.10, a
    date) are refused rather than turned into a text that nobody wrote."""
    for name, value in entry.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{where}: env must hold names of variables, got {shown(name)}")
        if type(value) not in (str, int) or "\0" in str(value):
            raise ValueError(f"{where}: env: {name} must be a whole number or a text in quotes, got {shown(value)}")
    return {name: str(value) for name, value in entry.items()}


def _key(value: object) -> str:
    return value if isinstance(value, str) and value.isidentifier() and len(value) <= 80 else shown(value)
