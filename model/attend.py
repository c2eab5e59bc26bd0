"""Everything attention must know besides queries, keys and values. Built once a forward pass, one for all layers that
see equally far.

    positions     rotary tables, or ALiBi's slopes
    documents     nothing, their lengths, their starts, or a mask, depending on the implementation of attention
    window        how far back a query sees: a number or part of the mask, depending on the implementation
    cache         keys and values of earlier tokens, and how many of them each row has
    segments      new tokens of several texts in one row, whose keys are in a pool of blocks (paged.py)
    share         the part of each row's positions that this process has, and how it gets the keys and values of all

A new kind of mask or cache changes this file and the implementations in model/kernels/, but no layer.

Shapes: B batch, T new tokens, S tokens attended to (T plus what the cache holds), C hidden size, H query heads, K key
and value heads, D head dim, M documents.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.kernels.paged_attention import Group, Runs
from model.kernels.paged_decoding import Table
from model.rope import rotary_tables

if TYPE_CHECKING:
    from model.paged import PagedStep


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's slope of each head, float32 (H,): a key at distance d from the query gets the score -slope d on top
    (Press et al., "Train short, test long", 2022).

    The first 2^n heads, as many as there are, have the slopes 2^(-8 i / 2^n), i = 1, 2, ...; the others have those with
    odd i of twice as many heads.
    """
    power = 1 << (num_heads.bit_length() - 1)
    first = torch.arange(1, power + 1, device=device) * (-8.0 / power)
    others = (2 * torch.arange(num_heads - power, device=device) + 1) * (-4.0 / power)
    return torch.cat((first, others)).exp2()


