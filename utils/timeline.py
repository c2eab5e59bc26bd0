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

import argparse
import bisect
import gzip
import json
import math
import re
import statistics
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ABOUT = "zero2all"
"""Key of a trace's own metadata: {"run", "rank", "world_size", "device"}."""
MOST_BYTES = 256 << 20
"""Of an unpacked trace: reading takes about ten times as much memory."""

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
            raise ValueError(f"{self.path} does not hold step {step}, but {', '.join(map(str, self.steps))}")
        return self.steps[step]

    def median_step(self) -> int:
        """The number of the step of median duration."""
        middle = statistics.median_low(end - start for start, end in self.steps.values())
        return next(number for number, (start, end) in self.steps.items() if end - start == middle)


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
    content = _read_json(path)
    raw = content.get("traceEvents") if isinstance(content, dict) else None
    if not isinstance(raw, list):
        raise ValueError(f"{path} is no Chrome trace: it has no traceEvents")
    events = [event for event in map(_event, raw) if event is not None]
    ranges = [event for event in events if event.category == "user_annotation"]
    steps = {int(m[1]): (e.start, e.end) for e in ranges if (m := _STEP.fullmatch(e.name))}
    worked = sorted(e.start for e in ranges if e.name == "forward")
    # The last one may have been broken off before it began.
    steps = {n: (a, b) for n, (a, b) in steps.items() if bisect.bisect(worked, b) > bisect.bisect_left(worked, a)}
    if not steps:
        raise ValueError(f"{path} holds no step of a training run: make a trace with --profile_steps")
    about = content.get(ABOUT)
    about = about if isinstance(about, dict) else {}
    described = _described_ranges(events, ranges)
    spans = _on_device(events, described) if any(e.category in _ON_DEVICE for e in events) else list(described.values())
    if about.get("world_size") == 1:
        spans = [span for span in spans if span.row not in ("wire", "waiting")]
    return Trace(path, about, dict(sorted(steps.items())), spans)


def _read_json(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if is_packed else open)(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES >> 20} MiB: trace fewer steps")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is broken: it is not whole JSON") from None


def _event(raw: object) -> _Event | None:
    """A complete event with a duration; None for what else a trace holds."""
    if not isinstance(raw, dict) or raw.get("ph") != "X":
        return None
    name, category, start, duration = (raw.get(key) for key in ("name", "cat", "ts", "dur"))
    if not isinstance(name, str) or not isinstance(category, str):
        return None
    if not all(isinstance(value, (int, float)) and abs(value) < 1e18 for value in (start, duration)):
        return None
    arguments = raw.get("args")
    correlation = arguments.get("correlation") if isinstance(arguments, dict) else None
    thread = (str(raw.get("pid")), str(raw.get("tid")))
    return _Event(
        name, category, thread, start / 1e3, (start + max(duration, 0)) / 1e3,
        correlation if isinstance(correlation, int) else None,
    )  # fmt: skip


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
    sums = _gloo_sums(events)
    found = {}
    for event in ranges:
        span = _described(event.name, event.start, event.end)
        if span is None:
            continue
        if span.row == "wire":
            launched = sums[event.thread]
            first = bisect.bisect_left(launched, event.start, key=lambda one: one[0])
            last = bisect.bisect_left(launched, event.end, key=lambda one: one[0])
            work = [interval for _, interval in launched[first:last]]
            if work and work[-1][1] > event.end:
                span = span._replace(start=work[0][0], end=max(end for _, end in work))
        found[event] = span
    return found


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
    for event, span in described.items():
        if span.row == "waiting":
            for start, end in _overlap([_gap(main_stream, event)], wire):
                spans.append(span._replace(start=start, end=end))
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
    found = ((max(start, other), min(end, other_end)) for start, end in a for other, other_end in b)
    return [(start, end) for start, end in found if start < end]


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


FIGURES = ("step", "data wait", "forward", "backward", "optimizer", "wire", "hidden", "exposed")


def figures_of(trace: Trace, step: int) -> dict[str, float]:
    """Milliseconds of each of FIGURES within a step.

    Raises:
        ValueError: the trace does not hold it.
    """
    window = trace.window(step)

    def union(*kinds: str) -> list[Interval]:
        inside = _union((s.start, s.end) for s in trace.spans if s.kind in kinds or s.row in kinds)
        return _overlap(inside, [window])

    wire, waiting, stepping = union("wire"), union("waiting"), union("optimizer")
    exposed = _length(_overlap(wire, waiting))
    return {
        "step": window[1] - window[0],
        "data wait": _length(union("data wait")),
        "forward": _length(union("forward")),
        "backward": _length(union("backward")),
        # Without ZeRO-1's wait for parameters, which lies inside.
        "optimizer": _length(stepping) - _length(_overlap(stepping, waiting)),
        "wire": _length(wire),
        "hidden": _length(wire) - exposed,
        "exposed": exposed,
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
    longest = max(panel.duration for panel in panels)
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
        return panel

    def draw(self, axes: object, longest: float, is_last: bool) -> None:
        inches_per_ms = (_WIDTH - _LEFT - _RIGHT) / longest
        passes = {kind: sum(span.kind == kind for _, span in self.placed) for kind in ("forward", "backward")}
        seen = dict.fromkeys(passes, 0)
        for lane, span in self.placed:
            shade = 0.75 if span.number is not None and span.number % 2 else 1.0
            # White edges part neighbours; those of its own colour keep what is short from vanishing.
            is_wide = (span.end - span.start) * inches_per_ms > 0.06
            edge = "white" if is_wide else _COLOURS[span.kind]
            look = {"color": _COLOURS[span.kind], "alpha": shade, "edgecolor": edge, "linewidth": 0.7}
            axes.barh(lane, span.end - span.start, 0.84, span.start, **look)
            if span.kind in seen:
                seen[span.kind] += 1
            numbered = f"{span.kind} {seen[span.kind]}" if passes.get(span.kind, 0) > 1 else span.kind
            text = _fitting(_labels(span, numbered), (span.end - span.start) * inches_per_ms)
            colour = "white" if span.kind in _DARK else "black"
            axes.text((span.start + span.end) / 2, lane, text, ha="center", va="center", fontsize=_FONT, color=colour)
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
    parser = argparse.ArgumentParser(prog="python -m utils.timeline", description="Where a step's time goes.")
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="file of a run's profile/ directory")
    parser.add_argument("--png", type=Path, help="draw them there")
    parser.add_argument("--step", type=int, help="which step; default: all for the numbers, the median one is drawn")
    options = parser.parse_args(argv)
    try:
        traces = [read_trace(path) for path in options.traces]
        for line in _table(traces, options.step):
            print(line)
        if options.png is not None:
            draw(traces, options.png, options.step)
            print(f"drawn: {options.png}")
    except ImportError:
        print(f"timeline: a picture needs matplotlib: pip install matplotlib, then python -m utils.timeline "
              f"{' '.join(map(str, options.traces))} --png {options.png}", file=sys.stderr)  # fmt: skip
        return 2
    except (ValueError, OSError) as error:
        print(f"timeline: {error}", file=sys.stderr)
        return 2
    return 0


def _table(traces: list[Trace], step: int | None) -> Iterator[str]:
    width = max(len(str(trace.path)) for trace in traces)
    yield f"{'milliseconds a step':{width}s}" + "".join(f"{name:>11s}" for name in FIGURES)
    for trace in traces:
        figures = mean_figures(trace) if step is None else figures_of(trace, step)
        yield f"{trace.path!s:{width}s}" + "".join(f"{figures[name]:11.1f}" for name in FIGURES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
