"""Dropout whose mask is a function of where it is applied, not of a generator's state.

The mask of an element is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of
(run seed, the row's position in the run, forward pass, site in the model, index of the element in its row). So it is
the same however a global batch was split into micro-batches and over ranks, it needs no saving, and recomputation
under gradient checkpointing sees it again.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SITES_PER_LAYER = 3
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT = range(SITES_PER_LAYER)

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class DropoutKey:
    """Names the masks of one forward pass."""

    seed: int
    """The run's seed; its low 64 bits count."""
    row_ids: Tensor
    """(B,) int64: each row's position in the run."""
    forward_id: int = 0
    """Tells several forward passes over the same rows apart; below 2**16."""
    layer: Tensor | None = None
    """Number of the block, as an int64 scalar: a Python number would make torch.compile build every block anew."""

    def for_layer(self, index: int) -> "DropoutKey":
        return replace(self, layer=torch.full((), index, device=self.row_ids.device))


def philox_uint32(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32.

    Args:
        key: two 32-bit words.
        counter: four int64 tensors of one broadcast shape, each value in [0, 2**32).
    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap; shifting right then masking still yields the high word of the unsigned product.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK32) ^ c1 ^ k0,
            product_1 & _MASK32,
            ((product_0 >> 32) & _MASK32) ^ c3 ^ k1,
            product_0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def dropout_mask(shape: torch.Size, probability: float, key: DropoutKey, site: int) -> Tensor:
    """Boolean mask, True where an element is kept.

    Args:
        shape: (B, ...); B rows, the rest are a row's elements in row-major order.
        site: number of the dropout in its block, below SITES_PER_LAYER.
    """
    rows = key.row_ids.reshape(-1, 1)
    elements = 1
    for size in shape[1:]:
        elements *= size
    blocks = torch.arange(-(-elements // 4), device=rows.device).reshape(1, -1)
    where = torch.full_like(blocks, (key.forward_id & 0xFFFF) << 16 | site)
    if key.layer is not None:
        where = where + SITES_PER_LAYER * key.layer
    counter = torch.broadcast_tensors(blocks, rows & _MASK32, (rows >> 32) & _MASK32, where)
    words = philox_uint32((key.seed & _MASK32, key.seed >> 32 & _MASK32), counter)
    uniform = torch.stack(words, dim=-1).reshape(len(rows), -1)[:, :elements]
    return (uniform >= round(probability * 2.0**32)).reshape(shape)


def dropout(x: Tensor, probability: float, key: DropoutKey | None, site: int) -> Tensor:
    """Drop elements of x (B, ...) with the given probability and scale the rest; identity without a key."""
    if key is None or probability == 0.0:
        return x
    return x * dropout_mask(x.shape, probability, key, site) * (1.0 / (1.0 - probability))
