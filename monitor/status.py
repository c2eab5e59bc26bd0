"""The status file `RUN/monitor/status.json`: what the monitor knows, for `monitor_process.py --status RUN`."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml

from monitor.node import MONITOR_DIR
from utils.files import atomic_write_json
from utils.logging import clock
from utils.reslog import newest_values

STATUS_FILE = "status.json"
_STALE_SECONDS = 30.0


@dataclass
class Status:
    state: str = "starting"
    """starting, running, waiting (for the next launch or a host), stopping; or ended: finished, stopped, refused,
    failed."""
    monitor_pid: int = 0
    hosts: list[str] = field(default_factory=list)
    attempt: int = 0
    """Launches in all."""
    restarts: int = 0
    """Restarts by this monitor."""
    phase: str = ""
    """Of the rank that is behind the others."""
    ranks: int = 0
    step: int | None = None
    max_iters: int | None = None
    seconds_per_step: float | None = None
    """Median."""
    checkpoint: int | None = None
    """Step of the newest one."""
    last_ending: str = ""
    """Why the last launch ended."""
    updated: float = 0.0
    """Seconds since 1970."""

    def write(self, run_dir: Path) -> None:
        self.updated = time.time()
        atomic_write_json(run_dir / MONITOR_DIR / STATUS_FILE, asdict(self), durable=False)

    @staticmethod
    def read(run_dir: Path) -> "Status":
        """
        Raises:
            ValueError: there is none.
        """
        path = run_dir / MONITOR_DIR / STATUS_FILE
        try:
            status = Status(**json.loads(path.read_text()))
            for name, kinds in _KINDS.items():
                if not isinstance(getattr(status, name), kinds) or isinstance(getattr(status, name), bool):
                    raise ValueError(f"{name} is {getattr(status, name)!r}")
            return status
        except FileNotFoundError:
            raise ValueError(f"no monitor has looked after {run_dir}: {path} does not exist") from None
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None


_KINDS = {
    "state": str, "monitor_pid": int, "hosts": list, "attempt": int, "restarts": int, "phase": str, "ranks": int,
    "step": int | None, "max_iters": int | None, "seconds_per_step": float | int | None, "checkpoint": int | None,
    "last_ending": str, "updated": float | int,
}  # fmt: skip


def planned_steps(run_dir: Path) -> int | None:
    """Steps of the whole run, from the configuration that the training left."""
    try:
        return int(yaml.safe_load((run_dir / "config.yaml").read_text())["derived"]["max_iters"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def last_loss(run_dir: Path) -> float | None:
    """Of the newest complete training record."""
    return next(newest_values(run_dir / "reslog.jsonl", "loss"), None)


def describe(status: Status, loss: float | None, now: float) -> list[str]:
    """Lines for people.

    Args:
        now: time.time().
    """
    ended = status.state in ("finished", "stopped", "refused", "failed")
    why = f": {status.last_ending}" if ended or status.state == "waiting" else ""
    lines = [status.state if why == f": {status.state}" else status.state + why]
    age = now - status.updated
    if not ended and (age > _STALE_SECONDS or not psutil.pid_exists(status.monitor_pid)):
        lines[0] = f"no monitor is at work: the last one wrote {clock(age)} ago, when it was {status.state}"
    if status.step is not None:
        of = f" of {status.max_iters}" if status.max_iters else ""
        lines.append(f"step {status.step}{of}" + (f", loss {loss:.4f}" if loss is not None else ""))
    if status.seconds_per_step:
        lines.append(f"{status.seconds_per_step:.3f} s a step")
        if status.max_iters and status.step is not None and not ended:
            left = (status.max_iters - status.step) * status.seconds_per_step
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.updated + left))
            lines.append(f"expected to end {end} ({clock(left)} left)")
    lines.append("no checkpoint yet" if status.checkpoint is None else f"newest checkpoint: step {status.checkpoint}")
    lines.append(
        f"{status.ranks} ranks{' in phase ' + status.phase if status.phase else ''} on {', '.join(status.hosts)}; "
        f"{status.attempt} launch{'es' if status.attempt != 1 else ''}, {status.restarts} "
        f"restart{'s' if status.restarts != 1 else ''} by this monitor"
    )
    if status.last_ending and not ended and status.state != "waiting":
        lines.append(f"last launch ended: {status.last_ending}")
    return lines
