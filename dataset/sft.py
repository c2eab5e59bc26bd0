"""SFT samples: sequences with supervised stretches, packed into rows or one a row.

Shapes: B rows in a batch; T positions: those of the batch's longest row, rounded up.

A sequence of n tokens takes n - 1 positions. All tokens but the last are inputs; all tokens but the first are labels
where they are supervised. So no label ever comes from another sequence.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.order import sample_at
from dataset.packing import pack
from dataset.pretrain import IGNORE_INDEX, as_tensors
from dataset.sequences import SequenceSet

if TYPE_CHECKING:
    import torch

ROUND_UP = 8
"""Factor of the rows' lengths, which attention kernels need."""
PADDING = -1
"""Document id of the positions after a packed row's last sequence."""


class SFTDataset:
    """One set (train or valid) of a directory that was pretokenized for SFT.

    Args:
        packing: whether a sample is a row of several sequences, fixed by their lengths, in which attention and
        positions
            restart at each sequence. Without it, a sample is one sequence.
    Raises:
        ValueError: see SequenceSet.
    """

    def __init__(self, data_dir: str | Path, split: str, max_seq_len: int, packing: bool = True):
        self.sequences = SequenceSet(data_dir, split, "sft", max_seq_len)
        self.max_seq_len, self.packing, self.check = max_seq_len, packing, self.sequences.check
        self.valid_ratio = self.sequences.valid_ratio
        lengths = self.sequences.lengths - 1
        self._rows, self.fingerprint = None, self.sequences.fingerprint
        if packing:
            rows = pack(lengths, max_seq_len)
            # Unshuffled, the first rows would hold the longest sequences, and --valid_iters may look at those alone.
            self._rows = [rows[index] for index in sample_at(0, np.arange(len(rows)), len(rows))]
            self.fingerprint = hashlib.sha256(f"packed {self.fingerprint}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.sequences) if self._rows is None else len(self._rows)

    def members(self, sample_id: int) -> np.ndarray:
        """Numbers of the sequences of a sample."""
        return np.array([sample_id]) if self._rows is None else self._rows[sample_id]

    def context_and_supervised_share(self) -> tuple[float, float]:
        return self.sequences.context_and_supervised_share()

    def description(self) -> str:
        """Sentence on the samples and how full they are, for people."""
        count, tokens = len(self.sequences), int(self.sequences.lengths.sum())
        share = f"{self.sequences.supervised_tokens / tokens:.0%} of the tokens supervised"
        if self._rows is None:
            return f"{count:,} sequences of {tokens / count:,.0f} tokens on average, each by itself, {share}"
        full = (tokens - count) / (len(self) * self.max_seq_len)
        rows = f"{len(self):,} rows of {self.max_seq_len} positions that are {full:.1%} full"
        return f"{count:,} sequences packed into {rows}, {share}"

    def ids_at(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Ids of the samples at positions of the run's stream."""
        return sample_at(seed, positions, len(self))

    def longest(self) -> int:
        """Number of a sample that takes the most positions."""
        lengths = self.sequences.lengths - 1
        if self._rows is not None:
            lengths = np.array([lengths[row].sum() for row in self._rows])
        return int(lengths.argmax())

    def input_rows(self, sample_ids: np.ndarray) -> list[np.ndarray]:
        """Input tokens of the given samples, each of its own length."""
        return [self.sequences.inputs(self.members(sample_id)) for sample_id in sample_ids.tolist()]

    def collate(self, sample_ids: np.ndarray) -> "dict[str, torch.Tensor]":
        """Batch of the given samples.

        Returns:
            input_ids (B, T) int64; labels (B, T) int64, IGNORE_INDEX where not supervised; positions (B, T) int64; if
            packed, document_ids (B, T) int64, equal where two tokens share a sequence; supervised (N,) int64, the
            flat positions b * T + t of the N supervised ones; lengths (B,) int64, positions without padding;
            sample_ids (B,) int64.
        """
        rows = [[self.sequences.sequence(number) for number in self.members(i)] for i in sample_ids.tolist()]
        batch = padded(rows, self.max_seq_len, self.sequences.header.pad_id)
        if self._rows is None:
            # Padding comes last, so that causal attention needs no mask against it.
            del batch["document_ids"]
        return batch | as_tensors({"sample_ids": sample_ids.copy()})


def padded(rows: list[list[tuple[np.ndarray, np.ndarray]]], max_seq_len: int, pad_id: int) -> "dict[str, torch.Tensor]":
    """Batch of rows of (tokens, supervised) sequences, as long as the longest row; see SFTDataset.collate."""
    lengths = np.array([sum(len(ids) - 1 for ids, _ in row) for row in rows], np.int64)
    width = min(-(-int(lengths.max()) // ROUND_UP) * ROUND_UP, max_seq_len)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    document_ids = np.full((len(rows), width), PADDING, np.int64)
    for index, row in enumerate(rows):
        begin = 0
        for document, (ids, supervised) in enumerate(row):
            end = begin + len(ids) - 1
            input_ids[index, begin:end] = ids[:-1]
            # Widened first: 16 unsigned bits turn IGNORE_INDEX into token 65436.
            labels[index, begin:end] = np.where(supervised[1:], ids[1:].astype(np.int64), IGNORE_INDEX)
            positions[index, begin:end] = np.arange(len(ids) - 1)
            document_ids[index, begin:end] = document
            begin = end
    flat = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)
    arrays = {"input_ids": input_ids, "labels": labels, "positions": positions, "document_ids": document_ids,
              "supervised": flat, "lengths": lengths}  # fmt: skip
    return as_tensors(arrays)


def widened(batch: "dict[str, torch.Tensor]", length: int) -> "dict[str, torch.Tensor]":
    """A batch of SFTDataset or DPODataset whose rows are padded to `length` positions."""
    from torch.nn.functional import pad

    width = batch["input_ids"].shape[1]
    more = length - width
    if not more:
        return batch
    filled = {"input_ids": 0, "labels": IGNORE_INDEX, "positions": 0, "document_ids": PADDING}
    wide = {name: pad(batch[name], (0, more), value=value) for name, value in filled.items() if name in batch}
    if "supervised" in batch:
        wide["supervised"] = batch["supervised"] + batch["supervised"] // width * more
    return batch | wide
