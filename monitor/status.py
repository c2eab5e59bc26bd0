"""The status file `RUN/monitor/status.json`, which `monitor_process.py --status RUN` prints."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from runs.layout import RunPaths
from runs.reslog import newest_values
from utils.files import atomic_write_json, is_passing
from utils.logging import clock
from utils.paths import absent
from utils.small_files import is_number, is_whole, parse_json, parse_yaml, read_small
from utils.text import plain

STATUS_FILE = "status.json"
ENDED_STATES = ("finished", "stopped", "refused", "failed")
_STALE_SECONDS = 30.0
_LONGEST_STATUS, _LONGEST_CONFIG = 1 << 20, 1 << 20
"""Limits in bytes."""
_LATEST_TIME = 1e11
_LONGEST_STEP = 1e9
"""Limit in seconds."""


@dataclass
class Status:
    """What a monitor knows of its run."""

    state: str = "starting"
    """starting, running, waiting (for the next launch or a host), stopping; or ended: finished, stopped, refused,
    failed."""
    monitor_pid: int = 0
    hosts: list[str] = field(default_factory=list)
    attempt: int = 0
    """Number of all launches."""
    restarts: int = 0
    """Number of restarts by this monitor."""
    phase: str = ""
    """Phase of the rank that is behind the others."""
    ranks: int = 0
    step: int | None = None
    max_iters: int | None = None
    seconds_per_step: float | None = None
    """Median over recent steps."""
    checkpoint: int | None = None
    """Step of the newest checkpoint."""
    last_ending: str = ""
    """Why the last launch ended."""
    updated: float = 0.0
    """When the file was written, in seconds since 1970."""

    def write(self, run_dir: Path) -> None:
        self.updated = time.time()
        atomic_write_json(RunPaths(run_dir).monitor_dir / STATUS_FILE, asdict(self), durable=False)

    @staticmethod
    def read(run_dir: Path) -> "Status":
        """The status of a run.

        Raises:
            ValueError: there is no status file, or no monitor wrote it.
            OSError: the file cannot be read now.
        """
        path = RunPaths(run_dir).monitor_dir / STATUS_FILE
        try:
            values = parse_json(read_small(path, _LONGEST_STATUS))
            _check(values)
        except (FileNotFoundError, NotADirectoryError):
            if not run_dir.exists():
                raise ValueError(absent(run_dir)) from None
            raise ValueError(f"no monitor has looked after {run_dir}: {path} does not exist") from None
        except OSError as error:
            if is_passing(error):
                raise
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return Status(**values)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _or_none(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_right(value)


_IS_RIGHT: dict[str, Callable[[object], bool]] = {
    "state": _is_text, "monitor_pid": lambda value: is_whole(value, 0, (1 << 31) - 1),
    "hosts": lambda value: isinstance(value, list) and all(map(_is_text, value)), "attempt": is_whole,
    "restarts": is_whole, "phase": _is_text, "ranks": is_whole, "step": _or_none(is_whole),
    "max_iters": _or_none(is_whole), "seconds_per_step": _or_none(lambda value: is_number(value, 0, _LONGEST_STEP)),
    "checkpoint": _or_none(is_whole), "last_ending": _is_text,
    "updated": lambda value: is_number(value, 0, _LATEST_TIME),
}  # fmt: skip


def _check(values: object) -> None:
    """Check the values of a status file.

    Raises:
        ValueError: no monitor writes such values.
    """
    if not isinstance(values, dict):
        raise ValueError("it holds no status")
    if odd := sorted(values.keys() ^ _IS_RIGHT.keys()):
        raise ValueError(f"{plain(odd[0])} is {'unknown' if odd[0] in values else 'missing'}")
    for name, is_right in _IS_RIGHT.items():
        if not is_right(values[name]):
            raise ValueError(f"{name} is {plain(repr(values[name]))}")


def planned_steps(run_dir: Path) -> int | None:
    """Number of steps of the whole run, from the configuration that the training left; None if it does not say."""
    try:
        content = parse_yaml(read_small(RunPaths(run_dir).config, _LONGEST_CONFIG))
    except (OSError, ValueError):
        return None
    derived = content.get("derived") if isinstance(content, dict) else None
    steps = derived.get("max_iters") if isinstance(derived, dict) else None
    return steps if is_whole(steps) else None


def last_loss(run_dir: Path) -> float | None:
    """Loss in the newest complete training record."""
    return next(newest_values(RunPaths(run_dir).reslog, "loss"), None)


def describe(status: Status, loss: float | None, now: float) -> list[str]:
    """The status in lines for the user.

    Args:
        now: time.time().
    """
    ended = status.state in ENDED_STATES
    state, reason = plain(status.state), plain(status.last_ending, 1000)
    why = f": {reason}" if ended or status.state == "waiting" else ""
    lines = [state if why == f": {state}" else state + why]
    age = max(now - status.updated, 0.0)
    if not ended and (age > _STALE_SECONDS or not psutil.pid_exists(status.monitor_pid)):
        lines[0] = f"no monitor is at work: the last one wrote {clock(age)} ago, when it was {state}"
    if status.step is not None:
        of = f" of {status.max_iters}" if status.max_iters else ""
        lines.append(f"step {status.step}{of}" + _loss(loss))
    if status.seconds_per_step:
        lines.append(f"{status.seconds_per_step:.3f} s a step")
        if status.max_iters and status.step is not None and not ended:
            left = max(status.max_iters - status.step, 0) * status.seconds_per_step
            lines.append(f"expected to end {_moment(status.updated + left)} ({clock(left)} left)")
    lines.append("no checkpoint yet" if status.checkpoint is None else f"newest checkpoint: step {status.checkpoint}")
    lines.append(
        f"{status.ranks} ranks{' in phase ' + plain(status.phase) if status.phase else ''} on "
        f"{plain(', '.join(status.hosts), 10_000)}; "
        f"{status.attempt} launch{'es' if status.attempt != 1 else ''}, {status.restarts} "
        f"restart{'s' if status.restarts != 1 else ''} by this monitor"
    )
    if status.last_ending and not ended and status.state != "waiting":
        lines.append(f"last launch ended: {reason}")
    return lines


def _loss(loss: float | None) -> str:
    if loss is None:
        return ""
    return f", loss {loss:.4f}" if abs(loss) < 1e6 or not math.isfinite(loss) else f", loss {loss:.4g}"


def _moment(seconds: float) -> str:
    """Date and time for the user.

    Args:
        seconds: seconds since 1970.
    """
    if seconds > _LATEST_TIME:
        return "in thousands of years"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
