"""Recognises hangs by overdue heartbeats.

The training thread of each rank writes a heartbeat at the beginning of each step and of each phase that takes long. How
old a heartbeat may become depends on the phase and, between two steps, on the run's own median step:

    hang  <=>  seconds since the rank's last heartbeat > limit(phase)
    limit(step) = max(step_floor, step_factor * median seconds of a step), or `first_step` before a median is known
"""

import statistics
from collections import deque
from dataclasses import dataclass

from runs.sinks import LONGEST_CLOSE_S

_SAMPLES = 101
_FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class Limits:
    """Longest time without a heartbeat in each phase, in seconds."""

    step_floor: float = 60.0
    """Least limit between steps: validation batches and data waits count as steps."""
    step_factor: float = 10.0
    """Limit between steps, in median steps."""
    first_step: float = 900.0
    """Limit until a few steps have been seen."""
    start: float = 900.0
    """From the launch to the first heartbeat, and from there to the first step: imports, data, other nodes."""
    compile: float = 1800.0
    save: float = 1800.0
    end: float = 300.0 + LONGEST_CLOSE_S
    """From the last save to the end of the process: loggers finish, old checkpoints are deleted, the ranks leave their
    group."""
    validate: float = 300.0
    """Least limit for a batch of a validation, an evaluation or of DPO's reference: the first one may compile."""


class Silence:
    """The time for which ranks have been silent while somebody listened.

    A heartbeat's age says nothing if the monitor, the connection or the whole machine stood still meanwhile: the ranks
    may have stood still, too. So from one look to the next, no more is counted than a look takes.

    Args:
        is_adopted: the launch is older than this watch; the first age that is seen counts as it is.
    """

    def __init__(self, is_adopted: bool):
        self._is_adopted = is_adopted
        self._last: dict[int, tuple[float, float]] = {}

    def judge(self, heartbeats: list[dict], watched: float) -> list[dict]:
        """The heartbeats, with their ages counted this way.

        Args:
            heartbeats: heartbeats of all ranks of a node.
            watched: watched seconds since the node's last report.
        """
        judged = []
        for beat in heartbeats:
            stamp, most = beat["monotonic"], watched
            if beat["rank"] in self._last and self._last[beat["rank"]][0] == stamp:
                most += self._last[beat["rank"]][1]
            elif beat["rank"] not in self._last and self._is_adopted:
                most = beat["age"]
            judged.append(beat | {"age": min(beat["age"], most)})
            self._last[beat["rank"]] = (stamp, judged[-1]["age"])
        return judged


class Watch:
    """Judges the heartbeats of one launch.

    Args:
        started: time of the launch in seconds.
    """

    def __init__(self, limits: Limits, started: float):
        self._limits, self._started = limits, started
        self._last: dict[int, tuple[int, float]] = {}
        self._seconds: deque[float] = deque(maxlen=_SAMPLES)

    def take(self, heartbeats: list[dict]) -> None:
        """Learn how long a step takes from the heartbeats at the beginning of steps."""
        for beat in heartbeats:
            if beat["phase"] != "step":
                self._last.pop(beat["rank"], None)
                continue
            step, at = self._last.get(beat["rank"], (beat["step"], beat["monotonic"]))
            if beat["step"] > step:
                self._seconds.append((beat["monotonic"] - at) / (beat["step"] - step))
            self._last[beat["rank"]] = (beat["step"], beat["monotonic"])

    @property
    def median_step(self) -> float | None:
        """Seconds; None before enough steps have been seen."""
        return statistics.median(self._seconds) if len(self._seconds) >= _FEWEST_SAMPLES else None

    def limit(self, phase: str) -> float:
        """Longest time in seconds without a heartbeat in a phase."""
        limits = self._limits
        others = {"compile": limits.compile, "save": limits.save, "end": limits.end}
        if phase not in ("step", "validate", "evaluate", "reference"):
            return others.get(phase, limits.start)
        median = self.median_step
        step = limits.first_step if median is None else max(limits.step_floor, limits.step_factor * median)
        return step if phase == "step" else max(step, limits.validate)

    def overdue(self, heartbeats: list[dict], now: float) -> str | None:
        """A sentence about the problem if a living rank is overdue.

        Args:
            heartbeats: heartbeats of all ranks that have written one in this launch, with their "age".
            now: time by the clock of `started`.
        """
        if not heartbeats and now - self._started > self._limits.start:
            return f"no rank gave a sign of life within {self._limits.start:.0f} s of the launch"
        late = [beat for beat in heartbeats if beat["alive"] and beat["age"] > self.limit(beat["phase"])]
        if not late:
            return None
        worst = max(late, key=lambda beat: beat["age"])
        stopped = [beat["rank"] for beat in heartbeats if beat["stopped"]]
        ranks = f"rank{'s' if len(late) > 1 else ''} {', '.join(str(beat['rank']) for beat in late)}"
        return (
            f"no sign of life from {ranks} for {worst['age']:.1f} s in phase {worst['phase']} at step "
            f"{worst['step']}; {self.limit(worst['phase']):.1f} s are the limit"
            + (f"; stopped by a signal: rank {', '.join(map(str, stopped))}" if stopped else "")
        )
