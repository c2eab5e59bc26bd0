"""SSH connections against a real sshd: trusted hosts, logins, and messages to the user."""

import contextlib
import importlib
import logging
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sshd import Sshd, empty_home, fingerprint, free_port, make_key, missing
from utils.ssh import BrokeOff, HostKeyRefused, LoginRefused, SSHProblem, SSHTarget, Unreachable, _Session, connect

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

PASSWORD = "correct-horse-7"
# openssl passwd -6 -salt zero2all correct-horse-7
PASSWORD_HASH = "$6$zero2all$dvXJMT0h6GO0zccBJNG5NOWUi4p8Jik4./RFWsld0vWYxb33NuR0hink4XuSGMqDbL4zJmjSGZCgmho4/T9YZ."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def server_of_three_types(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd"), host_keys=("ed25519", "ecdsa", "rsa")) as server:
        yield server


@pytest.fixture(scope="module")
def password_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with server_with_guest(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@contextlib.contextmanager
def server_with_guest(directory: Path, *settings: str) -> Iterator[Sshd]:
    """A server that knows a user "guest" with PASSWORD, in a mount namespace with its own passwd and shadow."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces, to give sshd a user with a password")
    binds = []
    lines = {"passwd": f"guest:x:0:0::{directory}:/bin/sh", "shadow": f"guest:{PASSWORD_HASH}:1::::::"}
    for name, line in lines.items():
        (directory / name).write_text(f"{Path('/etc', name).read_text()}{line}\n")
        binds.append(f"mount --bind {shlex.quote(str(directory / name))} /etc/{name}")
    prefix = ["unshare", "--mount", "sh", "-c", " && ".join([*binds, 'exec "$@"']), "sshd"]
    with Sshd(directory / "sshd", prefix=prefix, passwords=True, settings=settings) as server:
        server.user = "guest"
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


def login(*args, **kwargs) -> str:
    """Connect, run a command, close; returns the command's output."""
    with connect(*args, **kwargs) as client:
        return client.exec_command("echo works; whoami")[1].read().decode()


def paramiko_error(text: str) -> Exception:
    """(paramiko may be missing.)"""
    return importlib.import_module("paramiko").SSHException(text) if not missing() else Exception(text)


def refuse_to_answer(*_):
    raise AssertionError("this must not be asked")


class Answers:
    """Gives the answers in turn, and keeps the questions."""

    def __init__(self, *answers):
        self.answers, self.questions = list(answers), []

    def __call__(self, *question):
        self.questions.append(question)
        return self.answers.pop(0)


def one_sentence(problem: pytest.ExceptionInfo) -> str:
    text = str(problem.value)
    assert text and text.isprintable() and not text.endswith("."), text
    assert "Error" not in text and "Traceback" not in text, text
    return text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("node1\n", SSHTarget("node1")),
        ("ada@node1.example.org:2222", SSHTarget("node1.example.org", 2222, "ada")),
        ("ada@corp@10.0.0.7", SSHTarget("10.0.0.7", None, "ada@corp")),
        ("[::1]", SSHTarget("::1")),
        ("ada@[fe80::1%eth0]:22", SSHTarget("fe80::1%eth0", 22, "ada")),
        ("2001:db8::7", SSHTarget("2001:db8::7")),
    ],
)
def test_parse(text: str, expected: SSHTarget):
    assert SSHTarget.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "ada@", "@node1", "node1:", "node1:ssh", "node1:0", "node1:65536", "[::1]:", "[::1]x", "a b",
     "-oProxyCommand=id", "-l@node1", "$(id)@node1", "node1;id", "node1\nnode2", "a\x1b[2J"],
)  # fmt: skip
def test_parse_refuses(text: str):
    with pytest.raises(ValueError) as problem:
        SSHTarget.parse(text)
    assert str(problem.value).isprintable()


def test_a_fingerprint_of_another_kind_is_not_a_fingerprint():
    with pytest.raises(ValueError, match="SHA256"):
        SSHTarget("node1", fingerprint="MD5:00:11")


def test_a_known_host(server: Sshd):
    assert login(server.target(), refuse_to_answer, refuse_to_answer) == f"works\n{server.user}\n"


