"""Measures what a log record costs the training, and whether the viewer stays smooth.

    python -m benchmarks.viewer [--runs 10] [--steps 100000]

Four measurements, on logs made here that are as long as those of long runs:
  1. microseconds that the training waits for a record;
  2. seconds and memory to open all runs, without a window;
  3. the longest time for which the window's thread was busy, hence deaf, while it opens them, while all runs grow and
     while somebody zooms: the gaps between the beats of a timer of 2 ms;
  4. seconds from a zoom to its finished picture.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from runs.layout import RESLOG_NAME
from runs.reslog import ResLog
from utils.machine import cpu_name
from utils.terminal import run_main


def train_values(random_: random.Random, step: int, steps: int) -> dict:
    """The values of one train record."""
    return {
        "step": step,
        "loss": 2.2 + 6.8 * math.exp(-12 * step / steps) + random_.gauss(0, 0.08) + 3 * (random_.random() < 2e-4),
        "bits_per_byte": 1.1 + random_.gauss(0, 0.03), "lr": 1e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
        "grad_norm": 0.6 + abs(random_.gauss(0, 0.15)), "tokens": step * 65536,
        "tokens_per_sec": 54000 * random_.uniform(0.95, 1.03), "mfu": 0.41 * random_.uniform(0.96, 1.03),
        "mfu_seed": 0.48 * random_.uniform(0.96, 1.03), "dt": 1.2 * random_.uniform(0.97, 1.05),
        "data_wait": 4e-4 * random_.uniform(0.5, 2), "comm_wait": 0.012 * random_.uniform(0.6, 1.6),
        "samples": [64 * step - 64, 64 * step - 1], "digest": f"{random_.getrandbits(64):016x}",
    }  # fmt: skip


def make_runs(directory: Path, runs: int, steps: int) -> None:
    began = time.time() - 1.2 * steps
    for number in range(runs):
        random_, path = random.Random(number), directory / f"run-{number}"
        path.mkdir(parents=True)
        with open(path / RESLOG_NAME, "w") as file:
            for step in range(steps + 1):
                name = "train" if step else "start"
                values = train_values(random_, step, steps) if step else {"step": 0, "max_iters": 2 * steps}
                file.write(json.dumps({"name": name, "time": round(began + 1.2 * step, 3), **values}) + "\n")


def measure_logging(directory: Path, records: int = 20_000) -> tuple[float, float]:
    """Median and 99th percentile, microseconds a record."""
    log, random_, times = ResLog(directory / RESLOG_NAME), random.Random(0), []
    for step in range(1, records + 1):
        values = train_values(random_, step, records)
        started = time.perf_counter()
        log.write("train", **values)
        times.append(time.perf_counter() - started)
    log.close()
    return 1e6 * statistics.median(times), 1e6 * statistics.quantiles(times, n=100)[98]


def memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_opening(directory: Path) -> tuple[float, float]:
    """Seconds, and MiB of additional memory at the peak."""
    from viewer.sources.source import RunSource

    before, started = memory_mib(), time.perf_counter()
    source = RunSource(None, [str(directory)], on_change=lambda: None)
    source.start()
    source.loaded.wait()
    seconds = time.perf_counter() - started
    source.stop()
    source.join(5)
    assert len(source.runs) and all("train" in run.history.snapshot().tables for run in source.runs)
    return seconds, memory_mib() - before


def measure_window(directory: Path, steps: int) -> dict[str, object]:
    """Gaps in milliseconds (the longest three) of each phase, and seconds of each zoom."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ["XDG_CONFIG_HOME"] = str(directory / "config")
    from PyQt5.QtCore import QTimer
    from PyQt5.QtWidgets import QApplication

    from viewer import command
    from viewer.desktop import window

    app, gaps, found = QApplication([""]), [], {}
    beat, last = QTimer(), [time.perf_counter()]

    def on_beat() -> None:
        now = time.perf_counter()
        gaps.append(now - last[0])
        last[0] = now

    def note(phase: str) -> None:
        found[phase] = [round(1000 * gap) for gap in sorted(gaps)[-3:]]
        gaps.clear()

    beat.timeout.connect(on_beat)
    script = _script(app, window, directory, steps, found, note)

    def advance() -> None:
        try:
            pause = next(script)
        except StopIteration:
            return
        QTimer.singleShot(pause, advance)

    def begin() -> None:
        last[0] = time.perf_counter()
        beat.start(2)
        advance()

    QTimer.singleShot(0, begin)
    command.main(["--smoothing", "0.9", "--language", "en", str(directory / "runs")])
    return found


def _script(app, window_module, directory: Path, steps: int, found: dict, note):
    """What happens to the window; yields pauses in ms."""
    shown = [w for w in app.topLevelWidgets() if isinstance(w, window_module.Window)][0]
    started = time.perf_counter()
    while not (shown.runs and all(source.loaded.is_set() for source in shown._sources)):
        yield 20
    found["window opened, s"] = round(time.perf_counter() - started, 2)
    yield 3000
    note("gaps while opening, ms")
    stop = threading.Event()
    writer = threading.Thread(target=_grow, args=(directory / "runs", steps, stop))
    writer.start()
    yield 8000
    note("gaps while all runs grow, ms")
    stop.set()
    writer.join()
    zooms = []
    for low, high in ((0.1, 0.6), (0.2, 0.3), (0.0, 1.0)):
        pictures = []
        shown.draughtsman.drawn.connect(pictures.append)
        view = window_module.replace(shown._view, x_range=(low * steps, high * steps))
        zoomed = time.perf_counter()
        shown._set_view(view)
        while not any(picture.view.x_range == view.x_range for picture in pictures):
            yield 5
        zooms.append(round(time.perf_counter() - zoomed, 3))
    note("gaps while zooming, ms")
    found["zoom to picture, s"] = zooms
    found["memory at the highest, MiB"] = round(memory_mib())
    shown.close()
    app.quit()


def _grow(directory: Path, steps: int, stop: threading.Event) -> None:
    logs, random_ = [ResLog(path) for path in sorted(directory.glob("*/reslog.jsonl"))], random.Random(1)
    while not stop.wait(0.1):
        steps += 1
        for log in logs:
            log.write("train", **train_values(random_, steps, steps))
    for log in logs:
        log.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewer", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--window", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.window:
        print(json.dumps(measure_window(Path(args.window), args.steps)))
        return 0
    print(f"{os.cpu_count()} cores of {cpu_name()}, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        median, high = measure_logging(directory)
        print(f"a train record: {median:.1f} us (median), {high:.1f} us (99th percentile)", flush=True)
        make_runs(directory / "runs", args.runs, args.steps)
        size = sum(path.stat().st_size for path in directory.glob("runs/*/reslog.jsonl"))
        print(f"{args.runs} runs of {args.steps:,} steps: {size / 1e6:.0f} MB of logs", flush=True)
        seconds, memory = measure_opening(directory / "runs")
        print(f"opened in {seconds:.2f} s, {memory:.0f} MiB", flush=True)
        # In a process of its own: its memory is the window's.
        command = [sys.executable, "-m", "benchmarks.viewer", "--window", folder, "--steps", str(args.steps)]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    run_main(main)
