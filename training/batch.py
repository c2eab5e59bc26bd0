"""The batch, if nobody has given it: for SFT and DPO so small that the data makes enough steps, for pretraining that of
the size.

64 rows suit a hundred thousand records. With 200 they would be a single step, which hardly changes a model.
"""

import logging
from dataclasses import replace

from configurator import is_open
from dataset.config import DataConfig
from training.config import RunConfig

logger = logging.getLogger(__name__)

_STEPS = 100
"""Steps that a run should have, if there is enough data."""
LEAST_ROWS, _MOST_ROWS = 4, 64
"""Bounds of the samples in a step: fewer leave too much to chance, more gain little. In three passes over 82 packed
rows of 200 conversations, a model of 6.9 M parameters learnt less from 2 rows a step than from 4 (held-out loss 4.94
and 4.80, down from 5.62)."""
_SHARES = 8
"""Micro-batches of a step. 1, 2, 4 and 8 processes can share them, so the run is the same on each number."""


def choose_batch(run: RunConfig, data: DataConfig, given: frozenset[str], samples: int, data_size: int) -> DataConfig:
    """The data's options with the batch in them. They are saved, so a run keeps its batch, however it is resumed.

    Args:
        given: names of the flags that were given.
        samples: packed rows, conversations or pairs in an epoch.
        data_size: processes that read different rows.
    """
    if not is_open(run, given, "train_batch_size", "gradient_accumulation_steps"):
        return data
    if run.task.reads_records:
        passes = 1.0 if run.max_iters else run.epoch
        batch, why = batch_for(samples * passes), f"chosen from the {samples:,} there are"
    elif run.size and data.gradient_accumulation_steps % data_size:
        batch = data.train_batch_size * data.gradient_accumulation_steps
        why = f"which {data_size} processes can share"
    else:
        return data
    size, count = split_batch(batch, data_size, data.train_batch_size)
    logger.info(
        "%d %s a step, %s: --train_batch_size=%d --gradient_accumulation_steps=%d",
        size * count, run.task.unit(data.packing), why, size, count,
    )  # fmt: skip
    return replace(data, train_batch_size=size, gradient_accumulation_steps=count)


def batch_for(samples: float) -> int:
    """Samples in a step, a power of two, for a run of so many samples in all."""
    batch = LEAST_ROWS
    while batch < _MOST_ROWS and 2 * batch * _STEPS <= samples:
        batch *= 2
    return batch


def split_batch(batch: int, data_size: int, most: int) -> tuple[int, int]:
    """Samples in a micro-batch, and micro-batches in a step. If the processes cannot share the batch evenly, it becomes
    the nearest one that they can.

    Args:
        most: largest number of samples in a micro-batch, for the sake of memory.
    """
    count = max(min(batch, _SHARES), -(-batch // most))
    count = -(-count // data_size) * data_size
    return max(1, round(batch / count)), count