def test_an_unknown_host_is_refused(server: Sshd, tmp_path: Path):
    known_hosts = tmp_path / "none" / "known_hosts"
    with pytest.raises(HostKeyRefused) as problem:
        connect(server.target(known_hosts=str(known_hosts)))
    text = one_sentence(problem)
    assert fingerprint(server.host_key()) in text and server.known_as in text and "ssh-keyscan" in text
    assert not known_hosts.parent.exists()


def test_a_confirmed_host_is_remembered(server: Sshd, home: Path):
    confirm = Answers(True)
    target = server.target(known_hosts=None)
    assert login(target, confirm)
    assert confirm.questions == [(server.known_as, "ssh-ed25519", fingerprint(server.host_key()))]
    known_hosts = home / ".ssh" / "known_hosts"
    assert stat.S_IMODE(known_hosts.stat().st_mode) == 0o600
    assert stat.S_IMODE(known_hosts.parent.stat().st_mode) == 0o700
    assert login(target, refuse_to_answer)
    # OpenSSH's own client accepts the written file.
    options = ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={known_hosts}", "BatchMode=yes"]
    command = ["ssh", "-F", "none", "-i", server.client_key, "-p", str(server.port), *(f"-o{o}" for o in options)]
    done = subprocess.run([*command, f"{server.user}@{server.listen}", "echo works"], capture_output=True, text=True)
    assert done.stdout == "works\n", done.stderr


def test_remembering_keeps_what_is_there(server: Sshd, tmp_path: Path):
    known_hosts = tmp_path / "known_hosts"
    other = f"other.example {make_key(tmp_path / 'other')}"
    known_hosts.write_text(f"# mine\n{other}")
    assert login(server.target(known_hosts=str(known_hosts)), Answers(True))
    assert known_hosts.read_text() == f"# mine\n{other}\n{server.known_hosts_line()}"


def test_a_host_that_is_not_confirmed(server: Sshd, tmp_path: Path):
    known_hosts = tmp_path / "known_hosts"
    with pytest.raises(HostKeyRefused, match="not confirmed") as problem:
        connect(server.target(known_hosts=str(known_hosts)), Answers(False))
    assert fingerprint(server.host_key()) in one_sentence(problem) and not known_hosts.exists()


def test_a_changed_key_is_never_asked_about(tmp_path: Path):
    with Sshd(tmp_path / "sshd") as server:
        assert login(server.target())
        server.restart()
        new = fingerprint(server.host_key())
        for target in (server.target(), server.target(fingerprint=new)):
            before = server.known_hosts.read_text()
            with pytest.raises(HostKeyRefused, match="has changed") as problem:
                connect(target, refuse_to_answer)
            text = one_sentence(problem)
            assert new in text and server.known_as in text and "only if the change is expected" in text
            assert server.known_hosts.read_text() == before
        # The printed advice works.
        command = re.search("ssh-keygen -R .*", text)[0]
        subprocess.run(command, shell=True, check=True, capture_output=True)
        assert login(server.target(), Answers(True))


@pytest.mark.parametrize("names", ["{}", "*", "!nobody.example,*"])
def test_a_revoked_key_is_refused(server: Sshd, tmp_path: Path, names: str):
    key = server.public_keys["ed25519"]
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"{server.known_hosts_line()}@revoked {names.format(server.known_as)} {key}\n")
    target = server.target(known_hosts=str(known_hosts), fingerprint=fingerprint(server.host_key()))
    with pytest.raises(HostKeyRefused, match="revoked") as problem:
        connect(target, refuse_to_answer)
    assert "line 2" in one_sentence(problem)


@pytest.mark.parametrize("key_type", ["ed25519", "ecdsa", "rsa"])
def test_a_host_known_by_one_of_its_key_types(server_of_three_types: Sshd, tmp_path: Path, key_type: str):
    server = server_of_three_types
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(server.known_hosts_line(key_type))
    with connect(server.target(known_hosts=str(known_hosts)), refuse_to_answer) as client:
        assert client.get_transport().get_remote_server_key().fingerprint == fingerprint(server.host_key(key_type))


