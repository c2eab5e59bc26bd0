"""Loader: from positions in the run's stream to micro-batches on a rank.

A step with global batch G takes the next G positions of the stream. They are cut into micro-batches of B rows, and
micro-batch m goes to data rank m % data_size. So the stream and the gradient of a step do not depend on the number of
ranks. `row_ids` of a batch are the rows' positions in the stream; dropout is keyed by them, for the same reason.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dataset.pretrain import as_tensors
from utils.threads import background_threads

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
_ORDER_BLOCK = 4096


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def ids_at(self, seed: int, positions: np.ndarray) -> np.ndarray: ...

    def collate(self, sample_ids: np.ndarray) -> Batch: ...


@dataclass(frozen=True)
class Step:
    """A data rank's share of one step."""

    first: int
    """First position of the step's global batch in the stream."""
    last: int
    """Last position, inclusive."""
    micro_batches: list[Batch]


class TrainLoader:
    """Endless iterator over steps, which starts anywhere in constant time.

    Args:
        dataset: set that is read.
        seed: key of the order.
        micro_batch_size: B, the rows of a micro-batch.
        accumulation_steps: micro-batches of a step over all data ranks; a multiple of data_size.
        data_rank, data_size: number of this process among those that read different rows, and how many they are.
        first_position: position in the stream to start from (the run's samples_consumed).
        num_workers: threads that read ahead; with 0, reading happens on demand.
        pin_memory: whether tensors are page-locked, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        micro_batch_size: int,
        accumulation_steps: int,
        data_rank: int,
        data_size: int,
        first_position: int = 0,
        num_workers: int = 1,
        pin_memory: bool = False,
    ):
        if accumulation_steps % data_size:
            raise ValueError(f"{accumulation_steps} micro-batches a step do not split evenly over {data_size} ranks")
        self.dataset, self.seed, self.pin_memory = dataset, seed, pin_memory
        self.micro_batch_size, self.accumulation_steps = micro_batch_size, accumulation_steps
        self.data_rank, self.data_size = data_rank, data_size
        self._next_position = first_position
        self._block_start, self._block = first_position, np.empty(0, np.int64)
        self._pool = background_threads(num_workers, "read-ahead") if num_workers else None
        self._pending: deque[Future[Step]] = deque()
        self._depth = 2 * num_workers

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._pool is None:
            return self._read_step(*self._advance())
        while len(self._pending) < self._depth:
            self._pending.append(self._pool.submit(self._read_step, *self._advance()))
        return self._pending.popleft().result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _advance(self) -> tuple[int, np.ndarray]:
        """First position of the next step, and the sample ids of its whole global batch."""
        first, size = self._next_position, self.micro_batch_size * self.accumulation_steps
        self._next_position += size
        begin = first - self._block_start
        if begin + size > len(self._block):
            # Many positions at once: for a few, computing the order costs more than reading the rows.
            positions = first + np.arange(max(size, _ORDER_BLOCK), dtype=np.int64)
            self._block_start, self._block = first, self.dataset.ids_at(self.seed, positions)
            begin = 0
        return first, self._block[begin : begin + size]

    def _read_step(self, first: int, sample_ids: np.ndarray) -> Step:
        size = self.micro_batch_size
        micro_batches = []
        for index in range(self.data_rank, self.accumulation_steps, self.data_size):
            within = index * size + np.arange(size, dtype=np.int64)
            batch = self.dataset.collate(sample_ids[within]) | as_tensors({"row_ids": first + within})
            if self.pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            micro_batches.append(batch)
        return Step(first, first + size * self.accumulation_steps - 1, micro_batches)


def validation_batches(
    dataset: Dataset, batch_size: int, max_batches: int, data_rank: int, data_size: int, equally_many: bool = False
) -> tuple[int, Iterator[tuple[int, Batch]]]:
    """Batches of the validation set in its own order, the same on any number of ranks.

    Args:
        max_batches: number of batches of batch_size to use over all data ranks; 0 uses the whole set.
        data_rank, data_size: see TrainLoader.
        equally_many: let every data rank have as many; a batch with a number beyond the set's repeats an earlier one
            and must not count.
    Returns:
        the number of batches over all data ranks, and an iterator over this one's (batch number, batch).
    """
    count = -(-len(dataset) // batch_size)
    if max_batches:
        count = min(count, max_batches)

    def batches() -> Iterator[tuple[int, Batch]]:
        last = -(-count // data_size) * data_size if equally_many else count
        for index in range(data_rank, last, data_size):
            first = index % count * batch_size
            ids = np.arange(first, min(first + batch_size, len(dataset)), dtype=np.int64)
            yield index, dataset.collate(ids) | as_tensors({"row_ids": ids})

    return count, batches()


def batch_digest(batch: Batch) -> int:
    """64-bit digest of the real content of a micro-batch, without padding."""
    sample_ids = batch["sample_ids"].numpy()
    rows = list(batch["input_ids"].numpy())
    if "lengths" in batch:
        rows = [row[:length] for row, length in zip(rows, batch["lengths"].tolist())]
        # A sample may have several rows.
        each = len(rows) // len(sample_ids)
        rows = [np.concatenate(rows[begin : begin + each]) for begin in range(0, len(rows), each)]
    return rows_digest(sample_ids, rows)


def num_tokens(batch: Batch) -> int:
    """Number of positions of a batch, without padding."""
    return int(batch["lengths"].sum()) if "lengths" in batch else batch["input_ids"].numel()


def rows_digest(sample_ids: np.ndarray, rows: Iterable[np.ndarray]) -> int:
    """64-bit digest of rows: the sum, modulo 2**64, of blake2b(sample id, input tokens as little-endian uint32).

    A sum does not depend on how rows were spread over micro-batches and ranks, yet it changes if a row is used twice or
    left out.

    Args:
        sample_ids: (B,)
        rows: tokens of each sample.
    """
    total = 0
    for sample_id, row in zip(sample_ids, rows):
        content = sample_id.astype("<i8").tobytes() + row.astype("<u4").tobytes()
        total += int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return total % (1 << 64)
