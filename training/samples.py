"""Texts that the model writes at each validation, so that a log shows more than a loss."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dataset.mixture import MixtureDataset
from dataset.opening import TaskDataset
from dataset.pretrain import PretrainDataset
from serving.generation import generate
from tokenizer.chat_template import template_of
from training.build import Built

_PROMPT_TOKENS = 32
"""Most tokens of a held-out text that begin a sample."""
_PATIENCE_S = 10.0
"""Time limit for all samples of a validation, as other ranks wait meanwhile."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    is_cut: bool
    """The time was over before the text ended."""


class Samples:
    """Writes --sample_texts continuations of --sample_prompt, or of beginnings of the validation set. Beginnings and
    random numbers are always the same, so that samples of one run can be compared. The run itself is not changed.

    If a forward pass needs all ranks, all write the same texts: the first rank draws each token, and its clock ends the
    work.
    """

    def __init__(self, built: Built):
        self._engine, self._context, self._dtype = built.engine, built.context, built.dtype
        data, flags = built.data, built.config.data
        self._model, self._seed, self._tokenizer = built.model, built.config.run.seed, data.tokenizer
        self._most, self._prompts = flags.sample_tokens, []
        self._stop_ids = frozenset([data.tokenizer.eod_id])
        if built.config.run.task.teaches_chat:
            self._stop_ids |= template_of(data.tokenizer).stop_ids
        if data.valid is None or not flags.sample_texts:
            return
        if flags.sample_prompt:
            own = [*data.tokenizer.begin_ids, *data.tokenizer.encode(flags.sample_prompt)]
            self._prompts = [own] * flags.sample_texts
        else:
            self._prompts = beginnings(data.valid, flags.sample_texts, data.tokenizer.eod_id)

    @torch.no_grad()
    def write(self) -> Iterator[Sample]:
        """Write the samples, between steps, when all weights are there: on one rank, or on all ranks if a forward pass
        needs them."""
        until = time.monotonic() + _PATIENCE_S
        was_training, longest = self._model.training, self._model.config.max_position_embeddings - 1
        self._model.eval()
        # Compiled blocks would be compiled again for every length.
        with torch.compiler.set_stance("force_eager"):
            for number, prompt in enumerate(self._prompts):
                ids, is_cut = [], False
                new = generate(
                    self._model, prompt[-longest:], self._most, self._stop_ids, seed=self._seed + number,
                    vocab_size=self._tokenizer.vocab_size, dtype=self._dtype, device=self._context.device,
                    agree=self._of_first,
                )  # fmt: skip
                for token_id in new:
                    ids.append(token_id)
                    if is_cut := bool(self._of_first(int(time.monotonic() > until))):
                        break
                yield Sample(self._tokenizer.decode(prompt), self._tokenizer.decode(ids), is_cut)
                if is_cut:
                    break
        self._engine.end_forward()
        self._model.train(was_training)

    def _of_first(self, value: int) -> int:
        """The first rank's value, on each rank that writes."""
        if not self._engine.forward_is_collective:
            return value
        return int(self._context.all_sum(torch.tensor(value if self._context.is_main else 0)))


def beginnings(dataset: TaskDataset, count: int, eod_id: int) -> list[list[int]]:
    """Prompts from texts of a set that lie far apart: the first tokens of a document, or a conversation up to its first
    answer."""
    if isinstance(dataset, PretrainDataset | MixtureDataset):
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64)
        return [_document_of(row, eod_id) for row in dataset.input_rows(chosen)]
    chosen = np.linspace(0, len(dataset.sequences) - 1, min(count, len(dataset.sequences))).astype(np.int64)
    found = (dataset.sequences.sequence(number) for number in chosen.tolist())
    prompts = [ids[: int(np.argmax(supervised))].tolist() for ids, supervised in found]
    # A text that begins with an answer makes no prompt.
    return [prompt for prompt in prompts if prompt]


def _document_of(row: np.ndarray, eod_id: int) -> list[int]:
    """Beginning of the first document that starts in the row; if none does, of the row."""
    ends = np.flatnonzero(row[: len(row) // 2] == eod_id)
    begin = int(ends[0]) + 1 if len(ends) else 0
    # Half of the model's positions are left for the continuation.
    text = row[begin : begin + max(1, min(_PROMPT_TOKENS, len(row) // 2))].tolist()
    # The first token stays, even if the document is empty: a continuation needs at least one.
    return text[: text.index(eod_id, 1)] if eod_id in text[1:] else text
