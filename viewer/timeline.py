"""Where a step's time goes, drawn from traces of --profile_steps.

    python -m utils.timeline TRACE [TRACE ...] [--png out.png] [--step N]

Several traces are drawn under each other on one time axis, each from its step's beginning: overlap on against off, or
one rank against another. Rows:

    data        waiting for the loader, and for all ranks to agree on counts
    compute     forward and backward pass of each micro-batch
    optimizer   the step on the summed gradients
    wire        reduction of each bucket, gathering of its parameters: with the megabytes that this rank sends
    waiting     the main thread (on CUDA: its stream) waits for the wire

Exposed is what of the wire's time the training waited for, hidden the rest. What a hook computes between collectives
(PowerSGD) counts as the wire's. On a CPU, a range is what its thread did, or of a sum that goes on after that, what
gloo's threads did. On CUDA, a range is drawn where the GPU did what it launched: from the first to the last of its
kernels, copies and collectives.
"""

import sys

if __name__ == "__main__":
    # Also when it is run by its path, or by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-viewer.txt")

import bisect
import gzip
import itertools
import math
import re
import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from runs.json_pieces import JSONPieces, TooLarge
from utils.arguments import Parser
from utils.files import is_passing
from utils.paths import a_path, absent
from utils.terminal import run_main

ABOUT = "zero2all"
"""Key of a trace's own metadata: {"run", "rank", "world_size", "device"}."""
MOST_BYTES = 256 << 20
"""Of an unpacked trace."""
MOST_EVENTS, MOST_KEPT = 4_000_000, 1_000_000
"""Events in a trace, and those of them that are needed here: only these stay in memory, about 200 bytes each."""
_LONGEST_EVENT, _LONGEST_NAME = 1 << 20, 64
"""Characters."""
_MOST_NAMED = 20
"""Steps in a sentence."""

ROWS = ("data", "compute", "optimizer", "wire", "waiting")
_ROW_OF = {
    "data wait": "data", "agree": "data", "prepass": "compute", "forward": "compute", "backward": "compute",
    "optimizer": "optimizer", "zero gradients": "optimizer", "wait for buckets": "waiting",
    "wait for gathers": "waiting", "wait for gradients": "waiting",
}  # fmt: skip
_NUMBERED = re.compile(
    r"(?P<kind>gather bucket|step bucket|bucket) (?P<number>\d{1,9})(?: \((?P<size>[\d.]{1,12} MB)\))?"
)
_STEP = re.compile(r"step (\d{1,12})")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_SUMS = ("gloo:all_reduce", "c10d::allreduce_")

Interval = tuple[float, float]


class Span(NamedTuple):
    """Something that went on: times in milliseconds on the trace's clock."""

    row: str
    kind: str
    """Such as "forward", "bucket", "gather bucket"."""
    start: float
    end: float
    number: int | None = None
    """Of the bucket."""
    size: str = ""
    """What this rank sends of it."""


