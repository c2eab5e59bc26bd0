"""Pretraining samples: rows of max_seq_len + 1 consecutive tokens, read through memory maps.

Shapes: B rows in a batch, T = max_seq_len.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.format import (
    BIN_HEADER_BYTES,
    BUILD_INDEX_COMMAND,
    PRETOKENIZE_COMMAND,
    BinHeader,
    map_tokens,
    read_bin_header,
    read_index,
    require_made_with,
)
from dataset.order import sample_at
from utils.files import sha256_of_file

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""


def as_tensors(arrays: Mapping[str, np.ndarray]) -> "dict[str, torch.Tensor]":
    """The same memory as tensors. Only here does a data set need torch, whose import takes seconds, so that commands
    which look at data without training start at once."""
    import torch

    return {name: torch.from_numpy(values) for name, values in arrays.items()}


class PretrainDataset:
    """One set (train or valid) of a pretokenized directory.

    Args:
        data_dir: directory with the `.bin` and `.ibin` files.
        split: "train" or "valid".
        max_seq_len: T; an index for it must have been built.
        document_mask: whether positions and attention restart at each document, and the token after an end-of-document
            token is not supervised. Without it, a row is one text.
    Raises:
        ValueError: files are missing, damaged, or not the ones that the index maps.
    """

    def __init__(self, data_dir: str | Path, split: str, max_seq_len: int, document_mask: bool = True):
        data_dir = Path(data_dir)
        index = read_index(data_dir, split, max_seq_len)
        self.rows, self.max_seq_len, self.fingerprint = index.rows, max_seq_len, index.fingerprint
        self.document_mask = document_mask
        self._paths = [data_dir / name for name in index.file_names]
        self._tokens: list[np.ndarray] = []
        self.headers: list[BinHeader] = []
        for name, fingerprint in zip(index.file_names, index.file_fingerprints):
            header = read_bin_header(data_dir / name)
            if header.fingerprint != fingerprint:
                raise ValueError(
                    f"{data_dir / name} is not the file that the index was built for: run "
                    f"`{BUILD_INDEX_COMMAND} --data_dir {data_dir} --max_seq_len {max_seq_len}` again"
                )
            self.headers.append(header)
            self._tokens.append(map_tokens(data_dir / name, header))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def header(self) -> BinHeader:
        """Header of the first file; vocabulary, end-of-document id and tokenizer are the same in all files."""
        return self.headers[0]

    @property
    def valid_ratio(self) -> float:
        return self.header.valid_ratio

    def description(self) -> str:
        """Sentence on the samples, for people."""
        return f"{len(self):,} samples of {self.max_seq_len} tokens"

    def context_and_supervised_share(self) -> tuple[float, float]:
        """Figures for FLOPs: the length that a token may attend to, ignoring document masks, and the share of tokens
        that get logits."""
        return self.max_seq_len, 1.0

    def input_rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Input tokens of the given samples, (B, T) int64."""
        return self.read_rows(sample_ids)[:, :-1]

    def longest(self) -> int:
        """Number of a sample that takes the most positions: all take the same."""
        return 0

    def check(self, tokenizer_fingerprint: str, valid_ratio: float | None = None) -> None:
        """Check that the set was made with this tokenizer and ratio, see require_made_with."""
        tokenizers = (self.header.tokenizer_fingerprint, tokenizer_fingerprint)
        require_made_with("the data", PRETOKENIZE_COMMAND, tokenizers, self.valid_ratio, valid_ratio)

    def check_content(self) -> None:
        """Read and check all tokens.

        Raises:
            ValueError: they are not those that were written.
        """
        for path, header in zip(self._paths, self.headers):
            if sha256_of_file(path, BIN_HEADER_BYTES) != header.content_sha256:
                raise ValueError(f"{path} is damaged: delete it and run `{PRETOKENIZE_COMMAND}` again")

    def read_rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Tokens of the given samples, each with the token that follows it: (B,) ids -> (B, T + 1) int64."""
        length = self.max_seq_len + 1
        out = np.empty((len(sample_ids), length), np.int64)
        for row, (file, offset) in zip(out, self.rows[sample_ids].tolist()):
            filled = 0
            while filled < length:
                piece = self._tokens[file][offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                file, offset = file + 1, 0
        if out.size and out.max() >= self.header.vocab_size:
            raise ValueError(
                f"a shard of {self._paths[0].parent} holds tokens outside its vocabulary: find it with "
                f"`python -m dataset.inspect {self._paths[0].parent} --verify`"
            )
        return out

    def ids_at(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Ids of the samples at positions of the run's stream."""
        return sample_at(seed, positions, len(self))

    def collate(self, sample_ids: np.ndarray) -> "dict[str, torch.Tensor]":
        """Batch of the given samples; see `batch_of`."""
        return self.batch_of(self.read_rows(sample_ids), sample_ids)

    def batch_of(self, tokens: np.ndarray, sample_ids: np.ndarray) -> "dict[str, torch.Tensor]":
        """Batch of samples that were read.

        Args:
            tokens: (B, T + 1), see `read_rows`.
        Returns:
            input_ids (B, T) int64; labels (B, T) int64, IGNORE_INDEX where not supervised; positions (B, T) int64;
            with document_mask also document_ids (B, T) int64, equal where two tokens share a document;
            sample_ids (B,) int64.
        """
        input_ids, labels = tokens[:, :-1], tokens[:, 1:].copy()
        batch = {"input_ids": input_ids.copy(), "sample_ids": sample_ids.copy()}
        columns = np.broadcast_to(np.arange(self.max_seq_len), input_ids.shape)
        if self.document_mask:
            ends_document = input_ids == self.header.eod_id
            labels[ends_document] = IGNORE_INDEX
            starts_document = np.zeros_like(ends_document)
            starts_document[:, 1:] = ends_document[:, :-1]
            document_ids = np.cumsum(starts_document, axis=1)
            document_start = np.maximum.accumulate(np.where(starts_document, columns, 0), axis=1)
            batch["positions"] = columns - document_start
            batch["document_ids"] = document_ids
        else:
            batch["positions"] = columns.copy()
        batch["labels"] = labels
        return as_tensors(batch)
