"""Where runs lie, and what is new of them: files on this machine, or on another over one SSH connection a host.

A thread for each host asks for the size of each file, and reads what has been added since. A file that was replaced, or
cut, is read anew.
"""

import logging
import math
import os
import posixpath
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from runs.history import RunHistory
from runs.reslog import LONGEST_LINE
from utils.paths import expand
from utils.small_files import parse_yaml
from utils.ssh import HostKeyRefused, LoginRefused, SSHTarget, connect
from utils.text import plain

if TYPE_CHECKING:
    import paramiko

logger = logging.getLogger(__name__)

RESLOG = "reslog.jsonl"
_COMPARED_BYTES = 64
_CHUNK_BYTES = 4 << 20
_LONGEST_CONFIG = 1 << 17
_LONGEST_HEARTBEAT = 1 << 14
_LOOK_ROUND_S = 5.0
"""How often configurations, heartbeats and new runs are looked for."""
_LONGEST_WAIT_S = 30.0
"""Between two attempts to connect."""


@dataclass(frozen=True)
class FileState:
    size: int
    modified: float
    identity: int = 0
    """Another number, another file; 0 where that cannot be known."""


class Files(Protocol):
    """A machine's files. What cannot be read raises OSError, EOFError or SSHException."""

    def state(self, path: str) -> FileState | None:
        """None: there is no such file."""

    def read(self, path: str, offset: int, size: int) -> bytes: ...
    def folders(self, path: str) -> list[str]:
        """Names of the folders in a folder, sorted; none if it is none."""

    def now(self) -> float:
        """Seconds since 1970, by that machine's clock."""

    def connected(self) -> bool:
        """False: what was just raised means all files, not only the one that was asked for."""

    def close(self) -> None: ...


class LocalFiles:
    def state(self, path: str) -> FileState | None:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileState(found.st_size, found.st_mtime, found.st_ino) if stat.S_ISREG(found.st_mode) else None

    def read(self, path: str, offset: int, size: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def folders(self, path: str) -> list[str]:
        try:
            # Not DirEntry.is_dir, which raises for a link into a folder that may not be read.
            return sorted(name for name in os.listdir(path) if os.path.isdir(posixpath.join(path, name)))
        except OSError:
            return []

    def now(self) -> float:
        return time.time()

    def connected(self) -> bool:
        return True

    def close(self) -> None:
        pass


class RemoteFiles:
    """Over SFTP."""

    def __init__(self, client: "paramiko.SSHClient"):
        self._client = client
        self._sftp = client.open_sftp()
        self._sftp.get_channel().settimeout(20.0)
        self._request, self._sftp._request = self._sftp._request, self._lenient_request
        self._ahead = self._clock_ahead()

    def _lenient_request(self, *args) -> tuple:
        """paramiko could not list a folder where a single name is not UTF-8."""
        kind, message = self._request(*args)
        message.get_text = lambda: message.get_string().decode("utf-8", "replace")
        return kind, message

    def _clock_ahead(self) -> float:
        """Seconds by which the host's clock is ahead of ours; 0 where it only serves files."""
        try:
            _, output, _ = self._client.exec_command("date +%s", timeout=5.0)
            ahead = float(output.read(32)) - time.time()
            return ahead if math.isfinite(ahead) else 0.0
        except Exception as error:
            # Of no consequence, and a host that serves files only refuses in ways of its own.
            logger.debug("the host does not tell the time: %s", error)
            return 0.0

    def state(self, path: str) -> FileState | None:
        try:
            found = self._sftp.stat(path)
        except FileNotFoundError:
            return None
        regular = found.st_mode is None or stat.S_ISREG(found.st_mode)
        return FileState(found.st_size or 0, float(found.st_mtime or 0)) if regular else None

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self._sftp.open(path, "rb") as file:
            file.seek(offset)
            # Asks for all of it at once, else each 32 KiB would cost a round trip.
            file.prefetch(offset + size)
            return file.read(size)

    def folders(self, path: str) -> list[str]:
        try:
            entries = self._sftp.listdir_attr(path)
        except OSError as error:
            if not _is_of_one_file(error, self):
                raise
            return []
        # A link may lead to a folder.
        return sorted(e.filename for e in entries if stat.S_IFMT(e.st_mode or 0) in (stat.S_IFDIR, stat.S_IFLNK))

    def now(self) -> float:
        return time.time() + self._ahead

    def connected(self) -> bool:
        transport = self._client.get_transport()
        return transport is not None and transport.is_active() and not self._sftp.get_channel().closed

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True)
class News:
    lines: list[bytes]
    """Complete, without their ends."""
    anew: bool = False
    """The file is another one: what was read before is void."""
    more: bool = False
    """There is more to read at once."""


