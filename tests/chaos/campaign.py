"""Inject faults into training runs, and check that each ends as if nothing had happened.

    python -m tests.chaos.campaign --seed 1 --faults 300 [--kinds a,b] [--skip c] [--dir D] [--report FILE]

Each round is a run under monitor_process.py that is hit several times. The seed decides by which faults, and when: the
first one at a step of the run, each other one so many steps after the effect of the previous one. At the end the run is
compared with an undisturbed run of the same flags: the same bits, the same records, a clean audit, nothing left over.

Exit codes: 0 all promises were kept; 1 some were not, see the last lines; the directories of those runs are kept.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import tests.chaos.file_faults
import tests.chaos.read_faults
import tests.chaos.ssh_faults
import tests.chaos.start_faults
import tests.chaos.weight_faults  # noqa: F401  each registers its kinds
from tests import sshd
from tests.chaos.checks import CHECKS, remarks
from tests.chaos.data import make_data
from tests.chaos.faults import KINDS, OVER_SSH, Kind
from tests.chaos.read_errors import build_library
from tests.chaos.references import References, check_announced, deviations
from tests.chaos.report import Report
from tests.chaos.run import SETUPS, Broken, Run, RunOver, Setup

FAULTS_A_ROUND = 12
STEPS = 260
FIRST_FAULT, GAP = (8, 20), (8, 18)
"""Bounds of the first fault's step, and of the steps between the effect of a fault and the next fault."""
DISK_BYTES = 340 << 20
"""More than the free space below which the monitor warns."""
ORDER = ("ddp2", "ddp1", "zero1", "ssh1", "lora2", "ddp2", "powersgd", "ddp1")
"""Setups of the rounds, repeated."""


def deck(kinds: list[Kind], random: Random) -> Iterator[Kind]:
    """All kinds in random order, each as often as its weight, repeated."""
    while True:
        cards = [kind for kind in kinds for _ in range(kind.weight)]
        random.shuffle(cards)
        yield from cards


