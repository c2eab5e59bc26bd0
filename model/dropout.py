"""Dropout whose mask is a function of its place, not of a generator's state.

The mask of an element is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of
(run seed, the row's position in the run, forward pass, site in the model, place of the element in its row). So the mask
does not depend on how the global batch was split into micro-batches and over ranks, it need not be saved, and
recomputation under gradient checkpointing draws the same one. A place must not depend on the row's padding, which the
other rows of its micro-batch decide: for hidden states it is the index in row-major order, since padding comes last;
for attention weights it is head, query and key.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SITES_PER_LAYER = 3
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT = range(SITES_PER_LAYER)
ADAPTER_SITES_PER_LAYER = 16
"""Sites of adapters, whose words lie in the upper half of 16 bits, where those of up to 10,922 blocks do not reach."""
_FIRST_ADAPTER_WORD = 1 << 15
MAX_ADAPTED_LAYERS = _FIRST_ADAPTER_WORD // ADAPTER_SITES_PER_LAYER

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK16, _MASK32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class DropoutKey:
    """Name of the masks of one forward pass."""

    seed: int
    """The run's seed; its low 64 bits count."""
    row_ids: Tensor
    """(B,) int64: each row's position in the run."""
    forward_id: int = 0
    """Number that tells forward passes over the same rows apart; below 2**16."""
    layer: Tensor | None = None
    """Number of the block, as an int64 scalar: a Python number would make torch.compile build every block anew."""

    def for_layer(self, index: int) -> "DropoutKey":
        return replace(self, layer=torch.full((), index, device=self.row_ids.device))

    def for_layer_before(self) -> "DropoutKey":
        assert self.layer is not None
        return replace(self, layer=self.layer - 1)


def philox_uint32(
    key: tuple[int | Tensor, int | Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32.

    Args:
        key: two 32-bit words; tensors of them must broadcast to the counter's shape.
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


def adapter_site(number: int) -> int:
    """Site of an adapted layer of a block.

    Args:
        number: of the layer in its block, below ADAPTER_SITES_PER_LAYER.
    """
    assert 0 <= number < ADAPTER_SITES_PER_LAYER, f"a block has {ADAPTER_SITES_PER_LAYER} sites for adapters"
    return _FIRST_ADAPTER_WORD + number


def _where(key: DropoutKey, site: int) -> Tensor:
    """The word that names forward pass, block and site, as an int64 scalar."""
    where = torch.full((), (key.forward_id & _MASK16) << 16 | site, device=key.row_ids.device)
    sites = SITES_PER_LAYER if site < _FIRST_ADAPTER_WORD else ADAPTER_SITES_PER_LAYER
    return where if key.layer is None else where + sites * key.layer


def _seed_words(key: DropoutKey) -> tuple[int, int]:
    return key.seed & _MASK32, key.seed >> 32 & _MASK32


def _is_kept(words: tuple[Tensor, ...], length: int, probability: float) -> Tensor:
    """Mask from Philox blocks of four words: words (..., n) each -> (..., length). Four neighbours share a block."""
    uniform = torch.stack(words, dim=-1).flatten(-2)[..., :length]
    return uniform >= round(probability * 2.0**32)


def dropout_mask(shape: torch.Size, probability: float, key: DropoutKey, site: int) -> Tensor:
    """Boolean mask, True where an element is kept.

    Args:
        shape: (B, T, ...); B rows, the rest are a row's elements in row-major order.
        site: number of the dropout in its block, below SITES_PER_LAYER, or an adapter's, see `adapter_site`.
    """
    rows = key.row_ids.reshape(-1, 1)
    elements = math.prod(shape[1:])
    blocks = torch.arange(-(-elements // 4), device=rows.device).reshape(1, -1)
    counter = torch.broadcast_tensors(blocks, rows & _MASK32, (rows >> 32) & _MASK32, _where(key, site))
    return _is_kept(philox_uint32(_seed_words(key), counter), elements, probability).reshape(shape)


def attention_dropout_mask(shape: torch.Size, probability: float, key: DropoutKey) -> Tensor:
    """Boolean mask of attention weights (B, H, T, S), True where one is kept; the T queries are the last of S tokens.

    Head, query and key do not fit into the one word of a block's number. So a first Philox turns row, forward pass,
    layer and head into the key of a second one, which counts queries and keys.
    """
    batch, heads, num_new, num_all = shape
    rows, device = key.row_ids.reshape(batch, 1), key.row_ids.device
    counter = torch.broadcast_tensors(
        torch.arange(heads, device=device), rows & _MASK32, (rows >> 32) & _MASK32, _where(key, ATTENTION_WEIGHTS)
    )
    word_0, word_1, word_2, word_3 = (word[..., None, None] for word in philox_uint32(_seed_words(key), counter))
    queries = torch.arange(num_all - num_new, num_all, device=device)[:, None]
    blocks = torch.arange(-(-num_all // 4), device=device)
    words = philox_uint32((word_0, word_1), torch.broadcast_tensors(blocks, queries, word_2, word_3))
    return _is_kept(words, num_all, probability)


def dropout(x: Tensor, probability: float, key: DropoutKey | None, site: int) -> Tensor:
    """Drop elements of x (B, ...) with the given probability and scale the rest; identity without a key."""
    if key is None or probability == 0.0:
        return x
    return x * dropout_mask(x.shape, probability, key, site) * (1.0 / (1.0 - probability))


def attention_dropout(weights_BHTS: Tensor, probability: float, key: DropoutKey | None) -> Tensor:
    """Drop attention weights in the same way; see `attention_dropout_mask`."""
    if key is None or probability == 0.0:
        return weights_BHTS
    return weights_BHTS * attention_dropout_mask(weights_BHTS.shape, probability, key) * (1.0 / (1.0 - probability))