class FollowedFile:
    """Reads what is new in a growing file of lines."""

    def __init__(self, path: str):
        self.path = path
        self.bytes_fetched = 0
        self._begin(None)

    def _begin(self, state: FileState | None) -> None:
        self._offset, self._tail, self._line, self._too_long = 0, b"", b"", False
        self._state = state

    def poll(self, files: Files) -> News:
        state = files.state(self.path)
        if state is None or state == self._state and state.size == self._offset:
            return News([])
        before, anew = self._state, False
        data = None
        if before is None or state.identity == before.identity and state.size >= self._offset:
            data = self._fetch(files, state)
        if data is None:
            anew = True
            self._begin(state)
            data = self._fetch(files, state) or b""
        self._state = state
        return self._read(data, state, anew)

    def _fetch(self, files: Files, state: FileState) -> bytes | None:
        """What comes after our place, in one read with the bytes before it; None if these are not those that we read: a
        file that was replaced by a longer one would look like one that grew."""
        before = len(self._tail)
        size = before + min(state.size - self._offset, _CHUNK_BYTES)
        data = files.read(self.path, self._offset - before, size) if size else b""
        self.bytes_fetched += len(data)
        return data[before:] if data.startswith(self._tail) else None

    def _read(self, data: bytes, state: FileState, anew: bool) -> News:
        self._offset += len(data)
        self._tail = (self._tail + data)[-_COMPARED_BYTES:]
        *lines, self._line = (self._line + data).split(b"\n")
        if lines and self._too_long:
            lines[0], self._too_long = b"", False
        if len(self._line) > LONGEST_LINE:
            # Shown once as a line that is too long; what follows of it is not kept.
            if not self._too_long:
                lines.append(self._line[: LONGEST_LINE + 1])
            self._line, self._too_long = b"", True
        return News(lines, anew, more=bool(data) and self._offset < state.size)


@dataclass(frozen=True)
class Place:
    """Where somebody says that runs lie."""

    target: SSHTarget | None
    """None: this machine."""
    path: str

    @staticmethod
    def parse(text: str) -> "Place":
        """A local path, [user@]host:path, or ssh://[user@]host[:port]/path (there, /~/ is the home directory).

        Raises:
            ValueError: with a sentence for the user.
        """
        if match := re.fullmatch(r"ssh://([^/]+)(/.*)?", text):
            path = match[2] or ""
            return Place(SSHTarget.parse(match[1]), _remote(text, re.sub("^/(~|[$])", r"\1", path)))
        if text.startswith("ssh://"):
            raise ValueError(f"{plain(text)!r} names no host: write ssh://[user@]host[:port]/RUN")
        host, colon, path = text.partition(":")
        if match := re.fullmatch(r"((?:[^@/]+@)?\[[^]]*\]):(.*)", text):
            host, colon, path = match[1], ":", match[2]
        # As scp does: a colon after a slash, or in something that exists here, belongs to a local name. C:\ is a drive.
        if not colon or "/" in host or re.match(r"[A-Za-z]:\\", text) or os.path.exists(text):
            return Place(None, expand(text))
        if not host or re.fullmatch(r"\d{1,5}(/.*|:.*)", path):
            raise ValueError(f"{plain(text)!r} is no run: write RUN, [user@]host:RUN or ssh://[user@]host:port/RUN")
        return Place(SSHTarget.parse(host), _remote(text, path))


