"""Choice of next tokens: against transformers' processors, applied to one row at a time, and plain formulas."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from serving.requests import Sampling
from serving.rows import RowState, adjust, uniform, uniforms
from serving.sampling import NO_TOKEN, check, filtered, sample, token_scores

VOCAB = 60
STOPS = frozenset({3, 7})


def random_sampling(rng: random.Random, vocab_size: int = VOCAB) -> Sampling:
    """Options of which each is used in half of the cases."""

    def maybe(value: object, default: object) -> object:
        return value if rng.random() < 0.5 else default

    return Sampling(
        min_new_tokens=maybe(rng.randint(0, 6), 0), temperature=maybe(rng.uniform(0.2, 3), maybe(0.0, 1.0)),
        top_k=maybe(rng.randint(1, vocab_size + 3), 0), top_p=maybe(rng.uniform(0.05, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.5), 0.0), repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0), frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe({rng.randrange(vocab_size): rng.uniform(-5, 5) for _ in range(4)}, {}),
        logprobs=maybe(rng.randint(0, 5), None), seed=rng.randint(-(1 << 63), (1 << 63) - 1),
    )  # fmt: skip


def row(sampling: Sampling, prompt: list[int], said: list[int], choice: int = 0) -> RowState:
    state = RowState(sampling, sampling.seed or 0, choice, prompt, STOPS)
    for token_id in said:
        state.push(token_id)
    return state


def processed(scores_V: Tensor, sampling: Sampling, prompt: list[int], said: list[int]) -> Tensor:
    """Scores that transformers makes of them; the penalties that it does not have are written out."""
    ids, scores_1V = torch.tensor([prompt + said]), scores_V[None].clone()
    if sampling.logit_bias:
        bias = [[[token_id], float(value)] for token_id, value in sampling.logit_bias.items()]
        scores_1V = theirs.SequenceBiasLogitsProcessor(bias)(ids, scores_1V)
    if sampling.repetition_penalty != 1:
        scores_1V = theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores_1V)
    for token_id in set(said):
        scores_1V[0, token_id] -= sampling.presence_penalty + sampling.frequency_penalty * said.count(token_id)
    waits = theirs.MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_new_tokens, list(STOPS), device="cpu")
    scores_1V = waits(ids, scores_1V)
    if sampling.temperature > 0:
        scores_1V = theirs.TemperatureLogitsWarper(sampling.temperature)(ids, scores_1V)
        if sampling.top_k:
            scores_1V = theirs.TopKLogitsWarper(sampling.top_k)(ids, scores_1V)
        if sampling.top_p < 1:
            scores_1V = theirs.TopPLogitsWarper(sampling.top_p)(ids, scores_1V)
        if sampling.min_p:
            scores_1V = theirs.MinPLogitsWarper(sampling.min_p)(ids, scores_1V)
    return scores_1V[0]


def by_formula(scores_V: Tensor, sampling: Sampling, number: float) -> int:
    """Token of processed scores: the highest, or the inverse of the cumulative sum in float64."""
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    sums = scores_V.double().softmax(dim=0).cumsum(dim=0)
    return int((sums <= number * sums[-1]).sum())


def random_rows(rng: random.Random, count: int) -> list[tuple[Sampling, list[int], list[int]]]:
    def ids(least: int, most: int) -> list[int]:
        return rng.choices(range(VOCAB), k=rng.randint(least, most))

    return [(random_sampling(rng), ids(1, 20), ids(0, 9)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_against_transformers(seed: int):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cases = random_rows(rng, 40)
    scores_RV = 3 * torch.randn(40, VOCAB, generator=generator)
    before = scores_RV.clone()
    rows = [row(sampling, prompt, said, rng.randint(0, 9)) for sampling, prompt, said in cases]
    tokens = sample(scores_RV, rows)
    assert torch.equal(scores_RV, before)
    for n, (token, (sampling, prompt, said)) in enumerate(zip(tokens, cases)):
        number = uniform(sampling.seed, rows[n].choice, len(said))
        assert token.id == by_formula(processed(scores_RV[n], sampling, prompt, said), sampling, number)
        logprobs_V = scores_RV[n].double().log_softmax(dim=0)
        if sampling.logprobs is None:
            assert token.logprob is None and token.alternatives == ()
        else:
            assert token.logprob == pytest.approx(float(logprobs_V[token.id]), abs=1e-12)
            best = logprobs_V.topk(sampling.logprobs) if sampling.logprobs else None
            assert [i for i, _ in token.alternatives] == ([] if best is None else best.indices.tolist())
            assert [p for _, p in token.alternatives] == pytest.approx([] if best is None else best.values.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_else_is_served_changes_nothing(dtype: torch.dtype):
    """Rows alone, in other batches and in another order give the same bits, also where scores are equal."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    cases = random_rows(rng, 48)
    scores_RV = (3 * torch.randn(48, VOCAB, generator=generator)).to(dtype)
    rows = [row(*case) for case in cases]
    together = sample(scores_RV, rows)
    for n in range(48):
        assert sample(scores_RV[n : n + 1], rows[n : n + 1]) == [together[n]]
        some = rng.sample(range(48), k=rng.randint(1, 7))
        assert sample(scores_RV[some], [rows[i] for i in some]) == [together[i] for i in some]


