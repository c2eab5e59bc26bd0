"""Files that a launch writes to the run directory before its first step: config.yaml and the start record."""

import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoint.retention import abandon_later
from configurator import changes_since, flatten, to_yaml
from runs import exits
from runs.reslog import VERSION, ResLog, count_launches
from runs.sinks import Sinks, open_sinks
from training.build import Built
from training.config import Config
from training.data import stream_of
from training.describe import Flops, count_flops, describe
from utils import environment
from utils.files import atomic_write
from utils.machine import commit_of, cpu_name

logger = logging.getLogger(__name__)


def start_records(built: Built, energy_counters: Sequence[str] = ()) -> tuple[ResLog | None, Flops]:
    """Describe the run, set superseded checkpoints aside, and write the configuration and the start record.

    Args:
        energy_counters: names of those whose energy the records will have.
    Returns:
        the results' file, on the first rank alone; the basis of MFU.
    """
    config, context, run_dir, step = built.config, built.context, built.run_dir, built.progress.step
    context.barrier()
    counted = count_flops(built)
    reslog = ResLog(run_dir.paths.reslog, _open_sinks(config, run_dir.path, step)) if context.is_main else None
    for line in describe(built, counted):
        logger.info(line)
    if run_dir.place.is_first_of_store and not config.run.valid_only:
        for path in abandon_later(run_dir.paths.ckpt_dir, step):
            logger.info("set aside %s: the run goes on from step %d", path.name, step)
        run_dir.saver.prune(step)
        exits.clear_gone_ranks(run_dir.paths.exit_dir, context.world_size)
        _write_start(built, reslog, counted, energy_counters)
    return reslog, counted


def _open_sinks(config: Config, out_dir: Path, step: int) -> Sinks | None:
    """Open further destinations of the results."""
    run = config.run
    if run.valid_only:
        return None
    return open_sinks(out_dir, step, run.tensorboard, run.wandb_project, run.wandb_mode, flatten(config))


def _write_start(built: Built, reslog: ResLog | None, counted: Flops, energy_counters: Sequence[str]) -> None:
    config, run_dir, derived, progress = built.config, built.run_dir, built.derived, built.progress
    changed = changes_since(config, run_dir.paths.config) if run_dir.resumed_from else {}
    for name, (before, now) in changed.items():
        logger.info("changed since the last launch: %s %s -> %s", name, before, now)
    dtype, world_size = str(built.dtype).removeprefix("torch."), built.context.world_size
    resolved = (
        derived.__dict__
        | {"dtype": dtype, "world_size": world_size}
        | {f"{split}_data": str(path) for split, path in built.data.dirs.items()}
        | built.model.config.__dict__
    )
    atomic_write(run_dir.paths.config, to_yaml(config, resolved).encode())
    if reslog is None:
        return
    reslog.write(
        "start",
        version=VERSION,
        attempt=count_launches(run_dir.paths.reslog) + 1,
        step=progress.step,
        max_iters=derived.max_iters,
        samples_consumed=progress.samples_consumed,
        parent_ckpt=run_dir.chosen.name if run_dir.chosen else None,
        left_out=built.left_out,
        world_size=world_size,
        dtype=dtype,
        **stream_of(config.run.seed, built.data),
        global_batch_size=derived.global_batch_size,
        task=config.run.task_type,
        packing=config.data.packing,
        changed=changed,
        device=device_name(built.context.device),
        **counted.record(),
        energy_counters=list(energy_counters),
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        commit=commit_of(environment.ROOT),
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