def _remote(text: str, path: str) -> str:
    """A path on another machine, for SFTP: relative ones begin at the home directory, and nothing else is expanded.

    Raises:
        ValueError: it would have to be.
    """
    path = re.sub("^~(/|$)", "", path) or "."
    if match := re.match(r"~[^/]*|.*?(\$[A-Za-z_{][A-Za-z0-9_}]*)", path.replace("$$", "")):
        raise ValueError(
            f"{plain(text)!r}: {plain(match[1] or match[0])} means something there only to a shell: write the path in "
            f"full, or from your home directory on"
        )
    return path.replace("$$", "$")


@dataclass
class Health:
    """What is known of a run beside its results."""

    problem: str = ""
    """Why it cannot be read now."""
    phase: str = ""
    """Of rank 0, by its heartbeat."""
    heartbeat_at: float = 0.0
    """Seconds since 1970, by the clock of the run's machine, like `clock_ahead + time.time()`."""
    clock_ahead: float = 0.0
    config: dict[str, object] = field(default_factory=dict)
    config_problem: str = ""
    """Why the configuration cannot be read."""


class Run:
    """One run, wherever it lies.

    Args:
        path: its directory, or its reslog.jsonl (or a file like that).
    """

    def __init__(self, target: SSHTarget | None, path: str):
        is_file = path.endswith(".jsonl")
        self.target, self.path = target, path
        self.directory = posixpath.dirname(path) if is_file else path
        self.log = FollowedFile(path if is_file else posixpath.join(path, RESLOG))
        self.data, self.health = RunHistory(), Health()
        self._config_state: FileState | None = None

    def update(self, files: Files) -> bool:
        """Read what is new of the results; whether there is more."""
        news = self.log.poll(files)
        if news.anew:
            self.data.clear()
        if news.lines:
            self.data.feed(news.lines)
        return news.more

    def look_round(self, files: Files) -> None:
        """Read what changes seldom, if it did."""
        path = posixpath.join(self.directory, "config.yaml")
        state = files.state(path)
        if state is not None and state != self._config_state:
            text = files.read(path, 0, _LONGEST_CONFIG + 1)
            self._config_state, self.health.config, self.health.config_problem = state, {}, ""
            try:
                self.health.config = _read_config(text)
            except ValueError as error:
                self.health.config_problem = plain(error)
        path = posixpath.join(self.directory, "heartbeat", "rank-0.json")
        state = files.state(path)
        self.health.clock_ahead = files.now() - time.time()
        if state is not None:
            self.health.heartbeat_at = state.modified
            found = re.search(rb'"phase": ?"([a-z_ ]{1,20})"', files.read(path, 0, _LONGEST_HEARTBEAT))
            self.health.phase = found[1].decode() if found else ""


