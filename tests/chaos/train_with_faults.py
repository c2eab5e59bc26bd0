"""train_my_ddp.py with the faults that the campaign requests.

A phase of a save, or another moment, kills or slows this process. The request is `armed.json` in the directory that
CHAOS_DIR names: {"phase", "rank", "step", "seconds"}. The first save of at least that step takes it and renames it
`fired.json`. Half a second or more means sleep; 0 means die.

Numbers are spoiled as plan.py says: losses, weights.
"""

import contextlib
import json
import math
import os
import runpy
import signal
import time
from pathlib import Path
from random import Random

import torch

from checkpoint import retention, writing
from checkpoint.folder import MANIFEST, REPLACED
from checkpoint.writing import CheckpointWriter
from optimizer.mixed_precision import MixedPrecisionOptimizer, StepResult
from parallel.launched import launch_token
from runs import sinks
from runs.heartbeat import Heartbeat
from tasks.language_model import LanguageModelTask
from tests.chaos.plan import FLIPPED_BIT, NAN_LOSS, NAN_WEIGHT, Plan

HOME = Path(os.environ["CHAOS_DIR"])
SLOW = HOME / "slow"
"""While this file is there, each step takes as many seconds longer as it says."""
RANK = int(os.environ.get("RANK", "0"))
_step = 0
"""Step of the last save."""
_doing = 0
"""Step in progress."""


def claim(phase: str) -> dict | None:
    """The request, if it is for this phase, rank and step; nobody else gets it."""
    armed = HOME / "armed.json"
    if not armed.exists():
        return None
    request = json.loads(armed.read_text())
    if request["phase"] != phase or request["rank"] != RANK or _step < request["step"]:
        return None
    (HOME / "fired.tmp").write_text(json.dumps(request | {"step": _step, "pid": os.getpid()}))
    armed.unlink()
    os.replace(HOME / "fired.tmp", HOME / "fired.json")
    return request


def strike(phase: str) -> None:
    request = claim(phase)
    if request is None:
        return
    if not request["seconds"]:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(request["seconds"])


def around(name: str, before: str = "", after: str = "") -> None:
    """Make a method of CheckpointWriter strike before or after its work."""
    original = getattr(CheckpointWriter, name)

    def disturbed(self: CheckpointWriter, *arguments: object) -> object:
        global _step
        _step = self.step
        strike(before)
        result = original(self, *arguments)
        strike(after)
        return result

    setattr(CheckpointWriter, name, disturbed)


def leave_half_a_file() -> None:
    original = CheckpointWriter.write_tensors

    def write_tensors(self: CheckpointWriter, name: str, *arguments: object) -> None:
        original(self, name, *arguments)
        request = claim("write_tensors")
        if request is not None and not request["seconds"]:
            os.truncate(self.directory / name, (self.directory / name).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        elif request is not None:
            time.sleep(request["seconds"])

    CheckpointWriter.write_tensors = write_tensors


def around_manifest() -> None:
    original = writing.atomic_write_json

    def atomic_write_json(path: Path, value: object, **options: bool) -> None:
        if path.name == MANIFEST:
            strike("before_manifest")
        original(path, value, **options)
        if path.name == MANIFEST:
            strike("before_rename")

    writing.atomic_write_json = atomic_write_json


def inside_prune() -> None:
    original = retention._delete

    def _delete(directory: Path, *patterns: str) -> None:
        # At the start of a launch more patterns than that are deleted.
        if ".old-*" in patterns and ".tmp-step-*" not in patterns:
            strike("in_prune")
        original(directory, *patterns)

    retention._delete = _delete


def around_files() -> None:
    """Strike when a run directory is made, or when a save replaces one of the same step."""
    mkdir, os_replace = Path.mkdir, os.replace

    def disturbed_mkdir(self: Path, *arguments: object, **options: object) -> None:
        if self.name == "ckpt":
            strike("before_ckpt_dir")
        mkdir(self, *arguments, **options)
        if self.name == "ckpt":
            strike("after_ckpt_dir")

    def disturbed_replace(source: object, target: object, **options: object) -> None:
        os_replace(source, target, **options)
        if Path(target).name.startswith(REPLACED):
            strike("between_renames")

    Path.mkdir, os.replace = disturbed_mkdir, disturbed_replace


class SlowSink:
    """A service that takes the results and can be slow to end."""

    def write(self, record: dict) -> None:
        """Keep nothing."""

    def close(self) -> None:
        strike("sink_close")


def with_a_slow_sink() -> None:
    original = sinks.open_sinks

    def open_sinks(*arguments: object, **options: object) -> sinks.Sinks:
        assert original(*arguments, **options) is None
        return sinks.Sinks({"a service": SlowSink})

    sinks.open_sinks = open_sinks


def planned(what: str) -> Plan | None:
    """The plan, if it is for this launch, rank and step; it is recorded as done."""
    plan = Plan.read(HOME)
    if plan is None or plan.what != what or plan.launch not in (None, launch_token()):
        return None
    if RANK not in plan.ranks or not plan.first <= _doing <= plan.last:
        return None
    plan.note(HOME, RANK, _doing)
    return plan


def follow_steps() -> None:
    """Hold up the training thread when it reports, at the beginning of a step, how many steps are done."""
    original = Heartbeat.beat

    def beat(self: Heartbeat, phase: str, step: int) -> None:
        global _doing
        _doing = step + 1
        original(self, phase, step)
        if phase == "step":
            with contextlib.suppress(FileNotFoundError):
                time.sleep(float(SLOW.read_text()))

    Heartbeat.beat = beat


def spoil_losses() -> None:
    original = LanguageModelTask.loss

    def loss(self: LanguageModelTask, *arguments: object) -> tuple:
        loss_sum, *more = original(self, *arguments)
        plan = planned(NAN_LOSS) if self.model.training else None
        if plan is not None:
            time.sleep(plan.pause)
            loss_sum = loss_sum * math.nan
        return loss_sum, *more

    LanguageModelTask.loss = loss


def spoil_weights() -> None:
    """Spoil weights after a step, so that a save that is due then meets them."""
    original = MixedPrecisionOptimizer.step

    def step(self: MixedPrecisionOptimizer, *arguments: object) -> StepResult:
        result = original(self, *arguments)
        for what in (NAN_WEIGHT, FLIPPED_BIT):
            if (plan := planned(what)) is not None:
                spoil_weight(self, plan)
        return result

    MixedPrecisionOptimizer.step = step


@torch.no_grad()
def spoil_weight(optimizer: MixedPrecisionOptimizer, plan: Plan) -> None:
    """In float32 a weight is its own main parameter."""
    random, pieces = Random(plan.seed), optimizer.named_state()
    weights = random.choice(pieces)[1]["main"].view(-1)
    place = random.randrange(len(weights))
    if plan.what == NAN_WEIGHT:
        weights[place] = math.nan
    else:
        # In the upper half of the mantissa, so that the weight stays plausible and no rounding restores it.
        weights.view(torch.int32)[place] ^= 1 << random.randrange(12, 23)


if __name__ == "__main__":
    around("make_directory", after="make_directory")
    leave_half_a_file()
    around("finish", before="finish", after="after_finish")
    around_manifest()
    around("commit", after="before_prune")
    inside_prune()
    around_files()
    with_a_slow_sink()
    follow_steps()
    spoil_losses()
    spoil_weights()
    runpy.run_path("train_my_ddp.py", run_name="__main__")