def test_large_vocabulary():
    """As in use: each fast path against the plain formula, for scores as those of a trained model and for flat ones."""
    generator = torch.Generator().manual_seed(2)
    scores_RV = torch.randn(24, 5000, generator=generator) * torch.linspace(0.1, 6, 24)[:, None]
    options = [
        Sampling(temperature=0.8, top_k=50), Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.7, top_p=0.5),
        Sampling(min_p=0.05), Sampling(top_k=40, top_p=0.9, min_p=0.02), Sampling(top_p=0.999), Sampling(top_k=1),
    ]  # fmt: skip
    for number in range(5):
        rows = [RowState(options[(r + number) % 8], 7, r) for r in range(24)]
        tokens = sample(scores_RV, rows)
        for n, (token, state) in enumerate(zip(tokens, rows)):
            kept_V = filtered(scores_RV[n : n + 1], state.sampling)[0]
            assert token.id == by_formula(kept_V, state.sampling, uniform(7, n, 0)), (n, state.sampling)
            assert sample(scores_RV[n : n + 1], [state]) == [token]


def test_equal_scores():
    """The first of the highest; equals of top_k's last stay, of top_p's last the first ones."""
    scores_RV = torch.tensor([[1.0, 5.0, 5.0, 2.0, 5.0, 2.0]])
    assert sample(scores_RV, [RowState(Sampling(temperature=0.0), 0)])[0].id == 1
    flat_RV = torch.zeros(1, 10)

    def possible(sampling: Sampling, scores_RV: Tensor) -> set[int]:
        return {sample(scores_RV, [RowState(sampling, seed)])[0].id for seed in range(200)}

    assert possible(Sampling(top_k=2), scores_RV) == {1, 2, 4}
    assert possible(Sampling(top_p=0.45), flat_RV) == {0, 1, 2, 3, 4}
    assert possible(Sampling(top_k=3, top_p=0.45), flat_RV) == {0, 1, 2, 3, 4}
    assert possible(Sampling(min_p=1.0), scores_RV) == {1, 2, 4}
    token = sample(scores_RV, [RowState(Sampling(temperature=0.0, logprobs=4), 0)])[0]
    assert [i for i, _ in token.alternatives] == [1, 2, 4, 3]


def test_distribution():
    """Frequencies over seeds are the probabilities: chi squared of 9 degrees of freedom, at 1 in 10,000."""
    scores_V = torch.linspace(-1, 1, 10)
    rows = [RowState(Sampling(temperature=0.5), seed) for seed in range(4000)]
    counts_V = np.bincount([t.id for t in sample(scores_V.expand(4000, 10), rows)], minlength=10)
    expected_V = 4000 * (2 * scores_V.double()).softmax(dim=0).numpy()
    assert ((counts_V - expected_V) ** 2 / expected_V).sum() < 33.7


def test_random_numbers():
    """A function of three numbers, without correlation between neighbours in any of them."""
    assert uniform(5, 2, 3) == uniform(5, 2, 3) == uniforms(5, 2, 3, 8)[0]
    assert (uniforms(5, 2, 3, 8)[:3] == uniforms(5, 2, 3, 3)).all()
    # The same key and counter by numpy's own generator.
    key, counter = np.array([5, 2], np.uint64), np.array([0, 3, 0, 0], np.uint64)
    assert (np.random.Generator(np.random.Philox(key=key, counter=counter)).random(8) == uniforms(5, 2, 3, 8)).all()
    grid = np.array([[[uniform(s, c, n) for n in range(12)] for c in range(12)] for s in range(-6, 6)])
    assert len(np.unique(grid)) == 12**3 and grid.min() >= 0 and grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.03
    for axis in range(3):
        moved = np.roll(grid, 1, axis)
        assert abs(np.corrcoef(grid.ravel(), moved.ravel())[0, 1]) < 0.1
    assert uniform(-1, 0, 0) == uniform((1 << 64) - 1, 0, 0)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers(fault: float, temperature: float):
    """They cost the row's text, and no other's."""
    scores_RV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    options = [Sampling(temperature=temperature, top_p=0.9, logprobs=2), Sampling(temperature=temperature, top_k=5)]
    rows = [RowState(options[0], 1), RowState(options[n := 1], 2), RowState(options[0], 3)]
    good = sample(scores_RV, rows)
    scores_RV[1, 5 if math.isnan(fault) or fault > 0 else slice(None)] = fault
    for options_of_fault in options:
        rows[n] = RowState(options_of_fault, 2)
        tokens = sample(scores_RV, rows)
        assert tokens[1].id == NO_TOKEN and tokens[::2] == good[::2]
    told = token_scores(scores_RV, [1, 1, 1], [2, 2, 2])
    assert math.isnan(told[1].logprob) and not told[1].alternatives and len(told[2].alternatives) == 2


