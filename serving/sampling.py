"""Choice of next tokens from a model's scores, for rows whose requests differ in everything.

    adjust -> greedy rows: the highest score
           -> others:      weights -> top_k -> top_p -> min_p -> inverse of the cumulative sum at a keyed random number

A row's token is the same to the bit whoever else is in the batch. Weights are integers, whose sums are the same in any
order. Random numbers are a function of seed, choice and the token's number (Philox, Salmon et al., 2011), so that a
sequence that was interrupted goes on as if it had not been. The order of the steps is that of transformers' processors.

Shapes: R rows, V vocabulary, M candidates of a row, in the order of the vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serving.requests import Sampling, TokenScore
from serving.rows import RowState, adjust, uniform

NO_TOKEN = -1
"""Id in place of a token where the scores are not numbers, or none is above minus infinity."""
_LARGEST_SEED = 1 << 63
_MOST_CANDIDATES = 512
"""Of one step of a beam search, those that the folder's own stop tokens add not counted."""
_ROWS_AT_ONCE = 64
"""Rows of log-probabilities that are in memory at the same time."""
_SCORES_AT_ONCE = 1 << 18
_USUAL_NUCLEUS = 512
"""Tokens that usually reach top_p."""


def check(sampling: Sampling, vocab_size: int, n: int = 1) -> None:
    """Check that a request's options make sense, each by itself and together.

    Args:
        vocab_size: the tokenizer's.
        n: number of choices.
    Raises:
        ValueError: one does not; a sentence that begins with its name.
    """

    def require(is_met: bool, name: str, what: str, value: object = None) -> None:
        if not is_met:
            raise ValueError(f"{name} must {what}, got {getattr(sampling, name) if value is None else value}")

    one = sampling
    require(n >= 1, "n", "be at least 1", n)
    require(one.max_new_tokens is None or one.max_new_tokens >= 0, "max_new_tokens", "not be negative")
    most = math.inf if one.max_new_tokens is None else one.max_new_tokens
    require(0 <= one.min_new_tokens <= most, "min_new_tokens", "lie between 0 and max_new_tokens")
    require(0 <= one.temperature < math.inf, "temperature", "not be negative, and be finite")
    require(one.top_k >= 0, "top_k", "not be negative (0: no limit)")
    require(0 < one.top_p <= 1, "top_p", "be above 0 and at most 1")
    require(0 <= one.min_p <= 1, "min_p", "lie between 0 and 1")
    require(0 < one.repetition_penalty < math.inf, "repetition_penalty", "be above 0, and finite")
    require(-2 <= one.presence_penalty <= 2, "presence_penalty", "lie between -2 and 2")
    require(-2 <= one.frequency_penalty <= 2, "frequency_penalty", "lie between -2 and 2")
    for token_id, bias in one.logit_bias.items():
        require(0 <= token_id < vocab_size, "logit_bias", f"name tokens from 0 to {vocab_size - 1}", token_id)
        require(-100 <= bias <= 100, "logit_bias", "lie between -100 and 100", bias)
    for token_id in one.stop_ids:
        require(0 <= token_id < vocab_size, "stop_ids", f"be tokens from 0 to {vocab_size - 1}", token_id)
    seed = 0 if one.seed is None else one.seed
    require(-_LARGEST_SEED <= seed < _LARGEST_SEED, "seed", "lie between -2^63 and 2^63 - 1")
    for name in ("logprobs", "prompt_logprobs"):
        require(0 <= (getattr(one, name) or 0) <= vocab_size, name, f"lie between 0 and {vocab_size}")
    require("" not in one.stop, "stop", "not hold an empty text")
    require(one.num_beams >= 1, "num_beams", "be at least 1")
    require(-math.inf < one.length_penalty < math.inf, "length_penalty", "be finite")
    require(one.early_stopping in (True, False, "never"), "early_stopping", 'be true, false or "never"')
    if one.num_beams > 1:
        require(n <= one.num_beams, "n", f"not exceed num_beams, which is {one.num_beams}", n)
        # Each step compares, or draws one by one, num_beams candidates for each stop token: nobody else is served then.
        most = max(_MOST_CANDIDATES // one.num_beams - 1, 8)
        require(len(one.stop_ids) <= most, "stop_ids", f"be {most} at most with num_beams {one.num_beams}",
                len(one.stop_ids))  # fmt: skip
        for is_asked, what in ((bool(one.stop), "stop texts"), (one.logprobs is not None, "logprobs")):
            if is_asked:
                raise ValueError(f"{what} cannot be had with num_beams above 1: leave one of the two out")


def sample(scores_RV: Tensor, rows: Sequence[RowState]) -> list[TokenScore]:
    """The next token of each row, with its log-probability where the row asks for it. Does not push them.

    Args:
        scores_RV: the model's scores, of any floating-point type, on any device; unchanged.
    Returns:
        One for each row; its id is NO_TOKEN where the scores give no probabilities.
    """
    ids = [NO_TOKEN] * len(rows)
    changed_RV = adjust(scores_RV.float(), rows)
    greedy = [r for r, row in enumerate(rows) if row.sampling.temperature == 0]
    drawn = [r for r, row in enumerate(rows) if row.sampling.temperature != 0]
    for chosen, choose in ((greedy, _highest), (drawn, _draw)):
        if chosen:
            some_RV = changed_RV if len(chosen) == len(rows) else changed_RV[chosen]
            for r, token_id in zip(chosen, choose(some_RV, [rows[r] for r in chosen])):
                ids[r] = token_id
    tokens = [TokenScore(token_id) for token_id in ids]
    asked = [r for r, row in enumerate(rows) if row.sampling.logprobs is not None and ids[r] != NO_TOKEN]
    if asked:
        some_RV = scores_RV if len(asked) == len(rows) else scores_RV[asked]
        counts = [rows[r].sampling.logprobs or 0 for r in asked]
        for r, token in zip(asked, token_scores(some_RV, [ids[r] for r in asked], counts)):
            tokens[r] = token
    return tokens


def _highest(scores_RV: Tensor, rows: Sequence[RowState]) -> list[int]:
    """Token with the highest score of each row; the first of equals."""
    if scores_RV.device.type == "cpu":
        # Ten times as fast as torch's.
        ids_R = torch.from_numpy(scores_RV.numpy().argmax(axis=1))
    else:
        ids_R = scores_RV.argmax(dim=1)
    best_R = scores_RV.gather(1, ids_R[:, None])[:, 0]
    return torch.where(best_R.isfinite(), ids_R, NO_TOKEN).tolist()


def _draw(scores_RV: Tensor, rows: Sequence[RowState]) -> list[int]:
    """A token for each row, drawn from those that its options leave."""
    drawn = [NO_TOKEN] * len(rows)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for r, row in enumerate(rows):
        options = row.sampling
        key = 0 < options.top_k < scores_RV.shape[1], options.top_p < 1 or options.min_p > 0
        groups.setdefault(key, []).append(r)
    # So few rows at once that what is computed stays in a CPU's cache.
    step = max(1, _SCORES_AT_ONCE // scores_RV.shape[1]) if scores_RV.device.type == "cpu" else len(rows)
    for (has_top_k, has_limits), members in groups.items():
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            some_RV = scores_RV if len(chosen) == len(rows) else scores_RV[chosen]
            ids = _draw_alike(some_RV, [rows[r] for r in chosen], has_top_k, has_limits)
            for r, token_id in zip(chosen, ids):
                drawn[r] = token_id
    return drawn


def _draw_alike(scores_RV: Tensor, rows: Sequence[RowState], has_top_k: bool, has_limits: bool) -> list[int]:
    """`_draw` for rows all or none of which have top_k, and top_p or min_p."""
    options, vocab_size = [row.sampling for row in rows], scores_RV.shape[1]

    def column(values: list, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=scores_RV.device).unsqueeze(1)

    # The highest weight. The sum of all of them stays below 2^63.
    largest = 2.0 ** (62 - vocab_size.bit_length())
    best_R1, ids_RM = scores_RV.amax(dim=1, keepdim=True).double(), None
    if has_top_k:
        least_R1 = _kth_highest(scores_RV, [one.top_k for one in options])
        # Equals of the last one stay, as in transformers.
        ids_RM, scores_RV = _at_least(scores_RV, least_R1, -math.inf)
    temperature = column([one.temperature for one in options])

    def weights_of(scores: Tensor) -> Tensor:
        return scores.double().sub_(best_R1).div_(temperature).exp_().mul_(largest).long()

    weights_RM = weights_of(scores_RV)
    if has_limits:
        top_p, min_p = column([one.top_p for one in options]), column([one.min_p for one in options])
        total_R1 = weights_RM.sum(dim=1, keepdim=True)
        needed_R1 = torch.where(top_p < 1, (top_p * total_R1).long().clamp_(min=1), 1)
        smallest_R1 = (min_p * largest).long().clamp_(min=1)
        if ids_RM is None:
            # The likeliest tokens usually reach top_p. Without it, min_p alone decides.
            last_R1 = weights_of(_kth_highest(scores_RV, [min(_USUAL_NUCLEUS, vocab_size)] * len(rows)))
            ids_RM, likely_RM = _at_least(weights_RM, torch.where(top_p < 1, last_R1, smallest_R1).clamp_(min=1), 0)
            if bool((likely_RM.sum(dim=1, keepdim=True) < needed_R1).any()):
                # All tokens below this weight have together less than top_p leaves out.
                unneeded_R1 = (total_R1 - needed_R1) // vocab_size
                ids_RM, likely_RM = _at_least(weights_RM, torch.where(top_p < 1, unneeded_R1, smallest_R1), 0)
            weights_RM = likely_RM
        weights_RM = torch.where(top_p < 1, _nucleus(weights_RM, needed_R1), weights_RM)
        weights_RM = weights_RM.masked_fill_(weights_RM < smallest_R1, 0)
    sums_RM = weights_RM.cumsum(dim=1)
    numbers = column([uniform(row.seed, row.choice, row.number) for row in rows])
    total_R1 = sums_RM[:, -1:]
    # The number could round up to the sum itself.
    places_R1 = torch.searchsorted(sums_RM, torch.minimum((numbers * total_R1).long(), total_R1 - 1), right=True)
    places_R1.clamp_(max=sums_RM.shape[1] - 1)
    ids_R1 = places_R1 if ids_RM is None else ids_RM.gather(1, places_R1)
    return torch.where(best_R1.isfinite(), ids_R1, NO_TOKEN).flatten().tolist()


def _at_least(values_RV: Tensor, least_R1: Tensor, filler: float) -> tuple[Tensor, Tensor]:
    """Values that reach a limit: their places, int64 (R, M), and they themselves, (R, M), with M the largest number of
    them in a row, at least 1. Shorter rows are filled up."""
    rows_N, places_N = (values_RV >= least_R1).nonzero(as_tuple=True)
    counts_R = rows_N.bincount(minlength=len(values_RV))
    targets_N = torch.arange(len(rows_N), device=rows_N.device) - (counts_R.cumsum(0) - counts_R)[rows_N]
    shape = len(values_RV), max(1, int(counts_R.max()))
    places_RM, found_RM = rows_N.new_zeros(shape), values_RV.new_full(shape, filler)
    places_RM[rows_N, targets_N] = places_N
    found_RM[rows_N, targets_N] = values_RV[rows_N, places_N]
    return places_RM, found_RM


def _nucleus(weights_RM: Tensor, needed_R1: Tensor) -> Tensor:
    """Weights of the fewest tokens whose sum reaches a number; 0 for others. Of equal ones, the first stay."""
    falling_RM = -_sorted(-weights_RM)
    before_RM = falling_RM.cumsum(dim=1) - falling_RM
    kept_R1 = (before_RM < needed_R1).sum(dim=1, keepdim=True)
    border_R1 = falling_RM.gather(1, (kept_R1 - 1).clamp_(min=0))
    above_RM, equal_RM = weights_RM > border_R1, weights_RM == border_R1
    room_R1 = kept_R1 - above_RM.sum(dim=1, keepdim=True)
    return weights_RM * (above_RM | (equal_RM & (equal_RM.cumsum(dim=1) <= room_R1)))


def _sorted(values_RM: Tensor) -> Tensor:
    """Rows in rising order. On a CPU, numpy sorts ten times as fast."""
    if values_RM.device.type == "cpu":
        return torch.from_numpy(np.sort(values_RM.numpy(), axis=1))
    return values_RM.sort(dim=1).values


def _kth_highest(values_RV: Tensor, counts: list[int]) -> Tensor:
    """Each row's k-th highest value, (R, 1), given k for each row."""
    if values_RV.device.type == "cpu":
        places = [values_RV.shape[1] - count for count in counts]
        parted_RV = np.partition(values_RV.numpy(), sorted(set(places)), axis=1)
        return torch.from_numpy(parted_RV[range(len(places)), places]).unsqueeze(1)
    places_R1 = torch.tensor(counts, device=values_RV.device).unsqueeze(1) - 1
    return values_RV.topk(max(counts)).values.gather(1, places_R1)


def filtered(scores_RV: Tensor, options: Sampling, min_kept: int = 1) -> Tensor:
    """Scores divided by the temperature, with minus infinity for tokens that top_k, top_p and min_p leave out, float32
    (R, V): the plain formula of what `sample` draws from, and what beam sampling adds to its beams.

    Args:
        min_kept: tokens that are kept in any case.
    """
    scores_RV = scores_RV / options.temperature
    vocab_size = scores_RV.shape[1]
    if 0 < options.top_k < vocab_size:
        least_R1 = scores_RV.topk(min(max(options.top_k, min_kept), vocab_size)).values[:, -1:]
        scores_RV = scores_RV.masked_fill(scores_RV < least_R1, -math.inf)
    for is_used, falls in (
        (options.top_p < 1, lambda falling_RV: falling_RV.cumsum(dim=1) - falling_RV >= options.top_p),
        (options.min_p > 0, lambda falling_RV: falling_RV < options.min_p * falling_RV[:, :1]),
    ):
        if is_used:
            falling_RV, order_RV = scores_RV.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
            falls_RV = falls(falling_RV)
            falls_RV[:, :min_kept] = False
            scores_RV = scores_RV.masked_fill(torch.zeros_like(falls_RV).scatter_(1, order_RV, falls_RV), -math.inf)
    return scores_RV


def token_scores(scores_NV: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[TokenScore]:
    """Tokens with their log-probabilities and the likeliest alternatives, which include the token itself if it is one
    of these.

    Args:
        scores_NV: the model's scores, of any floating-point type.
        ids: a token for each row.
        counts: number of alternatives for each row.
    Returns:
        One for each row. Equally likely alternatives are in the order of their ids. Where the scores are not numbers,
        the log-probability is NaN, and there are no alternatives.
    """
    told: list[TokenScore] = []
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        logprobs_NV = scores_NV[some].double().log_softmax(dim=1)
        own = logprobs_NV.gather(1, torch.tensor(ids[some], device=logprobs_NV.device).unsqueeze(1))
        alternatives = _likeliest(logprobs_NV, counts[some])
        told += map(TokenScore, ids[some], own.flatten().tolist(), alternatives)
    return told


def continuation_scores(scores_RV: Tensor, rows: Sequence[int], ids: Sequence[int]) -> list[TokenScore]:
    """Tokens with their log-probabilities, each with the likeliest one in its place, the first of equals. Sums are in
    float32: an error of 1e-6 or so for each token, at a fraction of the time of `token_scores`.

    Args:
        scores_RV: the model's scores, float32.
        rows: of each token; a row may come several times.
    """
    best_R, best_ids_R = scores_RV.max(dim=1)
    total_R = best_R + (scores_RV - best_R[:, None]).exp_().sum(dim=1).log_()
    rows_N = torch.tensor(rows, device=scores_RV.device)
    own_N = scores_RV[rows_N, torch.tensor(ids, device=scores_RV.device)]
    told_3N = torch.stack((own_N - total_R[rows_N], (best_R - total_R)[rows_N], best_ids_R[rows_N].double())).tolist()
    return [
        TokenScore(token_id, logprob, ((int(best_id), best),))
        for token_id, logprob, best, best_id in zip(ids, *told_3N, strict=True)
    ]


def _likeliest(logprobs_NV: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row as (id, log-probability), in falling order, equals by id."""
    most = min(max(counts), logprobs_NV.shape[1])
    if most == 0:
        return [()] * len(counts)
    ids_NM, found_NM = _at_least(logprobs_NV, logprobs_NV.topk(most).values[:, -1:], -math.inf)
    found_NM, order_NM = found_NM.sort(dim=1, descending=True, stable=True)
    ids, found = ids_NM.gather(1, order_NM)[:, :most].tolist(), found_NM[:, :most].tolist()
    known = logprobs_NV[:, 0].isnan().logical_not_().tolist()
    return [tuple(zip(ids[n][:count], found[n])) if known[n] else () for n, count in enumerate(counts)]
