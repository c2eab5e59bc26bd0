"""The engine's texts equal those of transformers' `generate`, which gets one prompt at a time: greedy, sampled with the
same random numbers, and by beams; all at once in a cache that is too small, with blocks taken away at random."""

import random
from collections.abc import Callable, Iterable

from serving.admission import EngineOptions
from serving.loading import Served, Speech
from serving.requests import Request
from tests.unit.test_beams import (
    CONTEXT,
    STOPS,
    VOCAB,
    Both,
    a_prompt,
    both,
    drawn_options,
    new_ids,
    options_of,
    same_numbers,
)  # fmt: skip
from tests.unit.test_engine import Shaken, check_empty, gather

__all__ = ["both", "same_numbers"]


class Letters:
    """A tokenizer whose tokens are letters."""

    vocab_size, special_ids, run_ids = VOCAB, {}, frozenset[int]()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(97 + token_id) for token_id in ids)


def test_texts_equal_transformers(both: Both, same_numbers: Callable[[int], None]):
    rng, begin = random.Random(0), [5, 6, 1, 2, 9, 10, 4, 1]
    requests, expected = [], {}
    for number in range(20):
        prompt = (begin[: rng.choice([0, 4, 8])] + a_prompt(rng))[: CONTEXT // 2]
        most, make = rng.randint(3, 20), rng.choice([options_of, drawn_options])
        beams = {"num_beams": rng.randint(2, 4), "length_penalty": rng.uniform(-1, 2)} if number % 3 == 0 else {}
        sampling = make(rng, most, max_new_tokens=most, **beams, **({"temperature": 0.0} if make is options_of else {}))
        request = Request(str(number), tuple(prompt), sampling, n=sampling.num_beams)
        same_numbers(sampling.seed or 0)
        found = both.generate(sampling, prompt, most, request.n)
        expected[request.id] = [new_ids(sequence, len(prompt)) for sequence in found.sequences]
        requests.append(request)
    served = Served(both.ours, Speech(Letters(), frozenset(STOPS), {}))  # type: ignore[arg-type]
    options = EngineOptions(max_running=5, tokens_a_step=7, block_size=2, cache_tokens=80)
    engine = Shaken(served, options)
    said = gather(engine.run(requests))
    assert {request.id: [said[request.id, n].ids for n in range(request.n)] for request in requests} == expected
    assert all(one.text == Letters().decode(one.ids) for one in said.values())
    stats = engine.stats()
    assert stats.preemptions > 5 and stats.cached_tokens
    check_empty(engine)
