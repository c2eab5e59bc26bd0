"""Everything attention must know besides queries, keys and values. Built once a forward pass, the same for every layer.

    positions     rotary tables
    documents     nothing, their lengths, their starts, or a mask, depending on the implementation of attention
    cache         keys and values of earlier tokens, and how many of them each row has

A new kind of mask or cache changes this file and the implementations in model/kernels/, but no layer.

Shapes: B batch, T new tokens, S tokens attended to (T plus what the cache holds), K key and value heads, D head dim,
M documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.rope import rotary_tables


def causal_mask(
    num_new: int, num_all: int, document_ids_BT: Tensor | None, device: torch.device, rows: list[int] | None = None
) -> Tensor:
    """Mask of the keys that each query sees, bool (1 or B, 1, T, S): those of its document that do not come after it.

    Args:
        rows: number of tokens in each row's cache, if the rows differ; by default all rows hold S - T.
    """
    starts = torch.tensor(rows if rows is not None else [num_all - num_new], device=device)
    queries = starts[:, None] + torch.arange(num_new, device=device)
    mask = (queries[..., None] >= torch.arange(num_all, device=device))[:, None]
    if document_ids_BT is not None:
        mask = mask & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
    return mask


def document_lengths(document_ids_BT: Tensor) -> list[list[int]] | None:
    """Lengths of each row's documents if, on a CPU, attending document by document costs less than computing all T x T
    weights under a mask; otherwise None.

    Measured there: a weight under a mask costs as much as 1.4 of plain causal attention, a call as much as 2,500.
    """
    batch, width = document_ids_BT.shape
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_ids_BT]
    weights = sum(length * length for row in lengths for length in row)
    calls = sum(map(len, lengths))
    return lengths if 0.7 * weights + 2500 * calls < batch * width * width else None


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Offsets at which documents begin among the tokens of all rows, and the end of the last one: int32 (M + 1,). The
    border of a row is also the border of a document. Call it on CPU tensors: a GPU would have to wait for the number
    of documents."""
    begins = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_full((1,), document_ids_BT.numel()))).to(torch.int32)


class KVCache:
    """Keys and values of every layer, for up to `max_length` tokens a row.

    `lengths` is the number of tokens that each row holds; `Decoder.forward` adds the new ones. A caller whose rows are
    padded at the end then sets `lengths` to the real numbers, and later tokens overwrite the padding.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.max_length, self.lengths = max_length, [0] * batch
        self._keys_LBKSD = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBKSD = torch.zeros_like(self._keys_LBKSD)

    @property
    def is_even(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return len(set(self.lengths)) == 1

    def require_room(self, num_new: int) -> None:
        """
        Raises:
            ValueError: a row has no room for that many more tokens.
        """
        if max(self.lengths) + num_new > self.max_length:
            raise ValueError(
                f"the KV cache holds {self.max_length} tokens, {max(self.lengths) + num_new} were asked of it"
            )

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, for instance when other texts have ended."""
        self.lengths = [self.lengths[row] for row in rows]
        self._keys_LBKSD, self._values_LBKSD = self._keys_LBKSD[:, rows], self._values_LBKSD[:, rows]

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens after those of each row; return keys and values up to the end of the longest row,
        (B, K, S, D). After its own end, a shorter row holds zeros or padding, which the mask hides."""
        num_new, end = k_BKTD.shape[2], max(self.lengths) + k_BKTD.shape[2]
        for all_BKSD, new_BKTD in ((self._keys_LBKSD[layer], k_BKTD), (self._values_LBKSD[layer], v_BKTD)):
            if self.is_even:
                all_BKSD[:, :, end - num_new : end] = new_BKTD
            else:
                for row, length in enumerate(self.lengths):
                    all_BKSD[row, :, length : length + num_new] = new_BKTD[row]
        return self._keys_LBKSD[layer, :, :, :end], self._values_LBKSD[layer, :, :, :end]


@dataclass(frozen=True)
class Attend:
    """What the queries of one forward pass attend to. At most one of `mask`, `documents` and `starts` is given; without
    any, attention is causal over the whole row."""

    rope: tuple[Tensor, Tensor]
    """cos and sin of each position's angles, float32, (B, 1, T, D / 2) each."""
    mask: Tensor | None = None
    """Keys that each query sees, bool (1 or B, 1, T, S)."""
    documents: list[list[int]] | None = None
    """Lengths of each row's documents."""
    starts: Tensor | None = None
    """Offsets of the documents among the tokens of all rows; see `document_starts`."""
    cache: KVCache | None = None

    @property
    def is_plainly_causal(self) -> bool:
        """Whether each row is one document without earlier tokens."""
        return self.mask is None and self.documents is None and self.starts is None and self.cache is None


def attend_to(
    config: ModelConfig,
    num_new: int,
    device: torch.device,
    positions_BT: Tensor,
    document_ids_BT: Tensor | None = None,
    starts: Tensor | None = None,
    cache: KVCache | None = None,
    by_document: bool = True,
) -> Attend:
    """Build the Attend of a forward pass over `num_new` tokens a row.

    Args:
        positions_BT: positions of the new tokens, int64.
        document_ids_BT: document of each token, int64, equal ids side by side; not together with a cache.
        starts: offsets of those documents, for an implementation of attention that takes them.
        by_document: whether documents may be attended to one by one, if that is less work.
    """
    rope = rotary_tables(config, positions_BT, document_ids_BT)
    if starts is not None:
        return Attend(rope, starts=starts, cache=cache)
    if document_ids_BT is not None and by_document and not document_ids_BT.is_cuda:
        documents = document_lengths(document_ids_BT)
        if documents is not None:
            return Attend(rope, documents=documents, cache=cache)
    if cache is not None and not cache.is_even:
        longest = max(cache.lengths)
        return Attend(rope, causal_mask(num_new, longest + num_new, None, device, cache.lengths), cache=cache)
    past = cache.lengths[0] if cache is not None else 0
    needs_mask = document_ids_BT is not None or (past and num_new > 1)
    mask = causal_mask(num_new, past + num_new, document_ids_BT, device) if needs_mask else None
    return Attend(rope, mask, cache=cache)
