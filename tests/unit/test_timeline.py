"""Traces of steps: reading, refusing, and --profile_steps on one process."""

import errno
import gzip
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train_my_ddp
from configurator import parse_config
from model import flops
from runs import traces
from runs.intervals import LatestEnd
from runs.traces import StepPart, Trace, figures_of, mean_figures, read_trace
from tests.runs import elsewhere, final_state, losses, out_dir, same_bits
from training.profile_steps import StepProfile
from viewer import timeline

MAIN, AUTOGRAD, COMM, GLOO = 10, 11, 12, 13


def event(name: str, start: float, end: float, thread: int = MAIN, category: str = "user_annotation", **args) -> dict:
    """Times in milliseconds."""
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": 1e3 * start,
            "dur": 1e3 * (end - start), "args": args}  # fmt: skip


def kernel(name: str, start: float, end: float, stream: int, launched: float, thread: int, number: int) -> list[dict]:
    """Work on the GPU, and its launch."""
    runtime = event("cudaLaunchKernel", launched, launched + 0.01, thread, "cuda_runtime", correlation=number)
    return [runtime, event(name, start, end, stream, "kernel", correlation=number) | {"pid": 0}]


def write(path: Path, events: list[dict], **about) -> Path:
    content = {"traceEvents": events, "zero2all": {"run": "r", "rank": 0, "world_size": 2, "device": "cpu"} | about}
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def cpu_step(number: int, at: float, overlap: bool) -> list[dict]:
    """A step of 100 ms: two micro-batches, two buckets; gloo's part of bucket 1 goes on after its range."""
    first, second, waits = (55, 70, 85) if overlap else (80, 84, 95)
    shifted = [
        event(f"step {number}", 0, 100), event("data wait", 0, 4), event("agree", 4, 5),
        event("forward", 5, 15), event("backward", 15, 40), event("forward", 40, 50), event("backward", 50, 80),
        event("c10d::allreduce_", 4, 5, category="cpu_op"), event("gloo:all_reduce", 4.1, 4.9, GLOO),
        event("bucket 0 (2.0 MB)", first, first + 4, COMM), event("bucket 1 (1.0 MB)", second, second + 1, COMM),
        event("c10d::allreduce_", first, first + 1, COMM, "cpu_op"), event("gloo:all_reduce", first, first + 3, GLOO),
        event("c10d::allreduce_", second, second + 1, COMM, "cpu_op"),
        event("gloo:all_reduce", second + 1.5, waits, GLOO + 1),
        event("c10d::allreduce_", 98, 99, category="cpu_op"), event("gloo:all_reduce", 98.1, 99.5, GLOO),
        event("wait for buckets", 80, waits), event("optimizer", waits, 98), event("aten::mm", 6, 7, category="cpu_op"),
    ]  # fmt: skip
    return [one | {"ts": one["ts"] + 1e3 * at} for one in shifted]


@pytest.fixture
def on(tmp_path: Path) -> Path:
    # The first step is slower, as first steps are.
    slow = [one | {"ts": 3 * one["ts"], "dur": 3 * one["dur"]} for one in cpu_step(6, 0, True)]
    return write(tmp_path / "on.json.gz", [*slow, *cpu_step(7, 300, True), *cpu_step(8, 400, True)])


def test_a_steps_figures_on_a_cpu(on: Path, tmp_path: Path):
    trace = read_trace(on)
    assert list(trace.steps) == [6, 7, 8] and trace.median_step() in (7, 8)
    expected = {"step": 100, "data wait": 4, "forward": 20, "backward": 55, "optimizer": 13, "wire": 17.5,
                "hidden": 12.5, "exposed": 5}  # fmt: skip
    assert figures_of(trace, 7) == pytest.approx(expected)
    assert mean_figures(trace)["exposed"] == pytest.approx((15 + 5 + 5) / 3)
    off = read_trace(write(tmp_path / "off.json", cpu_step(7, 0, False)))
    assert figures_of(off, 7) == pytest.approx(
        expected | {"optimizer": 3, "wire": 13.5, "hidden": 0, "exposed": 13.5}
    )
    bucket = next(part for part in off.parts if part.number == 1)
    assert bucket == StepPart("wire", "bucket", 85.5, 95.0, 1, "1.0 MB")