def deal(hand: list[Kind], cards: Iterator[Kind], count: int, setup: Setup) -> list[Kind]:
    """Take the faults of a round from `hand`, which is filled from `cards`; faults that do not fit stay in it."""
    first: list[Kind] = []
    taken: list[Kind] = []
    last: list[Kind] = []
    index = 0
    while len(first) + len(taken) + len(last) < count and index < 500:
        if index == len(hand):
            hand.append(next(cards))
        kind = hand[index]
        place = first if kind.comes_first else last if kind.comes_last else taken
        if not kind.fits(setup) or (place and place is not taken):
            index += 1
            continue
        place.append(hand.pop(index))
    return [*first, *taken, *last]


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
    """Set up the campaign.

    Args:
        steps: steps of each run.
    """

    def __init__(self, seed: int, home: Path, kinds: list[Kind], steps: int = STEPS):
        self.seed, self.home, self.steps = seed, home, steps
        self.report = Report(seed)
        home.mkdir(parents=True, exist_ok=True)
        self.kinds = list(kinds)
        self.library: Path | None = None
        self._drop_what_cannot_be()
        self.data_dir = make_data(home / "source")
        self.references = References(home, self.data_dir, steps)

    def _drop_what_cannot_be(self) -> None:
        """Leave out the kinds that this machine cannot run."""
        if any(kind.needs_own_disk for kind in self.kinds) and not may_mount(self.home):
            self._drop(lambda kind: kind.needs_own_disk, "no permission to mount a small disk")
        if any(kind.needs_read_errors for kind in self.kinds):
            try:
                self.library = build_library(self.home)
            except (OSError, subprocess.CalledProcessError) as error:
                self._drop(lambda kind: kind.needs_read_errors, f"the library cannot be compiled: {error}")
        self.no_sshd = sshd.missing()
        if self.no_sshd:
            self._drop(lambda kind: set(kind.setups) <= set(OVER_SSH), self.no_sshd)

    def _drop(self, which: Callable[[Kind], bool], why: str) -> None:
        self.report.skipped |= {kind.name: why for kind in self.kinds if which(kind)}
        self.kinds = [kind for kind in self.kinds if not which(kind)]

    def throw(self, count: int, order: Sequence[str] = ORDER, a_round: int = FAULTS_A_ROUND) -> None:
        """Run rounds until `count` faults were injected.

        Raises:
            SystemExit: no kind is left that any of the setups could have.
        """
        setups = [SETUPS[name] for name in order if not (self.no_sshd and SETUPS[name].over_ssh)]
        self._drop(lambda kind: not any(map(kind.fits, setups)), "fits none of the setups")
        if not self.kinds:
            raise SystemExit("no kind of fault is left to throw")
        cards, hand = deck(self.kinds, Random(f"{self.seed} deck")), []
        for number, setup in enumerate(itertools.cycle(setups), 1):
            left = count - self.report.thrown
            if left <= 0:
                return
            kinds = deal(hand, cards, min(a_round, left), setup)
            if kinds:
                hand[:0] = self.round(number, setup, kinds)

    def round(self, number: int, setup: Setup, kinds: list[Kind]) -> list[Kind]:
        """One run; returns the kinds that were not injected, because it was over too soon or went wrong."""
        home = self.home / f"round-{number:03d}-{setup.name}"
        self.references.of(setup)
        self._say(f"round {number}, {setup.name}: {', '.join(kind.name for kind in kinds)}")
        started, before = time.monotonic(), len(self.report.failures)
        disk = own_disk(home) if any(kind.needs_own_disk for kind in kinds) else contextlib.nullcontext()
        with disk as mount:
            library = self.library if any(kind.needs_read_errors for kind in kinds) else None
            run = Run(home, setup, self.data_dir, self.steps, mount / "run" if mount else None, library)
            left = list(kinds)
            try:
                self._disturb(run, number, left)
                self._check(run, number)
            except Broken as problem:
                self._fail(number, home, "ran to its end", str(problem))
            finally:
                run.clear()
        self.report.add_run(run.seen, time.monotonic() - started)
        if len(self.report.failures) == before:
            shutil.rmtree(home)
            self.references.forget_apart()
        return left

    def _disturb(self, run: Run, number: int, left: list[Kind]) -> None:
        """Inject one fault after the other, and let the run finish; faults that come too late stay in `left`."""
        random = Random(f"{self.seed} round {number}")
        step = random.randint(*FIRST_FAULT)
        if not left[0].comes_first:
            run.start()
        try:
            while left:
                kind = left[0]
                if not kind.comes_first:
                    run.wait_step(step)
                del left[0]
                # A fault's draws depend on what it meets: that must not change the faults that follow.
                self._throw(run, kind, step, Random(f"{self.seed} round {number} left {len(left)}"))
                step = max(step, run.step()) + random.randint(*GAP)
        except RunOver:
            self._say(f"  over before {', '.join(kind.name for kind in left) or 'the effect showed'}")
        run.end_monitor(0, "the end of the run")

    def _throw(self, run: Run, kind: Kind, step: int, random: Random) -> None:
        """Inject a fault.

        Raises:
            Broken: the effect was not the promised one.
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

    def _check(self, run: Run, number: int) -> None:
        """Compare with an undisturbed run, except for deviations that the faults explain."""
        apart = deviations(run.out_dir)
        check_announced(run, apart)
        reference = self.references.of(run.setup, apart)
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
    """Kinds to inject, and the reasons why others are not.

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
    parser.add_argument("--faults", type=int, default=300, help="how many to throw")
    parser.add_argument("--faults_a_run", type=int, default=FAULTS_A_ROUND, help="at most so many in one run")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--setups", default=",".join(ORDER), help="of the runs, over and over")
    parser.add_argument("--kinds", default="", help=f"only these, of {', '.join(KINDS)}")
    parser.add_argument("--skip", default="", help="not these")
    parser.add_argument("--dir", help="where the runs are made; default: a new temporary directory")
    parser.add_argument("--report", help="JSON file to leave the figures in")
    args = parser.parse_args(argv)
    # Leave no process and no mount behind after SIGTERM.
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
