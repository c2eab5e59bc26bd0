"""SSH connections that trust only known hosts.

A host is known from known_hosts, by OpenSSH's rules, or from the user: by a fingerprint given beforehand, or an answer
on the first visit. A key that has changed is refused without asking.
"""

import base64
import contextlib
import getpass
import glob
import hmac
import logging
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import paramiko

logger = logging.getLogger(__name__)

SSH_PORT = 22
TRIES = 3
"""Number of times that a password or a passphrase is asked for."""
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


class SSHProblem(ConnectionError):
    """There is no connection: one sentence for the user, without secrets and control characters."""


class HostKeyRefused(SSHProblem):
    """The host's key is unknown, has changed, is revoked, or is not the one that the user named."""


class LoginRefused(SSHProblem):
    """The host accepted none of the keys and passwords."""


class Unreachable(SSHProblem):
    """The address does not answer, or does not speak SSH."""


class BrokeOff(Unreachable):
    """The address answers, but the connection ends before or during the login. A host may count such connections, and
    shut out a client that returns too soon."""


@dataclass(frozen=True)
class SSHTarget:
    """The host to connect to. A field that is None comes from ~/.ssh/config, then from OpenSSH's defaults.

    `known_hosts` is a file to use instead of the user's and the system's. `fingerprint` ("SHA256:...") belongs to the
    host's key; the user has confirmed it by other means.
    """

    host: str
    port: int | None = None
    user: str | None = None
    key_file: str | None = None
    known_hosts: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        # Both may end up in a ProxyCommand, which a shell runs.
        if not re.fullmatch(r"[\w.:][\w.:%-]*", self.host):
            raise ValueError(f"{self.host!r} is not a host name or address: write [user@]host[:port]")
        if self.user is not None and not re.fullmatch(r"[\w.][\w.@+-]*", self.user):
            raise ValueError(f"{self.user!r} is not a user name: write [user@]host[:port]")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"a port is a number from 1 to 65535, got {self.port}")
        if self.fingerprint is not None and not self.fingerprint.startswith("SHA256:"):
            raise ValueError(f"a fingerprint starts with SHA256:, got {self.fingerprint!r}")

    @staticmethod
    def parse(text: str) -> "SSHTarget":
        """[user@]host[:port] or [user@][ipv6]:port, the second pair of brackets being typed.

        Raises:
            ValueError: with a sentence for the user.
        """
        user, at, address = text.strip().rpartition("@")
        host, port = address, ""
        if match := re.fullmatch(r"\[([^]]*)\](?::(.*))?", address):
            host, port = match[1], match[2]
        elif address.count(":") == 1:
            host, _, port = address.partition(":")
        if port == "" and address.endswith(":") or port and not re.fullmatch(r"[0-9]{1,5}", port):
            raise ValueError(f"{text!r} has a port that is not a number: write [user@]host[:port]")
        return SSHTarget(host, int(port) if port else None, user if at else None)


def connect(
    target: SSHTarget,
    confirm: Callable[[str, str, str], bool] | None = None,
    ask_password: Callable[[str], str | None] | None = None,
    timeout_s: float = 10.0,
    keepalive_s: int = 15,
    config_file: str | Path | None = None,
) -> "paramiko.SSHClient":
    """Connect and log in.

    Args:
        target: takes precedence over the configuration file.
        confirm: decides about an unknown host, given its name as in known_hosts ("host", or "[host]:port" if the port
            is not 22), the key's type and its fingerprint; after True the key is added to known_hosts.
        ask_password: shows a prompt and returns a password or passphrase, or None to give up.
        timeout_s: how long to wait for the connection, for the handshake, and for each answer to a login.
        keepalive_s: seconds of silence after which a sign of life is sent; 0 for never.
        config_file: instead of ~/.ssh/config.

    Raises:
        HostKeyRefused, LoginRefused, Unreachable, BrokeOff: see there.
        SSHProblem: paramiko is missing, or the configuration file is broken.
    """
    paramiko = _import_paramiko()
    route = _Route.find(paramiko, target, config_file, timeout_s)
    session = _Session(paramiko, route, target.fingerprint, confirm, ask_password, timeout_s)
    proxy = route.proxy_command
    connection = _ProxySocket.start(proxy) if proxy else _open_tcp(route, timeout_s, keepalive_s)
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(session)
    started = time.monotonic()
    try:
        client.connect(
            route.host,
            route.port,
            username=route.user,
            sock=connection,
            timeout=timeout_s,
            banner_timeout=timeout_s,
            auth_timeout=timeout_s,
            transport_factory=session.make_transport,
            auth_strategy=session,
        )
    except BaseException as error:
        client.close()
        connection.close()
        if not isinstance(error, Exception):
            raise
        if not session.handshake_done:
            why = _why_no_handshake(route, connection, error, time.monotonic() - started, timeout_s)
            raise BrokeOff(why) from None
        if isinstance(error, (paramiko.SSHException, EOFError, OSError)) and not isinstance(error, SSHProblem):
            why = _plain(error) or "it closed the connection"
            raise BrokeOff(f"{route.address} broke off during the login: {why}") from None
        raise
    client.get_transport().set_keepalive(keepalive_s)
    return client


