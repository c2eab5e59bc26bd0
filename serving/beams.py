"""Beam search, and beam sampling, over the scores of one request's texts. It equals transformers' (version 5).

Several texts, the beams, grow by one token at a time. Of all ways to continue one of them, a few more than there are
beams become candidates: those with the highest sums of log-probabilities, or as many as are drawn by these. A
candidate that has ended competes for a place among the best texts; the others are the next beams.

    scores (B, V) -> advance -> for each new beam, the beam that it continues and its token
    results -> the best texts

Which candidates end, and how long the search goes on, is the subject of `Sampling.early_stopping`.

Shapes: B beams, V vocabulary, C candidates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serving.requests import Sampling
from serving.rows import RowState, adjust, uniforms
from serving.sampling import filtered

_IMPOSSIBLE = -1.0e9
"""Score of what must not be chosen. As in transformers it is added to scores, and finite."""


class BeamText(NamedTuple):
    """A text that a search found."""

    ids: tuple[int, ...]
    """Its new tokens, without the stop token."""
    score: float
    """Sum of its log-probabilities, after penalties and temperature, divided by its length to the power of
    `length_penalty`. The stop token counts."""
    has_stopped: bool
    """Whether it ended with a stop token, and not at its limit."""


class Advance(NamedTuple):
    """What the model computes next."""

    parents: list[int]
    """For each new beam, the number of the beam that it continues; of the first scores' single row, 0."""
    tokens: list[int]
    """Its new token."""
    is_done: bool
    """Whether the search has ended. There are no more beams then."""


