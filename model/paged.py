"""Keys and values of many sequences in one pool of blocks (Kwon et al., "PagedAttention", 2023), and a forward pass
over new tokens of several of them.

    blocks        0       1       2       3       4
    pool          a a a a b b b b a a . . b b b . . . . .       a has blocks 0 and 2, b has 1 and 3
    a pass        one row of tokens, sequence after sequence:   a: 1 new token, b: 5 of its prompt, c: ...

Norms, projections and feed-forward layers see one row of N tokens. Attention goes segment by segment: a query sees the
keys of its own sequence. Segments of one token are attended to together (kernels/paged_attention.py, on a GPU
kernels/paged_decoding.py). What attention needs besides (mask, window, places in the pool) is computed once a pass.

A sequence whose blocks lie side by side, in rising order, is read where it is; otherwise its blocks are copied together
in each layer. So whoever hands out blocks should prefer the block after a sequence's last one. The pool lies by head,
as products of matrices read it.

A block is cleared before its first token is stored, so no numbers that another sequence has left there are read, even
under a mask, which would not hide infinities.

Shapes: L layers, N new tokens of all segments, T new tokens of one, S tokens attended to, C hidden size, K key and
value heads, D head dim.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.attend import Attend, common_to_layers, mask_dtype, whole_rows
from model.config import ModelConfig
from model.kernels.paged_attention import Group, Runs, Single, attend_group, attend_runs, groups_of, runs_of
from model.kernels.paged_decoding import Table, table_of
from model.ops import choose_paged
from model.rope import depends_on_length


class Segment(NamedTuple):
    """New tokens of one sequence."""

    num_new: int
    length: int
    """Tokens of the sequence that are in the cache after the pass, the new ones included."""
    blocks: Sequence[int]
    """Blocks that hold them, in order; more may follow."""
    prompt_length: int = 0
    """Where rotary angles depend on a text's length: each token gets those of a text that ends with it, but of one that
    is at least as long as this. 0: those of a text that ends with the last new token."""


class PagedCache:
    """Keys and values of every layer in blocks of `block_size` tokens; with a local filter also what it read.

    Nothing is remembered of sequences: whoever uses the cache knows which blocks belong to whom. Memory is taken when
    the first keys come, since a rank of tensor parallelism has some of the heads.

    Args:
        layers: numbers of the blocks of the model that this process has; None: all.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device,
        layers: Iterable[int] | None = None,
    ):  # fmt: skip
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        self.dtype, self.device = dtype, device
        self.attend_table = choose_paged(device, dtype)
        """Kernel for one query a sequence; None: there is none here."""
        numbers = range(config.num_hidden_layers) if layers is None else layers
        self._places = {layer: place for place, layer in enumerate(numbers)}
        # Row 2 i has the keys of layer i, row 2 i + 1 its values: so one view holds what all layers know of a sequence.
        self.pool: Tensor | None = None
        self._rows: tuple[Tensor, ...] = ()
        slots = num_blocks * block_size if config.local_filter else 0
        self._states_LSC = torch.zeros(len(self._places), slots, config.hidden_size, dtype=dtype, device=device)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers of the whole model."""
        values = 2 * config.num_key_value_heads * config.head_dim + (config.hidden_size if config.local_filter else 0)
        return config.num_hidden_layers * block_size * values * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it has taken."""
        return sum(tensor.nbytes for tensor in (self.pool, self._states_LSC) if tensor is not None)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, given as (from, to), all at once: what a pair reads, no other pair has changed."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self.device).unbind(1)
        for pool in (self.pool, self._states_LSC if self.config.local_filter else None):
            if pool is not None:
                blocks = pool.unflatten(-2, (self.num_blocks, self.block_size))
                blocks.index_copy_(-3, targets, blocks.index_select(-3, sources))

    def append(self, layer: int, slots: Tensor, k_KND: Tensor, v_KND: Tensor) -> None:
        """Store a layer's keys and values of new tokens at these places, int64 (N,)."""
        if self.pool is None:
            heads, _, width = k_KND.shape
            shape = 2 * len(self._places), heads, self.num_blocks * self.block_size, width
            self.pool = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._rows = self.pool.unbind(0)
        keys_KSD, values_KSD = self.rows_of(layer)
        keys_KSD.index_copy_(1, slots, k_KND)
        values_KSD.index_copy_(1, slots, v_KND)

    def clear(self, blocks: Tensor) -> None:
        """Forget what is in some blocks, given by their numbers, int64."""
        if self.pool is not None:
            self.pool.unflatten(2, (self.num_blocks, self.block_size)).index_fill_(2, blocks, 0.0)

    def rows_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values in all slots, (K, slots, D)."""
        row = self.row_of(layer)
        return self._rows[row], self._rows[row + 1]

    def row_of(self, layer: int) -> int:
        """Row of the pool that has a layer's keys; its values are in the next one."""
        return 2 * self._places[layer]

    def append_states(self, layer: int, slots: Tensor, x_NC: Tensor, before_N2: Tensor) -> Tensor:
        """Store what a layer's local filter reads of new tokens; return that of the two tokens before each, (N, 2, C).

        Args:
            before_N2: their places; any where there are none.
        """
        states_SC = self._states_LSC[self._places[layer]]
        states_SC.index_copy_(0, slots, x_NC)
        return states_SC[before_N2]


