"""What can be known of an evaluation before the training that it belongs to."""

import importlib.util
from pathlib import Path

from evaluation.config import EvalConfig, as_flags_of_training
from evaluation.running import choose
from evaluation.task import Options


def options_of(config: EvalConfig, chat: bool) -> Options:
    """
    Args:
        chat: whether the model learns to answer.
    """
    data_dir, task_dir = (Path(path) if path else None for path in (config.eval_data_dir, config.eval_task_dir))
    return Options(
        config.eval_limit, config.eval_num_fewshot, data_dir, task_dir, chat,
        allow_code_execution=config.eval_allow_code_execution,
    )  # fmt: skip


def check_tasks(flags: EvalConfig, chat: bool, cut_by: str) -> None:
    """Refuse tasks that cannot be run. Nothing is fetched from the network for it.

    Args:
        chat: whether the model learns to answer.
        cut_by: the flag that cuts the model or its rows over the ranks; empty: none does.
    Raises:
        ValueError: a task is unknown or does not go with the run, or something that it needs is missing.
    """
    chosen = choose(flags.names)
    writing = [task.name for task in chosen.own if task.needs_writing and cut_by]
    if writing:
        rest = ",".join([*(task.name for task in chosen.own if not task.needs_writing), *chosen.others])
        raise ValueError(
            f"--eval_tasks: the model writes in {', '.join(writing)}, which it does not with {cut_by} while it trains: "
            f"{f'give --eval_tasks={rest}' if rest else 'leave it out'}, and evaluate a checkpoint with "
            f"evaluate_model.py"
        )
    for task in chosen.own:
        if task.runs_code and not flags.eval_allow_code_execution:
            raise ValueError(
                f"--eval_tasks: {task.name} runs programs that the model wrote: allow it by "
                f"--eval_allow_code_execution, or leave it out"
            )
    try:
        chosen.require_use_of(options_of(flags, chat))
    except ValueError as error:
        raise ValueError(as_flags_of_training(str(error))) from error
    if chosen.others and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"--eval_tasks: {', '.join(chosen.others)} needs the package lm-eval: pip install -r requirements-eval.txt "
            f"(tasks whose names begin with zero_ need nothing)"
        )
    for name in ("eval_data_dir", "eval_task_dir"):
        path = getattr(flags, name)
        if path and not Path(path).is_dir():
            raise ValueError(f"--{name}={path} is not a directory")
    if chosen.others:
        from evaluation.harness import require_possible

        try:
            require_possible(chosen.others, options_of(flags, chat), can_write=not cut_by)
        except ValueError as error:
            raise ValueError(f"--eval_tasks: {as_flags_of_training(str(error))}") from error
