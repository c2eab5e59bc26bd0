"""The hosts file: which machines a run uses, in the order of their ranks.

    hosts:
      - host: gpu1.example.org      # as for ssh; ~/.ssh/config counts
        user: me                    # optional
        port: 22                    # optional
        key_file: ~/.ssh/id_ed25519 # optional; else the agent and the usual keys
        workdir: /home/me/zero2all  # where train_my_ddp.py is, and from where paths count
        python: .venv/bin/python    # optional, default python3
        address: 10.0.0.1           # optional: how the other hosts reach it; default: host
        env: {GLOO_SOCKET_IFNAME: eth0}
      - ...
    rendezvous_port: 29400          # optional; on the first host
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils.ssh import SSHTarget


@dataclass(frozen=True)
class Host:
    host: str
    workdir: str
    user: str | None = None
    port: int | None = None
    key_file: str | None = None
    known_hosts: str | None = None
    """Another known_hosts file than the user's."""
    fingerprint: str | None = None
    """SHA256:... of the host's key, confirmed by other means; else an unknown host is asked about, or refused."""
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
class Hosts:
    hosts: list[Host]
    rendezvous_port: int = 29400


_TYPES = {
    "host": str, "workdir": str, "user": str, "port": int, "key_file": str, "known_hosts": str, "fingerprint": str,
    "python": str, "address": str, "env": dict,
}  # fmt: skip


def read_hosts(path: Path) -> Hosts:
    """
    Raises:
        ValueError: the file cannot be read, or says something else than a hosts file may; one sentence.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the hosts file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("hosts"), list) or not content["hosts"]:
        raise ValueError(f"{path} must hold `hosts:` with a list of hosts")
    if unknown := set(content) - {"hosts", "rendezvous_port"}:
        raise ValueError(f"{path}: unknown: {', '.join(map(str, sorted(unknown)))}")
    port = content.get("rendezvous_port", Hosts.rendezvous_port)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise ValueError(f"{path}: rendezvous_port must be a port number, got {port!r}")
    hosts = [_read_host(path, number, entry) for number, entry in enumerate(content["hosts"], 1)]
    names = [(host.host, host.port, host.reached_at) for host in hosts]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a host is listed twice")
    return Hosts(hosts, port)


def _read_host(path: Path, number: int, entry: object) -> Host:
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
            raise ValueError(f"{where}: {name} is unknown: {', '.join(_TYPES)} are known")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be of type {_TYPES[name].__name__}, got {value!r}")
    env = {str(name): str(value) for name, value in entry.get("env", {}).items()}
    host = Host(**{**entry, "env": env})
    try:
        # What is no name, port or fingerprint is refused there.
        _ = host.target
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return host
