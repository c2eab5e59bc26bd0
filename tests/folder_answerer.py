"""The model of a folder as an Answerer that notes what it is asked."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from evaluation.asking import Score, Scoring, Writing, Written
from serving.generation import load_model
from tests.plain_answerer import PlainAnswerer


class FolderAnswerer(PlainAnswerer):
    """Answers in float32 on the CPU, and always writes the likeliest text."""

    def __init__(self, folder: Path):
        model, tokenizer, stop_ids = load_model(folder, torch.device("cpu"), torch.float32)
        super().__init__(model, tokenizer, model.config.max_position_embeddings)
        self._stops = stop_ids
        self.asked: list[Scoring | Writing] = []

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        self.asked += asked
        return super().score(asked)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        self.asked += asked
        return super().write([replace(one, temperature=0.0) for one in asked])
