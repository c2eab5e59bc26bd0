"""Blocks of the cache of keys and values: who has which, and what can be found again. Plain data, without torch.

The cache is a pool of blocks, each with room for the keys and values of `block_size` tokens (paged attention: Kwon et
al., SOSP 2023). A sequence has a table of blocks. A block can be in several tables, and counts them:

    free -> used -> full, known by its key -> unused, still known -> used again by who brings the same tokens
                                                                  -> evicted when a block is needed, oldest first

The key of a full block is a hash of its tokens and of the key of the block before it. So it stands for all tokens up to
the block's end, and for the adapter that computed them, with which the chain begins.

Attention reads a sequence in place if its blocks follow each other in the pool. A new table therefore begins a run of
free blocks that is as long as the sequence may become. Others avoid the rest of that run while there is room elsewhere.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

_USED = np.iinfo(np.int64).max


def first_key(adapter: str | None, group: int = 0) -> bytes:
    """Beginning of the chain of keys of a sequence that an adapter computes. Sequences of different groups share
    nothing."""
    name = b"" if adapter is None else b"=" + adapter.encode()
    return hashlib.blake2b(b"%d" % group + name, digest_size=16).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block with these tokens after the block with another key. A user cannot make two that are equal."""
    return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(eq=False)
class Table:
    """Blocks of one sequence, in order."""

    owner: int
    blocks: list[int] = field(default_factory=list)
    room: range = range(0)
    """Blocks that others avoid, so that the sequence can go on in one run."""


class Blocks:
    """The pool.

    Args:
        count: number of blocks.
        block_size: tokens in each.
        shares_prefixes: whether full blocks can be found by their keys.
    """

    def __init__(self, count: int, block_size: int, shares_prefixes: bool = True):
        self.count, self.block_size, self.shares_prefixes = count, block_size, shares_prefixes
        self.users = [0] * count
        """Number of tables that each block is in."""
        self.num_free = count
        """Blocks that nobody uses, those that are still known included."""
        self._keys: list[bytes | None] = [None] * count
        self._known: dict[bytes, int] = {}
        # When each block was used last: 0 if nobody can find it again. And the owner for whom it is avoided, 0: none.
        self._times = np.zeros(count, dtype=np.int64)
        self._avoided_for = np.zeros(count, dtype=np.int64)
        self._time = self._num_owners = 0

    @property
    def num_used(self) -> int:
        return self.count - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def key_of(self, block: int) -> bytes | None:
        """Key by which a block is known."""
        return self._keys[block]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks known by the first of these keys, up to one that is missing."""
        found: list[int] = []
        for key in keys:
            if key not in self._known:
                break
            found.append(self._known[key])
        return found

    def open(self, shared: Iterable[int] = ()) -> Table:
        """A new table that begins with blocks of others, or with known ones."""
        self._num_owners += 1
        table = Table(self._num_owners)
        for block in shared:
            self._use(block)
            table.blocks.append(block)
        return table

    def fork(self, table: Table) -> Table:
        """A table with the same blocks."""
        return self.open(table.blocks)

    def grow(self, table: Table, count: int, expected: int) -> None:
        """Add blocks to a table; there must be so many free ones.

        Args:
            expected: number that may follow in all, these included.
        """
        assert count <= self.num_free
        for number in range(count):
            block = self._next_block(table, count - number, max(expected, count) - number)
            self._forget(block)
            self._use(block)
            table.blocks.append(block)

    def make_own(self, table: Table, expected: int) -> tuple[int, int] | None:
        """Replace a table's last block, if others use it too, by a free one before it is written; there must be one.
        Return what to copy, as (from, to).

        Args:
            expected: number of blocks that may be needed from here on, this one included.
        """
        old = table.blocks[-1]
        if self.users[old] == 1:
            return None
        del table.blocks[-1]
        self.grow(table, 1, expected)
        self._release(old)
        return old, table.blocks[-1]

    def know(self, block: int, key: bytes) -> None:
        """Let a full block be found by its key, unless another with the same contents can be found already."""
        if self.shares_prefixes and self._keys[block] is None and key not in self._known:
            self._keys[block], self._known[key] = key, block

    def close(self, table: Table) -> None:
        """Release a table's blocks. Of those that stay known, the last are evicted first, as none is found without
        those before it."""
        self._avoid(table, range(0))
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks = []

    def _use(self, block: int) -> None:
        if not self.users[block]:
            self.num_free -= 1
            self._times[block] = _USED
        self.users[block] += 1

    def _release(self, block: int) -> None:
        self.users[block] -= 1
        if not self.users[block]:
            self._time += 1
            self._times[block] = self._time if self._keys[block] is not None else 0
            self.num_free += 1

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._known[key]
            self._keys[block] = None
        if not self.users[block]:
            self._times[block] = 0

    def _avoid(self, table: Table, room: range) -> None:
        old = slice(table.room.start, table.room.stop)
        self._avoided_for[old][self._avoided_for[old] == table.owner] = 0
        self._avoided_for[room.start : room.stop] = table.owner
        table.room = room

    def _next_block(self, table: Table, needed: int, expected: int) -> int:
        """A free block for a table: the one after its last, or the first of a new run."""
        after = table.blocks[-1] + 1 if table.blocks else self.count
        if after < self.count and not self.users[after]:
            owner = self._avoided_for[after]
            if owner == table.owner or (not owner and not self._times[after]):
                return after
        elsewhere = np.where(self._avoided_for == 0, self._times, _USED)
        start = _start_of_run(elsewhere, expected)
        if start is None:
            # From the end, where a run that is kept for another sequence is needed last.
            start = _start_of_run(self._times[::-1], needed)
            assert start is not None
            start = (self.count - start[0] - start[1], start[1])
        self._avoid(table, range(start[0], start[0] + start[1]))
        return start[0]


def _start_of_run(times_N: np.ndarray, length: int) -> tuple[int, int] | None:
    """Start and length of the run of free blocks whose latest use is longest ago. If none is so long: of one half as
    long, and so on. None: no block is free."""
    length = min(length, len(times_N))
    while length:
        # Latest use in each run, from that in runs of 1, 2, 4 ... blocks.
        latest, span = times_N, 1
        while 2 * span <= length:
            latest, span = np.maximum(latest[:-span], latest[span:]), 2 * span
        num_runs = len(times_N) - length + 1
        latest = np.maximum(latest[:num_runs], latest[length - span :][:num_runs])
        start = int(latest.argmin())
        if latest[start] != _USED:
            return start, length
        length //= 2
    return None