def test_a_host_that_no_longer_shows_a_known_type_has_changed(server: Sshd, tmp_path: Path):
    """Otherwise an attacker in between would only need a key of another type to turn a refusal into a question."""
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"{server.known_as} {make_key(tmp_path / 'old', 'ecdsa')}\n")
    with pytest.raises(HostKeyRefused, match="has changed"):
        connect(server.target(known_hosts=str(known_hosts)), refuse_to_answer)


def test_hashed_names(server: Sshd, tmp_path: Path):
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(server.known_hosts_line())
    subprocess.run(["ssh-keygen", "-H", "-f", known_hosts], check=True, capture_output=True)
    assert server.listen not in known_hosts.read_text()
    assert login(server.target(known_hosts=str(known_hosts)), refuse_to_answer)
    known_hosts.write_text(known_hosts.read_text().replace(server.public_keys["ed25519"], make_key(tmp_path / "new")))
    with pytest.raises(HostKeyRefused, match="has changed"):
        connect(server.target(known_hosts=str(known_hosts)), refuse_to_answer)


def test_lines_that_say_nothing_of_this_host(server: Sshd, tmp_path: Path):
    key, wrong = server.public_keys["ed25519"], make_key(tmp_path / "wrong")
    known_hosts = tmp_path / "known_hosts"
    lines = [
        f"#{server.known_as} {key}", f"@cert-authority * {key}", f"{server.known_as} ssh-ed25519",
        "|1|x|y ssh-rsa AAAA", f"{server.known_as} ssh-ed25519 not-base64!", f"!*127.0.0.1*,* {key}",
        f"[127.0.0.1]:1 {wrong}",
        f"127?0?0?1 {wrong}", f"127.0.0.1 {wrong}", "\x00\xff", "",
    ]  # fmt: skip
    known_hosts.write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(HostKeyRefused, match="unknown"):
        connect(server.target(known_hosts=str(known_hosts)))
    known_hosts.write_text("\n".join([*lines, f"a.example,[127.?.0.*]:{server.port} {key} a comment"]))
    assert login(server.target(known_hosts=str(known_hosts)), refuse_to_answer)


def test_each_of_several_known_keys_is_good(server: Sshd, tmp_path: Path):
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"{server.known_as} {make_key(tmp_path / 'old')}\n{server.known_hosts_line()}")
    assert login(server.target(known_hosts=str(known_hosts)), refuse_to_answer)


def test_a_key_known_without_a_port_is_good_for_any(server_of_three_types: Sshd, tmp_path: Path):
    server = server_of_three_types
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"{server.listen} {server.public_keys['rsa']}\n")
    target = server.target(known_hosts=str(known_hosts))
    assert login(target, refuse_to_answer)
    # Only an entry for the port itself counts.
    known_hosts.write_text(f"{server.listen} {make_key(tmp_path / 'other')}\n{server.known_hosts_line('rsa')}")
    assert login(target, refuse_to_answer)


def test_a_fingerprint_in_place_of_known_hosts(server: Sshd, tmp_path: Path):
    right, known_hosts = fingerprint(server.host_key()), tmp_path / "known_hosts"
    assert login(server.target(known_hosts=str(known_hosts), fingerprint=right), refuse_to_answer)
    assert not known_hosts.exists()
    make_key(tmp_path / "wrong")
    wrong = fingerprint(tmp_path / "wrong.pub")
    for file in (known_hosts, server.known_hosts):
        with pytest.raises(HostKeyRefused, match="given fingerprint") as problem:
            connect(server.target(known_hosts=str(file), fingerprint=wrong), refuse_to_answer)
        assert right in one_sentence(problem) and wrong in str(problem.value)


def test_known_hosts_that_cannot_be_read(server: Sshd, tmp_path: Path):
    with pytest.raises(HostKeyRefused, match="cannot be read"):
        connect(server.target(known_hosts=str(tmp_path)), refuse_to_answer)


