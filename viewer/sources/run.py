"""One run, wherever it lies: its results, settings and heartbeat."""

import posixpath
import re
import time
from dataclasses import dataclass, field

from runs.history import RunHistory
from runs.layout import CONFIG_NAME, HEARTBEAT_DIR, RESLOG_NAME, rank_file
from utils.small_files import parse_yaml
from utils.ssh import SSHTarget
from utils.text import plain
from viewer.sources.files import Files, FileState
from viewer.sources.following import FollowedFile

_LONGEST_CONFIG = 1 << 17
_LONGEST_HEARTBEAT = 1 << 14


@dataclass
class Health:
    """What the viewer knows of a run besides its results."""

    problem: str = ""
    """Why the run cannot be read now; empty if it can."""
    phase: str = ""
    """Phase of rank 0, from its heartbeat."""
    heartbeat_at: float = 0.0
    """Seconds since 1970 by the clock of the run's machine, which shows `clock_ahead + time.time()`."""
    clock_ahead: float = 0.0
    config: dict[str, object] = field(default_factory=dict)
    config_problem: str = ""
    """Why the configuration cannot be read; empty if it can."""


class Run:
    """A run on any machine.

    Args:
        path: the run's directory, its reslog.jsonl, or a file of that kind.
    """

    def __init__(self, target: SSHTarget | None, path: str):
        is_file = path.endswith(".jsonl")
        self.target, self.path = target, path
        self.directory = posixpath.dirname(path) if is_file else path
        self.log = FollowedFile(path if is_file else posixpath.join(path, RESLOG_NAME))
        self.history, self.health = RunHistory(), Health()
        self._config_state: FileState | None = None

    def update(self, files: Files) -> bool:
        """Read new results, and return whether there are more."""
        news = self.log.poll(files)
        if news.anew:
            self.history.clear()
        if news.lines:
            self.history.feed(news.lines)
        return news.more

    def look_round(self, files: Files) -> None:
        """Read the configuration, if it has changed, and the heartbeat."""
        path = posixpath.join(self.directory, CONFIG_NAME)
        state = files.state(path)
        if state is not None and state != self._config_state:
            text = files.read(path, 0, _LONGEST_CONFIG + 1)
            self._config_state, self.health.config, self.health.config_problem = state, {}, ""
            try:
                self.health.config = _read_config(text)
            except ValueError as error:
                self.health.config_problem = plain(error)
        path = posixpath.join(self.directory, HEARTBEAT_DIR, rank_file(0))
        state = files.state(path)
        self.health.clock_ahead = files.now() - time.time()
        if state is not None:
            self.health.heartbeat_at = state.modified
            found = re.search(rb'"phase": ?"([a-z_ ]{1,20})"', files.read(path, 0, _LONGEST_HEARTBEAT))
            self.health.phase = found[1].decode() if found else ""


def _read_config(text: bytes) -> dict[str, object]:
    """The flat configuration of a run: plain values by name; derived values are named "derived.NAME".

    Raises:
        ValueError: the text is not a configuration.
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
    """Whether a value is a text, a number, true, false or null. Python refuses to print integers that are too long."""
    return isinstance(value, (str, float, type(None))) or isinstance(value, int) and value.bit_length() < 1000
