"""Undisturbed runs of the same flags, for comparison.

A fault may make a run skip steps whose gradients it made non-finite, or leave out samples, as the monitor does after a
loss that is not finite. The records that count show both. The run is then compared with an undisturbed run that skips
and leaves out the same.
"""

import math
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from runs.layout import RUN_MARK
from runs.reslog import number, read_reslog
from tests.chaos.plan import NAN_LOSS, Plan
from tests.chaos.run import ROOT, SAVE_INTERVAL, Broken, Run, Setup, own_environment, training_command, training_flags


@dataclass(frozen=True)
class LeftOut:
    """The samples before position `until` were left out after `step`."""

    step: int
    until: int


@dataclass(frozen=True)
class Skipped:
    """The steps `first` to `last` changed nothing."""

    first: int
    last: int


Deviation = LeftOut | Skipped


def deviations(out_dir: Path) -> tuple[Deviation, ...]:
    """Deviations of a run from its plan, in the order of its steps, from its records of every step."""
    found: list[Deviation] = []
    due = 0
    for record in read_reslog(out_dir / "reslog.jsonl"):
        if record["name"] != "train":
            continue
        step, (first, last) = record["step"], record["samples"]
        if first != due:
            found.append(LeftOut(step - 1, first))
        due = last + 1
        if math.isfinite(number(record["grad_norm"])):
            continue
        if found and isinstance(found[-1], Skipped) and found[-1].last == step - 1:
            found[-1] = Skipped(found[-1].first, step)
        else:
            found.append(Skipped(step, step))
    return tuple(found)


def check_announced(run: Run, found: tuple[Deviation, ...]) -> None:
    """Check that every deviation was announced by a fault.

    Raises:
        Broken: samples were left out, or steps skipped, without a fault as the reason.
    """
    for deviation in found:
        if isinstance(deviation, LeftOut):
            asked = deviation.until in run.may_leave_out
        else:
            asked = set(range(deviation.first, deviation.last + 1)) <= run.may_skip
        if not asked:
            raise Broken(f"no fault gave a reason for it: {deviation}")


class References:
    """Makes each reference when it is first needed."""

    def __init__(self, home: Path, data_dir: Path, steps: int):
        self._home, self._data_dir, self._steps = home, data_dir, steps
        self._made: dict[tuple, Path] = {}
        self._count = 0

    def of(self, setup: Setup, apart: tuple[Deviation, ...] = ()) -> Path:
        """Directory of a run that nothing disturbed and no monitor started."""
        key = (setup.world_size, setup.flags, apart)
        if key not in self._made:
            base = self.of(setup, apart[:-1]) if apart else None
            self._count += 1
            out_dir = self._home / f"reference-{self._count}-{setup.name}" / "run"
            flags = [*training_flags(setup, self._data_dir, out_dir, self._steps), f"--keep_every={SAVE_INTERVAL}"]
            if base is not None:
                flags += self._begin_apart(base, out_dir, setup, apart[-1])
            self._train(setup, flags, out_dir)
            self._made[key] = out_dir
        return self._made[key]

    def forget_apart(self) -> None:
        """Delete references that were made for only one run."""
        for key in [key for key in self._made if key[-1]]:
            shutil.rmtree(self._made.pop(key).parent)

    def _begin_apart(self, base: Path, out_dir: Path, setup: Setup, last: Deviation) -> list[str]:
        """Go on in `out_dir` from the point of the run in `base` before the last deviation; returns the flags for
        that."""
        step = last.step if isinstance(last, LeftOut) else (last.first - 1) // SAVE_INTERVAL * SAVE_INTERVAL
        (out_dir / "ckpt").mkdir(parents=True)
        for name in (RUN_MARK, "reslog.jsonl", "config.yaml"):
            shutil.copy(base / name, out_dir / name)
        shutil.copytree(base / "ckpt" / f"step-{step}", out_dir / "ckpt" / f"step-{step}")
        if isinstance(last, LeftOut):
            return ["--resume", f"--resume_at_sample={last.until}"]
        Plan(NAN_LOSS, None, setup.loss_ranks, last.first, last.last).write(out_dir.parent)
        return ["--resume"]

    def _train(self, setup: Setup, flags: list[str], out_dir: Path) -> None:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        planned = (out_dir.parent / Plan.FILE).exists()
        script = "tests/chaos/train_with_faults.py" if planned else "train_my_ddp.py"
        done = subprocess.run(
            training_command(replace(setup, over_ssh=False), script, flags), cwd=ROOT, text=True,
            env=os.environ | own_environment(out_dir.parent), capture_output=True, timeout=600,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the undisturbed run failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
