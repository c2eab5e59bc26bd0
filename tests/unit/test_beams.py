"""Texts of a model equal those of transformers' `generate` for the folder that we save: greedy, sampled with the same
random numbers, and by beams."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import ModelOutput

from model import Decoder, KVCache, ModelConfig, hf
from model.families import FAMILIES
from serving.beams import BeamSearch, BeamText
from serving.loading import Served, Speech
from serving.requests import Request, Sampling
from serving.rows import RowState, uniform, uniforms
from serving.sampling import sample
from tests.unit.test_engine import Shaken, check_empty, engine_of, gather
from tokenizer import Tokenizer

VOCAB, CONTEXT = 14, 48
STOPS = (3, 7)
SMALL = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.35,
)  # fmt: skip
MODELS = {"llama": {}, "qwen3": {"head_dim": 8}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}


class Both(NamedTuple):
    """A model, and transformers' of its folder."""

    ours: Decoder
    theirs: torch.nn.Module

    def generate(self, sampling: Sampling, prompt: list[int], max_new_tokens: int, n: int = 1) -> ModelOutput:
        """Texts of transformers."""
        ids_1T = torch.tensor([prompt])
        options = their_options(sampling, n, max_new_tokens)
        return self.theirs.generate(ids_1T, options, attention_mask=torch.ones_like(ids_1T))


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    changes = MODELS[request.param]
    config = FAMILIES[request.param].new(dataclasses.replace(SMALL, **changes), changes.keys()).resolve()
    model = Decoder(config).eval()
    model.initialize(5)
    folder: Path = tmp_path_factory.mktemp("folder")
    save_file(hf.named_weights(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert theirs.config.model_type == request.param
    return Both(model, theirs)


def their_options(sampling: Sampling, n: int, max_new_tokens: int) -> GenerationConfig:
    is_drawn = sampling.temperature > 0
    bias = [[[token_id], float(value)] for token_id, value in sampling.logit_bias.items()]
    drawn = {
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p
    }  # fmt: skip
    return GenerationConfig(
        max_new_tokens=max_new_tokens, min_new_tokens=sampling.min_new_tokens or None, do_sample=is_drawn,
        num_beams=sampling.num_beams, num_return_sequences=n, length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping, repetition_penalty=sampling.repetition_penalty,
        sequence_bias=bias or None, eos_token_id=list(STOPS), pad_token_id=0, output_scores=True,
        return_dict_in_generate=True, **(drawn if is_drawn else {}),
    )  # fmt: skip


def new_ids(sequence: Tensor, num_prompt: int) -> tuple[int, ...]:
    """New tokens up to a stop token."""
    ids = sequence[num_prompt:].tolist()
    end = next((place for place, token_id in enumerate(ids) if token_id in STOPS), len(ids))
    return tuple(ids[:end])


@torch.inference_mode()
def grow(model: Decoder, sampling: Sampling, prompt: list[int], max_new_tokens: int) -> tuple[int, ...]:
    """A text by the plain loop."""
    state = RowState(sampling, sampling.seed or 0, 0, prompt, frozenset(STOPS))
    cache = KVCache(model.config, 1, CONTEXT, torch.float32, torch.device("cpu"))
    inputs, said = prompt, []
    while len(said) < max_new_tokens:
        scores_1V = model.logits(model(torch.tensor([inputs]), cache=cache)[:, -1])
        token_id = sample(scores_1V, [state])[0].id
        if token_id in STOPS:
            break
        state.push(token_id)
        said.append(token_id)
        inputs = [token_id]
    return tuple(said)


@torch.inference_mode()
def search(
    model: Decoder, sampling: Sampling, prompt: list[int], max_new_tokens: int, n: int
) -> tuple[list[BeamText], BeamSearch]:
    """A beam search whose beams share a cache that is put in order after each step."""
    beams = BeamSearch(sampling, sampling.seed or 0, prompt, frozenset(STOPS), max_new_tokens)
    cache = KVCache(model.config, 1, CONTEXT, torch.float32, torch.device("cpu"))
    inputs = [prompt]
    while True:
        scores_BV = model.logits(model(torch.tensor(inputs), cache=cache)[:, -1])
        parents, tokens, is_done = beams.advance(scores_BV)
        if is_done:
            return beams.results(n), beams
        cache.keep(parents)
        inputs = [[token_id] for token_id in tokens]


@pytest.fixture
def same_numbers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets transformers draw by our random numbers."""

    def use(seed: int) -> None:
        steps: Iterator[int] = iter(range(10_000))

        def inverse(probabilities_BV: Tensor, num_samples: int) -> Tensor:
            step = next(steps)
            weights = probabilities_BV[0].double().numpy().copy()
            if num_samples == 1:
                sums = np.cumsum(weights)
                return torch.tensor([[np.searchsorted(sums, uniform(seed, 0, step) * sums[-1], side="right")]])
            places: list[int] = []
            for number in uniforms(seed, 0, step, num_samples):
                sums = np.cumsum(weights)
                if sums[-1] == 0:
                    order = np.argsort(-probabilities_BV[0].numpy(), kind="stable")
                    place = next(place for place in order if place not in places)
                else:
                    place = np.searchsorted(sums, number * sums[-1], side="right")
                weights[place] = 0
                places.append(int(place))
            return torch.tensor([places])

        monkeypatch.setattr(torch, "multinomial", inverse)

    return use


def options_of(rng: random.Random, most: int, **more: object) -> Sampling:
    def maybe(value: object, default: object) -> object:
        return value if rng.random() < 0.4 else default

    return Sampling(
        repetition_penalty=maybe(rng.uniform(0.7, 1.5), 1.0), min_new_tokens=maybe(rng.randint(1, min(5, most)), 0),
        logit_bias=maybe({rng.randrange(VOCAB): rng.uniform(-2, 2), STOPS[0]: rng.uniform(-1, 3)}, {}),
        seed=rng.getrandbits(40), **more,
    )  # fmt: skip


def drawn_options(rng: random.Random, most: int, **more: object) -> Sampling:
    limits = rng.choice([{}, {"top_k": rng.randint(3, VOCAB)}, {"top_p": rng.uniform(0.3, 1)},
                         {"min_p": rng.uniform(0, 0.3)}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}])  # fmt: skip
    return options_of(rng, most, temperature=rng.choice([1.0, rng.uniform(0.4, 2)]), **limits, **more)


def a_prompt(rng: random.Random) -> list[int]:
    return [i for i in rng.choices(range(VOCAB), k=rng.randint(1, 9)) if i not in STOPS] or [1]


@pytest.mark.parametrize("is_drawn", [False, True])
def test_one_text_at_a_time(both: Both, same_numbers: Callable[[int], None], is_drawn: bool):
    rng, lengths = random.Random(is_drawn), set()
    for _ in range(8):
        prompt, most = a_prompt(rng), rng.randint(1, 14)
        sampling = drawn_options(rng, most) if is_drawn else options_of(rng, most, temperature=0.0)
        same_numbers(sampling.seed or 0)
        found = both.generate(sampling, prompt, most)
        said = grow(both.ours, sampling, prompt, most)
        assert said == new_ids(found.sequences[0], len(prompt)), sampling
        lengths.add(len(said))
    assert len(lengths) > 3


@pytest.mark.parametrize("is_drawn", [False, True])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams(both: Both, same_numbers: Callable[[int], None], early_stopping: bool | str, is_drawn: bool):
    rng, ends = random.Random(f"{early_stopping}{is_drawn}"), []
    for number in range(9):
        prompt, most = a_prompt(rng), rng.choice([1, 3, 8, 12, 20]) if number else 20
        more = {
            "num_beams": rng.randint(2, 5), "early_stopping": early_stopping,
            "length_penalty": rng.choice([1.0, 0.0, rng.uniform(-2, 3)]),
        }  # fmt: skip
        sampling = drawn_options(rng, most, **more) if is_drawn else options_of(rng, most, temperature=0.0, **more)
        if number == 0:
            # Stop tokens so likely that the search ends early.
            sampling = dataclasses.replace(sampling, logit_bias=dict.fromkeys(STOPS, 4.0), length_penalty=1.0)
        n = rng.randint(1, sampling.num_beams)
        same_numbers(sampling.seed or 0)
        found = both.generate(sampling, prompt, most, n)
        texts, beams = search(both.ours, sampling, prompt, most, n)
        assert [t.ids for t in texts] == [new_ids(s, len(prompt)) for s in found.sequences], sampling
        assert [t.score for t in texts] == pytest.approx(found.sequences_scores.tolist(), rel=1e-4, abs=1e-5), sampling
        assert beams.num_new == len(found.scores)
        ends += [(t.has_stopped, beams.num_new < most and early_stopping != "never") for t in texts]
    # "never" rarely ends before the limit.
    assert {(True, early_stopping != "never"), (False, False)} <= set(ends)


class Letters(Tokenizer):
    """A tokenizer for a vocabulary that is too small for any: each token is a letter."""

    vocab_size, special_ids, eod_id, fingerprint = VOCAB, {}, STOPS[0], ""

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        return [[ord(char) - ord("a") for char in text] for text in texts]

    def _decode_plain(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token_id) for token_id in ids)

    def token_byte_lengths(self) -> list[int]:
        return [1] * VOCAB

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        raise NotImplementedError

    def save_pretrained(self, directory: str | Path) -> None:
        raise NotImplementedError


def test_the_engine(both: Both, same_numbers: Callable[[int], None]):
    """All kinds of requests at once, in a cache of few small blocks: prefixes are found, and texts are interrupted at
    any time."""
    rng = random.Random(11)
    requests, expected = [], {}
    start = [i for i in rng.choices(range(VOCAB), k=12) if i not in STOPS]
    for number in range(12):
        most, prompt = rng.choice([3, 8, 12, 20]), start[: rng.randint(0, 10)] + a_prompt(rng)
        more: dict[str, object] = {"max_new_tokens": most}
        if number % 4 > 1:
            more |= {"num_beams": rng.randint(2, 4), "early_stopping": rng.choice([True, False, "never"])}
        sampling = drawn_options(rng, most, **more) if number % 2 else options_of(rng, most, temperature=0.0, **more)
        n = rng.randint(1, sampling.num_beams)
        requests.append(Request(str(number), tuple(prompt), sampling, n))
        same_numbers(sampling.seed or 0)
        found = both.generate(sampling, prompt, most, n)
        for choice, sequence in enumerate(found.sequences):
            expected[str(number), choice] = new_ids(sequence, len(prompt))
    served = Served(both.ours, Speech(Letters(), frozenset(STOPS), {}))
    engine = engine_of(served, 40, kind=Shaken, block_size=3)
    said = gather(engine.run(requests))
    assert {key: one.ids for key, one in said.items()} == expected
    assert all(one.text == Letters().decode(one.ids) and not one.error for one in said.values())
    stats = engine.stats()
    assert stats.preemptions > 1 and stats.cached_tokens > 0
    check_empty(engine)


def test_scores_that_are_not_numbers():
    beams = BeamSearch(Sampling(num_beams=2, temperature=0.0), 0, [1], frozenset(STOPS), 5)
    with pytest.raises(FloatingPointError, match="not numbers"):
        beams.advance(torch.full((1, VOCAB), float("nan")))
