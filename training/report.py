"""Lines and records of steps, validations, saves and the end, and a profile of some steps.

`reslog` is the first rank's, and None on the others.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from checkpoint.folder import list_checkpoints
from checkpoint.saving import SaveOutcome
from evaluation.results import TaskResult
from parallel.context import DistContext, has_lost_peer
from runs.layout import RunPaths
from runs.reslog import ResLog
from tasks.task import Task
from training.build import Built
from training.config import RunConfig, parse_profile_steps
from training.describe import Flops
from training.profile_steps import StepProfile
from training.progress import Progress, Unlogged
from training.samples import Sample
from training.summary import RunEnd, summary_lines
from utils.logging import clock, log_repeated_warnings
from utils.paths import for_command
from utils.terminal import visible

logger = logging.getLogger(__name__)

_LONG_STEP_S, _POOR_MFU = 10.0, 0.08
"""A step at least this long that reaches less of the peak is worth a warning: on a busy machine, two threads wait for
each other all the time."""
_SHOWN_OF_PROMPT = 100
"""Characters."""


def report_step(
    reslog: ResLog | None,
    progress: Progress,
    max_iters: int,
    last: Unlogged,
    figures: dict[str, float],
    reading: dict,
    counted: Flops,
    experts: dict | None = None,
) -> None:
    """Log and record the last step.

    Args:
        figures: the last step's, over all ranks.
        reading: StepMeter.read() for the steps since the last report.
        experts: the last step's `router_figures`; None if the model has no experts.
    """
    if reslog is None:
        return
    tokens_per_sec = reading["tokens"] / reading["dt"]
    mfu, mfu_seed = (tokens_per_sec * per_token / counted.peak for per_token in (counted.strict, counted.seed))
    rest = {name: value for name, value in reading.items() if name != "tokens"}
    reslog.write(
        "train", step=progress.step, **figures, lr=last.learning_rate, grad_norm=last.grad_norm,
        tokens=progress.tokens, tokens_per_sec=tokens_per_sec, mfu=mfu, mfu_seed=mfu_seed, **rest,
    )  # fmt: skip
    if experts is not None:
        reslog.write("experts", step=progress.step, **experts)
    seconds_left = reading["dt"] * (max_iters - progress.step)
    if reading["dt"] >= _LONG_STEP_S and mfu < _POOR_MFU and torch.get_num_threads() > 1:
        logger.warning(
            "steps take several times as long as this machine should need, as if other programs were using its cores: "
            "--num_threads=1 may then be faster (stop, and go on with --resume)"
        )
    starved = reading["data_wait"] / reading["dt"]
    logger.info(
        "step %d/%d | %s%s | norm %.3f | lr %.2e | %s tokens/s | MFU %.1f%% | %s%s left",
        progress.step, max_iters, shown(figures),
        f" | balance {experts['balance_loss']:.3f}" if experts is not None else "", last.grad_norm, last.learning_rate,
        f"{tokens_per_sec:,.0f}", 100 * mfu, f"data wait {100 * starved:.0f}% | " if starved > 0.05 else "",
        clock(seconds_left),
    )  # fmt: skip


def report_validation(
    reslog: ResLog | None,
    step: int,
    task: Task,
    figures: dict[str, float],
    terms: float,
    seconds: float,
) -> None:
    """Log and record a validation.

    Args:
        terms: divisor of the loss.
    """
    logger.info(
        "valid at step %d | %s | %d %s | %.1f s", step, shown(figures), task.units(terms), task.count_name, seconds
    )
    if reslog is not None:
        units = {task.count_name: task.units(terms)}
        reslog.write("valid", step=step, **figures, dt=round(seconds, 3), **units)


def report_evaluation(reslog: ResLog | None, step: int, result: TaskResult) -> None:
    """Log and record a task's result. The first of its figures is the main one; if it has none, its settings say
    why."""
    flat = {}
    if result.figures:
        main, figure = next(iter(result.figures.items()))
        told = f"{main} {figure.value:.4f}"
        if figure.interval is not None:
            told += " (95%: {:.4f} to {:.4f})".format(*figure.interval)
        told += f" | {figure.count} samples"
        flat["/".join(filter(None, [result.group, result.name, main]))] = figure.value
    else:
        told = f"no figures: {result.settings.get('reason', 'it has no samples')}"
    logger.info("eval at step %d | %s | %s | %.1f s", step, result.name, told, result.seconds)
    if reslog is not None:
        figures = {name: [one.value, one.error, one.count] for name, one in result.figures.items()}
        reslog.write(
            "eval", step=step, task=result.name, figures=figures, seconds=round(result.seconds, 3), **flat
        )


def report_failed_evaluation(reslog: ResLog | None, step: int, problem: str) -> None:
    """Warn of an evaluation that failed, or was not begun, and record it."""
    logger.warning("step %d was not evaluated to the end, the run goes on: %s", step, problem)
    if reslog is not None:
        reslog.write("eval_failed", step=step, problem=problem)


def report_sample(reslog: ResLog | None, step: int, sample: Sample) -> None:
    """Log and record a text of the model, after the end of its prompt."""
    lines = visible(sample.text + (" [cut: it took too long]" if sample.is_cut else "")).splitlines() or [""]
    given = visible(" ".join(sample.prompt.split()))
    logger.info("sample at step %d, after: %s\n    | %s", step, given[-_SHOWN_OF_PROMPT:], "\n    | ".join(lines))
    if reslog is not None:
        reslog.write("sample", step=step, prompt=sample.prompt, text=sample.text)


def report_save(reslog: ResLog | None, ckpt_dir: Path, outcome: SaveOutcome) -> None:
    """Log and record a save. A full disk does not end the run, as earlier checkpoints are whole."""
    if reslog is None:
        return
    if outcome.problem is not None:
        if not outcome.poisoned:
            logger.warning(
                "the checkpoint of step %d could not be written, the run goes on: %s", outcome.step, outcome.problem
            )
        reslog.write("save_failed", step=outcome.step, problem=outcome.problem)
        return
    reslog.write(
        "save", step=outcome.step, path=outcome.name, dt=round(outcome.seconds, 3), held_up=round(outcome.held_up, 4)
    )
    logger.info(
        "saved %s in %.2f s (training waited %.3f s)", ckpt_dir / outcome.name, outcome.seconds, outcome.held_up
    )


def open_profile(built: Built, untimed: Callable[[], AbstractContextManager]) -> StepProfile:
    """Profile of the steps in --profile_steps; `untimed` is a context for long work that is not part of training."""
    context, out_dir = built.context, built.run_dir.path
    about = {
        "run": out_dir.name,
        "rank": context.rank,
        "world_size": context.world_size,
        "device": torch.cuda.get_device_name() if context.device.type == "cuda" else "cpu",
    }
    steps = parse_profile_steps(built.config.run.profile_steps)
    profile = StepProfile(steps, built.run_dir.paths.profile_dir, context.device, about, untimed)
    profile.begin(built.progress.step)
    return profile


def report_end(
    reslog: ResLog | None, built: Built, finished: bool, steps_now: int, seconds: float, train_loss: float | None
) -> None:
    """Record the end, and show where everything is. The arguments are those of RunEnd."""
    if reslog is None:
        log_repeated_warnings(logger.warning)
        return
    run_dir, progress = built.run_dir, built.progress
    ending = RunEnd(
        run_dir.path, finished, progress.step, built.derived.max_iters, steps_now, seconds, progress.tokens,
        train_loss, built.config.run.task.teaches_chat, built.config.adapter.load_in_4bit,
        _resume_command(built.context, run_dir.path), run_dir.saver.retention,
    )  # fmt: skip
    reslog.write("end", step=progress.step, reason="finished" if finished else "stopped on request")
    try:
        for line in summary_lines(ending):
            logger.info(line)
    except OSError as error:
        # The run is over and saved, even if its summary fails.
        logger.warning("the run directory %s cannot be read: %s", run_dir.path, error)
    log_repeated_warnings(logger.info)


def ways_on(run: RunConfig, context: DistContext | None, error: BaseException) -> list[str]:
    """Advice after a crash without a monitor.

    Args:
        context: None if the crash came before it existed.
    """
    lines, out_dir = [], Path(run.out_dir)
    paths = RunPaths(out_dir)
    if has_lost_peer(error):
        lines.append(
            f"another process ended first, or the network failed: the cause is in what it printed, or in its record in "
            f"{paths.exit_dir}; a process without a record was killed, perhaps for lack of memory"
        )
    if run.valid_only:
        return lines
    try:
        saved = list_checkpoints(paths.ckpt_dir)
    except OSError as error:
        way_on = _resume_command(context, out_dir)
        lines.append(f"once {paths.ckpt_dir} can be read ({error.strerror}), go on: {way_on}")
        return lines
    if saved:
        lines.append(f"go on from step {saved[-1].step}: {_resume_command(context, out_dir)}")
    else:
        lines.append("nothing was saved yet: start again with the same command")
    return lines


def _resume_command(context: DistContext | None, out_dir: Path) -> str:
    if context is None:
        return "the same command with --resume"
    flags = f"--resume --out_dir={for_command(out_dir)}"
    if context.world_size == 1:
        return f"python train_my_ddp.py {flags}"
    if context.local_world_size == context.world_size:
        return f"python train_my_ddp.py --nproc {context.world_size} {flags}"
    return "the same command on every node, with --resume"


def shown(figures: dict[str, float]) -> str:
    """A task's main figures, on one line."""
    formats = {
        "loss": "loss {:.4f}",
        "bits_per_byte": "bits per byte {:.4f}",
        "rewards/margins": "margin {:.3f}",
        "rewards/accuracies": "accuracy {:.2f}",
    }
    return " | ".join(text.format(figures[name]) for name, text in formats.items() if name in figures)