def attention_mask(
    num_new: int,
    num_all: int,
    document_ids_BT: Tensor | None,
    device: torch.device,
    rows: list[int] | None = None,
    window: int = 0,
    slopes_H: Tensor | None = None,
    first_key: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mask of the keys that each query sees: those of its document that do not come after it, or too far before it.

    Returns:
        bool (1 or B, 1, T, S). With slopes (1 or B, H, T, S): ALiBi's scores, -inf for keys that are not seen. They
        follow from distances, so near the query they are exact in any dtype, however long the text is.

    Args:
        document_ids_BT: documents of all tokens, or None; queries are the last ones before `num_all`.
        rows: number of tokens in each row's cache, if the rows differ; by default all rows hold the same.
        window: latest keys that a query sees, itself among them; 0: all.
        first_key: keys before it are left out: S is `num_all` less this number.
        dtype: of the scores.
    """
    starts = torch.tensor(rows if rows is not None else [num_all - num_new], device=device)
    queries = starts[:, None] + torch.arange(num_new, device=device)
    distances = (queries[..., None] - torch.arange(first_key, num_all, device=device))[:, None]
    mask = distances >= 0
    if window:
        mask = mask & (distances < window)
    if document_ids_BT is not None:
        of_queries, of_keys = document_ids_BT[:, num_all - num_new : num_all], document_ids_BT[:, first_key:num_all]
        mask = mask & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
    if slopes_H is None:
        return mask
    exact = torch.promote_types(dtype, torch.float32)
    return (distances.to(exact) * -slopes_H.to(exact)[:, None, None]).masked_fill(~mask, -torch.inf).to(dtype)


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


def document_tails(document_ids_BT: Tensor, chunks: Iterable[int], num_chunks: int) -> Tensor:
    """`document_starts` for queries that are chunks of rows: int32 (chunks, 2, M + 1), for each chunk the offsets of
    the documents among its queries, and among the keys of all rows up to the chunk's end. Call it on CPU tensors.

    Before the first document of a chunk lie keys that none of its queries sees: a document without queries. The last
    documents may be empty.
    """
    batch, width = document_ids_BT.shape
    size, columns = width // num_chunks, torch.arange(width)
    begins = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    of_token = torch.where(begins, columns, 0).cummax(1).values
    found = []
    for chunk in chunks:
        first, end = chunk * size, (chunk + 1) * size
        is_seen = begins & (columns > first) | (columns == of_token[:, first, None]) | (columns == 0)
        rows, places = is_seen[:, :end].nonzero().unbind(1)
        of_queries = torch.cat((rows * size + (places - first).clamp(min=0), torch.tensor([batch * size])))
        of_keys = torch.cat((rows * end + places, torch.tensor([batch * end])))
        found.append(torch.stack((of_queries, of_keys)))
    longest = max(starts.shape[1] for starts in found)
    return torch.stack([F.pad(its, (0, longest - its.shape[1]), mode="replicate") for its in found]).to(torch.int32)


class KVCache:
    """Keys and values of every layer, for up to `max_length` tokens a row; with a local filter also what it read.

    `lengths` is the number of tokens that each row holds; `Decoder.forward` adds the new ones. A caller whose rows are
    padded at the end then sets `lengths` to the real numbers, and later tokens overwrite the padding.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device):
        self.max_length, self.lengths = max_length, [0] * batch
        self._config, self._dtype, self._device = config, dtype, device
        # By layer: memory is taken when its first keys come. A rank of a pipeline has some of the layers, one of tensor
        # parallelism some of the heads.
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, Tensor] = {}

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

    def advance(self, num_new: int) -> None:
        """Count new tokens, once all layers have stored theirs."""
        self.lengths = [length + num_new for length in self.lengths]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, for instance when other texts have ended."""
        self.lengths = [self.lengths[row] for row in rows]
        self._kept = {layer: (k_BKSD[rows], v_BKSD[rows]) for layer, (k_BKSD, v_BKSD) in self._kept.items()}
        self._states = {layer: states_BSC[rows] for layer, states_BSC in self._states.items()}

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, first_key: int = 0) -> tuple[Tensor, Tensor]:
        """Store T new tokens after those of each row; return keys and values from `first_key` up to the end of the
        longest row, (B, K, S, D). After its own end, a shorter row holds zeros or padding, which the mask hides."""
        heads, num_new = k_BKTD.shape[1:3]
        end = max(self.lengths) + num_new
        if layer not in self._kept:
            k_BKSD, v_BKSD = (self._room(heads, self.max_length, self._config.head_dim) for _ in range(2))
            self._kept[layer] = k_BKSD, v_BKSD
        for all_BKSD, new_BKTD in zip(self._kept[layer], (k_BKTD, v_BKTD)):
            if self.is_even:
                all_BKSD[:, :, end - num_new : end] = new_BKTD
            else:
                for row, length in enumerate(self.lengths):
                    all_BKSD[row, :, length : length + num_new] = new_BKTD[row]
        k_BKSD, v_BKSD = self._kept[layer]
        return k_BKSD[:, :, first_key:end], v_BKSD[:, :, first_key:end]

    def append_states(self, layer: int, x_BTC: Tensor) -> Tensor:
        """Store what a layer's local filter reads of T new tokens; return that of the two tokens before them in each
        row, (B, 2, C), which are zeros where there are none."""
        num_new = x_BTC.shape[1]
        if layer not in self._states:
            # Rows may be cut back to any length, so the last two tokens' states would not be enough.
            self._states[layer] = self._room(self.max_length, self._config.hidden_size)
        states_BSC, earlier_B2C = self._states[layer], x_BTC.new_zeros(len(x_BTC), 2, x_BTC.shape[2])
        for row, length in enumerate(self.lengths):
            num = min(length, 2)
            earlier_B2C[row, 2 - num :] = states_BSC[row, length - num : length]
            states_BSC[row, length : length + num_new] = x_BTC[row]
        return earlier_B2C

    def _room(self, *shape: int) -> Tensor:
        """Zeros for each row."""
        return torch.zeros(len(self.lengths), *shape, dtype=self._dtype, device=self._device)


@dataclass(frozen=True)
class RowShare:
    """The share of the positions of each row that one of several processes has.

    A row is cut into 2 n equal chunks for n processes. Each has two of them, the one with its number and the one with
    this number from the end, so that all have as many keys before their queries:

        4 processes    0 1 2 3 3 2 1 0
    """

    number: int
    count: int
    gather: Callable[[Tensor], Tensor]
    """Chunks (2, ...) of each process -> those of all, (2 n, ...), process by process. Its backward pass adds the
    gradients of all processes, and returns those of this one's chunks."""
    add: Callable[[Tensor], Tensor]
    """Sum of a tensor over the processes. Its backward pass returns the gradient as it is."""
    ring: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Causal attention of q, k, v (B, H, T, D) over whole rows of one document without gathering: heads' outputs of
    this process' queries. None: keys and values are gathered."""

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of this process' chunks."""
        return self.number, 2 * self.count - 1 - self.number

    def padded(self, width: int) -> int:
        """Width of a row that can be cut: at least so many positions."""
        return -(-width // (2 * self.count)) * 2 * self.count

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This process' positions of a dimension."""
        chunks = whole.chunk(2 * self.count, dim)
        return torch.cat([chunks[number] for number in self.chunks], dim)

    def whole(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole rows, (B, K, S, D) each, from those of this process' positions."""
        own = torch.stack((k_BKTD, v_BKTD)).unflatten(3, (2, -1)).movedim(3, 0)
        # Process i has brought chunks i and 2 n - 1 - i.
        places = [2 * number for number in range(self.count)] + [2 * i + 1 for i in reversed(range(self.count))]
        chunks = self.gather(own.contiguous()).unbind(0)
        # (2, B, K, 2 n, T / 2, D)
        k_BKSD, v_BKSD = torch.stack([chunks[place] for place in places], dim=3).flatten(3, 4).unbind(0)
        return k_BKSD, v_BKSD


@dataclass(frozen=True)
class Attend:
    """What the queries of one forward pass attend to, in layers that see equally far. At most one of `documents` and
    `starts` is given. Without these and a mask, attention is causal over the whole row."""

    positions: Tensor
    """Position of each new token in its document, int64 (B, T)."""
    rope: tuple[Tensor, Tensor] | None
    """cos and sin of each position's angles, float32, (B, 1, T, D / 2) each; None: nothing is rotated."""
    mask: Tensor | None = None
    """Keys that each query sees, see `attention_mask`; beside `documents`, for a document as long as the longest. It
    covers window and slopes."""
    documents: list[list[int]] | None = None
    """Lengths of each row's documents."""
    starts: Tensor | None = None
    """Offsets of the documents among the tokens of all rows; see `document_starts`."""
    key_starts: Tensor | None = None
    """Offsets of the documents of a chunk among its keys; see `document_tails`."""
    window: int = 0
    """Without a mask: latest keys that a query sees, itself among them; 0: all."""
    slopes: Tensor | None = None
    """Without a mask: ALiBi's slope of each head, float32 (H,)."""
    cache: KVCache | None = None
    first_key: int = 0
    """First key of the cache, or of the row, that any query sees."""
    share: RowShare | None = None
    chunks: tuple["Attend", ...] = ()
    """What the queries of each chunk of this process attend to, in order; empty without a share."""
    end: int = 0
    """Number of keys of the row up to the last query of a chunk."""
    step: "PagedStep | None" = None
    """If the row has new tokens of several texts."""
    segments: tuple["Attend", ...] = ()
    """What the queries of each text with several of them attend to, in the order of `step.longer`."""
    singles: tuple[Runs | Group | Table, ...] = ()
    """Texts with one query, alone or as they are attended to together."""
    has_past: bool = False
    """Whether there are keys before the first query."""

    @property
    def is_plainly_causal(self) -> bool:
        """Whether each row is one document without earlier tokens."""
        return self.mask is None and self.documents is None and self.starts is None and not self.has_past


def attend_to(
    config: ModelConfig,
    windows: Iterable[int],
    num_new: int,
    device: torch.device,
    positions_BT: Tensor,
    document_ids_BT: Tensor | None = None,
    starts: Tensor | None = None,
    cache: KVCache | None = None,
    by_document: bool = True,
    by_mask: bool = True,
    dtype: torch.dtype = torch.float32,
    share: RowShare | None = None,
    by_tails: bool = False,
) -> dict[int, Attend]:
    """Build the Attend of a forward pass over `num_new` tokens a row, for each of these windows (see
    `ModelConfig.window_of`).

    Args:
        positions_BT: positions of the new tokens, int64.
        document_ids_BT: document of each token, int64, equal ids side by side; not together with a cache.
        starts: offsets of those documents, for an implementation of attention that takes them.
        by_document: whether documents may be attended to one by one, if that is less work.
        by_mask: whether the implementation of attention needs a mask for windows and ALiBi.
        dtype: of the queries.
        share: the part of each row whose tokens are the new ones; positions and document ids are those of whole rows,
            and starts are `document_tails`.
        by_tails: whether the implementation of attention takes the starts of queries and keys.
    """
    common, windows = common_to_layers(config, positions_BT, document_ids_BT), set(windows)
    dtype = mask_dtype(device, dtype)
    if share is not None:
        assert cache is None
        arguments = document_ids_BT, starts, by_mask, by_tails, dtype
        return {window: _shared_rows(common, share, window, *arguments) for window in windows}
    if starts is not None:
        return {window: replace(common, starts=starts, window=window if window < num_new else 0) for window in windows}
    if document_ids_BT is not None and by_document and not document_ids_BT.is_cuda:
        documents = document_lengths(document_ids_BT)
        if documents is not None:
            return {window: _document_by_document(common, window, documents, dtype) for window in windows}
    past = [0]
    if cache is not None:
        by_mask, past, common = True, cache.lengths, replace(common, cache=cache)
    return {window: whole_rows(common, window, num_new, past, document_ids_BT, by_mask, dtype) for window in windows}


def common_to_layers(
    config: ModelConfig, positions_BT: Tensor, document_ids_BT: Tensor | None, lengths_BT: Tensor | None = None
) -> Attend:
    """Positions, and what follows from them alone; arguments as of rotary_tables."""
    if config.position_embedding == "alibi":
        return Attend(positions_BT, None, slopes=alibi_slopes(config.num_attention_heads, positions_BT.device))
    return Attend(positions_BT, rotary_tables(config, positions_BT, document_ids_BT, lengths_BT))


def mask_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """dtype of a mask that is added to scores, for queries of a dtype."""
    # Kernels for CPUs take float32 beside 16 bits, those for GPUs only the queries' dtype.
    return dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)


def _document_by_document(common: Attend, window: int, documents: list[list[int]], dtype: torch.dtype) -> Attend:
    """With a mask only where a document is longer than the window, or ALiBi adds to scores."""
    longest = max(map(max, documents))
    window = window if window < longest else 0
    mask = None
    if window or common.slopes is not None:
        device = common.positions.device
        mask = attention_mask(longest, longest, None, device, None, window, common.slopes, dtype=dtype)
    return replace(common, documents=documents, mask=mask, slopes=None)


def whole_rows(
    common: Attend, window: int, num_new: int, past: list[int], document_ids_BT: Tensor | None, by_mask: bool,
    dtype: torch.dtype,
) -> Attend:  # fmt: skip
    """Each row as a whole, under a mask if there is anything that must be hidden or added by one.

    Args:
        past: number of earlier tokens of each row; one for all rows that have as many.
    """
    common = replace(common, has_past=max(past) > 0 or common.cache is not None)
    longest, is_even = max(past) + num_new, min(past) == max(past)
    window = window if window < longest else 0
    first_key = max(min(past) - window + 1, 0) if window else 0
    if num_new == 1 and is_even:
        # It sees all keys from the first one on.
        window = 0
    is_masked = document_ids_BT is not None or not is_even or (past[0] > 0 and num_new > 1)
    if not is_masked and not (by_mask and (window or common.slopes is not None)):
        return replace(common, window=window, first_key=first_key)
    rows, device = None if is_even else past, common.positions.device
    mask = attention_mask(num_new, longest, document_ids_BT, device, rows, window, common.slopes, first_key, dtype)
    return replace(common, mask=mask, slopes=None, first_key=first_key)


def _shared_rows(
    common: Attend, share: RowShare, window: int, document_ids_BT: Tensor | None, starts: Tensor | None,
    by_mask: bool, by_tails: bool, dtype: torch.dtype,
) -> Attend:  # fmt: skip
    """Part of each row, chunk by chunk: its queries see no key after the chunk's end.

    Args:
        common: of the whole rows.
    """
    chunks: list[Attend] = []
    (batch, width), device = common.positions.shape, common.positions.device
    if share.ring is not None and document_ids_BT is not None:
        raise ValueError(
            "--context_parallel_method=ring is for rows of one document: give --context_parallel_method=gather"
        )
    size = width // (2 * share.count)
    for index, number in enumerate(share.chunks if share.ring is None else ()):
        begin, end = number * size, (number + 1) * size
        its_window = window if window < end else 0
        first_key = max(begin - its_window + 1, 0) if its_window else 0
        chunk = replace(common, rope=None, window=its_window, first_key=first_key, end=end)
        if starts is not None:
            chunk = replace(chunk, starts=starts[index, 0], key_starts=starts[index, 1], first_key=0)
        elif by_tails and document_ids_BT is None:
            of_queries, of_keys = (
                torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
                for length in (size, end - first_key)
            )
            chunk = replace(chunk, starts=of_queries, key_starts=of_keys)
        elif begin or document_ids_BT is not None or (by_mask and (its_window or common.slopes is not None)):
            slopes = common.slopes
            mask = attention_mask(size, end, document_ids_BT, device, None, its_window, slopes, first_key, dtype)
            chunk = replace(chunk, mask=mask, slopes=None)
        # Otherwise it is the beginning of rows of one document.
        chunks.append(chunk)
    rope = None
    if common.rope is not None:
        cos, sin = common.rope
        rope = share.part(cos, 2), share.part(sin, 2)
    return replace(
        common, positions=share.part(common.positions, 1), rope=rope, slopes=None, share=share, chunks=tuple(chunks)
    )