def test_a_wrong_key(server: Sshd, tmp_path: Path):
    make_key(tmp_path / "wrong")
    with pytest.raises(LoginRefused) as problem:
        connect(server.target(key_file=str(tmp_path / "wrong")), ask_password=refuse_to_answer)
    text = one_sentence(problem)
    assert f"{server.user}@{server.listen}" in text and str(tmp_path / "wrong") in text and "publickey" in text


def test_no_key_at_all(server: Sshd, tmp_path: Path):
    with pytest.raises(LoginRefused, match="there was no key"):
        connect(server.target(key_file=None))
    with pytest.raises(LoginRefused, match="absent .not found"):
        connect(server.target(key_file=str(tmp_path / "absent")))
    (tmp_path / "junk").write_text("no key")
    with pytest.raises(LoginRefused, match="junk .no private key") as problem:
        connect(server.target(key_file=str(tmp_path / "junk")))
    one_sentence(problem)


@pytest.mark.parametrize("key_type", ["ed25519", "ecdsa", "rsa"])
def test_keys_in_the_home_directory(server: Sshd, home: Path, key_type: str):
    (home / ".ssh").mkdir()
    public = make_key(home / ".ssh" / f"id_{key_type}", key_type)
    with authorized(server, public):
        assert login(server.target(key_file=None))


@contextlib.contextmanager
def authorized(server: Sshd, public_key: str) -> Iterator[None]:
    """Let the server accept one more key."""
    file = server.directory / "authorized_keys"
    before = file.read_text()
    file.write_text(f"{before}{public_key}\n")
    yield
    file.write_text(before)


@contextlib.contextmanager
def agent_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *keys: Path) -> Iterator[None]:
    # The path of a socket must be short.
    path = Path("/tmp") / f"zero2all-agent-{os.getpid()}-{time.monotonic_ns()}"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    try:
        while not path.exists():
            time.sleep(0.01)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        for key in keys:
            subprocess.run(["ssh-add", "-q", key], check=True, capture_output=True)
        yield
    finally:
        agent.terminate()
        agent.wait()
        path.unlink(missing_ok=True)


