"""Scores by forward passes through the engine of a training run: naive, sharded or a pipeline, as they validate.

    requests -> batches, the same on any number of ranks -> engine.evaluate(batch, ScoringTask) -> two sums for each row

A batch has a fixed shape: the width follows from its longest row, and the number of rows from the width. Rows that are
missing are filled up. So a score does not depend on how many ranks there are, and hardly on what else is asked.

Names: B rows, T positions, N positions whose tokens' probabilities are wanted, V tokens, C hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from evaluation.asking import Scoring
from model import Decoder
from model.loss import IGNORE_INDEX
from tasks.task import Batch, Loss, Task, select_supervised

_TOKENS = {"cpu": 1 << 10, "cuda": 1 << 13}
"""Positions of a batch."""
_FINEST, _STEPS = 16, 8
"""Widths are multiples of the first, and from one power of two to the next there are so many of them at most."""
_LOGIT_BYTES = 1 << 27
"""Most memory for logits in float32 at a time."""


class Cut(NamedTuple):
    """The requests of a batch, and its shape."""

    places: tuple[int, ...]
    """Numbers of the requests."""
    rows: int
    width: int


def cut(asked: Sequence[Scoring], context: int, device: str) -> list[Cut]:
    """Cut requests into batches, the longest first.

    Args:
        context: positions that the model knows.
        device: "cpu" or "cuda".
    Raises:
        ValueError: a request is longer than the context, or there is nothing to score in it.
    """
    by_width: dict[int, list[int]] = {}
    for place, one in enumerate(asked):
        length = len(one.context) + len(one.continuation) - 1
        if not (one.context and one.continuation):
            raise ValueError("a text is to be scored that has no tokens, or no tokens before it")
        if length > context:
            raise ValueError(f"a text of {length} tokens is to be scored, and the model knows {context} positions")
        by_width.setdefault(min(_width(length), context), []).append(place)
    batches = []
    for width in sorted(by_width, reverse=True):
        rows, places = max(1, _TOKENS[device] // width), by_width[width]
        batches += [Cut(tuple(places[first : first + rows]), rows, width) for first in range(0, len(places), rows)]
    return batches


def _width(length: int) -> int:
    """The length, rounded up."""
    step = max(_FINEST, (1 << (length - 1).bit_length()) // (2 * _STEPS))
    return -(-length // step) * step


def collate(asked: Sequence[Scoring], rows: int, width: int) -> Batch:
    """Batch of requests, one a row.

    Returns:
        input_ids (B, T) int64; labels (B, T) int64, IGNORE_INDEX where nothing is wanted; positions (B, T) int64;
        supervised (N,) int64, the flat positions b * T + t of the labels.
    """
    input_ids, positions = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, width, dtype=torch.int64)
    labels = torch.full((rows, width), IGNORE_INDEX)
    for row, one in enumerate(asked):
        ids = torch.tensor(one.context + one.continuation)
        first, end = len(one.context) - 1, len(ids) - 1
        input_ids[row, :end], positions[row, :end] = ids[:-1], torch.arange(end)
        labels[row, first:end] = ids[first + 1 :]
    supervised = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return {"input_ids": input_ids, "labels": labels, "positions": positions, "supervised": supervised}


class ScoringTask(Task):
    """Log-probability of each row's labels, and how many of them are the likeliest tokens. It does not train.

    Args:
        vocab_size: tokens that there are; the model may have more rows.
    """

    count_name = "rows"
    metric_names = ("logprobs", "greedy")
    """Here sums over the tokens of each row, float64 (B,)."""

    def __init__(self, model: Decoder, vocab_size: int):
        super().__init__(model, dropout_seed=0)
        self.vocab_size = vocab_size

    @classmethod
    def build(cls, model: Decoder, dropout_seed: int, byte_lengths: Tensor, options: None) -> Self:
        return cls(model, len(byte_lengths))

    def count(self, batch: Batch) -> int:
        return len(batch["input_ids"])

    def figures(self, loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": loss_sum / count}

    def loss(self, hidden_BTC: Tensor, batch: Batch) -> Loss:
        labels_N, hidden_NC = select_supervised(batch, hidden_BTC)
        rows, width = batch["input_ids"].shape
        found_N2 = torch.cat(list(self._scores(hidden_NC, labels_N)))
        # Not scatter-add, whose order of additions varies on a GPU.
        table = found_N2.new_zeros(rows * width, 2).index_copy(0, batch["supervised"], found_N2)
        logprobs_B, greedy_B = self.of_rows(*table.view(rows, width, 2).sum(1).unbind(-1))
        return -logprobs_B.sum(), rows, {"logprobs": logprobs_B, "greedy": greedy_B}

    def _scores(self, hidden_NC: Tensor, labels_N: Tensor) -> Iterator[Tensor]:
        """(Log-probability, whether it is the likeliest) of some labels after the others, float64 (n, 2)."""
        # Logits, not Decoder.token_logprobs: only they tell which token is the likeliest, with any kernel.
        size = max(1, _LOGIT_BYTES // (4 * self.model.config.vocab_size))
        for labels, hidden in zip(labels_N.split(size), hidden_NC.split(size)):
            logits = self.model.logits(hidden)[:, : self.vocab_size].float()
            # A position without a label stands for a part of a row without any.
            is_wanted = labels != IGNORE_INDEX
            label = labels.clamp(min=0)
            logprobs = logits.log_softmax(-1).gather(-1, label[:, None])[:, 0]
            is_greedy = logits.argmax(-1) == label
            yield torch.stack([logprobs.double(), is_greedy.double()], dim=-1) * is_wanted[:, None]