def _read_config(text: bytes) -> dict[str, object]:
    """The flat configuration of a run: plain values, those that were derived with a dot before their names.

    Raises:
        ValueError: it is none.
    """
    if len(text) > _LONGEST_CONFIG:
        raise ValueError(f"it is larger than {_LONGEST_CONFIG >> 10} KiB")
    found = parse_yaml(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no settings")
    derived = found.pop("derived", None)
    config = {plain(key): value for key, value in found.items() if _is_simple(key)}
    if isinstance(derived, dict):
        config |= {
            f"derived.{plain(key)}": value for key, value in derived.items() if _is_simple(key) and key not in found
        }
    return {key: value for key, value in config.items() if _is_simple(value)}


def _is_simple(value: object) -> bool:
    """A text, a number, yes, no or nothing. Python refuses to write out integers that are too long."""
    return isinstance(value, (str, float, type(None))) or isinstance(value, int) and value.bit_length() < 1000


class Questions(Protocol):
    """Who answers when a host asks; called from the host's thread."""

    def confirm(self, name: str, key_type: str, fingerprint: str) -> bool: ...
    def password(self, prompt: str) -> str | None: ...


class _Remembered:
    """Answers what was answered before, once an attempt: after a lost connection, nobody is asked again."""

    def __init__(self, questions: Questions):
        self._questions = questions
        self._answers: dict[str, str] = {}
        self._used: set[str] = set()

    def begin(self) -> None:
        self._used.clear()

    def forget(self) -> None:
        """What was answered was wrong: it must not count as another wrong attempt."""
        self._answers.clear()

    def password(self, prompt: str) -> str | None:
        if prompt in self._answers and prompt not in self._used:
            self._used.add(prompt)
            return self._answers[prompt]
        answer = self._questions.password(prompt)
        if answer:
            self._answers[prompt] = answer
            self._used.add(prompt)
        return answer


class Host:
    """The runs on one machine, kept up to date by one thread over one connection, which is made again when it breaks.

    Args:
        target: None for this machine.
        paths: what somebody asked for: a run, a file like reslog.jsonl, or a folder of runs.
        on_change: is called from the thread when something is new; must not block.
        questions: None: nobody is there to ask.
        interval_s: between two looks at the files.
        ssh_config: instead of ~/.ssh/config.
    """

    def __init__(
        self,
        target: SSHTarget | None,
        paths: Sequence[str],
        on_change: Callable[[], None],
        questions: Questions | None = None,
        interval_s: float = 1.0,
        ssh_config: str | None = None,
    ):
        self.target, self._paths, self._on_change = target, list(paths), on_change
        self._interval_s, self._ssh_config = interval_s, ssh_config
        self._confirm = questions.confirm if questions else None
        self._remembered = _Remembered(questions) if questions else None
        self.runs: tuple[Run, ...] = ()
        self.problem = ""
        """Why there is no connection, or nothing at a place."""
        self.loaded = threading.Event()
        """All that was there has been read once, or cannot be."""
        self._stop, self._wake = threading.Event(), threading.Event()
        self._files: Files | None = None
        self._looked_round = 0.0
        self._known_paths: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._work, name=f"runs-{self.name}", daemon=True)

    @property
    def name(self) -> str:
        return self.target.host if self.target else "here"

    def start(self) -> None:
        self._thread.start()

    def add(self, path: str) -> None:
        self._paths.append(path)
        self.retry()

    def retry(self) -> None:
        """Look again at once."""
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end; it does within a second unless it waits for the network."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _work(self) -> None:
        wait_s = 1.0
        while not self._stop.is_set():
            try:
                if self._files is None:
                    self._files = self._open()
                self.problem = ""
                more = self._round(self._files)
                wait_s, pause_s = 1.0, 0.0 if more else self._interval_s
            except (HostKeyRefused, LoginRefused) as error:
                # Another attempt would end the same way, and too many lock an account.
                if self._remembered:
                    self._remembered.forget()
                self._lost(str(error))
                pause_s = None
            except Exception as error:
                # paramiko has many kinds; and if the mistake is ours, the other hosts' runs can still be watched.
                of_network = isinstance(error, (OSError, EOFError)) or type(error).__module__.startswith("paramiko")
                if not of_network:
                    logger.exception("reading the runs of %s failed", self.name)
                pause_s, wait_s = wait_s, min(2 * wait_s, _LONGEST_WAIT_S)
                lost = of_network and self.target is not None and self._files is not None
                why = "the connection was lost" if lost else plain(error) or type(error).__name__
                self._lost(f"{why}; tried again in {pause_s:.0f} s")
            self._on_change()
            if pause_s is None or pause_s > 0:
                self._wake.wait(pause_s)
                self._wake.clear()
        if self._files is not None:
            self._files.close()

    def _open(self) -> Files:
        if self.target is None:
            return LocalFiles()
        password = None
        if self._remembered:
            self._remembered.begin()
            password = self._remembered.password
        client = connect(self.target, self._confirm, password, config_file=self._ssh_config)
        try:
            return RemoteFiles(client)
        except BaseException:
            client.close()
            raise

    def _lost(self, problem: str) -> None:
        self.problem = problem
        for run in self.runs:
            run.health.problem = problem
        if self._files is not None:
            self._files.close()
            self._files = None
        self._looked_round = 0.0
        self.loaded.set()

    def _round(self, files: Files) -> bool:
        """Look at every run once; whether some has more to read at once."""
        looks_round = time.monotonic() - self._looked_round > _LOOK_ROUND_S or tuple(self._paths) != self._known_paths
        if looks_round:
            self._looked_round, self._known_paths = time.monotonic(), tuple(self._paths)
            self._find_runs(files)
        more = False
        for run in self.runs:
            try:
                more |= run.update(files)
                if looks_round:
                    run.look_round(files)
                run.health.problem = ""
            except OSError as error:
                if not _is_of_one_file(error, files):
                    raise
                run.health.problem = _why_unreadable(run.path, error)
            if self._stop.is_set():
                return False
        if not more:
            self.loaded.set()
        return more

    def _find_runs(self, files: Files) -> None:
        known = {run.path: run for run in self.runs}
        found: dict[str, None] = {}
        for path in self._paths:
            path = path.rstrip("/") or path
            if path.endswith(".jsonl") or self._holds_run(files, path):
                found[path] = None
                continue
            inside = [posixpath.join(path, name) for name in sorted(files.folders(path), key=in_order)]
            # What holds no run may become one.
            found |= dict.fromkeys([folder for folder in inside if self._holds_run(files, folder)] or [path])
        self.runs = tuple(known.get(path) or Run(self.target, path) for path in found)

    @staticmethod
    def _holds_run(files: Files, path: str) -> bool:
        try:
            return files.state(posixpath.join(path, RESLOG)) is not None
        except OSError as error:
            if not _is_of_one_file(error, files):
                raise
            return False