def test_nothing_is_copied_without_need():
    scores_RV = torch.randn(3, VOCAB)
    rows = [RowState(Sampling(), 0, prompt_ids=[1, 2]) for _ in range(3)]
    assert adjust(scores_RV, rows) is scores_RV
    assert not rows[0].is_penalised and not len(rows[0].seen[0])


def test_a_fork_goes_its_own_way():
    state = row(Sampling(frequency_penalty=1.0), list(range(40)), [1, 1, 50])
    other = state.fork()
    other.push(50)
    other.push(51)
    scores_RV = adjust(torch.zeros(2, VOCAB), [state, other])
    assert scores_RV[:, [1, 50, 51, 2]].tolist() == [[-2, -1, 0, 0], [-2, -2, -1, 0]]
    assert (state.number, other.number) == (3, 5)


def test_log_probabilities_of_a_prompt():
    scores_NV = torch.randn(150, VOCAB, generator=torch.Generator().manual_seed(4))
    ids = [n % VOCAB for n in range(150)]
    told = token_scores(scores_NV, ids, [n % 3 for n in range(150)])
    logprobs_NV = scores_NV.double().log_softmax(dim=1)
    assert [t.logprob for t in told] == pytest.approx([float(logprobs_NV[n, i]) for n, i in enumerate(ids)])
    assert [len(t.alternatives) for t in told] == [n % 3 for n in range(150)] and [t.id for t in told] == ids
    assert all(t.alternatives[0][0] == int(logprobs_NV[n].argmax()) for n, t in enumerate(told) if t.alternatives)


@pytest.mark.parametrize(
    ("changes", "sentence"), [
        ({"temperature": -0.1}, "temperature must"), ({"temperature": math.nan}, "temperature must"),
        ({"temperature": math.inf}, "temperature must"), ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, "top_p must"), ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
        ({"min_p": -0.1}, "min_p must"), ({"min_p": math.nan}, "min_p must"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must"), ({"presence_penalty": 2.1}, "presence_penalty must"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must"),
        ({"logit_bias": {60: 1.0}}, "from 0 to 59, got 60"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must name"), ({"logit_bias": {1: 101.0}}, "logit_bias must lie"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must lie"), ({"stop_ids": frozenset({60})}, "stop_ids must"),
        ({"seed": 1 << 63}, "seed must lie between"), ({"logprobs": -1}, "logprobs must"),
        ({"prompt_logprobs": 61}, "prompt_logprobs must lie between 0 and 60, got 61"),
        ({"stop": ("a", "")}, "stop must"),
        ({"max_new_tokens": -1}, "max_new_tokens must"), ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens"),
        ({"num_beams": 0}, "num_beams must"), ({"length_penalty": math.inf}, "length_penalty must"),
        ({"early_stopping": "always"}, "early_stopping must"), ({"num_beams": 2, "stop": ("a",)}, "stop texts cannot"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs cannot be had with num_beams"),
        ({"num_beams": 32, "stop_ids": frozenset(range(16))}, "stop_ids must be 15 at most with num_beams 32, got 16"),
    ],
)  # fmt: skip
def test_refusals(changes: dict, sentence: str):
    check(Sampling(), VOCAB)
    with pytest.raises(ValueError, match=sentence):
        check(replace(Sampling(), **changes), VOCAB)


def test_number_of_choices():
    check(Sampling(num_beams=3), VOCAB, n=3)
    for sampling, n in ((Sampling(), 0), (Sampling(num_beams=3), 4)):
        with pytest.raises(ValueError, match="n must .*, got"):
            check(sampling, VOCAB, n)
