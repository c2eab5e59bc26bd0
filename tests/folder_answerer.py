"""The model of a folder as an Answerer that notes what it is asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from evaluation.answering import answerer_of
from evaluation.asking import Score, Scoring, Writing, Written
from serving.loading import load


class FolderAnswerer:
    """Answers by the engine, in float32 on the CPU."""

    can_write = True

    def __init__(self, folder: Path):
        self._inner = answerer_of(load(folder, {}, torch.device("cpu"), torch.float32))
        self.tokenizer, self.context = self._inner.tokenizer, self._inner.context
        self.asked: list[Scoring | Writing] = []

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        self.asked += asked
        return self._inner.score(asked)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        self.asked += asked
        return self._inner.write(asked)
