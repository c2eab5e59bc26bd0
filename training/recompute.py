"""What each block recomputes under --activation_budget_gb: measured once before the first step, kept with the run.

The measurement is on the largest micro-batch that the data can give: every row is the longest sample, with a loss at
every position. So smaller ones stay below the limit, too. The highest costs of all ranks decide, on all ranks alike.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from dataset.loader import Batch
from dataset.opening import TaskDataset
from dataset.pretrain import as_tensors
from model import Decoder
from model.activations import Activations
from model.recompute import Choice, choose, costs_from, highest, in_gb, least_peak
from parallel.context import DistContext
from tasks.task import Task
from training.build_model import to_device
from training.config import Config
from training.run_dir import RunDir
from utils.files import atomic_write_json

logger = logging.getLogger(__name__)


def limit_activations(
    config: Config, context: DistContext, run_dir: RunDir, dataset: TaskDataset, model: Decoder, task: Task
) -> None:
    """Let each block recompute as little as the limit allows; nothing happens without a limit. Collective.

    Call this before the model is wrapped for data parallelism.

    Raises:
        ValueError: the limit is too low; on all ranks.
    """
    if not config.system.activation_budget_gb or config.run.valid_only:
        return
    batch, path = largest_batch(dataset, config.data.train_batch_size), run_dir.paths.activations
    facts = _facts(config, model, batch)
    stored = context.decide_on_main(lambda: _read(path))
    choice, source = _stored_choice(stored, facts, context.is_main), "as the run has chosen before"
    if choice is None:
        choice = _measured_choice(
            to_device(batch, model, context.device), config, context, model, task,
            lambda: run_dir.heartbeat.beat("start", 0),
        )  # fmt: skip
        source = "measured now"
        if context.is_main:
            atomic_write_json(path, {"facts": facts, **asdict(choice)})
    model.set_recompute(choice.keeps)
    logger.info(
        "activations: of %d blocks %s, %s; expected are at most %s GB of %g, and %.0f%% more time for a forward and "
        "backward pass than without recomputation",
        len(choice.keeps), choice, source, in_gb(choice.peak), config.system.activation_budget_gb,
        100 * choice.extra,
    )  # fmt: skip


def largest_batch(dataset: TaskDataset, rows: int) -> Batch:
    """The largest micro-batch that the data can give, with a loss at every position."""
    batch = dataset.collate(np.full(rows, dataset.longest(), np.int64))
    batch |= as_tensors({"row_ids": np.arange(rows, dtype=np.int64)})
    if "supervised" in batch:
        batch |= {"labels": batch["input_ids"], "supervised": torch.arange(batch["input_ids"].numel())}
    return batch


def _facts(config: Config, model: Decoder, batch: Batch) -> dict:
    """All that costs depend on and a resumed run may change; not the number of ranks."""
    parameter, system = next(model.parameters()), config.system
    # A new model may leave its family open; its checkpoints name one.
    shape = {name: value for name, value in model.config.__dict__.items() if name != "model_type"}
    device = torch.cuda.get_device_name() if parameter.device.type == "cuda" else "cpu"
    facts = {
        "activation_budget_gb": system.activation_budget_gb, "rows": len(batch["input_ids"]),
        "length": batch["input_ids"].shape[1], "dtype": str(parameter.dtype), "compile": system.compile,
        "device": device, "kernels": dict(model.ops.names), "task_type": config.run.task_type,
        "grad_reduce_in_fp32": config.parallel.grad_reduce_in_fp32, "model": shape, "adapter": asdict(config.adapter),
    }  # fmt: skip
    return json.loads(json.dumps(facts))


def _read(path: Path) -> dict | None:
    """What the run has stored; None if there is nothing that can be read."""
    try:
        stored = json.loads(path.read_bytes())
        return stored if isinstance(stored, dict) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): what blocks recompute is measured anew", path, error)
        return None


def _stored_choice(stored: object, facts: dict, is_main: bool) -> Choice | None:
    """The choice that the run has stored, if it still fits."""
    if not isinstance(stored, dict):
        return None
    before = stored.get("facts")
    before = before if isinstance(before, dict) else {}
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if not changed:
        return Choice(tuple(stored["keeps"]), stored["peak"], stored["extra"])
    if is_main:
        logger.info("what blocks recompute is measured anew: the run has changed in %s", ", ".join(changed))
    return None


def _measured_choice(
    batch: Batch, config: Config, context: DistContext, model: Decoder, task: Task, beat: Callable[[], None]
) -> Choice:
    """The best choice, by costs that are measured now and a pass that has stayed below the limit. Collective."""
    budget = round(config.system.activation_budget_gb * 1e9)
    was_training = model.training
    model.train()
    if task.uses_prepass:
        task.take_prepass(task.prepass(batch))
    grad_dtype = torch.float32 if config.parallel.grad_reduce_in_fp32 else next(model.parameters()).dtype
    measure = Activations(
        model, lambda: task.hidden(batch, task.layer_losses(batch, 1.0)),
        lambda hidden: task.loss(hidden, batch)[0], grad_dtype,
    )  # fmt: skip
    costs = highest([costs_from(each) for each in context.gather(asdict(measure.costs(beat)))])
    while True:
        choice = choose(costs, budget)
        beat()
        model.set_recompute(choice.keeps)
        peak = max(context.gather(measure.peak()))
        if peak <= budget:
            break
        # The parts together need more than the sum of what each needs alone.
        costs = replace(costs, shared=costs.shared + max(1, peak - choice.peak))
    model.train(was_training)
    least, everything = least_peak(costs), choose(costs, 1 << 62).peak
    logger.info(
        "activations: a micro-batch of %d rows of %d tokens needs %s GB if every block keeps its input alone, %s GB "
        "without recomputation", *batch["input_ids"].shape, in_gb(least), in_gb(everything),
    )  # fmt: skip
    return choice
