"""Rows in another number of micro-batches: the same as collating the samples in that number at once."""

import numpy as np
import pytest
import torch

from dataset.pretrain import as_tensors
from dataset.sft import padded
from parallel.regroup import regroup

_WIDTH = 16


def _batch(rng_seed: int, samples: range, rows_a_sample: int) -> dict[str, torch.Tensor]:
    """Rows that depend on their sample alone."""
    rows = []
    for sample in samples:
        for side in range(rows_a_sample):
            rng = np.random.default_rng([rng_seed, sample, side])
            length = int(rng.integers(2, _WIDTH + 2))
            # Some rows have no supervised token.
            supervised = rng.random(length) < (0.5 if rng.random() < 0.7 else 0.0)
            rows.append([(rng.integers(0, 99, length).astype(np.uint16), supervised)])
    # The last row is of full width, as after padding to max_seq_len.
    full = [(np.zeros(_WIDTH + 1, np.uint16), np.zeros(_WIDTH + 1, bool))]
    batch = padded([*rows, full], _WIDTH, 0)
    batch = {name: tensor[:-1] if name != "supervised" else tensor for name, tensor in batch.items()}
    ids = np.array(samples, np.int64)
    extra = {"sample_ids": ids, "row_ids": ids + 1000, "reference": np.stack([ids, -ids], 1).astype(np.float32)}
    return batch | as_tensors(extra)


@pytest.mark.parametrize("rows_a_sample", [1, 2])
@pytest.mark.parametrize("before, after", [(4, 2), (4, 8), (2, 4), (1, 8), (8, 1), (4, 4)])
def test_regrouping_is_collating_in_another_number(rows_a_sample, before, after):
    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        size = 8 // count
        return [_batch(7, range(first, first + size), rows_a_sample) for first in range(0, 8, size)]

    found, wanted = regroup(batches(before), after), batches(after)
    assert len(found) == len(wanted)
    for batch, its in zip(found, wanted):
        assert batch.keys() == its.keys()
        for name, tensor in its.items():
            assert batch[name].dtype == tensor.dtype and torch.equal(batch[name], tensor), name
