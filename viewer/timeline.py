"""Draws where a step's time goes, from traces of --profile_steps.

    python -m utils.timeline TRACE [TRACE ...] [--png out.png] [--step N]      (or python -m viewer.timeline)

Several traces are drawn below each other on one time axis, each from its step's beginning, to compare overlap on and
off, or two ranks. Rows:

    data        waiting for the loader, and for all ranks to agree on counts
    compute     forward and backward pass of each micro-batch
    optimizer   the step on the summed gradients
    wire        reduction of each bucket and gathering of its parameters (fsdp: of each block), with the megabytes that
                this rank sends
    waiting     the main thread (on CUDA: its stream) waits for the wire

runs/traces.py defines the parts of a step, and which communication is hidden or exposed.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-viewer.txt")

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runs.traces import FIGURES, ROWS, StepPart, Trace, figures_of, mean_figures, read_trace
from utils.arguments import Parser
from utils.files import is_passing
from utils.paths import a_path
from utils.terminal import run_main

_COLOURS = {
    "data wait": "#9d9da1", "agree": "#c9c9cc", "prepass": "#a9cfe8", "forward": "#7fb3d9", "backward": "#2f6fa8",
    "optimizer": "#8f6bb3", "rebalance": "#a98cc7", "zero gradients": "#c5b3d9", "step bucket": "#8f6bb3",
    "bucket": "#f0a03c", "gradients": "#f0a03c", "gather bucket": "#e8cf4e", "wait for buckets": "#d1495b",
    "wait for gathers": "#d1495b", "wait for gradients": "#d1495b", "gather weights": "#e8cf4e",
    "sum gradients": "#f0a03c", "sum over copies": "#f0a03c",
}  # fmt: skip
_LEGEND = {
    "data wait": "data wait", "agree": "ranks agree on counts", "forward": "forward", "backward": "backward",
    "optimizer": "optimizer", "bucket": "bucket reduced", "gather bucket": "parameters gathered",
    "gather weights": "weights gathered", "sum gradients": "gradients summed",
    "wait for buckets": "waits: exposed communication",
}  # fmt: skip
_DARK = ("backward", "optimizer", "step bucket", "wait for buckets", "wait for gathers", "wait for gradients")
_WIDTH, _LEFT, _RIGHT = 11.0, 0.85, 0.15
_LANE, _FONT = 0.27, 7.5
_MOST_LANES = 5
_MOST_DRAWN = 2000
"""Most ranges that are drawn of a step, the longest ones: each takes a millisecond."""


def draw(traces: list[Trace], png: Path, step: int | None = None) -> None:
    """Draw a step of each trace below each other; by default, the step of median duration.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a trace does not hold the step.
        OSError: `png` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [_Panel.of(trace, trace.median_step() if step is None else step) for trace in traces]
    # A step of no duration has no room for anything, but can be drawn.
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
    shown = {part.kind for panel in panels for _, part in panel.placed}
    shown |= {"wait for buckets"} if any(kind.startswith("wait") for kind in shown) else set()
    figure.legend(
        handles=[Patch(color=_COLOURS[kind], label=label) for kind, label in _LEGEND.items() if kind in shown],
        loc="lower center", ncols=len(_LEGEND), fontsize=_FONT, frameon=False, handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


@dataclass
class _Panel:
    """The layout of one trace's step: rows from the top, each with as many lanes as it needs."""

    title: str
    duration: float
    lanes: int = 0
    row_at: dict[str, float] = field(default_factory=dict)
    """Row -> middle of its lanes."""
    placed: list[tuple[int, StepPart]] = field(default_factory=list)
    """(lane, part), in milliseconds from the step's beginning."""

    @property
    def drawn(self) -> list[bool]:
        """Whether each of `placed` is drawn."""
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
            part._replace(start=max(part.start, start) - start, end=min(part.end, end) - start)
            for part in sorted(trace.parts, key=lambda part: part.start)
            if part.start < end and part.end > start
        ]
        for row in ROWS:
            parts = [part for part in inside if part.row == row]
            if not parts and row in ("wire", "waiting"):
                continue
            lanes = _lanes(parts)
            panel.placed += [(panel.lanes + lane, part) for lane, part in zip(lanes, parts)]
            height = max(lanes, default=0) + 1
            panel.row_at[row] = panel.lanes + (height - 1) / 2
            panel.lanes += height
        if len(panel.placed) > _MOST_DRAWN:
            panel.title += f"; the longest {_MOST_DRAWN:,} of {len(panel.placed):,} ranges are drawn"
        return panel

    def draw(self, axes: object, longest: float, is_last: bool) -> None:
        inches_per_ms = (_WIDTH - _LEFT - _RIGHT) / longest
        passes = {kind: sum(part.kind == kind for _, part in self.placed) for kind in ("forward", "backward")}
        seen = dict.fromkeys(passes, 0)
        for (lane, part), is_drawn in zip(self.placed, self.drawn):
            if part.kind in seen:
                seen[part.kind] += 1
            if not is_drawn:
                continue
            shade = 0.75 if part.number is not None and part.number % 2 else 1.0
            # White edges separate neighbours; edges of the same colour keep short ranges visible.
            is_wide = (part.end - part.start) * inches_per_ms > 0.06
            edge = "white" if is_wide else _COLOURS[part.kind]
            look = {"color": _COLOURS[part.kind], "alpha": shade, "edgecolor": edge, "linewidth": 0.7}
            axes.barh(lane, part.end - part.start, 0.84, part.start, **look)
            numbered = f"{part.kind} {seen[part.kind]}" if passes.get(part.kind, 0) > 1 else part.kind
            text = _fitting(_labels(part, numbered), (part.end - part.start) * inches_per_ms)
            colour = "white" if part.kind in _DARK else "black"
            if text:
                at = (part.start + part.end) / 2
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


def _lanes(parts: list[StepPart]) -> list[int]:
    """A lane for each part, so that parts in one lane do not overlap. The parts come by rising start."""
    ends: list[float] = []
    chosen = []
    for part in parts:
        lane = next((lane for lane, end in enumerate(ends) if end <= part.start), len(ends))
        lane = min(lane, _MOST_LANES - 1)
        ends[lane : lane + 1] = [part.end]
        chosen.append(lane)
    return chosen


def _labels(part: StepPart, numbered: str) -> Iterator[str]:
    """Texts for a part, the longest first.

    Args:
        numbered: kind of the part, with its number among parts of that kind if there are several.
    """
    if part.number is None:
        yield numbered
        yield numbered.partition(" ")[0] if part.kind not in ("forward", "backward") else numbered.rpartition(" ")[2]
        return
    if part.size:
        yield f"{part.kind} {part.number} ({part.size})"
        yield f"{part.number} ({part.size})"
    yield f"{part.kind} {part.number}"
    yield str(part.number)


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
    # A foreign file may hold anything here.
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
        # Code 2 means that another attempt cannot help.
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
