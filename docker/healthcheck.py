"""The image's HEALTHCHECK: whether the training in this container is alive.

    python docker/healthcheck.py [--run RUN]

A rank holds its heartbeat file open as long as it lives, so the runs of this container are found from its processes:
files of dead ranks, other containers or machines on the same volume do not count. A beat is overdue by the monitor's
rule (monitor/watch.py), with the run's logged seconds a step in place of the median.

Exit codes: 0 nothing trains here, or all ranks beat; 1 a rank is overdue.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from monitor.watch import Limits, Watch  # noqa: E402
from runs.heartbeat import read_heartbeats  # noqa: E402
from runs.layout import HEARTBEAT_DIR, RunPaths, rank_of  # noqa: E402
from runs.reslog import newest_values  # noqa: E402
from utils.paths import a_path  # noqa: E402
from utils.terminal import run_main  # noqa: E402

_KEYS = {"rank", "pid", "phase", "step", "monotonic"}


def local_ranks() -> dict[Path, dict[int, bool]]:
    """Processes of this container that hold a heartbeat file open: run directory -> {pid: stopped by a signal}."""
    found: dict[Path, dict[int, bool]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [Path(os.readlink(link)) for link in (process / "fd").iterdir()]
            stopped = process.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            # It has ended meanwhile, or belongs to another user.
            continue
        for file in files:
            if file.parent.name == HEARTBEAT_DIR and rank_of(file) is not None:
                found.setdefault(file.parent.parent, {})[int(process.name)] = stopped
    return found


def seconds_a_step(run_dir: Path) -> float | None:
    """Seconds a step from the newest training record; None before there is one."""
    return next(filter(math.isfinite, newest_values(RunPaths(run_dir).reslog, "dt")), None)


def overdue(run_dir: Path, ranks: dict[int, bool], limits: Limits, now: float) -> tuple[str | None, list[dict]]:
    """The problem with a run, if there is one, and the heartbeats of its ranks here."""
    beats = [
        record | {"age": now - record["monotonic"], "alive": True, "stopped": ranks[record["pid"]]}
        for record in read_heartbeats(RunPaths(run_dir).heartbeat_dir)
        # Processes that a rank has forked hold the file open, too.
        if set(record) >= _KEYS and record["pid"] in ranks
    ]
    seconds = seconds_a_step(run_dir)
    if seconds is not None:
        limits = replace(limits, first_step=max(limits.step_floor, limits.step_factor * seconds))
    return Watch(limits, now).overdue(beats, now), sorted(beats, key=lambda beat: beat["rank"])


def main(argv: list[str]) -> int:
    usual = Limits()
    parser = argparse.ArgumentParser(prog="healthcheck.py", description="Is the training in this container alive?")
    parser.add_argument(
        "--run", type=a_path, metavar="RUN", help="look at this run alone (default: at every one that trains here)"
    )
    hang_help = f"shortest time in seconds that counts as a hang (default: {usual.step_floor:.0f})"
    parser.add_argument("--hang_after", type=float, default=usual.step_floor, help=hang_help)
    args = parser.parse_args(argv)
    runs = local_ranks()
    if args.run is not None:
        runs = {run: ranks for run, ranks in runs.items() if run == Path(args.run).resolve()}
    problems, said = [], []
    for run_dir, ranks in sorted(runs.items()):
        problem, beats = overdue(run_dir, ranks, replace(usual, step_floor=args.hang_after), time.monotonic())
        if problem is not None:
            problems.append(f"{run_dir}: {problem}")
        elif beats:
            slowest = min(beats, key=lambda beat: beat["step"])
            ranks_here = f"{len(beats)} rank{'s' if len(beats) > 1 else ''} here"
            said.append(f"{run_dir}: {ranks_here}, phase {slowest['phase']}, step {slowest['step']}")
        else:
            said.append(f"{run_dir}: no heartbeat yet")
    print("\n".join(problems or said or ["idle: nothing trains here"]))
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), goes_on=True)
