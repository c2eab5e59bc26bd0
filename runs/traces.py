"""The parts of a step that a trace of --profile_steps shows: when each ran, and how long.

A trace is a Chrome trace as torch.profiler writes it, gzipped or not; it may come from anywhere. On a CPU, a part lasts
as long as its thread was in it; an all-reduce that goes on after that lasts as long as gloo's threads worked on it. On
CUDA, a part lies where the GPU did what it launched: from the first to the last of its kernels, copies and collectives.

Exposed is the share of the wire's time that the training waited for, hidden is the rest. A hook's computation between
collectives (PowerSGD) counts as the wire's.
"""

import bisect
import gzip
import itertools
import math
import re
import statistics
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeGuard

from runs.intervals import Interval, LatestEnd, Union, overlap, union
from runs.json_pieces import JSONPieces, TooLarge
from utils.files import is_passing
from utils.paths import absent

ABOUT = "zero2all"
"""Key of a trace's own metadata: {"run", "rank", "world_size", "device"}."""
MOST_BYTES = 256 << 20
"""Size limit of an unpacked trace."""
MOST_EVENTS, MOST_KEPT = 4_000_000, 1_000_000
"""Limits for the events in a trace, and for those that are needed here: only these stay in memory, about 200 bytes
each."""
_LONGEST_EVENT, _LONGEST_NAME = 1 << 20, 64
"""Limits in characters."""
_MOST_NAMED = 20
"""Steps that one sentence names at most."""

ROWS = ("data", "compute", "optimizer", "wire", "waiting")
_ROW_OF = {
    "data wait": "data", "agree": "data", "prepass": "compute", "forward": "compute", "backward": "compute",
    "optimizer": "optimizer", "rebalance": "optimizer", "zero gradients": "optimizer", "wait for buckets": "waiting",
    "wait for gathers": "waiting", "wait for gradients": "waiting",
}  # fmt: skip
_NUMBERED = re.compile(
    r"(?P<kind>gather bucket|step bucket|bucket) (?P<number>\d{1,9})(?: \((?P<size>[\d.]{1,12} MB)\))?"
)
_TRANSFER = re.compile(r"(?P<kind>gather weights|sum gradients|sum over copies)(?: \((?P<size>[\d.]{1,12} MB)\))?")
"""fsdp's, of a block at a time."""
_WAITS = {
    "wait: gather weights": "wait for gathers", "wait: sum gradients": "wait for gradients",
    "wait: sum over copies": "wait for gradients", "wait for updates": "wait for gathers",
}  # fmt: skip
_STEP = re.compile(r"step (\d{1,12})")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_SUMS = ("gloo:all_reduce", "c10d::allreduce_")


class StepPart(NamedTuple):
    """One thing that went on during a step; times are milliseconds on the trace's clock."""

    row: str
    kind: str
    """For example "forward", "bucket", "gather bucket"."""
    start: float
    end: float
    number: int | None = None
    """The bucket's number."""
    size: str = ""
    """How much of the bucket this rank sends."""


@dataclass(frozen=True)
class Trace:
    path: Path
    about: dict
    steps: dict[int, Interval]
    """Step number -> when the step began and ended."""
    parts: list[StepPart]

    def window(self, step: int) -> Interval:
        """When a step began and ended.

        Raises:
            ValueError: the trace does not hold the step.
        """
        if step not in self.steps:
            held = [str(number) for number in itertools.islice(self.steps, _MOST_NAMED)]
            held += ["..."] * (len(self.steps) > _MOST_NAMED)
            raise ValueError(f"{self.path} does not hold step {step}, but {', '.join(held)}")
        return self.steps[step]

    def median_step(self) -> int:
        """The number of the step of median duration."""
        middle = statistics.median_low(end - start for start, end in self.steps.values())
        return next(number for number, (start, end) in self.steps.items() if end - start == middle)

    @cached_property
    def unions(self) -> "dict[str, Union]":
        """The times from which FIGURES are computed, over all steps."""
        names = ("data wait", "forward", "backward", "optimizer", "wire", "waiting")
        unions = {
            name: union((a.start, a.end) for a in self.parts if name in (a.kind, a.row)) for name in names
        }  # fmt: skip
        unions["exposed"] = overlap(unions["wire"], unions["waiting"])
        unions["waiting in optimizer"] = overlap(unions["optimizer"], unions["waiting"])
        return {name: Union(intervals) for name, intervals in unions.items()}


class _Event(NamedTuple):
    name: str
    category: str
    thread: tuple
    start: float
    end: float
    correlation: int | None
    """The number that a launch shares with the work it launches on the device."""