def _import_paramiko():
    try:
        import paramiko
    except ImportError:
        raise SSHProblem("paramiko is missing: pip install paramiko") from None
    # Its thread logs a traceback of each error that connect() tells in one sentence.
    transport_logger = logging.getLogger("paramiko.transport")
    if transport_logger.level == logging.NOTSET:
        transport_logger.setLevel(logging.CRITICAL)
    return paramiko


def _plain(text: object) -> str:
    """One line for a terminal: text from a host may hold escape sequences."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text).strip())[:500]


def _config_lines(path: Path, block: str = "Host *", depth: int = 0) -> Iterator[str]:
    """The lines of a configuration file and of the files that it includes, which paramiko would pass over."""
    if depth > 16:
        raise ValueError("it includes itself")
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        keyword, *value = re.split(r"[\s=]+", line.strip(), maxsplit=1)
        if keyword.lower() == "include" and value:
            for pattern in shlex.split(value[0]):
                for name in sorted(glob.glob(str(Path.home() / ".ssh" / Path(pattern).expanduser()))):
                    yield from _config_lines(Path(name), block, depth + 1)
            # The next lines belong to the block with the Include, not to the included file's last block.
            yield block
        else:
            if keyword.lower() in ("host", "match"):
                block = line
            yield line


@dataclass(frozen=True)
class _Route:
    """A target with the values of ~/.ssh/config."""

    host: str
    port: int
    user: str
    known_as: str
    """The host's name in known_hosts."""
    known_hosts: list[Path]
    key_files: list[Path]
    default_keys: bool
    only_these_keys: bool
    proxy_command: str | None

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def find(paramiko, target: SSHTarget, config_file: str | Path | None, timeout_s: float) -> "_Route":
        path = Path(config_file or Path.home() / ".ssh" / "config")
        config = paramiko.SSHConfig()
        # The first value wins, also for %p and %r in a ProxyCommand.
        config.parse([f"Port {target.port}"] * bool(target.port) + [f"User {target.user}"] * bool(target.user))
        try:
            if config_file or path.exists():
                config.parse(_config_lines(path))
            options = config.lookup(target.host)
            host, port = options["hostname"], int(options.get("port", SSH_PORT))
            user = options.get("user") or getpass.getuser()
            proxy = next((key for key in options if key in ("proxycommand", "proxyjump")), "")
            command = options.get(proxy)
            if proxy == "proxyjump":
                command = _jump_command(config, command, target.host, f"[{host}]:{port}", config_file, timeout_s)
            users = shlex.split(options.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2"))
            systems = shlex.split(options.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts"))
        except (paramiko.SSHException, OSError, ValueError, LookupError, ImportError) as error:
            why = _plain(getattr(error, "strerror", None) or error)
            raise SSHProblem(f"{path} cannot be used as an SSH configuration: {why}") from None
        files = [target.known_hosts] if target.known_hosts else [f for f in users + systems if f.lower() != "none"]
        named = [target.key_file] * bool(target.key_file) + options.get("identityfile", [])
        keys = named or [str(Path.home() / ".ssh" / name) for name in DEFAULT_KEYS]
        known_as = host if port == SSH_PORT else f"[{host}]:{port}"
        return _Route(
            host,
            port,
            user,
            options.get("hostkeyalias", known_as).lower(),
            [Path(file).expanduser() for file in files],
            [Path(file).expanduser() for file in keys],
            default_keys=not named,
            only_these_keys=options.get("identitiesonly", "no").lower() == "yes",
            proxy_command=command,
        )


def _jump_command(config, jump: str, alias: str, address: str, config_file, timeout_s: float) -> str | None:
    """An ssh that forwards its standard input and output to the host, as OpenSSH does for ProxyJump."""
    *before, last = jump.split(",")
    hop = SSHTarget.parse(last.strip().removeprefix("ssh://"))
    if jump.lower() == "none" or (hop.host == alias and not before):
        # The second condition: "Host *" names the jump host, and the target is that host itself.
        return None
    # It could ask questions only on a terminal, and there may be none.
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={math.ceil(timeout_s)}", "-W", address]
    if config.lookup(hop.host).get("proxyjump") == jump:
        # Without this, ssh would start one ssh after the other, without end.
        command += ["-o", "ProxyJump=none"]
    for flag, value in (("-F", config_file), ("-J", ",".join(before)), ("-p", hop.port), ("-l", hop.user)):
        command += [flag, str(value)] if value else []
    return shlex.join([*command, "--", hop.host])


def _open_tcp(route: _Route, timeout_s: float, keepalive_s: int) -> socket.socket:
    try:
        connection = socket.create_connection((route.host, route.port), timeout=timeout_s)
        if keepalive_s and hasattr(socket, "TCP_USER_TIMEOUT"):
            # Without it, a host that has vanished is noticed after a quarter of an hour.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3000 * keepalive_s)
        return connection
    except (socket.gaierror, UnicodeError):
        raise Unreachable(f"the name {route.host} cannot be resolved: check its spelling and the network") from None
    except ConnectionRefusedError:
        raise Unreachable(f"{route.address} refuses connections: check the port and that sshd runs there") from None
    except TimeoutError:
        raise Unreachable(_no_answer(route, timeout_s)) from None
    except OSError as error:
        raise Unreachable(f"{route.address} cannot be reached: {error.strerror or error}") from None


def _no_answer(route: _Route, timeout_s: float) -> str:
    return f"{route.address} does not answer within {timeout_s:g} s: check the address, the network and firewalls"


class _ProxySocket(socket.socket):
    """Our end of a proxy command's standard input and output; closing it ends the command.

    paramiko.ProxyCommand would never report that its command has ended.
    """

    process: subprocess.Popen | None = None

    @classmethod
    def start(cls, command: str) -> "_ProxySocket":
        ours, theirs = socket.socketpair()
        self = cls(fileno=ours.detach())
        self.messages = tempfile.TemporaryFile()
        with theirs:
            # A session of its own: Ctrl-C must not end a connection that is still needed to stop the remote job.
            self.process = subprocess.Popen(
                f"exec {command}", shell=True, stdin=theirs, stdout=theirs, stderr=self.messages, start_new_session=True
            )
        return self

    def close(self) -> None:
        super().close()
        if self.process is not None and self.process.poll() is None:
            # With its children: an ssh through several hosts is several.
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self.process.pid, number)
                    self.process.wait(timeout=1)

    def complaint(self) -> str:
        self.messages.seek(0)
        return _plain("; ".join(self.messages.read().decode("utf-8", "replace").split("\n"))).rstrip("; ")


def _why_no_handshake(route: _Route, connection: socket.socket, error: Exception, waited: float, limit: float) -> str:
    why = _plain(error) or "it closed the connection"
    if why.startswith("Error reading SSH protocol banner"):
        why = "it does not begin as an SSH server does"
    if isinstance(connection, _ProxySocket) and (complaint := connection.complaint()):
        return f"{route.address} cannot be reached through its proxy: {complaint}"
    if waited >= 0.95 * limit:
        return _no_answer(route, limit)
    return f"{route.address} can be reached, but no SSH connection can be made, check the port: {why}"


@dataclass(frozen=True)
class _KnownKey:
    marker: str
    type: str
    blob: bytes
    file: Path
    line: int


def _matches(patterns: str, name: str) -> bool:
    """Whether the first field of a known_hosts line matches this host."""
    found = False
    for pattern in patterns.split(","):
        if pattern.startswith("|1|"):
            _, _, salt, digest = pattern.split("|")
            mac = hmac.digest(base64.b64decode(salt), name.encode(), "sha1")
            found |= hmac.compare_digest(mac, base64.b64decode(digest))
        else:
            regex = re.escape(pattern.removeprefix("!").lower()).replace(r"\*", ".*").replace(r"\?", ".")
            if re.fullmatch(regex, name):
                if pattern.startswith("!"):
                    return False
                found = True
    return found


def _known_keys(files: list[Path], name: str) -> list[_KnownKey]:
    """The keys of a host in known_hosts files. paramiko's own reader knows neither markers nor patterns, and only one
    key of each type."""
    found = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            continue
        except OSError as error:
            # It could hold the revoked key.
            raise HostKeyRefused(f"{file} cannot be read ({error.strerror}), so no host can be trusted") from None
        for number, line in enumerate(lines, 1):
            fields = line.split()
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) < 3 or fields[0].startswith("#"):
                continue
            try:
                if _matches(fields[0], name):
                    blob = base64.b64decode(fields[2], validate=True)
                    found.append(_KnownKey(marker, fields[1], blob, file, number))
            except ValueError:
                # A broken line, which OpenSSH ignores, too.
                continue
    return found