class BeamSearch:
    """The search for one request's texts.

    With temperature 0 it takes the best candidates; otherwise it draws them, by random numbers that are a function of
    the seed and the step. Options that change scores apply to log-probabilities, as in transformers.
    """

    def __init__(
        self, sampling: Sampling, seed: int, prompt_ids: Sequence[int], stop_ids: frozenset[int], max_new_tokens: int
    ):
        """
        Args:
            seed: the request's, or the random one in its place.
            stop_ids: tokens that end a text.
            max_new_tokens: at least 1: what is asked for, or as much as fits.
        """
        self._sampling, self._seed, self._stop_ids, self._most = sampling, seed, stop_ids, max_new_tokens
        self._num_beams = sampling.num_beams
        self._num_candidates = max(2, 1 + len(stop_ids)) * self._num_beams
        self._rows = [RowState(sampling, seed, 0, prompt_ids, stop_ids)] * self._num_beams
        self._beams: list[tuple[int, ...]] = [()] * self._num_beams
        # All beams are the prompt at first: only one of them counts.
        self._scores_B = torch.full((self._num_beams,), _IMPOSSIBLE)
        self._scores_B[0] = 0.0
        self._best: list[tuple[int, ...]] = [()] * self._num_beams
        self._best_scores_B = torch.full((self._num_beams,), _IMPOSSIBLE)
        self._best_ended_B = torch.zeros(self._num_beams, dtype=torch.bool)
        self._can_improve = True

    @property
    def num_new(self) -> int:
        """Number of tokens of each beam."""
        return len(self._beams[0])

    def advance(self, scores_BV: Tensor) -> Advance:
        """One step.

        Args:
            scores_BV: the model's scores behind each beam, of any floating-point type, on any device; the first time
                of one row, behind the prompt.
        Raises:
            FloatingPointError: they are not numbers.
        """
        totals_BV = self._scores_B[:, None] + self._logprobs(scores_BV)
        candidates, scores_C = self._candidates(totals_BV)
        ended_C = torch.tensor([ids[-1] in self._stop_ids or len(ids) >= self._most for _, ids in candidates])
        next_scores_C = scores_C + ended_C.float() * _IMPOSSIBLE
        chosen = next_scores_C.topk(self._num_beams).indices
        parents = [candidates[c][0] for c in chosen.tolist()]
        self._keep_best(candidates, scores_C, ended_C)
        self._beams = [candidates[c][1] for c in chosen.tolist()]
        self._scores_B = next_scores_C[chosen]
        self._rows = [self._rows[parent].fork() for parent in parents]
        for row, beam in zip(self._rows, self._beams):
            row.push(beam[-1])
        self._can_improve &= self._is_improvement_possible()
        is_full = self._sampling.early_stopping is True and bool(self._best_ended_B.all())
        is_done = not self._can_improve or is_full or bool(ended_C.all())
        return Advance([0] * len(parents) if len(scores_BV) == 1 else parents, [b[-1] for b in self._beams], is_done)

    def results(self, count: int) -> list[BeamText]:
        """The best texts, in falling order, once the search is done."""
        texts = []
        for ids, score in zip(self._best[:count], self._best_scores_B.tolist()):
            has_stopped = bool(ids) and ids[-1] in self._stop_ids
            texts.append(BeamText(ids[:-1] if has_stopped else ids, score, has_stopped))
        return texts

    def _logprobs(self, scores_BV: Tensor) -> Tensor:
        """Log-probabilities of next tokens, changed as the options say, (B, V) on the CPU."""
        logprobs_BV = scores_BV.float().cpu().log_softmax(dim=1)
        if bool(logprobs_BV.isnan().any()):
            raise FloatingPointError("the model's scores are not numbers")
        logprobs_BV = adjust(logprobs_BV.expand(self._num_beams, -1), self._rows)
        if self._sampling.temperature == 0:
            return logprobs_BV
        return filtered(logprobs_BV, self._sampling, min_kept=1 + max(1, len(self._stop_ids)))

    def _candidates(self, totals_BV: Tensor) -> tuple[list[tuple[int, tuple[int, ...]]], Tensor]:
        """Continuations, as the number of a beam and its new text, and their scores (C,), in falling order."""
        totals, vocab_size = totals_BV.flatten(), totals_BV.shape[1]
        count = min(self._num_candidates, len(totals))
        if self._sampling.temperature == 0:
            scores_C, places_C = totals.topk(count)
        else:
            numbers = uniforms(self._seed, 0, self.num_new, count).tolist()
            scores_C, order = totals[drawn := _draw_different(totals, numbers)].sort(descending=True)
            places_C = drawn[order]
        found = [divmod(place, vocab_size) for place in places_C.tolist()]
        return [(beam, (*self._beams[beam], token_id)) for beam, token_id in found], scores_C

    def _keep_best(self, candidates: list[tuple[int, tuple[int, ...]]], scores_C: Tensor, ended_C: Tensor) -> None:
        """Let the candidates that have ended compete with the best texts. Only as many of the highest as there are
        beams count."""
        joins_C = ended_C.clone()
        joins_C[self._num_beams :] = False
        is_closed = self._sampling.early_stopping is True and bool(self._best_ended_B.all())
        scores_C = scores_C / (self.num_new + 1) ** self._sampling.length_penalty
        scores_C = scores_C + is_closed * _IMPOSSIBLE + (not self._can_improve) * _IMPOSSIBLE
        scores_C = scores_C + (~joins_C).float() * _IMPOSSIBLE
        merged = torch.cat((self._best_scores_B, scores_C))
        chosen = merged.topk(self._num_beams).indices
        texts = self._best + [ids for _, ids in candidates]
        self._best = [texts[place] for place in chosen.tolist()]
        self._best_scores_B = merged[chosen]
        self._best_ended_B = torch.cat((self._best_ended_B, joins_C))[chosen]

    def _is_improvement_possible(self) -> bool:
        """Whether the best beam could still come before the worst of the best texts. Unless `early_stopping` is
        "never", that is an estimate: a text may get better by growing."""
        length = self.num_new
        if self._sampling.early_stopping == "never" and self._sampling.length_penalty > 0:
            length = self._most
        possible = self._scores_B[0] / length**self._sampling.length_penalty
        worst_B = torch.where(self._best_ended_B, self._best_scores_B.min(), _IMPOSSIBLE)
        return bool((possible > worst_B).any())


def _draw_different(totals: Tensor, numbers: Sequence[float]) -> Tensor:
    """Places drawn without replacement from softmax(totals), by the inverse of the cumulative sum at each number in
    turn. If no probability is left, the highest of the others, the first of equals."""
    weights = totals.double().softmax(dim=0)
    places: list[int] = []
    for number in numbers:
        sums = weights.cumsum(dim=0)
        total = float(sums[-1])
        if total > 0:
            place = int(torch.searchsorted(sums, min(number * total, math.nextafter(total, 0)), right=True))
        else:
            place = next(p for p in totals.argsort(descending=True, stable=True).tolist() if p not in places)
        weights[place] = 0.0
        places.append(place)
    return torch.tensor(places)
