"""The hosts file: what it may say, and one sentence for everything else."""

import errno
import os
import re
from pathlib import Path

import pytest

from monitor import hosts as hosts_module
from monitor.hosts import HostEntry, HostsFile, read_hosts

GOOD = """
hosts:
  - host: gpu1.example.org
    user: me
    port: 2222
    key_file: ~/.ssh/id
    known_hosts: /etc/known
    fingerprint: SHA256:abc
    workdir: /home/me/zero 2 all
    python: .venv/bin/python
    address: 10.0.0.1
    env: {GLOO_SOCKET_IFNAME: eth0, OMP_NUM_THREADS: 4}
  - {host: gpu2, workdir: w}
rendezvous_port: 29555
"""


def read(tmp_path: Path, text: str | bytes) -> HostsFile:
    path = tmp_path / "hosts.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_hosts(path)


def test_a_good_file(tmp_path: Path):
    hosts = read(tmp_path, GOOD)
    assert hosts == HostsFile(
        [
            HostEntry("gpu1.example.org", "/home/me/zero 2 all", "me", 2222, f"{Path.home()}/.ssh/id", "/etc/known",
                      "SHA256:abc", ".venv/bin/python", "10.0.0.1",
                      {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "4"}),
            HostEntry("gpu2", "w"),
        ],
        29555,
    )  # fmt: skip
    assert [host.reached_at for host in hosts.hosts] == ["10.0.0.1", "gpu2"]
    assert [host.target.host for host in hosts.hosts] == ["gpu1.example.org", "gpu2"]
    assert (hosts.hosts[0].target.port, hosts.hosts[0].target.user) == (2222, "me")


def test_the_order_of_the_ranks_is_the_files(tmp_path: Path):
    names = ["b", "a", "c"]
    text = "hosts:\n" + "".join(f"  - {{host: {name}, workdir: w}}\n" for name in names)
    assert [host.host for host in read(tmp_path, text).hosts] == names
    assert read(tmp_path, text).rendezvous_port == 29400


def test_one_machine_twice_under_two_ports_is_two_hosts(tmp_path: Path):
    """Hosts that are containers of one machine."""
    text = "hosts: [{host: a, workdir: w, port: 1}, {host: a, workdir: w, port: 2}]"
    assert len(read(tmp_path, text).hosts) == 2