def _remember(file: Path, name: str, key: "paramiko.PKey") -> None:
    """Append a host's key to a known_hosts file."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+", buffering=0) as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(size - 1, 0))
            start = "" if handle.read(1) in (b"", b"\n") else "\n"
            handle.write(f"{start}{name} {key.get_name()} {key.get_base64()}\n".encode())
    except OSError as error:
        logger.warning("the key of %s cannot be remembered in %s: %s", name, file, error.strerror)


class _Session:
    """Answers to paramiko's questions while it connects: the transport, the check of the host's key, the login."""

    def __init__(self, paramiko, route: _Route, fingerprint, confirm, ask_password, timeout_s: float):
        self._paramiko, self._route, self._timeout_s = paramiko, route, timeout_s
        self._fingerprint, self._confirm, self._ask_password = fingerprint, confirm, ask_password
        self.handshake_done = False
        keys = _known_keys(route.known_hosts, route.known_as)
        self._expected = [key for key in keys if not key.marker]
        if route.known_as.startswith("["):
            # As in OpenSSH: a key for the host without a port is good for any port that has none of its own.
            keys += _known_keys(route.known_hosts, route.host.lower())
        self._accepted = self._expected or [key for key in keys if not key.marker]
        self._revoked = [key for key in keys if key.marker == "@revoked"]
        self._methods: set[str] = set()
        self._tried: list[str] = []
        self._locked: list[Path] = []

    def make_transport(self, connection: socket.socket, **options) -> "paramiko.Transport":
        transport = self._paramiko.Transport(connection, **options)
        transport.handshake_timeout = self._timeout_s
        # The host has keys of several types and shows one: ask for a type that is known.
        known = {"rsa" if key.type == "ssh-rsa" else key.type for key in self._accepted}
        security = transport.get_security_options()
        security.key_types = sorted(security.key_types, key=lambda t: ("rsa" if "rsa-" in t else t) not in known)
        return transport

    def missing_host_key(self, client: "paramiko.SSHClient", hostname: str, key: "paramiko.PKey") -> None:
        """Check a host's key. Every key comes here, because the client itself has no known hosts."""
        self.handshake_done = True
        name, blob, offered = self._route.known_as, key.asbytes(), f"{key.get_name()} {key.fingerprint}"
        given = self._fingerprint and self._fingerprint.rstrip("=")
        for bad in self._revoked:
            if bad.blob == blob:
                raise HostKeyRefused(
                    f"the key of {name} ({offered}) is marked as revoked in {bad.file}, line {bad.line}: "
                    "ask the host's administrator for a new one"
                )
        known = any(good.blob == blob for good in self._accepted)
        if self._expected and not known:
            old = self._expected[0]
            raise HostKeyRefused(
                f"the key of {name} has changed: it now shows {offered}, but {old.file}, line {old.line}, has another; "
                "somebody may be listening in, so only if the change is expected remove the old entry with "
                f"ssh-keygen -R {shlex.quote(name)} -f {shlex.quote(str(old.file))}"
            )
        if given and given != key.fingerprint:
            raise HostKeyRefused(
                f"{name} shows the key {offered}, which is not the one with the given fingerprint {_plain(given)}: "
                "compare it with that of the host's key of this type"
            )
        if known or given:
            return
        if self._confirm is None:
            raise HostKeyRefused(
                f"{name} is unknown and shows the key {offered}: if that is the host's fingerprint, connect once with "
                "ssh, or add the key to known_hosts with ssh-keyscan"
            )
        if not self._confirm(name, key.get_name(), key.fingerprint):
            raise HostKeyRefused(f"{name} is unknown and its key {offered} was not confirmed")
        if self._route.known_hosts:
            _remember(self._route.known_hosts[0], name, key)

    def authenticate(self, transport: "paramiko.Transport") -> None:
        """Log in with a key, if possible without questions, or else with a password."""
        try:
            agent = self._paramiko.Agent()
        except (self._paramiko.SSHException, OSError, ValueError):
            agent = None
        try:
            # The host never grants this, but its answer lists the methods that it accepts.
            if self._attempt(transport, "no credentials", transport.auth_none):
                return
            self._tried.clear()
            if "publickey" in self._methods:
                for label, key in self._keys(agent.get_keys() if agent else ()):
                    if self._attempt(transport, label, transport.auth_publickey, key):
                        break
            self._use_password(transport)
        finally:
            if agent is not None:
                agent.close()
        if not transport.is_authenticated():
            raise LoginRefused(self._refusal())

    def _use_password(self, transport: "paramiko.Transport") -> None:
        for _ in range(TRIES):
            if transport.is_authenticated() or not self._methods & {"password", "keyboard-interactive"}:
                return
            password = self._ask_password and self._ask_password(f"Password of {self._who}: ")
            if not password:
                return
            try:
                self._attempt(transport, "password", transport.auth_password, password)
            finally:
                # paramiko would keep it as long as the connection lives.
                transport.auth_handler.password = transport.auth_handler.interactive_handler = None

    def _attempt(self, transport: "paramiko.Transport", label: str, method: Callable, *credentials) -> bool:
        """Whether the host accepts the credentials, perhaps only as the first of several that it demands."""
        try:
            self._methods = set(method(self._route.user, *credentials))
            return True
        except self._paramiko.BadAuthenticationType as error:
            self._methods = set(error.allowed_types)
        except Exception as error:
            if "timeout" in str(error).lower():
                raise BrokeOff(_no_answer(self._route, self._timeout_s)) from None
            if not transport.is_active():
                tried, why = ", ".join([*self._tried, label]), _plain(error)
                if "transport shut down" in why:
                    why = "if these are more tries than the host allows, name the right key"
                raise LoginRefused(f"the login of {self._who} broke off after trying {tried}: {why}") from None
            if not isinstance(error, self._paramiko.SSHException):
                raise
        if label not in self._tried:
            self._tried.append(label)
        return False

    def _keys(self, agent_keys) -> Iterator[tuple[str, "paramiko.PKey"]]:
        """Keys to try, with labels. A host ends the connection after a few, so the likely ones come first."""
        agent = {key.blob: (f"ssh-agent's {_plain(key.comment or key.fingerprint)}", key) for key in agent_keys}
        named = [] if self._route.default_keys else list(self._keys_of_files(agent))
        others = [] if self._route.only_these_keys else list(agent.values())
        yield from named
        yield from (pair for pair in others if pair not in named)
        if self._route.default_keys:
            yield from (pair for pair in self._keys_of_files(agent) if pair not in others)
        for file in self._locked if self._ask_password else ():
            for _ in range(TRIES):
                passphrase = self._ask_password(f"Passphrase of {file}: ")
                if not passphrase:
                    break
                try:
                    key = self._paramiko.PKey.from_path(file, passphrase.encode())
                except Exception:
                    # The kind of error depends on the key's format, on where the wrong bytes lead, and on the versions.
                    continue
                yield str(file), key
                break
            else:
                self._tried.append(f"{file} (wrong passphrase)")

    def _keys_of_files(self, agent: dict) -> Iterator[tuple[str, "paramiko.PKey"]]:
        for file in self._route.key_files:
            public = file if file.suffix == ".pub" else file.with_name(f"{file.name}.pub")
            try:
                blob = base64.b64decode(public.read_text().split()[1])
            except (OSError, ValueError, IndexError):
                blob = b""
            try:
                if blob in agent:
                    yield agent[blob]
                elif public == file:
                    self._tried.append(f"{file} (not in ssh-agent)")
                else:
                    yield str(file), self._paramiko.PKey.from_path(file)
            except FileNotFoundError:
                if not self._route.default_keys:
                    self._tried.append(f"{file} (not found)")
            except TypeError:
                # cryptography raises this for a key that needs a passphrase.
                self._locked.append(file)
            except Exception:
                self._tried.append(f"{file} (no private key that paramiko can read)")

    @property
    def _who(self) -> str:
        return f"{self._route.user}@{self._route.address}"

    def _refusal(self) -> str:
        tried = ", ".join(self._tried) or "nothing, as there was no key"
        accepted = _plain(", ".join(sorted(self._methods))) or "nothing"
        advice = "check the user name, and that the host's authorized_keys has your public key"
        if self._locked and not self._ask_password:
            advice = f"{self._locked[0]} has a passphrase, so add it to ssh-agent with ssh-add"
        elif "publickey" not in self._methods and not self._ask_password:
            advice = "it takes no keys, and nobody was there to ask for a password"
        return f"{self._who} refuses the login (tried {tried}; the host accepts {accepted}): {advice}"
