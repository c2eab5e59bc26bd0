"""Seconds that the units of a model take: its embedding, a block, and the last norm with the head."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.decoder import Decoder

_REPEATS = 3


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of a forward and a backward pass of micro-batches of some sizes."""

    sizes: list[int]
    embedding: list[tuple[float, float]]
    block: list[tuple[float, float]]
    """Times of the first block."""
    head: list[tuple[float, float]]

    def of(self, rows: float, flops: Sequence[float]) -> list[tuple[float, float]]:
        """(forward, backward) of each unit at so many rows. Blocks of another kind than the first take longer or less
        by their operations."""

        def at(times: list[tuple[float, float]], factor: float = 1.0) -> tuple[float, float]:
            forward, backward = (float(np.interp(rows, self.sizes, column)) for column in zip(*times))
            return factor * forward, factor * backward

        blocks = [at(self.block, its / flops[1]) for its in flops[1:-1]]
        return [at(self.embedding), *blocks, at(self.head)]


def measure_units(model: Decoder, sizes: list[int], length: int, head_share: float) -> UnitTimes:
    """
    Args:
        model: of one block, on its device, in its dtype; its gradients are not kept.
        sizes: numbers of rows, each of `length` tokens.
        head_share: share of the tokens that get logits.
    """
    model.initialize(0)
    model.train()
    measured = [_measure_at(model, size, length, head_share) for size in sizes]
    return UnitTimes(sizes, *([times[part] for times in measured] for part in range(3)))


def _measure_at(model: Decoder, rows: int, length: int, head_share: float) -> list[tuple[float, float]]:
    """(forward, backward) of embedding, block and head; the shortest of some repetitions."""
    device = next(model.parameters()).device
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device).expand(rows, length).contiguous()
    count = math.ceil(head_share * rows * length)

    def head(entering: Tensor) -> Tensor:
        hidden = model(ids, positions, units=range(2, 3), entering=entering)
        return model.loss_sum(hidden.flatten(0, 1)[:count], ids.flatten()[:count])

    passes: list[Callable[[Tensor], Tensor]] = [
        lambda entering: model(ids, positions, units=range(0, 1)),
        lambda entering: model(ids, positions, units=range(1, 2), entering=entering),
        head,
    ]
    with torch.no_grad():
        entering = passes[0](ids)
    return [_time(run, entering, device) for run in passes]


def _time(run: Callable[[Tensor], Tensor], entering: Tensor, device: torch.device) -> tuple[float, float]:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best = [math.inf, math.inf]
    # The first one also chooses kernels and allocates.
    for repeat in range(1 + _REPEATS):
        start = clock()
        out = run(entering.detach().requires_grad_())
        between = clock()
        out.sum().backward()
        end = clock()
        if repeat:
            best = [min(best[0], between - start), min(best[1], end - between)]
    return best[0], best[1]
