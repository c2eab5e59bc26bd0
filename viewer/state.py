"""How a run is doing: whether it is running, stalled or ended, how fast it is, and how long it will take."""

import math
from dataclasses import dataclass

import numpy as np

from runs.history import Snapshot
from utils.text import plain
from viewer.formats import duration
from viewer.sources.run import Run
from viewer.text import translate

_QUIET_S = 60.0
_QUIET_STEPS = 10
"""A run counts as stalled when nothing was heard of it for so many seconds and for so many steps' time."""
_RECENT = 20
"""Number of records whose median is the present speed."""


@dataclass(frozen=True)
class State:
    """What the table of runs shows of one."""

    kind: str
    """running, stalled, ended, waiting or no connection."""
    detail: str = ""
    step: int | None = None
    max_iters: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    tokens_per_sec: float = math.nan
    seconds_left: float = math.nan


def state_of(run: Run, snapshot: Snapshot, now: float, language: str = "en") -> State:
    """The state of a run.

    Args:
        now: time.time().
    """
    health, train, valid = run.health, snapshot.tables.get("train", {}), snapshot.tables.get("valid", {})
    step = int(train["step"][-1]) if train else None
    dt, rate = _recent(train, "dt"), _recent(train, "tokens_per_sec")
    max_iters = _planned(run, snapshot)
    figures = dict(
        step=step, max_iters=max_iters, loss=_last(train, "loss"), valid_loss=_last(valid, "loss"), tokens_per_sec=rate
    )
    if health.problem:
        return State("no connection", health.problem, **figures)
    if not snapshot.launches and step is None:
        return State("waiting", translate("no results yet", language))
    if snapshot.ended:
        return State("ended", snapshot.ended, **figures)
    silence = now + health.clock_ahead - max(snapshot.last_time, health.heartbeat_at)
    if silence > max(_QUIET_S, _QUIET_STEPS * (dt if math.isfinite(dt) else 0.0)):
        detail = translate("no news for {}", language).format(duration(silence))
        return State("stalled", detail, **figures)
    left = (max_iters - step) * dt if max_iters is not None and step is not None else math.nan
    return State("running", "" if health.phase == "step" else health.phase, seconds_left=left, **figures)


def _planned(run: Run, snapshot: Snapshot) -> int | None:
    """Number of steps of the whole run, if it is known."""
    found = snapshot.launches[-1].max_iters if snapshot.launches else None
    if found is None:
        found = run.health.config.get("derived.max_iters")
    return found if type(found) is int and 0 <= found < 1 << 53 else None


def _recent(columns: dict[str, np.ndarray], metric: str) -> float:
    values = columns[metric][-_RECENT:] if metric in columns else np.empty(0)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _last(columns: dict[str, np.ndarray], metric: str) -> float | None:
    return float(columns[metric][-1]) if metric in columns else None


def differences(configs: list[dict[str, object]]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for each setting that is not the same in all runs; "" where a run lacks it. A
    derived setting is left out if the setting of the same name differs. For a single run, all its settings."""
    if len(configs) == 1:
        return [(key, [_setting(value)]) for key, value in configs[0].items()]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows, differing = [], set()
    for key in keys:
        values = [_setting(config[key]) if key in config else "" for config in configs]
        name = key.removeprefix("derived.")
        if len(set(values)) > 1 and not (name != key and name in differing):
            rows.append((key, values))
            differing.add(key)
    return rows


def _setting(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else plain(value)