def test_fsdp_waits_for_what_it_gathers_and_sums(tmp_path: Path):
    ranges = [("gather weights", 5, 8), ("sum gradients", 30, 36), ("sum over copies", 36, 38)]
    wire = [event(f"{name} (1.5 MB)", *times) for name, *times in ranges]
    waits = [event(f"wait: {name}", *times) for name, *times in ranges]
    trace = read_trace(write(tmp_path / "t.json", [event("step 7", 0, 50), event("forward", 4, 20), *wire, *waits]))
    figures = figures_of(trace, 7)
    assert [figures[name] for name in ("wire", "hidden", "exposed")] == [11, 0, 11]
    timeline.draw([trace], tmp_path / "t.png")


def test_a_step_that_was_broken_off_is_left_out(tmp_path: Path):
    trace = read_trace(write(tmp_path / "t.json", [*cpu_step(7, 0, True), event("step 8", 100, 101)]))
    assert list(trace.steps) == [7]


def test_one_process_has_no_wire(tmp_path: Path):
    trace = read_trace(write(tmp_path / "t.json", cpu_step(7, 0, True), world_size=1))
    assert {part.row for part in trace.parts} == {"data", "compute", "optimizer"}
    assert figures_of(trace, 7)["wire"] == 0


def test_on_cuda_spans_lie_where_the_gpu_worked(tmp_path: Path):
    """Everything is launched within 12 ms, and the GPU works on it for 80. autograd's thread launches the backward pass
    and the buckets, whose reductions run on separate streams."""
    events = [
        event("step 3", 0, 90), event("data wait", 0, 1), event("forward", 2, 4), event("backward", 4, 10),
        event("bucket 0 (4.0 MB)", 6, 7, AUTOGRAD), event("bucket 1 (4.0 MB)", 9, 9.5, AUTOGRAD),
        event("wait for buckets", 10, 10.5), event("optimizer", 11, 88),
        *kernel("embedding", 10, 15, 7, 2.5, MAIN, 1), *kernel("gemm", 15, 30, 7, 3.5, MAIN, 2),
        *kernel("gemm", 30, 40, 7, 5, AUTOGRAD, 3),
        *kernel("cast", 40, 41, 20, 6.1, AUTOGRAD, 4), *kernel("ncclDevKernel_AllReduce", 41, 52, 21, 6.5, AUTOGRAD, 5),
        *kernel("gemm", 40, 60, 7, 8, AUTOGRAD, 6), *kernel("ncclDevKernel_AllReduce", 60, 72, 21, 9.2, AUTOGRAD, 7),
        *kernel("norm", 72, 75, 7, 11.5, MAIN, 8), *kernel("adamw", 75, 85, 7, 12, MAIN, 9),
        # Launched before the trace began.
        event("gemm", 1, 2, 7, "kernel", correlation=99), event("range", 1, 80, 7, "gpu_user_annotation"),
    ]  # fmt: skip
    trace = read_trace(write(tmp_path / "t.json", events, device="GPU"))
    assert set(trace.parts) == {
        StepPart("data", "data wait", 0.0, 1.0), StepPart("compute", "forward", 10.0, 30.0),
        StepPart("compute", "backward", 30.0, 60.0), StepPart("wire", "bucket", 40.0, 52.0, 0, "4.0 MB"),
        StepPart("wire", "bucket", 60.0, 72.0, 1, "4.0 MB"), StepPart("waiting", "wait for buckets", 60.0, 72.0),
        StepPart("optimizer", "optimizer", 72.0, 85.0),
    }  # fmt: skip
    figures = figures_of(trace, 3)
    assert (figures["wire"], figures["hidden"], figures["exposed"]) == (24.0, 12.0, 12.0)