BAD = {
    "empty": ("", "must hold `hosts:` with a list of hosts"),
    "no YAML": ("hosts: [", "cannot be read: "),
    "no text": (b"\xff\xfe\x00", "cannot be read: "),
    "a list": ("[a, b]", "must hold `hosts:`"),
    "no hosts": ("rendezvous_port: 1", "must hold `hosts:`"),
    "an empty list": ("hosts: []", "must hold `hosts:`"),
    "hosts as a mapping": ("hosts: {a: b}", "must hold `hosts:`"),
    "unknown outside": ("hosts: [{host: a, workdir: w}]\nport: 3", "unknown: port"),
    "a host that is a word": ("hosts: [a]", "host 1 must hold `host:` and `workdir:`"),
    "no host": ("hosts: [{workdir: w}]", "host 1 lacks `host:`"),
    "no workdir": ("hosts: [{host: a, workdir: w}, {host: b}]", "host 2 lacks `workdir:`"),
    "unknown inside": ("hosts: [{host: a, workdir: w, prot: 3}]", "host 1: prot is unknown: host, workdir, user"),
    "a port in words": ("hosts: [{host: a, workdir: w, port: '22'}]", "host 1: port must be of type int, got '22'"),
    "a port that is true": ("hosts: [{host: a, workdir: w, port: true}]", "host 1: port must be of type int, got True"),
    "a host that is a number": ("hosts: [{host: 5, workdir: w}]", "host 1: host must be of type str, got 5"),
    "a key of a variable": (
        "hosts: [{host: a, workdir: $W, key_file: $NO_SUCH/k}]", "host 1: $NO_SUCH/k: $NO_SUCH is not set here"
    ),
    "no value": ("hosts: [{host: a, workdir: }]", "host 1: workdir must be of type str, got None"),
    "env as a list": ("hosts: [{host: a, workdir: w, env: [A=1]}]", "host 1: env must be of type dict"),
    "twice": ("hosts: [{host: a, workdir: w}, {host: a, workdir: v}]", "a host is listed twice"),
    "rendezvous in words": ("hosts: [{host: a, workdir: w}]\nrendezvous_port: x", "must be a port number, got 'x'"),
    "rendezvous too high": ("hosts: [{host: a, workdir: w}]\nrendezvous_port: 65536", "a port number, got 65536"),
    "rendezvous is true": ("hosts: [{host: a, workdir: w}]\nrendezvous_port: true", "a port number, got True"),
    "a port too high": ("hosts: [{host: a, workdir: w, port: 99999}]", "host 1: a port is a number from 1 to 65535"),
    "an empty host": ("hosts: [{host: '', workdir: w}]", "host 1: '' is not a host name"),
    "keys of several kinds": ("1: a\nb: c\n2.5: d\n[]: e", "cannot be read: a key is a list"),
    "keys of several kinds 2": ("hosts: [{host: a, workdir: w}]\n1: a\nb: c\nnull: d", "unknown: 1, None, b"),
    "a list in the list": ("hosts: [[{host: a, workdir: w}]]", "host 1 must hold `host:` and `workdir:`"),
    "itself": ("hosts: &a [*a]", "host 1 must hold `host:` and `workdir:`"),
    "hosts twice": ("hosts: [{host: a, workdir: w}]\nhosts: [{host: b, workdir: w}]", "'hosts' is given twice, line 2"),
    "a host's key twice": ("hosts: [{host: a, host: b, workdir: w}]", "'host' is given twice"),
    "two documents": ("hosts: [{host: a, workdir: w}]\n---\nhosts: []", "document, line 2"),
    "a number as a key": ("hosts: [{1: b, host: a, workdir: w}]", "host 1: 1 is unknown: host"),
    "control characters": ('hosts: [{"\\e[2J": b, host: a, workdir: w}]', r"host 1: '\x1b[2J' is unknown"),
    "a host in two lines": ('hosts: [{host: "a\\nb", workdir: w}]', r"'a\nb' is not a host name"),
    "an octal port": ("hosts: [{host: a, workdir: w, port: 0022}]", "'0022' is not a decimal number"),
    "a port of base 60": ("hosts: [{host: a, workdir: w, port: 22:22}]", "'22:22' is not a decimal number"),
    "port 0": ("hosts: [{host: a, workdir: w, port: 0}]", "host 1: a port is a number from 1 to 65535"),
    "a huge port": ("hosts: [{host: a, workdir: w, port: " + "9" * 900 + "}]", "host 1: a port is a number"),
    "rendezvous of nothing": ("hosts: [{host: a, workdir: w}]\nrendezvous_port:", "a port number, got None"),
    "rendezvous of a list": ("hosts: [{host: a, workdir: w}]\nrendezvous_port: [1]", "a port number, got a list"),
    "an empty workdir": ("hosts: [{host: a, workdir: ' '}]", "host 1: workdir must be one line of text, got ' '"),
    "a workdir of two lines": ('hosts: [{host: a, workdir: "a\\nb"}]', "workdir must be one line of text"),
    "no character in a file's name": ('hosts: [{host: a, workdir: "a\\0"}]', "workdir must be one line of text"),
    "an empty address": ("hosts: [{host: a, workdir: w, address: ''}]", "address must be one line of text"),
    "a list in env": ("hosts: [{host: a, workdir: w, env: {A: [1, 2]}}]", "env: A must be a whole number or a text"),
    "nothing in env": ("hosts: [{host: a, workdir: w, env: {A: }}]", "text in quotes, got None"),
    "yes in env": ("hosts: [{host: a, workdir: w, env: {A: on}}]", "text in quotes, got True"),
    "a date in env": ("hosts: [{host: a, workdir: w, env: {A: 2000-01-01}}]", "text in quotes, got datetime"),
    "a fraction in env": ("hosts: [{host: a, workdir: w, env: {A: 1.10}}]", "text in quotes, got 1.1"),
    "NUL in env": ('hosts: [{host: a, workdir: w, env: {A: "\\0"}}]', "text in quotes, got "),
    "no name in env": ("hosts: [{host: a, workdir: w, env: {A=B: c}}]", "names of variables, got 'A=B'"),
    "a number as a name": ("hosts: [{host: a, workdir: w, env: {1: c}}]", "names of variables, got 1"),
    "references to references": (
        "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))
        + "hosts: [{host: *a11, workdir: w}]", "unknown: a0, a1, a10, a11, a2"),
    "references as a host": (
        "hosts: [{env: {a: &a0 [x, x], "
        + ", ".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
        + "}, host: a, workdir: w}]", "env: a must be a whole number or a text in quotes, got a list"),
    "too deep": ("hosts: " + "[" * 600, "nested too deeply"),
    "too large": ("#" * (2 << 20), "larger than 1024 KiB"),
    "a moment that cannot be": ("hosts: 2000-99-99", "impossible value: month must be in 1..12"),
    "a tag": ("hosts: !!timestamp x", "an impossible value"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, name: str):
    text, expected = BAD[name]
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "hosts.yaml") in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^the hosts file .*nothing.yaml does not exist$"):
        read_hosts(tmp_path / "nothing.yaml")
    (tmp_path / "hosts.yaml").touch()
    with pytest.raises(ValueError, match=r"hots.yaml does not exist: did you mean .*hosts.yaml\?$"):
        read_hosts(tmp_path / "hots.yaml")


def test_a_disk_that_does_not_answer_is_not_a_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hosts_module, "read_small", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_hosts(tmp_path / "hosts.yaml")


def test_what_several_hosts_share_can_be_written_once(tmp_path: Path):
    text = "hosts:\n - &first {host: a, workdir: w, env: {A: '1.10'}}\n - {<<: *first, host: b}"
    assert read(tmp_path, text).hosts[1] == HostEntry("b", "w", env={"A": "1.10"})


def test_passwords_are_refused_and_not_repeated(tmp_path: Path):
    with pytest.raises(ValueError, match="host 1: passwords have no place in a file") as caught:
        read(tmp_path, "hosts: [{host: a, workdir: w, password: hunter2}]")
    assert "hunter2" not in str(caught.value)
