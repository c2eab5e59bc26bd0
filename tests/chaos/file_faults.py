"""Kinds of faults in files: damaged checkpoints, data and records, a full disk."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.chaos.faults import kind, new_monitor_takes_over, relaunched
from tests.chaos.run import SAVE_INTERVAL, Broken, Run, send


def truncate(path: Path, random: Random) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def flip_bit(path: Path, random: Random, begin: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(begin, len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def remove(path: Path, random: Random) -> None:
    path.unlink()


def die_and(run: Run, damage: Callable[[], object]) -> object:
    """All processes of the training die, and `damage` is done before the monitor can look."""
    send(run.monitor.pid, signal.SIGSTOP)
    try:
        run.kill_all()
        return damage()
    finally:
        send(run.monitor.pid, signal.SIGCONT)


def break_newest(damage: Callable[[Path, Random], None]) -> Callable[[Run, Random], str]:
    """Damage one file of the newest checkpoint: the message names it, and the previous one is used."""

    def throw(run: Run, random: Random) -> str:
        run.wait(lambda: len(run.checkpoints()) > 1, "two checkpoints")
        old, since = run.launch(), len(run.lines)

        def break_it() -> tuple[Path, int, int]:
            before, newest = run.checkpoints()[-2:]
            names = sorted(p.name for p in newest.path.iterdir())
            victim = newest.path / random.choice(names)
            damage(victim, random)
            return victim, before.step, newest.step

        victim, before, newest = die_and(run, break_it)
        start = run.wait_new_launch(old, before)
        if start != before:
            raise Broken(f"{victim} was damaged, and the run went on from step {start} instead of {before}")
        if not run.said(f"step-{newest} is broken and skipped", since):
            raise Broken(f"{victim} was damaged, and step-{newest} was passed over without a word")
        return f"{victim.name} of step-{newest}: named, and on from step {start}"

    return throw


kind("ckpt_truncate", weight=2)(break_newest(truncate))
kind("ckpt_flip", weight=2)(break_newest(flip_bit))
kind("ckpt_remove", weight=2)(break_newest(remove))


def break_data(damage: Callable[[Path, Random], None]) -> Callable[[Run, Random], str]:
    """Damage a file of tokens: it is refused once, with one sentence that names it; once it is whole again, the run
    goes on."""

    def throw(run: Run, random: Random) -> str:
        old, least, since = run.launch(), run.newest_step(), len(run.lines)
        victim = random.choice(sorted(p for p in run.data_dir.iterdir() if p.suffix in (".bin", ".ibin")))
        whole = victim.read_bytes()
        die_and(run, lambda: damage(victim, random))
        run.end_monitor(2, f"{victim.name} is damaged")
        launches = [line for _, line in run.lines[since:] if line.startswith("monitor: launch") and "ended" not in line]
        last = run.lines[-1][1]
        if len(launches) != 1 or not last.startswith("monitor: refused: ") or victim.name not in last:
            raise Broken(f"{victim} is damaged; {len(launches)} launches, and the last line is: {last}")
        victim.write_bytes(whole)
        run.start()
        return f"{victim.name}: refused at once; restored: {relaunched(run, old, least)}"

    return throw


kind("data_truncate")(break_data(truncate))
kind("data_flip")(break_data(flip_bit))


@kind("torn_reslog", weight=2)
def torn_reslog(run: Run, random: Random) -> str:
    """A process dies in the middle of writing a record."""
    old, least = run.launch(), run.newest_step()

    def tear() -> None:
        path = run.out_dir / "reslog.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        torn = lines[-1][: random.randrange(1, len(lines[-1]) - 1)]
        path.write_bytes(b"".join([*lines, torn]))

    die_and(run, tear)
    return relaunched(run, old, least)


@kind("damaged_status")
def damaged_status(run: Run, random: Random) -> str:
    run.kill_monitor()
    spoil(run.out_dir / "monitor" / "status.json", random)
    return new_monitor_takes_over(run)


@kind("damaged_status_and_all")
def damaged_status_and_all(run: Run, random: Random) -> str:
    old, least = run.launch(), run.newest_step()
    run.kill_monitor()
    run.kill_all()
    how = spoil(run.out_dir / "monitor" / "status.json", random)
    run.start()
    return f"{how}; {relaunched(run, old, least)}"


@kind("damaged_job", weight=2)
def damaged_job(run: Run, random: Random) -> str:
    """The training is alive, but the file that identifies it is garbage."""
    run.kill_monitor()
    how = spoil(run.out_dir / "monitor" / "job-0.json", random)
    return f"{how}; {new_monitor_takes_over(run, must=False)}"


def spoil(path: Path, random: Random) -> str:
    content = path.read_bytes()
    how = random.choice(("empty", "half", "zeros", "random", "null", "list"))
    garbage = {
        "empty": b"", "half": content[: len(content) // 2], "zeros": bytes(len(content)),
        "random": random.randbytes(200), "null": b"null", "list": b"[]",
    }  # fmt: skip
    path.write_bytes(garbage[how])
    return how


def fill_disk(run: Run) -> None:
    """Leave no free byte on the run's disk. Repeat this, because deleted checkpoints make room."""
    with open(run.ballast, "ab", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(piece)) == piece:
                    pass


@kind("disk_full", weight=2, needs_own_disk=True)
def disk_full(run: Run, random: Random) -> str:
    """Saves fail, and the run lives on; later saves are whole again."""
    launch, failed = run.launch(), len(run.records("save_failed"))
    target = run.step() + 2 * SAVE_INTERVAL + random.randrange(4)
    run.wait(lambda: fill_disk(run) or run.step() >= target, f"step {target} on a full disk")
    newest = run.newest_step()
    run.ballast.unlink()
    run.wait(lambda: run.newest_step() > newest, "a checkpoint after the disk has room again")
    run.wait_progress(launch, 2)
    count = len(run.records("save_failed")) - failed
    if not count:
        raise Broken("no record of a save that failed on a full disk")
    return f"{count} saves failed, the launch lived on, and step-{run.newest_step()} is whole"


@kind("disk_full_kill", weight=2, needs_own_disk=True)
def disk_full_kill(run: Run, random: Random) -> str:
    """A rank dies while the disk is full: launches may fail until it has room."""
    old, least = run.launch(), run.newest_step()
    fill_disk(run)
    run.kill([random.choice(run.ranks())["pid"]])
    until = time.monotonic() + 2 + 6 * random.random()
    run.wait(lambda: fill_disk(run) or time.monotonic() > until, "the monitor lives on while the disk is full")
    run.ballast.unlink()
    return relaunched(run, old, least)


@kind("disk_full_long", needs_own_disk=True)
def disk_full_long(run: Run, random: Random) -> str:
    """The disk is full when the next launch starts, for longer than launches without progress are tolerated: those are
    not the run's fault."""
    old, least = run.launch(), run.newest_step()
    run.kill_monitor()
    run.start("--max_without_progress=3", "--give_up_after=1")
    run.wait(lambda: run.said("^monitor: took over launch"), "the new monitor has the run")
    die_and(run, lambda: fill_disk(run))
    seconds = 10 + 4 * random.random()
    until = time.monotonic() + seconds
    run.wait(lambda: fill_disk(run) or time.monotonic() > until, "the monitor lives on while the disk is full")
    run.ballast.unlink()
    what = relaunched(run, old, least)
    # The usual patience again.
    run.kill_monitor()
    return f"full for {seconds:.0f} s; {what}; {new_monitor_takes_over(run)}"