def test_the_command_prints_and_draws(on: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    off = write(tmp_path / "off.json", cpu_step(7, 0, False))
    png = tmp_path / "pictures" / "both.png"
    assert timeline.main([str(on), str(off), "--png", str(png), "--step", "7"]) == 0
    head, first, second, drawn = capsys.readouterr().out.splitlines()
    assert head.split()[3:] == ["step", "data", "wait", *traces.FIGURES[2:]]
    assert first.split() == [str(on), "100.0", "4.0", "20.0", "55.0", "13.0", "17.5", "12.5", "5.0"]
    assert second.split()[-2:] == ["0.0", "13.5"] and str(png) in drawn
    assert png.read_bytes().startswith(b"\x89PNG") and 10_000 < png.stat().st_size < 300_000


def test_without_matplotlib_the_numbers_are_there(on: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert timeline.main([str(on)]) == 0
    assert timeline.main([str(on), "--png", "x.png"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "pip install matplotlib, then python -m utils.timeline" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is not whole JSON"),
        (b'{"traceEvents": [', "is not whole JSON"),
        (b"[" * 100_000, "is not a JSON object"),
        (b'{"a": ' * 100_000, "is not whole JSON"),
        (gzip.compress(b'{"traceEvents": []}' * 100, mtime=0)[:-30], "cannot be read"),
        (b"[]", "is not a JSON object"),
        (b'{"traceEvents": 3}', "is not a Chrome trace"),
        (b'{"traceEvents": [7, {"ph": "X", "cat": "x", "name": "step 1", "ts": "now", "dur": 1}]}', "holds no step"),
        (json.dumps({"traceEvents": [event("step 1", 0, 2), event("forward", 1, 2)]}).encode(), "not hold step 5"),
        (b" " * 2000, "is larger than"),
    ],
)
def test_bad_traces_are_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
):
    monkeypatch.setattr(traces, "MOST_BYTES", 1000 if content == b" " * 2000 else traces.MOST_BYTES)
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    assert timeline.main([str(path), "--step", "5"]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") <= 1 and len(err.splitlines()) == 1
    assert err.startswith(f"timeline: {path} ") and message in err


def test_odd_values_in_a_trace_are_passed_over(tmp_path: Path):
    odd = [{"ph": "X", "cat": "kernel", "name": "k", "ts": 10**400, "dur": 1}, {"ph": "X"}, None,
           {"ph": "X", "cat": "kernel", "name": "k", "ts": float("nan"), "dur": 1, "args": 3}]  # fmt: skip
    trace = read_trace(write(tmp_path / "t.json", [*odd, *cpu_step(7, 0, True)], run="$x" * 500, device=[1]))
    assert figures_of(trace, 7)["wire"] == pytest.approx(17.5)
    assert len(timeline._title(trace, 7)) <= 160


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_what_counting_milliseconds_says(seed: int):
    """For ranges in any position, even beyond their step."""
    random_ = random.Random(seed)
    kinds = ["data wait", "forward", "backward", "optimizer", "bucket 3", "wait for buckets", "gradients", "agree"]
    parts = []
    for _ in range(60):
        start = random_.randrange(300)
        parts.append(traces._described(random_.choice(kinds), start, start + random_.randrange(25)))
    trace = Trace(Path("t"), {}, {1: (0.0, 120.0), 2: (100.0, 250.0), 9: (260.0, 260.0)}, parts)
    for step, (first, last) in trace.steps.items():
        def passed(name: str, first: float = first, last: float = last) -> set[int]:
            found = {at for s in parts if name in (s.kind, s.row) for at in range(int(s.start), int(s.end))}
            return {at for at in found if first <= at < last}

        wire, waiting = passed("wire"), passed("waiting")
        assert figures_of(trace, step) == pytest.approx({
            "step": last - first, "data wait": len(passed("data wait")), "forward": len(passed("forward")),
            "backward": len(passed("backward")), "optimizer": len(passed("optimizer") - waiting), "wire": len(wire),
            "hidden": len(wire - waiting), "exposed": len(wire & waiting),
        })  # fmt: skip


class Counting(list):
    """Parts that count how often they are read."""

    looks = 0

    def __iter__(self) -> Iterator:
        Counting.looks += len(self)
        return super().__iter__()


@pytest.mark.parametrize("count", [50, 200])
def test_the_mean_of_many_steps_does_not_look_at_all_ranges_for_each(count: int):
    parts = Counting(traces._described("forward", n, n + 0.5) for n in range(count))
    trace = Trace(Path("t"), {}, {n: (n, n + 1.0) for n in range(count)}, parts)
    Counting.looks = 0
    assert mean_figures(trace)["forward"] == pytest.approx(0.5)
    assert Counting.looks <= 8 * count


@pytest.mark.parametrize("seed", range(3))
def test_the_latest_end_of_a_stretch(seed: int):
    random_ = random.Random(seed)
    ends = [random_.random() for _ in range(100)]
    latest = LatestEnd(ends)
    for last in sorted(random_.randrange(1, 101) for _ in range(80)):
        first = random_.randrange(last)
        assert latest.between(first, last) == max(ends[first:last])


def many_buckets(count: int) -> list[dict]:
    buckets = [event(f"bucket {n} (1.0 MB)", 5 + n / 100, 6 + n / 50, COMM) for n in range(count)]
    return [event("step 7", 0, 100), event("forward", 1, 2), event("backward", 2, 4), *buckets]


def test_of_too_many_ranges_the_longest_are_drawn_and_the_title_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(11, 3))
    monkeypatch.setattr(timeline, "_MOST_DRAWN", 40, raising=False)
    panel = timeline._Panel.of(read_trace(write(tmp_path / "t.json", many_buckets(200))), 7)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    panel.draw(axes, 100.0, is_last=True)
    assert panel.title.endswith("; the longest 40 of 202 ranges are drawn")
    # The later buckets are longer.
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx([1 + n / 100 for n in range(160, 200)])


@pytest.mark.parametrize("names, most", [("MOST_EVENTS", 10), ("MOST_KEPT", 8), ("_LONGEST_EVENT", 50)])
def test_a_trace_that_holds_too_much_is_refused(
    names: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(traces, names, most, raising=False)
    path = write(tmp_path / "t.json.gz", many_buckets(30))
    assert timeline.main([str(path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"timeline: {path} holds ")


def test_only_what_is_needed_of_a_trace_is_kept(tmp_path: Path):
    """A CPU's trace is nine tenths operators, and a kernel's name can be a page of C++."""
    noise = [event(f"aten::op{n}", n, n + 1, category="cpu_op") for n in range(500)]
    noise += [event("nothing of ours", n, n + 1) for n in range(500)]
    noise += [event("cudaFree", n, n + 1, category="cuda_runtime") for n in range(500)]
    wordy = kernel("void gemm<" * 1000, 1, 2, 7, 0.5, MAIN, 5)
    path = write(tmp_path / "t.json", [*noise, *wordy, *cpu_step(7, 0, True)])
    _, events = traces._read_events(path)
    assert len(events) == len(cpu_step(7, 0, True)) - 1 + 2
    assert max(len(one.name) for one in events) < 40


def test_a_step_of_no_duration_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "t.json", [event("step 7", 5, 5), event("forward", 5, 5)])
    assert timeline.main([str(path), "--png", str(tmp_path / "t.png")]) == 0
    assert (tmp_path / "t.png").exists()


def test_of_many_steps_only_some_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    steps = [one for n in range(500) for one in (event(f"step {n}", n, n + 1), event("forward", n, n + 1))]
    path = write(tmp_path / "t.json", steps)
    assert timeline.main([str(path), "--step", "999"]) == 2
    said = capsys.readouterr().err
    assert "does not hold step 999, but 0, 1, 2, " in said and said.endswith("19, ...\n")


def test_a_disk_that_does_not_answer_is_no_wrong_input(
    on: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(_path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(traces, "_pieces", fail, raising=False)
    assert timeline.main([str(on)]) == 1
    assert "Input/output error" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["6", "8:6", "0:2", "a:b", "1:2:3", "-1:2", "1:1000000"])
def test_wrong_profile_steps_are_refused(value: str):
    with pytest.raises(ValueError, match="profile_steps"):
        parse_config(["--data_dir=d", f"--profile_steps={value}"])


def train(flags: list[str], *more: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "device_peak_flops", lambda *_: 1e11)
        return train_my_ddp.main([*flags, *more])


def profile_dir(flags: list[str]) -> list[str]:
    return sorted(path.name for path in (out_dir(flags) / "profile").iterdir())


def test_tracing_changes_no_result_and_ends_with_the_run(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = [*tiny_run, "--gradient_accumulation_steps=4"]
    assert train(flags) == 0
    assert not (out_dir(flags) / "profile").exists()
    traced = elsewhere(flags, tmp_path / "traced")
    capsys.readouterr()
    assert train(traced, "--profile_steps=3:9") == 0
    assert "profile: " in capsys.readouterr().out
    files = profile_dir(traced)
    assert files[0] == "steps-3-4-rank-0.json.gz" and set(files[1:]) <= {"steps-3-4.png"}
    trace = read_trace(tmp_path / "traced" / "profile" / "steps-3-4-rank-0.json.gz")
    assert trace.about == {"run": "traced", "rank": 0, "world_size": 1, "device": "cpu"}
    assert list(trace.steps) == [3, 4]
    for window in trace.steps.values():
        inside = [part.kind for part in trace.parts if window[0] <= part.start and part.end <= window[1]]
        assert sorted(inside) == sorted(["data wait", "agree", *["forward", "backward"] * 4, "optimizer"])
    assert losses(traced) == losses(flags)
    assert same_bits(final_state(traced, 4), final_state(flags, 4))
    # The option belongs to the launch; after the last step there is nothing to trace.
    assert train(traced, "--resume", "--max_iters=5", "--profile_steps=3:4") == 0
    assert "nothing is profiled: the run is at step 4, --profile_steps asks for 3 to 4" in capsys.readouterr().out
    assert train(traced, "--resume", "--max_iters=6", "--profile_steps=9:9") == 0
    printed = capsys.readouterr().out
    assert "nothing was profiled: the run ended before step 9" in printed
    assert profile_dir(traced) == files


@pytest.mark.parametrize("what", ["directory", "start", "write", "draw"])
def test_a_profile_that_cannot_be_written_ends_nothing(
    tiny_run: list[str], what: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if what == "directory":
        out_dir(tiny_run).mkdir()
        (out_dir(tiny_run) / ".zero2all-run").touch()
        (out_dir(tiny_run) / "profile").write_text("in the way")
    elif what == "start":
        monkeypatch.setattr(torch.profiler.profile, "start", fail)
    elif what == "write":
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    else:
        monkeypatch.setattr(timeline, "draw", fail)
    assert train(tiny_run, "--profile_steps=2:2") == 0
    said = "steps are not profiled: " if what == "start" else "the profile of steps 2 to 2 is not complete: "
    assert said in capsys.readouterr().out
    assert len(losses(tiny_run)) == 4


def test_nothing_is_called_between_the_steps_asked_for():
    profile = StepProfile((3, 4), Path("nowhere"), torch.device("cpu"), {"rank": 0}, pytest.fail)
    assert [profile.step(number, lambda: "done") for number in (1, 2, 5)] == ["done"] * 3
