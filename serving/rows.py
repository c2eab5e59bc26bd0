"""Scores of next tokens as a request's options change them, and the random numbers that it draws by.

A row of a batch is a sequence whose next token is chosen. Nothing here depends on the other rows.

Shapes: R rows, V vocabulary, N scores that change.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from serving.requests import Sampling

_WORD = 1 << 64


def uniforms(seed: int, choice: int, number: int, count: int) -> np.ndarray:
    """Random numbers in [0, 1) for one step of one text, float64.

    Args:
        seed: the request's, from -2^63 to 2^64 - 1.
        choice: number of the text among those of its request.
        number: index of the token among those that were generated.
        count: how many; the first ones do not depend on it.
    """
    key = np.array([seed % _WORD, choice], dtype=np.uint64)
    counter = np.array([0, number, 0, 0], dtype=np.uint64)
    words = np.atleast_1d(np.random.Philox(key=key, counter=counter).random_raw(count))
    return (words >> np.uint64(11)) * 2.0**-53


def uniform(seed: int, choice: int, number: int) -> float:
    """Random number in [0, 1) that draws a token; see `uniforms`."""
    return float(uniforms(seed, choice, number, 1)[0])


class RowState:
    """What the choice of a sequence's next token depends on, besides its scores."""

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        choice: int = 0,
        prompt_ids: Sequence[int] = (),
        stop_ids: frozenset[int] = frozenset(),
    ):
        """
        Args:
            seed: the request's, or the random one in its place.
            choice: number of the text among those of its request.
            stop_ids: tokens that end this text, which are not chosen before `min_new_tokens`.
        """
        self.sampling, self.seed, self.choice, self.stop_ids = sampling, seed, choice, stop_ids
        self.number = 0
        """Number of generated tokens."""
        self.is_penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.empty(16, np.int64), np.empty(16, np.float32)
        if self.is_penalised:
            for token_id in prompt_ids:
                self._count(token_id, 0)

    def push(self, token_id: int) -> None:
        """Add a generated token."""
        self.number += 1
        if self.is_penalised:
            self._count(token_id, 1)

    def fork(self) -> "RowState":
        """A copy that goes another way, as beams do."""
        other = RowState(self.sampling, self.seed, self.choice, (), self.stop_ids)
        other.number, other._places = self.number, dict(self._places)
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Different tokens of prompt and text, int64, and how often the text has each, float32. Empty if nothing is
        penalised."""
        return self._ids[: len(self._places)], self._counts[: len(self._places)]

    @property
    def waits(self) -> bool:
        """Whether it is too early for a stop token."""
        return self.number < self.sampling.min_new_tokens and bool(self.stop_ids)

    def _count(self, token_id: int, times: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token_id, 0
        self._counts[place] += times


def adjust(scores_RV: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Scores with bias, penalties and forbidden stop tokens, float32 (R, V); the same tensor if no row has any.

    As in transformers, the bias comes before `repetition_penalty`. The other penalties follow.

    Args:
        scores_RV: scores, or log-probabilities in a beam search; float32.
    """
    if not any(row.is_penalised or row.sampling.logit_bias or row.waits for row in rows):
        return scores_RV
    scores_RV = scores_RV.clone()
    biased = [(r, row.sampling.logit_bias) for r, row in enumerate(rows) if row.sampling.logit_bias]
    if biased:
        ids = [np.fromiter(bias.keys(), np.int64, len(bias)) for _, bias in biased]
        added = np.concatenate([np.fromiter(bias.values(), np.float32, len(bias)) for _, bias in biased])
        _change(scores_RV, [r for r, _ in biased], ids, lambda values, added: values + added, added)
    penalised = [r for r, row in enumerate(rows) if row.is_penalised]
    if penalised:
        seen = [rows[r].seen for r in penalised]
        lengths = [len(ids) for ids, _ in seen]
        factors, once, each = (
            np.repeat(np.array([getattr(rows[r].sampling, name) for r in penalised], np.float32), lengths)
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
        )
        counts = np.concatenate([counts for _, counts in seen])
        taken = once * (counts > 0) + each * counts
        _change(scores_RV, penalised, [ids for ids, _ in seen], _penalised, factors, taken)
    waiting = [r for r, row in enumerate(rows) if row.waits]
    if waiting:
        ids = [np.fromiter(rows[r].stop_ids, np.int64, len(rows[r].stop_ids)) for r in waiting]
        _change(scores_RV, waiting, ids, lambda values: torch.full_like(values, -math.inf))
    return scores_RV


def _penalised(values: Tensor, factors: Tensor, taken: Tensor) -> Tensor:
    return torch.where(values < 0, values * factors, values / factors) - taken


def _change(
    scores_RV: Tensor,
    rows: list[int],
    ids: list[np.ndarray],
    change: Callable[..., Tensor],
    *arguments: np.ndarray,
) -> None:
    """Change some scores in place.

    Args:
        rows: their rows; ids: the tokens in each of these.
        change: given the scores, (N,), and the arguments, returns the new ones.
    """
    at_rows = np.repeat(np.array(rows, np.int64), [len(some) for some in ids])
    places = [torch.from_numpy(index).to(scores_RV.device) for index in (at_rows, np.concatenate(ids))]
    others = [torch.from_numpy(argument).to(scores_RV.device) for argument in arguments]
    scores_RV[places[0], places[1]] = change(scores_RV[places[0], places[1]], *others)