def read_trace(path: Path) -> Trace:
    """The steps of a trace and their parts.

    Raises:
        ValueError: the file cannot be read, or is not a trace of --profile_steps; one sentence.
        OSError: the file cannot be read now.
    """
    about, events = _read_events(path)
    ranges = [event for event in events if event.category == "user_annotation"]
    steps = {int(m[1]): (e.start, e.end) for e in ranges if (m := _STEP.fullmatch(e.name))}
    worked = sorted(e.start for e in ranges if e.name == "forward")
    # The last step may have been broken off before its work began.
    steps = {n: (a, b) for n, (a, b) in steps.items() if bisect.bisect(worked, b) > bisect.bisect_left(worked, a)}
    if not steps:
        raise ValueError(f"{path} holds no step of a training run: make a trace with --profile_steps")
    described = _described_ranges(events, ranges)
    parts = _on_device(events, described) if any(e.category in _ON_DEVICE for e in events) else list(described.values())
    if about.get("world_size") == 1:
        parts = [part for part in parts if part.row not in ("wire", "waiting")]
    return Trace(path, about, dict(sorted(steps.items())), parts)


def _read_events(path: Path) -> tuple[dict, list[_Event]]:
    """The trace's own metadata, and those of its events that are needed here."""
    about: dict = {}
    events: list[_Event] = []
    threads: dict[tuple, tuple] = {}
    has_events, count = False, 0
    try:
        for key, value in _pieces(path):
            if key == ABOUT and isinstance(value, dict):
                about = value
            if key != "traceEvents":
                continue
            has_events, count = has_events or isinstance(value, dict), count + 1
            event = _event(value)
            if event is not None:
                events.append(event._replace(thread=threads.setdefault(event.thread, event.thread)))
            if count > MOST_EVENTS or len(events) > MOST_KEPT:
                raise TooLarge("holds more events than can be looked through")
    except FileNotFoundError:
        raise ValueError(absent(path)) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory: name a trace, a file in profile/ of a run's directory") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        if is_passing(error):
            raise
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except TooLarge as error:
        raise ValueError(f"{path} {error}: trace fewer steps") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if not has_events:
        raise ValueError(f"{path} is not a Chrome trace: it has no traceEvents")
    return about, events


def _pieces(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_packed else open)(path, "rb") as file:
        yield from JSONPieces(file, _LONGEST_EVENT, MOST_BYTES).members("traceEvents")


def _event(raw: object) -> _Event | None:
    """A complete event with a duration, of a kind that is needed here; None for anything else in a trace."""
    if not isinstance(raw, dict) or raw.get("ph") != "X":
        return None
    name, category, start, duration = (raw.get(key) for key in ("name", "cat", "ts", "dur"))
    if not isinstance(name, str) or not isinstance(category, str):
        return None
    if not (_is_time(start) and _is_time(duration)):
        return None
    arguments = raw.get("args")
    correlation = arguments.get("correlation") if isinstance(arguments, dict) else None
    correlation = correlation if isinstance(correlation, int) else None
    if category in _ON_DEVICE or category in _LAUNCHES and correlation is not None:
        # Its number identifies it; a kernel's name may be long.
        name = ""
    elif not (name in _SUMS or category == "user_annotation" and (_described(name, 0, 0) or _STEP.fullmatch(name))):
        return None
    thread = (str(raw.get("pid"))[:_LONGEST_NAME], str(raw.get("tid"))[:_LONGEST_NAME])
    return _Event(
        sys.intern(name), sys.intern(category), thread, start / 1e3, (start + max(duration, 0)) / 1e3, correlation
    )


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < 1e18


def _described(name: str, start: float, end: float) -> StepPart | None:
    """The part that one of our ranges stands for; None for other ranges."""
    if name in _ROW_OF:
        return StepPart(_ROW_OF[name], name, start, end)
    if name in _WAITS:
        return StepPart("waiting", _WAITS[name], start, end)
    if name == "gradients":
        return StepPart("wire", name, start, end)
    transfer = _TRANSFER.fullmatch(name)
    if transfer is not None:
        return StepPart("wire", transfer["kind"], start, end, size=transfer["size"] or "")
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    row = "optimizer" if match["kind"] == "step bucket" else "wire"
    return StepPart(row, match["kind"], start, end, int(match["number"]), match["size"] or "")


def _described_ranges(events: list[_Event], ranges: list[_Event]) -> dict[_Event, StepPart]:
    """Our ranges as parts, with the times that their threads saw. A range that only hands gloo a sum gets the time in
    which gloo worked on it."""
    found = {event: part for event in ranges if (part := _described(event.name, event.start, event.end)) is not None}
    sums = _gloo_sums(events)
    latest = {thread: LatestEnd([end for _, (_, end) in launched]) for thread, launched in sums.items()}
    wire = [event for event, part in found.items() if part.row == "wire" and event.thread in sums]
    for event in sorted(wire, key=lambda one: one.end):
        launched = sums[event.thread]
        first = bisect.bisect_left(launched, event.start, key=lambda one: one[0])
        last = bisect.bisect_left(launched, event.end, key=lambda one: one[0])
        if first < last and launched[last - 1][1][1] > event.end:
            end = latest[event.thread].between(first, last)
            found[event] = found[event]._replace(start=launched[first][1][0], end=end)
    return found


