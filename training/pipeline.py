"""The pipeline's plan: which part of the model each stage has, and in how many micro-batches a step's rows pass it.

What a unit of the model takes is counted, or measured on rank 0 before the first step. What follows from a measurement
is kept with the run, so that it goes on in the same way, and is told as flags, for other runs.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from dataset.opening import TaskDataset
from model import Decoder, ModelConfig
from model.flops import unit_flops
from model.unit_times import UnitTimes, measure_units
from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.schedules import StageTimes, check_micro_batches, choose_micro_batches, predict
from parallel.stages import Stages, plan_stages
from training.config import Config
from utils.files import atomic_write_json

logger = logging.getLogger(__name__)

_SIZES = 4
"""Sizes of a micro-batch that are measured; what lies between is interpolated."""


@dataclass(frozen=True)
class PipelinePlan:
    stages: Stages
    micro_batches: int
    """Micro-batches of a step on each data rank."""


def plan_pipeline(
    config: Config, shape: ModelConfig, dataset: TaskDataset, data_size: int, context: DistContext, dtype: torch.dtype,
    path: Path, new_model: Callable[[ModelConfig], Decoder],
) -> PipelinePlan | None:  # fmt: skip
    """The plan of the flags, told at the start; None: there is no pipeline. Collective.

    Args:
        data_size: ranks that read different rows.
        path: file in the run directory that keeps what follows from a measurement.
        new_model: makes a model of a shape, on its device and in its dtype, without values.
    Raises:
        ValueError: the flags do not fit the model or the batch; on all ranks.
    """
    flags = config.parallel
    if flags.pipeline_model_parallel_size == 1:
        return None
    length, head_share = dataset.context_and_supervised_share()
    flops = unit_flops(shape, length, head_share)
    rows = config.data.train_batch_size * config.data.gradient_accumulation_steps // data_size
    if _is_measured(flags):
        facts = _facts(config, shape, rows, context, dtype)

        def settle() -> dict:
            kept = _read(path, facts)
            if kept is None:
                sizes = _sizes(rows, config.data.train_batch_size)
                model = new_model(replace(shape, num_hidden_layers=1))
                times = measure_units(model, sizes, config.data.max_seq_len, head_share)
                kept = _choose(flags, flops, times, rows, config.data.train_batch_size)
                if not config.run.valid_only:
                    atomic_write_json(path, {"facts": facts, **kept})
            return kept

        # All checks that need no measurement come first, since they are quick.
        plan_stages(flags, flops)
        flags = replace(flags, **cast(dict, context.decide_on_main(settle)))
    stages = plan_stages(flags, flops)
    micro_batches = int(flags.pipeline_micro_batches or config.data.gradient_accumulation_steps // data_size)
    check_micro_batches(flags.pipeline_schedule, stages.pipe_size, micro_batches, rows)
    _tell(flags.pipeline_schedule, stages, micro_batches, flops, is_measured=flags is not config.parallel)
    return PipelinePlan(stages, micro_batches)


def _is_measured(flags: ParallelConfig) -> bool:
    return flags.pipeline_parts == "measured" or flags.pipeline_micro_batches == "auto"


def _tell(schedule: str, stages: Stages, micro_batches: int, flops: Sequence[float], is_measured: bool) -> None:
    basis = "by measured times"
    if not is_measured:
        costs = [sum(flops[unit] for unit in stages.units(stage)) for stage in range(stages.num_stages)]
        bubbles = predict(schedule, stages, micro_batches, [StageTimes.split(cost) for cost in costs]).bubbles
        basis = f"by the count of operations, ranks wait for {_range_of(bubbles)} of a step"
    logger.info(
        "pipeline: %d stages on %d ranks, %d micro-batches a step (%s): --pipeline_parts=%s "
        "--pipeline_micro_batches=%d",
        stages.num_stages, stages.pipe_size, micro_batches, basis, stages, micro_batches,
    )  # fmt: skip


def _range_of(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low} to {high}%"


def _choose(
    flags: ParallelConfig, flops: Sequence[float], times: UnitTimes, rows: int, most_rows: int
) -> dict[str, str]:
    """Flags that follow from measured times: name -> value."""
    costs = flops
    if flags.pipeline_parts == "measured":
        count = int(flags.pipeline_micro_batches) if flags.pipeline_micro_batches.isdecimal() else 0
        costs = [sum(each) for each in times.of(rows / count if count else most_rows, flops)]
    stages = plan_stages(flags, costs)
    chosen = {"pipeline_parts": str(stages), "num_layers_per_virtual_pipeline_stage": 0}
    if flags.pipeline_micro_batches == "auto":

        def times_of(size: int) -> list[StageTimes]:
            units = times.of(size, flops)
            its_units = [[units[unit] for unit in stages.units(stage)] for stage in range(stages.num_stages)]
            totals = [(sum(forward), sum(backward)) for forward, backward in (zip(*its) for its in its_units)]
            return [StageTimes(forward, backward / 2, backward / 2) for forward, backward in totals]

        count, step = choose_micro_batches(flags.pipeline_schedule, stages, rows, most_rows, times_of)
        logger.info(
            "pipeline: a step of %d rows should take the least time in %d micro-batches: %.3g s", rows, count, step.step
        )
        chosen["pipeline_micro_batches"] = str(count)
    return chosen


def _sizes(rows: int, most_rows: int) -> list[int]:
    """Rows of the micro-batches to measure: the smallest and the largest possible one, and some between."""
    possible = [size for size in range(1, most_rows + 1) if rows % size == 0]
    places = np.linspace(0, len(possible) - 1, min(_SIZES, len(possible))).round().astype(int)
    return [possible[place] for place in sorted(set(places.tolist()))]


def _facts(config: Config, shape: ModelConfig, rows: int, context: DistContext, dtype: torch.dtype) -> dict:
    """All that the choice depends on and a resumed run may change."""
    flags, system = config.parallel, config.system
    names = [name for name in vars(flags) if name.startswith("pipeline_")]
    device = torch.cuda.get_device_name() if context.device.type == "cuda" else "cpu"
    facts = {
        "flags": {name: getattr(flags, name) for name in [*names, "num_layers_per_virtual_pipeline_stage"]},
        "rows": rows, "train_batch_size": config.data.train_batch_size, "length": config.data.max_seq_len,
        "dtype": str(dtype), "device": device, "kernels": system.kernels,
        "gradient_checkpointing": [system.gradient_checkpointing, system.checkpoint_keeps],
        # A new model may leave its family open; its checkpoints name one.
        "model": {name: value for name, value in vars(shape).items() if name != "model_type"},
    }  # fmt: skip
    return json.loads(json.dumps(facts))


def _read(path: Path, facts: dict) -> dict | None:
    """The flags that the run has kept, if they still fit."""
    try:
        kept = json.loads(path.read_bytes())
        is_same = kept.pop("facts") == facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): the pipeline is measured anew", path, error)
        return None
    if not is_same:
        logger.info("the pipeline is measured anew, as the run has changed")
    return kept if is_same else None
