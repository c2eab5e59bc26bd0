"""Kinds of faults while a launch or a monitor begins: locks that others hold, stop files, deaths in between."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from checkpoint.folder import MANIFEST, REPLACED
from tests.chaos.faults import ask, begun, kind, relaunched, struck
from tests.chaos.file_faults import die_and
from tests.chaos.run import Broken, Run


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """The campaign holds a lock, as another process would."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(Path(file).resolve() == path.resolve() for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


def let_wait(run: Run, lock: Path, since: int, random: Random) -> None:
    """Wait until a process is seen waiting for the lock, or should have come to it, and a moment longer."""
    latest = time.monotonic() + 15.0

    def comes_to_it() -> bool:
        pids = [run.monitor.pid, *(process.pid for process in run.processes() if process.is_rank)]
        is_there = run.said("^monitor: waiting", since) or any(has_open(pid, lock) for pid in pids)
        return is_there or time.monotonic() > latest

    run.wait(comes_to_it, "somebody who waits for a lock")
    until = time.monotonic() + 0.5 + 2.5 * random.random()
    run.wait(lambda: time.monotonic() > until, "the monitor lives on while somebody else has the lock")


@kind("run_locked", weight=2)
def run_locked(run: Run, random: Random) -> str:
    """Another process holds the run directory when a launch begins (a `prune`, a rank that dies slowly): the launch
    waits."""
    old, least, lock, since = run.launch(), run.newest_step(), run.out_dir / ".lock", len(run.lines)
    with contextlib.ExitStack() as stack:
        die_and(run, lambda: stack.enter_context(held(lock)))
        let_wait(run, lock, since, random)
    what = relaunched(run, old, least)
    failed = [line for _, line in run.lines[since:] if line.startswith("monitor: launch") and " ended: " in line]
    if len(failed) > 1:
        raise Broken(f"a launch ended because another process held the run directory for a moment: {failed[-1]}")
    return f"waited for, {what}"


@kind("monitor_locked")
def monitor_locked(run: Run, random: Random) -> str:
    """The last monitor is not quite gone when the next one starts."""
    old, lock = run.launch(), run.out_dir / "monitor" / ".lock"
    run.kill_monitor()
    with held(lock), run.slowed():
        since = len(run.lines)
        run.start()
        let_wait(run, lock, since, random)
    with run.slowed():
        run.wait(lambda: run.said("^monitor: (took over )?launch", since), "the new monitor has looked around")
    run.wait_progress(old)
    return "waited for, and the launch went on"


@kind("second_monitor")
def second_monitor(run: Run, random: Random) -> str:
    """Run the same command again while the monitor is at work: it is refused, and nothing happens to the run."""
    launch, second = run.launch(), run.another_monitor()
    try:
        with run.slowed():
            run.wait(lambda: second.poll() is not None, "the end of a second monitor")
            said = second.communicate()[0].splitlines()
    finally:
        second.kill()
    if second.returncode != 2:
        raise Broken(f"a second monitor ended with {second.returncode}: {said[-1:]}")
    run.wait_progress(launch)
    return f"refused: {said[-1]}"


@kind("stop_file_between")
def stop_file_between(run: Run, random: Random) -> str:
    """A request to stop arrives while no process of the training is alive."""
    old, least = run.launch(), run.newest_step()
    die_and(run, (run.out_dir / "stop").touch)
    return f"between two launches: {honoured(run, old, least)}"


@kind("stop_file_at_start")
def stop_file_at_start(run: Run, random: Random) -> str:
    """A request to stop arrives while a launch begins."""
    old, least = run.launch(), run.newest_step()
    run.kill_all()
    begun(run, old, random)
    (run.out_dir / "stop").touch()
    return f"at a start: {honoured(run, old, least)}"


def honoured(run: Run, old: str, least: int) -> str:
    run.end_monitor(75, "a stop file")
    if run.processes():
        raise Broken("processes of the training live on after a stop file")
    run.start()
    start = run.wait_new_launch(old, max(least, run.newest_step()))
    if (run.out_dir / "stop").exists():
        raise Broken("the stop file is still there after it was honoured")
    return f"exit code 75, and on from step {start}"


@kind("kill_between_dir_and_mark", comes_first=True)
def kill_between_dir_and_mark(run: Run, random: Random) -> str:
    """The first launch dies when half of the new run directory is there."""
    phase = random.choice(("before_ckpt_dir", "after_ckpt_dir"))
    ask(run, phase, 0, step=0)
    run.start()
    struck(run, f"{phase} in the first launch")
    run.wait(run.launch, "a launch that makes steps")
    return f"died {phase.replace('_', ' ')} of the first launch, and on"


@kind("replaced", weight=2)
def replaced(run: Run, random: Random) -> str:
    """The state that a kill between the two renames of a commit leaves when a step is saved again: the step's older
    checkpoint is there under another name, and the new one not under its own yet."""
    run.wait(lambda: len(run.checkpoints()) > 1, "two checkpoints")
    old, alone = run.launch(), random.random() < 0.5

    def leave() -> int:
        *others, newest = run.checkpoints()
        shutil.copytree(newest.path, run.ckpt_dir / f".tmp-{newest.path.name}-0")
        newest.path.rename(run.ckpt_dir / f"{REPLACED}{newest.path.name}-0")
        for checkpoint in others if alone else ():
            # As with --keep_last=1.
            shutil.rmtree(checkpoint.path)
        return newest.step

    step = die_and(run, leave)
    start = run.wait_new_launch(old, step)
    if start != step or not (run.ckpt_dir / f"step-{step}" / MANIFEST).exists():
        raise Broken(f"the checkpoint of step {step} was there, and the run went on from step {start}")
    return f"step-{step} went back to its place{', the only one' if alone else ''}"