class _Blocks(NamedTuple):
    """Keys that lie in blocks here and there."""

    blocks: Tensor
    """Their numbers, int64."""
    begin: int
    end: int
    """Which of the blocks' tokens, side by side, are meant."""

    def read(self, cache: PagedCache, row: int) -> Tensor:
        """A copy of what a row of the pool has of them, (1, K, S, D)."""
        assert cache.pool is not None
        by_block = cache.pool[row].unflatten(1, (cache.num_blocks, cache.block_size))
        return by_block.index_select(1, self.blocks).flatten(1, 2)[:, self.begin : self.end][None]


class PagedStep:
    """One forward pass over new tokens of several sequences: `model(ids (1, N), cache=step)`, N being the sum of
    `num_new`, segment after segment.

    Raises:
        ValueError: a segment has not enough blocks.
    """

    def __init__(self, cache: PagedCache, segments: Sequence[Segment], one_by_one: bool = False):
        """
        Args:
            one_by_one: attend to each segment alone, over a copy of its keys: so nothing depends on other segments, or
                on where the keys lie. For segments with one new token.
        """
        size = cache.block_size
        self.one_by_one = one_by_one
        self.cache, self.segments = cache, tuple(segments)
        positions: list[int] = []
        slots: list[int] = []
        begun: list[int] = []
        for num_new, length, blocks, _ in segments:
            if not 0 < num_new <= length <= len(blocks) * size:
                raise ValueError(f"{len(blocks)} blocks of {size} cannot hold {length} tokens, {num_new} of them new")
            new = range(length - num_new, length)
            positions += new
            slots += [blocks[place // size] * size + place % size for place in new]
            if length % size and (length - 1) // size * size >= length - num_new:
                # The last block begins with one of these tokens, and they do not fill it.
                begun.append(blocks[(length - 1) // size])
        device = cache.device
        self.positions_1N = torch.tensor([positions], device=device)
        self.slots_N = torch.tensor(slots, device=device)
        self._begun = torch.tensor(begun, device=device) if begun else None
        ends = list(accumulate(segment.num_new for segment in segments))
        self.longer = [number for number, segment in enumerate(self.segments) if segment.num_new > 1]
        """Numbers of the segments with several new tokens."""
        self.rows = [slice(end - segment.num_new, end) for end, segment in zip(ends, self.segments)]
        """Places of each segment's tokens in the row."""
        self._singles = [
            Single(end - 1, segment.length, segment.blocks)
            for end, segment in zip(ends, self.segments) if segment.num_new == 1
        ]  # fmt: skip
        # Segment and first key -> where the keys are.
        self._places: dict[tuple[int, int], range | _Blocks] = {}
        # First slot and number of keys -> views of all rows of the pool.
        self._views: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._before_N2: Tensor | None = None

    @property
    def num_new(self) -> int:
        """New tokens of all segments."""
        return len(self.slots_N)

    def require_room(self, num_new: int) -> None:
        """
        Raises:
            ValueError: the row of tokens is not that of the segments.
        """
        if num_new != self.num_new:
            raise ValueError(f"the segments have {self.num_new} new tokens, {num_new} are given")

    def advance(self, num_new: int) -> None:
        """Nothing: whoever made the step knows what the cache holds after it."""

    def append(self, layer: int, k_1KND: Tensor, v_1KND: Tensor) -> None:
        """Store a layer's keys and values of the new tokens."""
        if self._begun is not None:
            self.cache.clear(self._begun)
            self._begun = None
        self.cache.append(layer, self.slots_N, k_1KND[0], v_1KND[0])

    def attend_singles(
        self, layer: int, q_HND: Tensor, singles: Sequence[Runs | Group | Table], out_HND: Tensor
    ) -> None:
        """Write the heads' outputs of the segments with one new token each."""
        keys_KSD, values_KSD = self.cache.rows_of(layer)
        for group in singles:
            if isinstance(group, Runs):
                views = [self._side_by_side(layer, run.place, run.num_keys) for run in group.runs]
                attend_runs(q_HND, group.runs, views, out_HND)
                continue
            rows_B = group[0]
            q_BHD = (q_HND if rows_B is None else q_HND.index_select(1, rows_B)).transpose(0, 1)
            if isinstance(group, Table):
                assert self.cache.attend_table is not None
                out_BHD = self.cache.attend_table(q_BHD, keys_KSD, values_KSD, group)
            else:
                out_BHD = attend_group(q_BHD, keys_KSD, values_KSD, group, self.cache.block_size)
            if rows_B is None:
                out_HND.copy_(out_BHD.transpose(0, 1))
            else:
                out_HND.index_copy_(1, rows_B, out_BHD.transpose(0, 1))

    def read(self, layer: int, segment: int, first_key: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a segment from `first_key` up to its last new token, (1, K, S, D)."""
        places = self._places.get((segment, first_key))
        if places is None:
            places = self._places[segment, first_key] = self._find(segment, first_key)
        if isinstance(places, _Blocks):
            row = self.cache.row_of(layer)
            return places.read(self.cache, row), places.read(self.cache, row + 1)
        k_KSD, v_KSD = self._side_by_side(layer, places.start, len(places))
        return k_KSD[None], v_KSD[None]

    def _side_by_side(self, layer: int, place: int, num_keys: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values in slots from a place on, (K, S, D) each."""
        views = self._views.get((place, num_keys))
        if views is None:
            assert self.cache.pool is not None
            # Of all layers by one call.
            views = self._views[place, num_keys] = self.cache.pool[:, :, place : place + num_keys].unbind(0)
        row = self.cache.row_of(layer)
        return views[row], views[row + 1]

    def _find(self, number: int, first_key: int) -> "range | _Blocks":
        """The slots of the keys, if they lie side by side; otherwise their blocks."""
        size, (_, length, blocks, _) = self.cache.block_size, self.segments[number]
        first, last = first_key // size, (length - 1) // size
        used = list(blocks[first : last + 1])
        begin, end = first_key - first * size, length - first * size
        if used != list(range(used[0], used[0] + len(used))):
            return _Blocks(torch.tensor(used, device=self.cache.device), begin, end)
        return range(used[0] * size + begin, used[0] * size + end)

    def append_states(self, layer: int, x_1NC: Tensor) -> Tensor:
        """Store what a layer's local filter reads of the new tokens; return that of the two tokens before each,
        (N, 2, C), of any value where there are none."""
        if self._before_N2 is None:
            size, places = self.cache.block_size, []
            for num_new, length, blocks, _ in self.segments:
                for position in range(length - num_new, length):
                    earlier = (max(position - back, 0) for back in (2, 1))
                    places.append([blocks[place // size] * size + place % size for place in earlier])
            self._before_N2 = torch.tensor(places, device=self.cache.device)
        return self.cache.append_states(layer, self.slots_N, x_1NC[0], self._before_N2)

    def attends(self, config: ModelConfig, windows: Iterable[int], dtype: torch.dtype) -> dict[int, Attend]:
        """The Attend of the pass, for each of these windows, with that of each segment; see attend.attend_to."""
        lengths_1N = None
        if depends_on_length(config):
            ends = ((s.num_new, s.length, s.prompt_length) for s in self.segments)
            lengths = [
                max(position + 1, prompt) if prompt else length
                for num_new, length, prompt in ends for position in range(length - num_new, length)
            ]  # fmt: skip
            lengths_1N = torch.tensor([lengths], device=self.cache.device)
        common = common_to_layers(config, self.positions_1N, None, lengths_1N)
        dtype = mask_dtype(self.cache.device, dtype)
        return {window: self._attend(replace(common, step=self), window, dtype) for window in set(windows)}

    def _attend(self, common: Attend, window: int, dtype: torch.dtype) -> Attend:
        segments = []
        for number in self.longer:
            num_new, length, *_ = self.segments[number]
            own = replace(common, positions=common.positions[:, self.rows[number]], rope=None)
            segments.append(whole_rows(own, window, num_new, [length - num_new], None, True, dtype))
        size, device = self.cache.block_size, self.cache.device
        assert not (self.one_by_one and self.longer)
        arguments = self.num_new, size, window, common.slopes, device
        singles: list[Runs | Group | Table]
        if self.cache.attend_table is not None:
            # Its bits depend on a text's own keys alone.
            singles = [table_of(self._singles, *arguments)] if self._singles else []
        else:
            singles, others = [], self._singles
            if not self.one_by_one:
                runs, others = runs_of(others, size, window, common.slopes, self.cache.dtype, device)
                singles += [Runs(runs)] if runs else []
            singles += groups_of(others, *arguments, self.one_by_one)
        return replace(common, segments=tuple(segments), singles=tuple(singles))