def _is_of_one_file(error: OSError, files: Files) -> bool:
    """Whether only a file, rather than the connection, is the matter."""
    return not isinstance(error, (TimeoutError, ConnectionError)) and files.connected()


def _why_unreadable(path: str, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{plain(path)} may not be read by this user"
    return f"{plain(path)} cannot be read: {plain(error.strerror or error)}"


def in_order(text: str) -> tuple[tuple[bool, int, str], ...]:
    """What to sort names by: run-2 before run-10."""
    # Every second part is a number, no longer than int() takes.
    parts = enumerate(re.split(r"([0-9]{1,300})", text))
    return tuple((place % 2 == 1, int(part) if place % 2 else 0, part) for place, part in parts if part)


def open_hosts(places: Sequence[Place], **options) -> list[Host]:
    """One Host a machine, not started yet; options as Host's."""
    paths: dict[SSHTarget | None, list[str]] = {}
    for place in places:
        paths.setdefault(place.target, []).append(place.path)
    return [Host(target, found, **options) for target, found in paths.items()]


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run, the end of its path that tells it from the others, with its host if need be."""
    parts = []
    for run in runs:
        path = run.directory if run.path.endswith("/" + RESLOG) or run.path == RESLOG else run.path
        absolute = posixpath.abspath(path) if run.target is None else posixpath.normpath(path)
        parts.append([part for part in absolute.split("/") if part] or [absolute])
    names = [found[-1] for found in parts]
    for length in range(2, max(map(len, parts), default=1) + 1):
        twice = {name for name, count in Counter(names).items() if count > 1}
        if not twice:
            break
        names = ["/".join(found[-length:]) if name in twice else name for name, found in zip(names, parts)]
    hosts = [run.target.host if run.target else "" for run in runs]
    several, counts = len(set(hosts)) > 1, Counter(names)
    found = [
        plain(f"{host}: {name}" if host and (several or counts[name] > 1) else name, 80)
        for name, host in zip(names, hosts)
    ]
    # Another port or user of a host, or the same run by two ways.
    seen, counts = Counter(), Counter(found)
    for index, name in enumerate(found):
        if counts[name] > 1:
            seen[name] += 1
            found[index] = f"{name} ({seen[name]})"
    return found
