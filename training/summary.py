"""The last lines of a run: its position, its files, and the commands to run next."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint.folder import best_first, list_checkpoints
from checkpoint.retention import Retention, doomed_by
from runs.layout import LOG_NAME, RESLOG_NAME, RunPaths
from runs.reslog import number, read_reslog
from utils.logging import clock
from utils.paths import for_command


@dataclass(frozen=True)
class RunEnd:
    """Facts about a launch at its end."""

    out_dir: Path
    finished: bool
    """False: it was stopped on request."""
    step: int
    max_iters: int
    steps_now: int
    """Steps of this launch alone."""
    seconds: float
    """Time from its first step to its end, validation and saves included."""
    tokens: int
    """Tokens read in the whole run."""
    train_loss: float | None
    """Loss of the last step, if this launch did one."""
    has_chat: bool
    """Whether the model is trained on conversations."""
    in_4bit: bool
    """Whether its frozen matrices were in 4 bits."""
    resume: str
    """The command to continue, or words for it."""
    retention: Retention


def summary_lines(end: RunEnd) -> Iterator[str]:
    """The lines, one by one."""
    run = for_command(end.out_dir)
    steps = f"{end.steps_now} step{'' if end.steps_now == 1 else 's'}"
    yield (
        f"{'finished' if end.finished else 'stopped on request'} at step {end.step} of {end.max_iters}: "
        f"{steps} in {clock(end.seconds)}, {end.tokens:,} tokens in the whole run"
    )
    losses = [] if end.train_loss is None else [f"{end.train_loss:.4f} in the last step"]
    losses += _validation(RunPaths(end.out_dir).reslog)
    if losses:
        yield f"loss: {', '.join(losses)}"
    checkpoints = list(_checkpoints(end))
    if checkpoints:
        yield f"checkpoints: {', '.join(checkpoints)}"
    yield f"results: {run}/{RESLOG_NAME}, log: {run}/{LOG_NAME}"
    if not end.finished:
        yield f"go on: {end.resume}"
    talk = "--chat" if end.has_chat else '--prompt "..."'
    talk += " --load_in_4bit" if end.in_4bit else ""
    yield f"{'talk to it' if end.has_chat else 'complete a text'}: python generate.py --model {run} {talk}"
    yield f"see its curves: python -m utils.resplot {run}"


def _validation(reslog: Path) -> list[str]:
    """Last and lowest validation loss of the whole run; empty if there was none."""
    valid = read_reslog(reslog, names=("valid",))
    found = [
        (loss, r["step"]) for r in valid if r.get("step") is not None and (loss := number(r.get("loss"))) is not None
    ]  # fmt: skip
    if not found:
        return []
    text = "{} in validation at step {}".format(*_shown(*found[-1]))
    finite = [(loss, step) for loss, step in found if math.isfinite(loss)]
    if finite and min(finite) != found[-1]:
        text += " (lowest {} at step {})".format(*_shown(*min(finite)))
    return [text]


def _shown(loss: float, step: int) -> tuple[str, int]:
    return (f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.4g}"), step


def _checkpoints(end: RunEnd) -> Iterator[str]:
    """The newest and the best of the checkpoints that stay."""
    there = list_checkpoints(RunPaths(end.out_dir).ckpt_dir)
    doomed = {checkpoint.path for checkpoint in doomed_by(end.retention, there)}
    kept = [checkpoint for checkpoint in there if checkpoint.path not in doomed]
    if not kept:
        return
    best, newest = next(iter(best_first(kept)), None), kept[-1]
    if best is not None and best.path == newest.path:
        yield f"{for_command(newest.path)} (newest and best)"
        return
    yield f"{for_command(newest.path)} (newest)"
    if best is not None:
        yield f"{for_command(best.path)} (best)"
