"""Kinds of faults in reading: a disk, a network file system or a mount that fails for a while.

Unreadable files may be there all the same: none may be deleted, and no run may start afresh.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from random import Random

from checkpoint.folder import MANIFEST, Checkpoint
from tests.chaos.faults import kind, relaunched
from tests.chaos.file_faults import die_and
from tests.chaos.read_errors import ERRORS
from tests.chaos.run import SAVE_INTERVAL, Broken, Run, send

HOLD = (0.3, 1.5, 5.0)
"""Seconds; shorter and longer than readers keep trying."""
HOW = ("any", "open", "read")


def check_there(run: Run, names: set[str]) -> None:
    """Check that checkpoints are kept.

    Raises:
        Broken: a checkpoint was deleted. (It may be set aside.)
    """
    there = [path.name for path in run.ckpt_dir.iterdir()]
    lost = [n for n in names if not any(other == n or other.startswith(f"abandoned-{n}-") for other in there)]
    if lost:
        raise Broken(f"{', '.join(sorted(lost))} could not be read, and was deleted")


def dead_and_unreadable(
    run: Run, random: Random, patterns: Callable[[list[Checkpoint]], list[str]], who: str, how: str, fresh: bool
) -> str:
    """All processes die, and reads of the next launch fail for a time that is shorter or longer than it keeps trying.

    Args:
        patterns: paths that cannot be read, given the existing checkpoints.
        fresh: a launch may go on meanwhile.
    """
    run.wait(lambda: len(run.checkpoints()) > 1, "two checkpoints")
    old, error, starts = run.launch(), random.choice(sorted(ERRORS)), len(run.records("start"))
    with contextlib.ExitStack() as stack:

        def refuse() -> list[Checkpoint]:
            found = run.checkpoints()
            stack.enter_context(run.read_errors.armed(error, *patterns(found), who=who, what=how))
            return found

        since = len(run.lines)
        found = die_and(run, refuse)
        run.wait(run.read_errors.hits, "a read that fails")
        until = time.monotonic() + random.choice(HOLD) * (0.5 + 0.5 * random.random())
        run.wait(lambda: time.monotonic() > until or run.launch() not in ("", old), "what comes of reads that fail")
        check_there(run, {checkpoint.path.name for checkpoint in found})
        if len(run.records("start")) > starts and not fresh:
            raise Broken("a launch began to train, though no checkpoint could be read")
        hits = run.read_errors.hits()
    # The first process that is reported to have ended is the killed one.
    failed = sum(line.startswith("monitor: launch") and " ended: " in line for _, line in run.lines[since:]) - 1
    least = found[-2].step if fresh else found[-1].step
    return f"{error} on {how} for {who}, {hits} times, {failed} launches failed; {relaunched(run, old, least)}"


@kind("newest_unreadable", needs_read_errors=True, weight=2)
def newest_unreadable(run: Run, random: Random) -> str:
    """A file of the newest checkpoint is unreadable: the launch goes on from the previous one, or from this one once it
    can be read."""
    weights, config = run.setup.weights_files
    name = random.choice((MANIFEST, weights, "optim-0.safetensors", "trainer_state.json", config))
    how = random.choice(HOW if name == MANIFEST else (*HOW, "stat"))
    said = dead_and_unreadable(
        run, random, lambda found: [f"*/ckpt/{found[-1].path.name}/{name}"], "ranks", how, fresh=True
    )
    return f"{name}: {said}"


@kind("all_manifests_unreadable", needs_read_errors=True, weight=2)
def all_manifests_unreadable(run: Run, random: Random) -> str:
    who, how = random.choice(("ranks", "all")), random.choice(HOW)
    return dead_and_unreadable(run, random, lambda _: [f"*/ckpt/step-*/{MANIFEST}"], who, how, fresh=False)


@kind("ckpt_dir_unreadable", needs_read_errors=True, weight=2)
def ckpt_dir_unreadable(run: Run, random: Random) -> str:
    who, how = random.choice(("ranks", "all")), random.choice(("any", "list"))
    return dead_and_unreadable(run, random, lambda _: ["*/ckpt"], who, how, fresh=False)


@kind("data_unreadable", needs_read_errors=True, weight=2)
def data_unreadable(run: Run, random: Random) -> str:
    """The data is unreadable but not damaged: the launch fails, and is tried again."""
    name, how = random.choice(("*.bin", "*.ibin")), random.choice(HOW)
    pattern = f"{run.data_dir.resolve()}/{name}"
    said = dead_and_unreadable(run, random, lambda _: [pattern], "ranks", how, fresh=False)
    return f"{name}: {said}"


@kind("prune_unreadable", needs_read_errors=True, weight=2)
def prune_unreadable(run: Run, random: Random) -> str:
    """Reads fail while checkpoints are saved and older ones deleted: reads of the earlier checkpoints, or of all."""
    run.wait(lambda: len(run.checkpoints()) > 1, "two checkpoints")
    launch, error, how = run.launch(), random.choice(sorted(ERRORS)), random.choice(HOW)
    every = random.random() < 0.4
    with contextlib.ExitStack() as stack:
        pids = [beat["pid"] for beat in run.ranks()]
        for pid in pids:
            send(pid, signal.SIGSTOP)
        try:
            # A deletion that has begun leaves these two, and the next deletion meets the errors.
            names = {checkpoint.path.name for checkpoint in run.checkpoints()[-2:]}
            of_these = [f"*/ckpt/{name}/{MANIFEST}" for name in sorted(names)]
            patterns = [f"*/ckpt/step-*/{MANIFEST}"] if every else of_these
            stack.enter_context(run.read_errors.armed(error, *patterns, who="ranks", what=how))
        finally:
            for pid in pids:
                send(pid, signal.SIGCONT)
        run.wait(run.read_errors.hits, "a read that fails")
        target = run.step() + 2 * SAVE_INTERVAL + 1
        run.wait(lambda: run.step() >= target, f"step {target} while reads fail")
        saved = run.records("save")[-1]["step"]
        check_there(run, names | {f"step-{saved}"})
    run.wait_progress(launch)
    return f"{error} on {how} of {'all' if every else 'the older'} manifests: nothing was deleted meanwhile"


LOOKED_AT = {
    "its records": ("config.yaml", "reslog.jsonl", "monitor/status.json"),
    "the job": ("monitor/job-0.json",),
    "all of its own": ("monitor/*.json",),
    "the signs of life": ("heartbeat/rank-*.json",),
    "the checkpoints": ("ckpt", "ckpt/*"),
}
"""Files that a monitor reads in the run directory."""


@kind("monitor_cannot_read", needs_read_errors=True, weight=2)
def monitor_cannot_read(run: Run, random: Random) -> str:
    """Files that a new monitor, or the one at work, reads cannot be read."""
    what, error = random.choice(sorted(LOOKED_AT)), random.choice(sorted(ERRORS))
    how = random.choice(("any", "list") if what == "the checkpoints" else HOW)
    old, anew, since = run.launch(), random.random() < 0.7, len(run.lines)
    patterns = [f"{run.out_dir.resolve()}/{name}" for name in LOOKED_AT[what]]
    if anew:
        run.kill_monitor()
    with run.slowed(), run.read_errors.armed(error, *patterns, who="others", what=how):
        if anew:
            run.start()
            run.wait(lambda: run.read_errors.hits() or run.said("^monitor: ", since), "the new monitor looks around")
        until = time.monotonic() + 0.5 + 2.0 * random.random()
        # A user without permission may be told so, and starts the monitor again.
        may_refuse = anew and error == "EACCES"
        run.wait(lambda: time.monotonic() > until, "the monitor lives on while reads fail", may_end=may_refuse)
        hits, refused = run.read_errors.hits(), may_refuse and run.monitor.poll() is not None
    with run.slowed():
        if refused:
            run.end_monitor(2, f"{error} on {what}")
            run.start()
        run.wait(lambda: not anew or run.said("^monitor: (took over )?launch", since), "the new monitor has the run")
    run.wait_progress(old)
    whom = "a new monitor" if anew else "the monitor"
    return f"{error} on {how} of {what} for {whom}, {hits} times{', refused' if refused else ''}: the launch went on"
