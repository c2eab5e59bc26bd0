"""DPO samples: a prompt with a chosen and a rejected answer.

Shapes: B pairs in a batch, hence 2 B rows: chosen and rejected in turns. T as in sft.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.order import sample_at
from dataset.pretrain import as_tensors
from dataset.sequences import SequenceSet
from dataset.sft import padded

if TYPE_CHECKING:
    import torch


class DPODataset:
    """One set (train or valid) of a directory that was pretokenized for DPO.

    Raises:
        ValueError: see SequenceSet.
    """

    def __init__(self, data_dir: str | Path, split: str, max_seq_len: int):
        self.sequences = SequenceSet(data_dir, split, "dpo", max_seq_len)
        self.max_seq_len, self.check = max_seq_len, self.sequences.check
        self.valid_ratio, self.fingerprint = self.sequences.valid_ratio, self.sequences.fingerprint
        self.reference: np.ndarray | None = None
        """Log-probabilities of the answers under the reference model, float32 (number of pairs, 2); set before
        training, see tasks/reference.py."""

    def __len__(self) -> int:
        return len(self.sequences) // 2

    def members(self, sample_id: int) -> np.ndarray:
        """Numbers of a sample's two sequences, the chosen and the rejected one."""
        return 2 * sample_id + np.arange(2)

    def context_and_supervised_share(self) -> tuple[float, float]:
        return self.sequences.context_and_supervised_share()

    def description(self) -> str:
        tokens = int(self.sequences.lengths.sum())
        return (
            f"{len(self):,} pairs of {tokens / len(self.sequences):,.0f} tokens an answer with its prompt on average, "
            f"{self.sequences.supervised_tokens / tokens:.0%} of the tokens in answers"
        )

    def ids_at(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Ids of the samples at positions of the run's stream."""
        return sample_at(seed, positions, len(self))

    def longest(self) -> int:
        """Number of a pair with one of the longest answers."""
        return int(self.sequences.lengths.argmax()) // 2

    def input_rows(self, sample_ids: np.ndarray) -> list[np.ndarray]:
        """Input tokens of some pairs, each the chosen row's followed by the rejected one's."""
        return [self.sequences.inputs(self.members(pair)) for pair in sample_ids.tolist()]

    def collate(self, sample_ids: np.ndarray) -> "dict[str, torch.Tensor]":
        """Batch of the given pairs.

        Returns:
            input_ids, labels, positions (2 B, T), supervised (N,), lengths (2 B,) as SFTDataset.collate has them;
            sample_ids (B,) int64; if there is a reference, reference (B, 2) float32.
        """
        rows = [[self.sequences.sequence(number)] for pair in sample_ids.tolist() for number in self.members(pair)]
        batch = padded(rows, self.max_seq_len, self.sequences.header.pad_id)
        del batch["document_ids"]
        more = {"sample_ids": sample_ids.copy()}
        if self.reference is not None:
            more["reference"] = self.reference[sample_ids]
        return batch | as_tensors(more)