@dataclass(frozen=True)
class Trace:
    path: Path
    about: dict
    steps: dict[int, Interval]
    """Number -> when it began and ended."""
    spans: list[Span]

    def window(self, step: int) -> Interval:
        """When a step began and ended.

        Raises:
            ValueError: the trace does not hold it.
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
    def unions(self) -> "dict[str, _Union]":
        """When what FIGURES are made of went on, of all steps."""
        names = ("data wait", "forward", "backward", "optimizer", "wire", "waiting")
        unions = {
            name: _union((s.start, s.end) for s in self.spans if name in (s.kind, s.row)) for name in names
        }  # fmt: skip
        unions["exposed"] = _overlap(unions["wire"], unions["waiting"])
        unions["waiting in optimizer"] = _overlap(unions["optimizer"], unions["waiting"])
        return {name: _Union(intervals) for name, intervals in unions.items()}


class _Event(NamedTuple):
    name: str
    category: str
    thread: tuple
    start: float
    end: float
    correlation: int | None
    """What a launch and that which runs on the device have in common."""


def read_trace(path: Path) -> Trace:
    """
    Raises:
        ValueError: it cannot be read, or is no trace of --profile_steps; one sentence.
    """
    about, events = _read_events(path)
    ranges = [event for event in events if event.category == "user_annotation"]
    steps = {int(m[1]): (e.start, e.end) for e in ranges if (m := _STEP.fullmatch(e.name))}
    worked = sorted(e.start for e in ranges if e.name == "forward")
    # The last one may have been broken off before it began.
    steps = {n: (a, b) for n, (a, b) in steps.items() if bisect.bisect(worked, b) > bisect.bisect_left(worked, a)}
    if not steps:
        raise ValueError(f"{path} holds no step of a training run: make a trace with --profile_steps")
    described = _described_ranges(events, ranges)
    spans = _on_device(events, described) if any(e.category in _ON_DEVICE for e in events) else list(described.values())
    if about.get("world_size") == 1:
        spans = [span for span in spans if span.row not in ("wire", "waiting")]
    return Trace(path, about, dict(sorted(steps.items())), spans)


def _read_events(path: Path) -> tuple[dict, list[_Event]]:
    """What a trace says of its run, and those of its events that are needed here."""
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
        raise ValueError(f"{path} is no Chrome trace: it has no traceEvents")
    return about, events


def _pieces(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_packed else open)(path, "rb") as file:
        yield from JSONPieces(file, _LONGEST_EVENT, MOST_BYTES).members("traceEvents")


def _event(raw: object) -> _Event | None:
    """A complete event with a duration, of a kind that is needed here; None for what else a trace holds."""
    if not isinstance(raw, dict) or raw.get("ph") != "X":
        return None
    name, category, start, duration = (raw.get(key) for key in ("name", "cat", "ts", "dur"))
    if not isinstance(name, str) or not isinstance(category, str):
        return None
    if not all(isinstance(value, (int, float)) and abs(value) < 1e18 for value in (start, duration)):
        return None
    arguments = raw.get("args")
    correlation = arguments.get("correlation") if isinstance(arguments, dict) else None
    correlation = correlation if isinstance(correlation, int) else None
    if category in _ON_DEVICE or category in _LAUNCHES and correlation is not None:
        # Known by its number; a kernel's name may be long.
        name = ""
    elif not (name in _SUMS or category == "user_annotation" and (_described(name, 0, 0) or _STEP.fullmatch(name))):
        return None
    thread = (str(raw.get("pid"))[:_LONGEST_NAME], str(raw.get("tid"))[:_LONGEST_NAME])
    return _Event(
        sys.intern(name), sys.intern(category), thread, start / 1e3, (start + max(duration, 0)) / 1e3, correlation
    )


def _described(name: str, start: float, end: float) -> Span | None:
    """The span of a range of ours; None for other ranges."""
    if name in _ROW_OF:
        return Span(_ROW_OF[name], name, start, end)
    if name == "gradients":
        return Span("wire", name, start, end)
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    row = "optimizer" if match["kind"] == "step bucket" else "wire"
    return Span(row, match["kind"], start, end, int(match["number"]), match["size"] or "")


def _described_ranges(events: list[_Event], ranges: list[_Event]) -> dict[_Event, Span]:
    """Our ranges, as their threads saw them. Of one that only hands gloo a sum: when gloo worked on that."""
    found = {event: span for event in ranges if (span := _described(event.name, event.start, event.end)) is not None}
    sums = _gloo_sums(events)
    latest = {thread: _LatestEnd([end for _, (_, end) in launched]) for thread, launched in sums.items()}
    wire = [event for event, span in found.items() if span.row == "wire" and event.thread in sums]
    for event in sorted(wire, key=lambda one: one.end):
        launched = sums[event.thread]
        first = bisect.bisect_left(launched, event.start, key=lambda one: one[0])
        last = bisect.bisect_left(launched, event.end, key=lambda one: one[0])
        if first < last and launched[last - 1][1][1] > event.end:
            end = latest[event.thread].between(first, last)
            found[event] = found[event]._replace(start=launched[first][1][0], end=end)
    return found


class _LatestEnd:
    """Finds the greatest of [first, last) of some numbers, for one `last` after another that never falls: no look at
    each of them for each range, which may lie inside each other."""

    def __init__(self, ends: list[float]):
        self._ends, self._added = ends, 0
        self._places: list[int] = []
        """Rising, of numbers that no later one reaches, up to the last that was asked for."""

    def between(self, first: int, last: int) -> float:
        for place in range(self._added, last):
            while self._places and self._ends[self._places[-1]] <= self._ends[place]:
                self._places.pop()
            self._places.append(place)
        self._added = max(self._added, last)
        return self._ends[self._places[bisect.bisect_left(self._places, first)]]


def _gloo_sums(events: list[_Event]) -> dict[tuple, list[tuple[float, Interval]]]:
    """Thread -> (when it launched an all-reduce, from when to when gloo worked on it), in order. gloo has threads of
    its own and takes what comes first: the n-th that begins is the n-th that was launched."""
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


def _on_device(events: list[_Event], described: dict[_Event, Span]) -> list[Span]:
    """Where the GPU did what each range launched. The threads of the backward pass launch for the main thread's range,
    but for what lies in ranges of their own (the buckets)."""
    forwards = [event for event, span in described.items() if span.kind == "forward"]
    launchers: dict[tuple, list[_Event]] = defaultdict(list)
    for event, span in described.items():
        if span.row not in ("data", "waiting"):
            launchers[event.thread].append(event)
    innermost = {thread: _Innermost(inside) for thread, inside in launchers.items()}
    main = innermost[forwards[0].thread]
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
    spans = []
    for event, span in described.items():
        if span.row != "waiting":
            start, end = worked.get(event, (span.start, span.end))
            spans.append(span._replace(start=start, end=end))
    wire = _union((span.start, span.end) for span in spans if span.row == "wire")
    main_stream = sorted(streams[statistics.mode(forward_streams)]) if forward_streams else []
    gaps: dict[Span, list[Interval]] = defaultdict(list)
    for event, span in described.items():
        if span.row == "waiting":
            gaps[span._replace(start=0.0, end=0.0)].append(_gap(main_stream, event))
    for span, found in gaps.items():
        spans += [span._replace(start=start, end=end) for start, end in _overlap(_union(found), wire)]
    return spans


class _Innermost:
    """Finds the innermost of a thread's ranges at a time; they are nested or apart."""

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
    """When a stream had done what was launched before a wait, and not begun what was launched after it.

    Args:
        stream: (when it was launched, what ran), sorted.
    """
    before = bisect.bisect_left(stream, wait.start, key=lambda item: item[0])
    after = bisect.bisect_left(stream, wait.end, key=lambda item: item[0])
    start = stream[before - 1][1].end if before else wait.start
    end = stream[after][1].start if after < len(stream) else wait.end
    return start, max(start, end)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def _overlap(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Of two unions."""
    found, at = [], 0
    for start, end in a:
        while at < len(b) and b[at][1] <= start:
            at += 1
        while at < len(b) and b[at][0] < end:
            found.append((max(start, b[at][0]), min(end, b[at][1])))
            if b[at][1] > end:
                break
            at += 1
    return found


class _Union:
    """Intervals that are apart, in order; says how much of them lies within a window, without a look at each."""

    def __init__(self, intervals: list[Interval]):
        self._starts = [start for start, _ in intervals]
        self._ends = [end for _, end in intervals]
        self._before = list(itertools.accumulate((end - start for start, end in intervals), initial=0.0))
        """Length of all intervals before each."""

    def within(self, window: Interval) -> float:
        start, end = window
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)
        if first >= last:
            return 0.0
        cut = max(start - self._starts[first], 0.0) + max(self._ends[last - 1] - end, 0.0)
        return self._before[last] - self._before[first] - cut


FIGURES = ("step", "data wait", "forward", "backward", "optimizer", "wire", "hidden", "exposed")


def figures_of(trace: Trace, step: int) -> dict[str, float]:
    """Milliseconds of each of FIGURES within a step.

    Raises:
        ValueError: the trace does not hold it.
    """
    window = trace.window(step)
    lengths = {name: union.within(window) for name, union in trace.unions.items()}
    return {
        "step": window[1] - window[0],
        "data wait": lengths["data wait"],
        "forward": lengths["forward"],
        "backward": lengths["backward"],
        # Without ZeRO-1's wait for parameters, which lies inside.
        "optimizer": lengths["optimizer"] - lengths["waiting in optimizer"],
        "wire": lengths["wire"],
        "hidden": lengths["wire"] - lengths["exposed"],
        "exposed": lengths["exposed"],
    }


def mean_figures(trace: Trace) -> dict[str, float]:
    """Of all steps in a trace."""
    each = [figures_of(trace, step) for step in trace.steps]
    return {name: statistics.fmean(figures[name] for figures in each) for name in FIGURES}


_COLOURS = {
    "data wait": "#9d9da1", "agree": "#c9c9cc", "prepass": "#a9cfe8", "forward": "#7fb3d9", "backward": "#2f6fa8",
    "optimizer": "#8f6bb3", "zero gradients": "#c5b3d9", "step bucket": "#8f6bb3", "bucket": "#f0a03c",
    "gradients": "#f0a03c", "gather bucket": "#e8cf4e", "wait for buckets": "#d1495b", "wait for gathers": "#d1495b",
    "wait for gradients": "#d1495b",
}  # fmt: skip
_LEGEND = {
    "data wait": "data wait", "agree": "ranks agree on counts", "forward": "forward", "backward": "backward",
    "optimizer": "optimizer", "bucket": "bucket reduced", "gather bucket": "parameters gathered",
    "wait for buckets": "waits: exposed communication",
}  # fmt: skip
_DARK = ("backward", "optimizer", "step bucket", "wait for buckets", "wait for gathers", "wait for gradients")
_WIDTH, _LEFT, _RIGHT = 11.0, 0.85, 0.15
_LANE, _FONT = 0.27, 7.5
_MOST_LANES = 5
_MOST_DRAWN = 2000
"""Ranges of a step; of more, the longest: each takes a millisecond to draw."""


def draw(traces: list[Trace], png: Path, step: int | None = None) -> None:
    """Draw a step of each trace, the median one by default, under each other.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a trace does not hold the step.
        OSError: `png` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [_Panel.of(trace, trace.median_step() if step is None else step) for trace in traces]
    # A step of no duration has room for nothing, but can be drawn.
    longest = max(*(panel.duration for panel in panels), 1e-6)
    heights = [_LANE * panel.lanes + 0.4 for panel in panels]
    height = sum(heights) + 0.85
    figure = Figure(figsize=(_WIDTH, height), dpi=110)
    FigureCanvasAgg(figure)
    top = height - 0.05
    for panel, panel_height in zip(panels, heights):
        bottom = top - panel_height
        axes = figure.add_axes(
            (_LEFT / _WIDTH, bottom / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, (panel_height - 0.3) / height)
        )
        panel.draw(axes, longest, is_last=panel is panels[-1])
        top = bottom
    shown = {span.kind for panel in panels for _, span in panel.placed}
    shown |= {"wait for buckets"} if any(kind.startswith("wait") for kind in shown) else set()
    figure.legend(
        handles=[Patch(color=_COLOURS[kind], label=label) for kind, label in _LEGEND.items() if kind in shown],
        loc="lower center", ncols=len(_LEGEND), fontsize=_FONT, frameon=False, handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


@dataclass
class _Panel:
    """A step of one trace, laid out: rows from the top, of which the wire has as many lanes as it needs."""

    title: str
    duration: float
    lanes: int = 0
    row_at: dict[str, float] = field(default_factory=dict)
    """Row -> middle of its lanes."""
    placed: list[tuple[int, Span]] = field(default_factory=list)
    """(lane, span), in milliseconds from the step's beginning."""

    @property
    def drawn(self) -> list[bool]:
        """Which of `placed` are drawn."""
        if len(self.placed) <= _MOST_DRAWN:
            return [True] * len(self.placed)
        longest = sorted(range(len(self.placed)), key=lambda n: self.placed[n][1].start - self.placed[n][1].end)
        chosen = set(longest[:_MOST_DRAWN])
        return [number in chosen for number in range(len(self.placed))]

    @staticmethod
    def of(trace: Trace, step: int) -> "_Panel":
        start, end = trace.window(step)
        panel = _Panel(_title(trace, step), end - start)
        inside = [
            span._replace(start=max(span.start, start) - start, end=min(span.end, end) - start)
            for span in sorted(trace.spans, key=lambda span: span.start)
            if span.start < end and span.end > start
        ]
        for row in ROWS:
            spans = [span for span in inside if span.row == row]
            if not spans and row in ("wire", "waiting"):
                continue
            lanes = _lanes(spans)
            panel.placed += [(panel.lanes + lane, span) for lane, span in zip(lanes, spans)]
            height = max(lanes, default=0) + 1
            panel.row_at[row] = panel.lanes + (height - 1) / 2
            panel.lanes += height
        if len(panel.placed) > _MOST_DRAWN:
            panel.title += f"; the longest {_MOST_DRAWN:,} of {len(panel.placed):,} ranges are drawn"
        return panel

    def draw(self, axes: object, longest: float, is_last: bool) -> None:
        inches_per_ms = (_WIDTH - _LEFT - _RIGHT) / longest
        passes = {kind: sum(span.kind == kind for _, span in self.placed) for kind in ("forward", "backward")}
        seen = dict.fromkeys(passes, 0)
        for (lane, span), is_drawn in zip(self.placed, self.drawn):
            if span.kind in seen:
                seen[span.kind] += 1
            if not is_drawn:
                continue
            shade = 0.75 if span.number is not None and span.number % 2 else 1.0
            # White edges part neighbours; those of its own colour keep what is short from vanishing.
            is_wide = (span.end - span.start) * inches_per_ms > 0.06
            edge = "white" if is_wide else _COLOURS[span.kind]
            look = {"color": _COLOURS[span.kind], "alpha": shade, "edgecolor": edge, "linewidth": 0.7}
            axes.barh(lane, span.end - span.start, 0.84, span.start, **look)
            numbered = f"{span.kind} {seen[span.kind]}" if passes.get(span.kind, 0) > 1 else span.kind
            text = _fitting(_labels(span, numbered), (span.end - span.start) * inches_per_ms)
            colour = "white" if span.kind in _DARK else "black"
            if text:
                at = (span.start + span.end) / 2
                axes.text(at, lane, text, ha="center", va="center", fontsize=_FONT, color=colour)
        axes.set_xlim(0, longest)
        axes.set_ylim(self.lanes - 0.4, -0.6)
        axes.set_yticks(list(self.row_at.values()), list(self.row_at), fontsize=_FONT + 1)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=_FONT, labelbottom=is_last)
        axes.set_title(self.title, fontsize=_FONT + 1.5, loc="left", pad=4)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if is_last:
            axes.set_xlabel("milliseconds from the beginning of the step", fontsize=_FONT)


def _lanes(spans: list[Span]) -> list[int]:
    """A lane for each span, so that those in one do not overlap; spans by rising start."""
    ends: list[float] = []
    chosen = []
    for span in spans:
        lane = next((lane for lane, end in enumerate(ends) if end <= span.start), len(ends))
        lane = min(lane, _MOST_LANES - 1)
        ends[lane : lane + 1] = [span.end]
        chosen.append(lane)
    return chosen


def _labels(span: Span, numbered: str) -> Iterator[str]:
    """What may stand in a span, the longest first."""
    if span.number is None:
        yield numbered
        yield numbered.partition(" ")[0] if span.kind not in ("forward", "backward") else numbered.rpartition(" ")[2]
        return
    if span.size:
        yield f"{span.kind} {span.number} ({span.size})"
        yield f"{span.number} ({span.size})"
    yield f"{span.kind} {span.number}"
    yield str(span.number)


def _fitting(labels: Iterator[str], inches: float) -> str:
    return next((label for label in labels if len(label) * 0.56 * _FONT / 72 + 0.04 <= inches), "")


def _title(trace: Trace, step: int) -> str:
    about, figures = trace.about, figures_of(trace, step)
    ranks = about.get("world_size", "?")
    place = f"rank {about.get('rank', '?')} of {ranks}" if ranks != 1 else "one process"
    text = f"{about.get('run', trace.path.name)}: step {step}, {place}, {about.get('device', '?')}: "
    text += f"{figures['step']:.1f} ms"
    if figures["wire"]:
        text += f"; communication: {figures['hidden']:.1f} ms hidden, {figures['exposed']:.1f} ms exposed"
    # Of a foreign file it may be anything.
    return text[:160].replace("$", "")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m utils.timeline", description="Where a step's time goes.")
    parser.add_argument("traces", nargs="+", type=a_path, metavar="TRACE", help="file of a run's profile/ directory")
    parser.add_argument("--png", type=a_path, help="draw them there")
    parser.add_argument("--step", type=int, help="which step; default: all for the numbers, the median one is drawn")
    options = parser.parse_args(argv)
    try:
        traces = [read_trace(Path(path)) for path in options.traces]
        for line in _table(traces, options.step):
            print(line)
        if options.png is not None:
            draw(traces, Path(options.png), options.step)
            print(f"drawn: {options.png}")
    except ImportError:
        print(f"timeline: a picture needs matplotlib: pip install matplotlib, then python -m utils.timeline "
              f"{' '.join(options.traces)} --png {options.png}", file=sys.stderr)  # fmt: skip
        return 2
    except (ValueError, OSError) as error:
        print(f"timeline: {error}", file=sys.stderr)
        # 2 says that another attempt cannot help.
        return 1 if isinstance(error, OSError) and is_passing(error) else 2
    return 0


def _table(traces: list[Trace], step: int | None) -> Iterator[str]:
    width = max(len(str(trace.path)) for trace in traces)
    yield f"{'milliseconds a step':{width}s}" + "".join(f"{name:>11s}" for name in FIGURES)
    for trace in traces:
        figures = mean_figures(trace) if step is None else figures_of(trace, step)
        yield f"{trace.path!s:{width}s}" + "".join(f"{figures[name]:11.1f}" for name in FIGURES)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), goes_on=True)