def test_the_agent(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There are more keys than the host allows tries: the right one is tried first if it is named."""
    keys = [tmp_path / f"k{i}" for i in range(7)]
    publics = [make_key(key) for key in keys]
    with authorized(server, publics[-1]), agent_with(tmp_path, monkeypatch, *keys):
        for key in keys[:-1]:
            key.unlink()
        # The agent has the key, so its passphrase is not needed.
        subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", PASSWORD, "-f", keys[-1]], check=True)
        assert login(server.target(key_file=str(keys[-1])), ask_password=refuse_to_answer)
        assert login(server.target(key_file=f"{keys[-1]}.pub"), ask_password=refuse_to_answer)
        with pytest.raises(LoginRefused, match="trying ssh-agent.s k0, ssh-agent.s k1.*right key") as problem:
            connect(server.target(key_file=None))
        one_sentence(problem)
        config = tmp_path / "config"
        config.write_text("IdentitiesOnly yes\n")
        with pytest.raises(LoginRefused, match="there was no key"):
            connect(server.target(key_file=None), config_file=config)


def test_no_key_is_tried_twice(server: Sshd, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    """The host allows six tries: five keys of the agent, one of which is also a file, and the right one."""
    keys = [home / ".ssh" / "id_ed25519", *(tmp_path / f"k{i}" for i in range(4))]
    keys[0].parent.mkdir()
    for key in keys:
        make_key(key)
    with authorized(server, make_key(home / ".ssh" / "id_rsa", "rsa")), agent_with(tmp_path, monkeypatch, *keys):
        assert login(server.target(key_file=None))


def test_a_key_with_a_passphrase(server: Sshd, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    key = tmp_path / "locked"
    with authorized(server, make_key(key, passphrase=PASSWORD)), logs_everything(caplog):
        target = server.target(key_file=str(key))
        ask = Answers("wrong-horse", PASSWORD)
        assert login(target, ask_password=ask)
        assert ask.questions == [(f"Passphrase of {key}: ",)] * 2
        with pytest.raises(LoginRefused, match="ssh-agent") as alone:
            connect(target)
        with pytest.raises(LoginRefused, match="wrong passphrase") as wrong:
            connect(target, ask_password=Answers("wrong-horse", "wrong-horse", "wrong-horse"))
        with pytest.raises(LoginRefused):
            connect(target, ask_password=Answers(None))
    for problem in (alone, wrong):
        assert str(key) in one_sentence(problem)
        assert no_secret_in(problem, caplog)


@contextlib.contextmanager
def logs_everything(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    names = ("", "paramiko", "paramiko.transport")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(caplog.at_level(logging.DEBUG, logger=name))
        yield


def no_secret_in(problem: pytest.ExceptionInfo, caplog: pytest.LogCaptureFixture) -> bool:
    """Neither in the exception nor in earlier ones, nor in log messages of any level."""
    said, error = caplog.text, problem.value
    assert "paramiko.transport" in said
    while error is not None:
        said += f"{error} {error!r} {error.args}"
        error = error.__context__
    return PASSWORD not in said and "wrong-horse" not in said


def test_a_password(password_server: Sshd, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_key(tmp_path / "wrong")
    target = password_server.target(key_file=str(tmp_path / "wrong"))
    with logs_everything(caplog):
        ask = Answers("wrong-horse", PASSWORD)
        with connect(target, ask_password=ask) as client:
            assert client.exec_command("echo $LOGNAME")[1].read() == b"guest\n"
            assert PASSWORD not in repr(vars(client.get_transport().auth_handler))
        assert ask.questions == [(f"Password of guest@127.0.0.1:{password_server.port}: ",)] * 2
        ask = Answers("wrong-horse", "wrong-horse", "wrong-horse", PASSWORD)
        with pytest.raises(LoginRefused) as wrong:
            connect(target, ask_password=ask)
        assert len(ask.questions) == 3
        with pytest.raises(LoginRefused) as given_up:
            connect(target, ask_password=Answers(None))
        with pytest.raises(LoginRefused) as nobody:
            connect(target)
    assert "tried" in one_sentence(wrong) and "password" in str(wrong.value)
    for problem in (wrong, given_up, nobody):
        assert "guest@127.0.0.1" in one_sentence(problem) and str(tmp_path / "wrong") in str(problem.value)
        assert no_secret_in(problem, caplog)


def test_a_host_that_falls_silent_during_the_login(password_server: Sshd):
    def ask(_) -> str:
        password_server.signal_connections(signal.SIGSTOP)
        return PASSWORD

    started = time.monotonic()
    try:
        with pytest.raises(BrokeOff, match="does not answer within 0.5 s"):
            connect(password_server.target(key_file=None), ask_password=ask, timeout_s=0.5)
        assert time.monotonic() - started < 4
    finally:
        password_server.drop_connections()


def test_a_connection_that_is_cut_in_the_login(password_server: Sshd):
    """Whatever paramiko raises becomes one sentence and its own class, because hosts lock out users who do this
    often."""
    def ask(_) -> str:
        password_server.drop_connections()
        return PASSWORD

    with pytest.raises((BrokeOff, LoginRefused)) as problem:
        connect(password_server.target(key_file=None), ask_password=ask)
    assert "broke off" in one_sentence(problem)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), paramiko_error("No session")])
def test_a_connection_that_is_cut_after_the_key_exchange(
    server: Sshd, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """Paramiko's exception used to reach the caller unchanged."""
    monkeypatch.setattr(_Session, "authenticate", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(BrokeOff, match="broke off during the login: ") as problem:
        connect(server.target())
    one_sentence(problem)


def test_a_key_and_a_password(tmp_path: Path):
    with server_with_guest(tmp_path, "AuthenticationMethods publickey,password") as server:
        assert login(server.target(), ask_password=Answers("wrong-horse", PASSWORD))
        with pytest.raises(LoginRefused, match="the host accepts password"):
            connect(server.target())


def only_these_threads(number: int) -> bool:
    """Whether no thread of paramiko's is left, or soon will be."""
    deadline = time.monotonic() + 2
    while threading.active_count() > number and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count() == number


def test_an_exception_of_the_caller_passes(password_server: Sshd, tmp_path: Path):
    before = threading.active_count()
    for asked in ({"confirm": refuse_to_answer}, {"ask_password": refuse_to_answer}):
        known_hosts = password_server.known_hosts if "ask_password" in asked else tmp_path / "known_hosts"
        with pytest.raises(AssertionError, match="this must not be asked"):
            connect(password_server.target(key_file=None, known_hosts=str(known_hosts)), **asked)
    assert only_these_threads(before)


def test_an_alias(server: Sshd, tmp_path: Path, home: Path):
    (home / ".ssh").mkdir()
    (home / ".ssh" / "more").write_text(
        f"Host trainer\n  HostName {server.listen}\n  Port {server.port}\n  User {server.user}\n"
        f"  IdentityFile {server.client_key}\nHost other\n"
    )
    known_hosts = f"UserKnownHostsFile {tmp_path / 'absent'} {server.known_hosts}\n"
    (home / ".ssh" / "config").write_text(f"Include absent* mo*\n{known_hosts}Host other\n  Port 1\n")
    assert login(SSHTarget("trainer"), refuse_to_answer, refuse_to_answer)
    # The target wins.
    with pytest.raises(Unreachable, match=":9:? refuses"):
        connect(SSHTarget("trainer", port=9))
    with pytest.raises(LoginRefused, match=f"nosuchuser@{server.listen}"):
        connect(SSHTarget("trainer", user="nosuchuser"))
    # Another file, and another name in known_hosts.
    config = tmp_path / "config"
    config.write_text(
        f"{known_hosts}HostKeyAlias Trainer\nPort {server.port}\nGlobalKnownHostsFile {tmp_path / 'global'}\n"
    )
    target = SSHTarget(server.listen, user=server.user, key_file=str(server.client_key))
    with pytest.raises(HostKeyRefused, match="trainer is unknown"):
        connect(target, config_file=config)
    (tmp_path / "global").write_text(f"trainer {server.public_keys['ed25519']}\n")
    assert login(target, refuse_to_answer, config_file=config)


@pytest.mark.parametrize("text", ["Port x\n", "Host 'a\n", "Include {}\n", "ProxyJump -x\n", None])
def test_a_broken_configuration(tmp_path: Path, text: str | None):
    config = tmp_path / "config"
    if text is not None:
        config.write_text(text.format(config))
    with pytest.raises(SSHProblem, match="cannot be used as an SSH configuration") as problem:
        connect(SSHTarget("trainer"), config_file=config)
    assert str(config) in one_sentence(problem)


def proxied(server: Sshd, tmp_path: Path, way: str) -> Path:
    config = tmp_path / "config"
    config.write_text(
        f"Host jump\n  HostName {server.listen}\n  Port {server.port}\nHost far\n  HostName {server.listen}\n  {way}\n"
        f"Host *\n  User {server.user}\n  IdentityFile {server.client_key}\n  UserKnownHostsFile {server.known_hosts}\n"
    )
    return config


@pytest.mark.parametrize(
    "way",
    [
        "ProxyJump jump",
        "ProxyJump {user}@{host}:{port}",
        "ProxyCommand sh -c 'ssh -F {config} -W %h:%p %r@jump; sleep 60'",
    ],
)
def test_a_proxy(server: Sshd, tmp_path: Path, way: str):
    """The proxy carries the connection, and ends with it."""
    way = way.format(user=server.user, host=server.listen, port=server.port, config=tmp_path / "config")
    config = proxied(server, tmp_path, way)
    with connect(SSHTarget("far", port=server.port), refuse_to_answer, config_file=config) as client:
        process = client.get_transport().sock.process
        assert client.exec_command("echo works")[1].read() == b"works\n"
        assert process.poll() is None
    assert process.returncode is not None


def test_a_jump_host_for_all_hosts(server: Sshd, tmp_path: Path):
    """The jump is not the way to the jump host itself; ssh would start itself again and again."""
    config = proxied(server, tmp_path, "ProxyJump jump")
    config.write_text(f"{config.read_text()}  ProxyJump jump\n")
    assert login(SSHTarget("far", port=server.port), config_file=config, timeout_s=3)
    with connect(SSHTarget("jump"), config_file=config, timeout_s=3) as client:
        assert not hasattr(client.get_transport().sock, "process")


def test_a_proxy_that_ends(server: Sshd, tmp_path: Path):
    config = proxied(server, tmp_path, "ProxyJump jump")
    with connect(SSHTarget("far", port=server.port), config_file=config) as client:
        client.get_transport().sock.process.kill()
        deadline = time.monotonic() + 3
        while client.get_transport().is_active() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not client.get_transport().is_active()


@pytest.mark.parametrize("way", ["ProxyJump jump", "ProxyCommand nosuchcommand %h"])
def test_a_proxy_that_does_not_get_there(server: Sshd, tmp_path: Path, way: str):
    started = time.monotonic()
    with pytest.raises(Unreachable, match="through its proxy: .*(refused|not found)") as problem:
        connect(SSHTarget("far", port=free_port()), config_file=proxied(server, tmp_path, way))
    assert time.monotonic() - started < 5
    one_sentence(problem)


def test_a_refused_port(home: Path):
    port = free_port()
    with pytest.raises(Unreachable, match=f"127.0.0.1:{port} refuses") as problem:
        connect(SSHTarget("127.0.0.1", port))
    one_sentence(problem)


def test_a_name_that_does_not_resolve():
    for name in ("no-such-host.invalid", "a" * 70):
        with pytest.raises(Unreachable, match=f"{name} cannot be resolved") as problem:
            connect(SSHTarget(name))
        one_sentence(problem)


@contextlib.contextmanager
def port_that_says(answer: bytes, closes: bool = True) -> Iterator[int]:
    """A port that accepts connections and never says anything else."""
    held = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = server.accept()[0]
                held.append(connection)
                connection.sendall(answer)
                if closes:
                    connection.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n"])
def test_a_port_that_falls_silent(answer: bytes):
    before = threading.active_count()
    with port_that_says(answer, closes=False) as port:
        started = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer within 0.5 s") as problem:
            connect(SSHTarget("127.0.0.1", port), timeout_s=0.5)
        assert time.monotonic() - started < 3
    one_sentence(problem)
    assert only_these_threads(before)


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad\r\n", b"\x1b[31mBad\x07\r\n" * 200, b"SSH-1.5-old\r\n", b"SSH-2.0-x\r\n\x00\x00"],
)
def test_a_port_that_is_not_ssh(answer: bytes, caplog: pytest.LogCaptureFixture):
    with port_that_says(answer) as port, pytest.raises(Unreachable, match="no SSH connection") as problem:
        connect(SSHTarget("127.0.0.1", port), timeout_s=2)
    text = one_sentence(problem)
    assert ("\\x1b[31mBad\\x07" in text) == (b"\x1b" in answer)
    assert not caplog.records


def test_nothing_but_the_sentence_reaches_the_screen():
    with port_that_says(b"\x1b[2J nonsense\r\n" * 200) as port:
        program = (
            "from utils.ssh import *\n"
            f"try: connect(SSHTarget('127.0.0.1', {port}))\n"
            "except SSHProblem as problem: print(problem)"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1 and done.stdout.startswith(f"127.0.0.1:{port} can be")


def test_without_paramiko():
    program = (
        "import sys; sys.modules['paramiko'] = None\n"
        "from utils.ssh import *\n"
        "try: connect(SSHTarget('127.0.0.1'))\n"
        "except SSHProblem as problem: print(problem)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("paramiko is missing: pip install paramiko\n", "")


def test_signs_of_life(tmp_path: Path):
    with Sshd(tmp_path / "sshd", log_level="DEBUG1") as server, connect(server.target(), keepalive_s=1) as client:
        sock = client.get_transport().sock
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
        deadline = time.monotonic() + 5
        while "keepalive@" not in server.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "keepalive@" in server.log.read_text()
        assert login(server.target(), keepalive_s=0)


def test_a_dropped_connection_is_noticed(server: Sshd):
    with connect(server.target()) as client:
        _, out, _ = client.exec_command("sleep 60")
        assert server.drop_connections() >= 1
        started = time.monotonic()
        assert out.read() == b"" and not client.get_transport().is_active()
        assert time.monotonic() - started < 3
    assert login(server.target())
