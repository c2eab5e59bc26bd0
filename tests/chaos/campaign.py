"""Throw faults at training runs, and see that each ends as if nothing had happened.

    python -m tests.chaos.campaign --seed 1 --faults 200 [--kinds a,b] [--skip c] [--dir D] [--report FILE]

Each round is a run under monitor_process.py that is hit several times. The seed says by what, and when: the first fault
at a step of the run, each other so many steps after the effect of the one before. In the end the run is compared with
an undisturbed one of the same flags: the same bits, the same records, a clean audit, nothing left over.

Exit codes: 0 all promises were kept; 1 not, see the last lines; the directories of those runs stay.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import tests.chaos.file_faults  # noqa: F401  registers its kinds
from tests.chaos.checks import CHECKS, remarks
from tests.chaos.data import make_data
from tests.chaos.faults import KINDS, Kind
from tests.chaos.report import Report
from tests.chaos.run import ROOT, SETUPS, Broken, Run, RunOver, Setup, environment, training_command, training_flags

FAULTS_A_ROUND = 8
STEPS = 260
FIRST_FAULT, GAP = (8, 20), (8, 18)
"""Bounds of the step of the first fault, and of the steps between the effect of one and the next."""
DISK_BYTES = 340 << 20
"""More than what the monitor warns below."""
ORDER = ("ddp2", "ddp1", "zero1", "ddp2", "powersgd", "ddp1")
"""Setups of the rounds, over and over."""


def deck(kinds: list[Kind], random: Random) -> Iterator[Kind]:
    """All kinds in random order, each as often as it weighs, again and again."""
    while True:
        cards = [kind for kind in kinds for _ in range(kind.weight)]
        random.shuffle(cards)
        yield from cards


def deal(hand: list[Kind], cards: Iterator[Kind], count: int, world_size: int) -> list[Kind]:
    """Take the faults of a round from `hand`, which is filled from `cards`; what does not fit stays in it."""
    taken: list[Kind] = []
    last: Kind | None = None
    index = 0
    while len(taken) + (last is not None) < count and index < 500:
        if index == len(hand):
            hand.append(next(cards))
        kind = hand[index]
        if (kind.needs_two_ranks and world_size < 2) or (kind.comes_last and last is not None):
            index += 1
            continue
        del hand[index]
        if kind.comes_last:
            last = kind
        else:
            taken.append(kind)
    return [*taken, *([last] if last is not None else [])]


@contextlib.contextmanager
def own_disk(directory: Path) -> Iterator[Path]:
    """A small disk; its content moves to `directory` at the end."""
    mount = directory.with_name(directory.name + "-disk")
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        (mount / "ballast").unlink(missing_ok=True)
        if (mount / "run").exists():
            shutil.copytree(mount / "run", directory / "run", dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
        mount.rmdir()


def may_mount(directory: Path) -> bool:
    try:
        with own_disk(directory / "probe"):
            return True
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(directory / "probe-disk", ignore_errors=True)
        return False


class Campaign:
    """
    Args:
        steps: of each run.
    """

    def __init__(self, seed: int, home: Path, kinds: list[Kind], steps: int = STEPS):
        self.seed, self.home, self.steps = seed, home, steps
        self.report = Report(seed)
        home.mkdir(parents=True, exist_ok=True)
        if any(kind.needs_own_disk for kind in kinds) and not may_mount(home):
            for kind in filter(lambda kind: kind.needs_own_disk, kinds):
                self.report.skipped[kind.name] = "no permission to mount a small disk"
            kinds = [kind for kind in kinds if not kind.needs_own_disk]
        if not kinds:
            raise SystemExit("no kind of fault is left to throw")
        self.kinds = kinds
        self.data_dir = make_data(home / "source")
        self._references: dict[str, Path] = {}

    def reference(self, setup: Setup) -> Path:
        """The undisturbed run: the training script itself, without monitor."""
        if setup.name not in self._references:
            out_dir = self.home / f"reference-{setup.name}"
            flags = training_flags(setup, self.data_dir, out_dir, self.steps)
            done = subprocess.run(training_command(setup, "train_my_ddp.py", flags), cwd=ROOT, text=True,
                                  env=environment(self.home), capture_output=True, timeout=600)  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"the undisturbed run failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            self._references[setup.name] = out_dir
        return self._references[setup.name]

    def throw(self, count: int, order: Sequence[str] = ORDER, a_round: int = FAULTS_A_ROUND) -> None:
        """Rounds until `count` faults were thrown."""
        cards, hand = deck(self.kinds, Random(f"{self.seed} deck")), []
        for number, name in enumerate(itertools.cycle(order), 1):
            left = count - self.report.thrown
            if left <= 0:
                return
            kinds = deal(hand, cards, min(a_round, left), SETUPS[name].world_size)
            if kinds:
                hand[:0] = self.round(number, SETUPS[name], kinds)

    def round(self, number: int, setup: Setup, kinds: list[Kind]) -> list[Kind]:
        """One run; returns the kinds that were not thrown, as it was over too soon or went wrong."""
        home = self.home / f"round-{number:03d}-{setup.name}"
        reference = self.reference(setup)
        self._say(f"round {number}, {setup.name}: {', '.join(kind.name for kind in kinds)}")
        started, before = time.monotonic(), len(self.report.failures)
        disk = own_disk(home) if any(kind.needs_own_disk for kind in kinds) else contextlib.nullcontext()
        with disk as mount:
            run = Run(home, setup, self.data_dir, self.steps, mount / "run" if mount else None)
            left = list(kinds)
            try:
                self._disturb(run, number, left)
                self._check(run, number, reference)
            except Broken as problem:
                self._fail(number, home, "ran to its end", str(problem))
            finally:
                run.clear()
        self.report.add_run(run.seen, time.monotonic() - started)
        if len(self.report.failures) == before:
            shutil.rmtree(home)
        return left

    def _disturb(self, run: Run, number: int, left: list[Kind]) -> None:
        """Throw one fault after the other, and let the run finish; those that come too late stay in `left`."""
        run.start()
        random = Random(f"{self.seed} round {number}")
        step = random.randint(*FIRST_FAULT)
        try:
            while left:
                run.wait_step(step)
                kind = left.pop(0)
                # What a fault draws depends on what it meets: that must not move those that follow.
                self._throw(run, kind, step, Random(f"{self.seed} round {number} left {len(left)}"))
                step = max(step, run.step()) + random.randint(*GAP)
        except RunOver:
            self._say(f"  over before {', '.join(kind.name for kind in left) or 'the effect showed'}")
        run.end_monitor(0, "the end of the run")

    def _throw(self, run: Run, kind: Kind, step: int, random: Random) -> None:
        """
        Raises:
            Broken: its effect was not what it must be.
        """
        self.report.count(kind.name, "thrown")
        since = time.monotonic()
        try:
            effect = kind.throw(run, random)
        except Broken as problem:
            self.report.count(kind.name, "failed")
            raise Broken(f"{kind.name} at step {step}: {problem}") from None
        self.report.count(kind.name, "had effect")
        self._say(f"  {kind.name} at step {step}: {effect} ({time.monotonic() - since:.1f} s)")

    def _check(self, run: Run, number: int, reference: Path) -> None:
        for name, check in CHECKS.items():
            try:
                check(run, reference)
            except Broken as problem:
                self._fail(number, run.home, name, str(problem))
            except Exception:
                self._fail(number, run.home, name, traceback.format_exc())
            else:
                self.report.passed[name] += 1
        self.report.remarks += [f"round {number}: {path}" for path in remarks(run)]

    def _fail(self, number: int, home: Path, promise: str, problem: str) -> None:
        self.report.fail(f"seed {self.seed}, round {number} ({home}): {promise}: {problem}")
        self._say(f"  NOT KEPT: {self.report.failures[-1]}")

    def _say(self, text: str) -> None:
        print(text, flush=True)


def chosen_kinds(only: str, skip: str) -> tuple[list[Kind], dict[str, str]]:
    """The kinds to throw, and why others are not.

    Raises:
        SystemExit: an unknown name.
    """
    wanted = only.split(",") if only else list(KINDS)
    unwanted = skip.split(",") if skip else []
    for name in (*wanted, *unwanted):
        if name not in KINDS:
            raise SystemExit(f"there is no kind {name}; there are: {', '.join(KINDS)}")
    return [KINDS[name] for name in wanted if name not in unwanted], dict.fromkeys(unwanted, "by --skip")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="gives the kinds, their order and their steps")
    parser.add_argument("--faults", type=int, default=200, help="how many to throw")
    parser.add_argument("--faults_a_run", type=int, default=FAULTS_A_ROUND, help="at most so many in one run")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--setups", default=",".join(ORDER), help="of the runs, over and over")
    parser.add_argument("--kinds", default="", help=f"only these, of {', '.join(KINDS)}")
    parser.add_argument("--skip", default="", help="not these")
    parser.add_argument("--dir", help="where the runs are made; default: a new temporary directory")
    parser.add_argument("--report", help="JSON file to leave the figures in")
    args = parser.parse_args(argv)
    # Leave no process and no mount behind when asked to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    kinds, skipped = chosen_kinds(args.kinds, args.skip)
    home = Path(args.dir) if args.dir else Path(tempfile.mkdtemp(prefix="chaos-"))
    campaign = Campaign(args.seed, home, kinds, args.steps)
    campaign.report.skipped |= skipped
    try:
        campaign.throw(args.faults, args.setups.split(","), args.faults_a_run)
    finally:
        for line in campaign.report.lines():
            print(line)
        if args.report:
            Path(args.report).write_text(json.dumps(campaign.report.figures(), indent=1) + "\n")
    if not campaign.report.failures and not args.dir:
        shutil.rmtree(home)
    return 1 if campaign.report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
