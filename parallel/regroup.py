"""The rows of a step in another number of micro-batches.

Shapes: a micro-batch has n samples, B rows (a sample may have several, such as DPO's two) and T positions.
"""

from collections.abc import Sequence

import torch

from parallel.engine import Batch


def regroup(micro_batches: Sequence[Batch], count: int) -> list[Batch]:
    """Micro-batches with the same rows in the same order, but `count` equal ones.

    Args:
        micro_batches: all of one T. `supervised`, flat positions b T + t in ascending order, follows its rows; of any
            other tensor each sample has an equal share.
    """
    if count == len(micro_batches):
        return list(micro_batches)
    width = micro_batches[0]["input_ids"].shape[1]
    rows = sum(len(batch["input_ids"]) for batch in micro_batches)
    assert sum(len(batch["sample_ids"]) for batch in micro_batches) % count == 0, (rows, count)
    regrouped: list[Batch] = [{} for _ in range(count)]
    for name in micro_batches[0]:
        if name != "supervised":
            whole = torch.cat([batch[name] for batch in micro_batches])
            parts: Sequence[torch.Tensor] = whole.chunk(count)
        else:
            parts = _cut_supervised(micro_batches, width, rows // count)
        for batch, part in zip(regrouped, parts, strict=True):
            batch[name] = part
    return regrouped


def _cut_supervised(micro_batches: Sequence[Batch], width: int, rows: int) -> list[torch.Tensor]:
    """`supervised` of micro-batches of so many rows."""
    flat, before = [], 0
    for batch in micro_batches:
        flat.append(batch["supervised"] + before * width)
        before += len(batch["input_ids"])
    whole, starts = torch.cat(flat), torch.arange(0, before * width, rows * width)
    bounds = [*torch.searchsorted(whole, starts).tolist(), len(whole)]
    return [whole[begin:end] - start for begin, end, start in zip(bounds, bounds[1:], starts.tolist())]