def _gloo_sums(events: list[_Event]) -> dict[tuple, list[tuple[float, Interval]]]:
    """Thread -> its all-reduces in order, as (time of launch, interval in which gloo worked on it). gloo has threads of
    its own and works in the order of launches: the n-th sum that begins is the n-th that was launched."""
    begun = sorted((e.start, e.end) for e in events if e.name == "gloo:all_reduce")
    found: dict[tuple, list[tuple[float, Interval]]] = defaultdict(list)
    index = 0
    for launch in sorted((e for e in events if e.name == "c10d::allreduce_"), key=lambda e: e.start):
        while index < len(begun) and begun[index][0] < launch.start:
            index += 1
        if index < len(begun):
            found[launch.thread].append((launch.start, begun[index]))
            index += 1
    return found


def _on_device(events: list[_Event], described: dict[_Event, StepPart]) -> list[StepPart]:
    """The parts, each at the time when the GPU did what its range launched. Whatever the threads of the backward pass
    launch counts for the main thread's range, unless it lies in a range of their own (a bucket)."""
    forwards = [event for event, part in described.items() if part.kind == "forward"]
    launchers: dict[tuple, list[_Event]] = defaultdict(list)
    for event, part in described.items():
        if part.row not in ("data", "waiting"):
            launchers[event.thread].append(event)
    innermost = {thread: _Innermost(inside) for thread, inside in launchers.items()}
    main = innermost[forwards[0].thread]
    launches: dict[int | None, _Event]
    launches = {e.correlation: e for e in events if e.category in _LAUNCHES and e.correlation is not None}
    worked: dict[_Event, Interval] = {}
    streams: dict[tuple, list[tuple[float, _Event]]] = defaultdict(list)
    is_forward, forward_streams = set(forwards), []
    for work in events:
        launch = launches.get(work.correlation) if work.category in _ON_DEVICE else None
        if launch is None:
            continue
        owner = innermost[launch.thread].at(launch.start) if launch.thread in innermost else None
        owner = owner or main.at(launch.start)
        streams[work.thread].append((launch.start, work))
        if owner is None:
            continue
        start, end = worked.get(owner, (work.start, work.end))
        worked[owner] = min(start, work.start), max(end, work.end)
        if owner in is_forward:
            forward_streams.append(work.thread)
    parts = []
    for event, part in described.items():
        if part.row != "waiting":
            start, end = worked.get(event, (part.start, part.end))
            parts.append(part._replace(start=start, end=end))
    wire = union((part.start, part.end) for part in parts if part.row == "wire")
    main_stream = sorted(streams[statistics.mode(forward_streams)]) if forward_streams else []
    gaps: dict[StepPart, list[Interval]] = defaultdict(list)
    for event, part in described.items():
        if part.row == "waiting":
            gaps[part._replace(start=0.0, end=0.0)].append(_gap(main_stream, event))
    for part, found in gaps.items():
        parts += [part._replace(start=start, end=end) for start, end in overlap(union(found), wire)]
    return parts


class _Innermost:
    """Finds the innermost of a thread's ranges at any time. The ranges are nested or apart."""

    def __init__(self, ranges: Iterable[_Event]):
        changes: list[tuple[float, _Event | None]] = []
        stack: list[_Event] = []

        def close(until: float) -> None:
            while stack and stack[-1].end <= until:
                ended = stack.pop()
                changes.append((ended.end, stack[-1] if stack else None))

        for event in sorted(ranges, key=lambda e: (e.start, -e.end)):
            close(event.start)
            stack.append(event)
            changes.append((event.start, event))
        close(math.inf)
        self._times, self._owners = [time for time, _ in changes], [owner for _, owner in changes]

    def at(self, time: float) -> _Event | None:
        index = bisect.bisect_right(self._times, time)
        return self._owners[index - 1] if index else None


def _gap(stream: list[tuple[float, _Event]], wait: _Event) -> Interval:
    """The time between the end of what was launched before a wait and the beginning of what was launched after it.

    Args:
        stream: (time of launch, work) of one stream, sorted.
    """
    before = bisect.bisect_left(stream, wait.start, key=lambda item: item[0])
    after = bisect.bisect_left(stream, wait.end, key=lambda item: item[0])
    start = stream[before - 1][1].end if before else wait.start
    end = stream[after][1].start if after < len(stream) else wait.end
    return start, max(start, end)


FIGURES = ("step", "data wait", "forward", "backward", "optimizer", "wire", "hidden", "exposed")


def figures_of(trace: Trace, step: int) -> dict[str, float]:
    """Milliseconds of each of FIGURES within a step.

    Raises:
        ValueError: the trace does not hold the step.
    """
    window = trace.window(step)
    lengths = {name: union.within(window) for name, union in trace.unions.items()}
    return {
        "step": window[1] - window[0],
        "data wait": lengths["data wait"],
        "forward": lengths["forward"],
        "backward": lengths["backward"],
        # ZeRO-1's wait for parameters lies inside the optimizer's range and counts as waiting.
        "optimizer": lengths["optimizer"] - lengths["waiting in optimizer"],
        "wire": lengths["wire"],
        "hidden": lengths["wire"] - lengths["exposed"],
        "exposed": lengths["exposed"],
    }


def mean_figures(trace: Trace) -> dict[str, float]:
    """The mean of each of FIGURES over all steps in a trace."""
    each = [figures_of(trace, step) for step in trace.steps]
    return {name: statistics.fmean(figures[name] for figures in each) for name in FIGURES}
