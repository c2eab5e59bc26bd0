"""The engine: many requests at once, in small caches, against one at a time by `generate`."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from model import Decoder, ModelConfig
from model.config import padded_vocab_size
from serving import pool
from serving.admission import EngineOptions
from serving.beams import BeamSearch, BeamText
from serving.engine import Engine
from serving.generation import generate
from serving.loading import Served, Speech, load
from serving.plan import StepPlan
from serving.requests import Piece, Request, Sampling, TokenScore
from tests.peers import peer
from tests.plain_runner import PlainRunner
from tests.unit.test_tokenizer import training_texts
from tokenizer import Tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe

CONTEXT = 64
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_hf_bbpe(training_texts(), 300, show_progress=False)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Served:
    """A model with random weights, which says something, and ends a text now and then."""
    config = ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.3,
    ).resolve(padded_vocab_size(tokenizer.vocab_size), CONTEXT)  # fmt: skip
    model = Decoder(config)
    model.initialize(0)
    return Served(model, Speech(tokenizer, frozenset(range(40, 50)) | {tokenizer.eod_id}, {}))


class Shaken(Engine):
    """Takes blocks away from running texts at random, besides those that it must take."""

    random = random.Random(0)

    def step(self) -> list[Piece]:
        running = self._scheduler.running
        if running and self.random.random() < 0.2:
            self._scheduler.preempt(self.random.choice(running))
        return super().step()


def engine_of(
    served: Served, blocks: int = 20, plain: bool = False, kind: type[Engine] = Engine, **options
) -> Engine:
    sizes = EngineOptions(**{"max_running": 6, "tokens_a_step": 9, "block_size": 4, "scores_a_step": 5} | options)
    sizes = replace(sizes, cache_tokens=blocks * sizes.block_size)
    return kind(served, sizes, PlainRunner(served, blocks, sizes.block_size) if plain else None)


@dataclass
class Said:
    """What an engine said in all pieces of one choice."""

    text: str = ""
    ids: tuple[int, ...] = ()
    tokens: tuple[TokenScore, ...] = ()
    prompt: tuple[TokenScore, ...] = ()
    finish: str | None = None
    error: str = ""
    cached: int = 0


def gather(pieces: Iterable[Piece]) -> dict[tuple[str, int], Said]:
    found: dict[tuple[str, int], Said] = {}
    for piece in pieces:
        said = found.setdefault((piece.request, piece.choice), Said())
        assert said.finish is None, "nothing follows the end"
        said.text += piece.text
        said.tokens += piece.tokens
        said.ids = tuple(token.id for token in said.tokens)
        said.prompt += piece.prompt
        said.finish, said.error, said.cached = piece.finish, piece.error, piece.cached_tokens
    return found


def prompts_of(count: int, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    """Prompts, some of which begin with others."""
    draw = random.Random(seed)
    prompts: list[tuple[int, ...]] = []
    for _ in range(count):
        begin = draw.choice(prompts)[: draw.randint(1, 30)] if prompts and draw.random() < 0.5 else ()
        prompts.append((*begin, *(draw.randrange(300) for _ in range(draw.randint(1, longest - len(begin))))))
    return prompts


def alone(served: Served, prompt: tuple[int, ...], sampling: Sampling = GREEDY) -> tuple[int, ...]:
    """The reference: greedy tokens of one prompt."""
    most = CONTEXT if sampling.max_new_tokens is None else sampling.max_new_tokens
    stop_ids = frozenset() if sampling.ignores_eos else served.stop_ids
    return tuple(generate(served.model, list(prompt), most, stop_ids, 0.0, vocab_size=served.tokenizer.vocab_size))


def check_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert not engine.has_work and not engine.step()
    assert (stats.used_blocks, stats.running, stats.waiting) == (0, 0, 0)


@pytest.mark.parametrize("plain", [False, True])
def test_many_at_once_equal_one_at_a_time(served: Served, plain: bool):
    """Prompts in pieces, prefixes found, preemptions."""
    prompts = prompts_of(14 if plain else 24)
    lengths = [Sampling(temperature=0.0, max_new_tokens=most) for most in (None, 3, 12, 20)]
    requests = [Request(str(n), prompt, lengths[n % 4]) for n, prompt in enumerate(prompts)]
    expected = [alone(served, request.prompt_ids, request.sampling) for request in requests]
    for blocks, options in ((200, {}), (17, {}), (17, {"prefix_sharing": False}), (60, {"tokens_a_step": 500})):
        kind = Shaken if plain and blocks == 17 else Engine
        engine = engine_of(served, blocks, plain, kind, **options)
        said = gather(engine.run(requests))
        assert [said[request.id, 0].ids for request in requests] == expected
        for request, ids in zip(requests, expected):
            whole = len(ids) + len(request.prompt_ids) == CONTEXT
            is_long = whole or len(ids) == request.sampling.max_new_tokens
            assert said[request.id, 0].finish == ("length" if is_long else "stop")
            assert said[request.id, 0].text == served.tokenizer.decode(ids)
        stats = engine.stats()
        assert (stats.preemptions > 0) == (blocks == 17)
        assert (stats.cached_tokens > 0) == options.get("prefix_sharing", True)
        assert stats.cached_tokens == sum(one.cached for one in said.values())
        assert stats.prompt_tokens == sum(map(len, prompts)) and stats.new_tokens == sum(map(len, expected))
        check_empty(engine)
    assert {said[request.id, 0].finish for request in requests} == {"length", "stop"}


def test_cancellations(served: Served):
    for seed in range(4):
        draw = random.Random(seed)
        engine = engine_of(served, 20, plain=True)
        requests = [
            Request(str(n), prompt, GREEDY, n=draw.choice([1, 1, 3])) for n, prompt in enumerate(prompts_of(16))
        ]
        pieces, todo, cancelled = [], list(requests), set()
        while todo or engine.has_work:
            if todo and draw.random() < 0.5:
                engine.submit(todo.pop())
            if engine._open and draw.random() < 0.2:
                cancelled.add(draw.choice(list(engine._open)))
                engine.cancel(max(cancelled, key=lambda one: one in engine._open))
            pieces += engine.step()
        said = gather(pieces)
        engine.cancel("unknown")
        check_empty(engine)
        assert len(said) == sum(request.n for request in requests)
        for request in requests:
            whole = alone(served, request.prompt_ids)
            for choice in range(request.n):
                one = said[request.id, choice]
                if one.finish == "cancelled":
                    assert request.id in cancelled and one.ids == whole[: len(one.ids)]
                else:
                    assert one.ids == whole


def test_choices_are_those_of_one_by_one(served: Served):
    """Same seed, same text: whatever else runs, preemptions included, and as a fourth of four or the only one."""
    sampling = Sampling(seed=5, max_new_tokens=15, top_k=20)
    requests = [Request(str(n), prompt, replace(sampling, seed=n), n=4) for n, prompt in enumerate(prompts_of(6, 1))]
    together = engine_of(served, 20, kind=Shaken)
    said = gather(together.run(requests))
    assert together.stats().preemptions
    for request in requests:
        one = gather(engine_of(served, 80).run([request]))
        assert one == {key: replace(said[key], cached=0) for key in one} and len({x.ids for x in one.values()}) > 1
        first = gather(engine_of(served, 80).run([replace(request, n=1)]))
        assert first[request.id, 0] == one[request.id, 0]
    check_empty(together)


class Faulty(PlainRunner):
    """Fails at some steps."""

    fails_at = ()

    def run(self, plan: StepPlan) -> torch.Tensor:
        scores_RV = super().run(plan)
        if len(self.plans) in self.fails_at:
            # What was to be written is not there.
            for part in plan.parts:
                for number in range(part.start, part.start + len(part.tokens)):
                    self.tokens[part.blocks[number // self.size], number % self.size] = -1
            raise RuntimeError("out of memory")
        return scores_RV


def test_a_fault_ends_those_concerned_alone(served: Served, caplog: pytest.LogCaptureFixture):
    engine = engine_of(served)
    engine._runner = runner = Faulty(served, 20, 4)
    runner.fails_at = (6, 11)
    requests = [Request(str(n), prompt, GREEDY) for n, prompt in enumerate(prompts_of(12))]
    said = gather(engine.run(requests))
    check_empty(engine)
    failed = [one for one in said.values() if one.finish == "error"]
    assert 0 < len(failed) < 8 and {one.error for one in failed} == {
        "a step of the engine failed (RuntimeError): the log says more"
    }
    for request in requests:
        one, whole = said[request.id, 0], alone(served, request.prompt_ids)
        assert one.ids == (whole[: len(one.ids)] if one.finish == "error" else whole)
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("works", [True, False])
def test_a_device_that_fails_for_good_is_noticed(served: Served, monkeypatch: pytest.MonkeyPatch, works: bool):
    engine = engine_of(served)
    engine._runner = runner = Faulty(served, 20, 4)
    runner.fails_at = (1,)

    def ones(*arguments: object, **options: object) -> torch.Tensor:
        if not works:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return torch.tensor([1.0])

    engine.submit(Request("a", (5, 6), GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", ones)
        assert [piece.finish for piece in engine.step()] == ["error"]
    assert engine.has_lost_device is not works


def test_a_fault_between_two_steps_ends_all_choices(served: Served, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(served, plain=True)

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    requests = [Request(str(n), (5, 6, 7, n), GREEDY, n=2) for n in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("serving.engine.sample", fail)
        said = gather(engine.run(requests))
    assert {key: one.finish for key, one in said.items()} == {(n, c): "error" for n in "01" for c in (0, 1)}
    check_empty(engine)
    assert gather(engine.run(requests))["1", 1].ids == alone(served, requests[1].prompt_ids)


class Damaged(PlainRunner):
    """Gives no numbers where a sequence has a certain token."""

    def run(self, plan: StepPlan) -> torch.Tensor:
        scores_RV, row = super().run(plan).clone(), 0
        for part in plan.parts:
            if part.start + len(part.tokens) > 2 and int(self.tokens[part.blocks[0], 2]) == 7 and part.num_scores:
                scores_RV[row + part.num_scores - 1, 11] = float("nan")
            row += part.num_scores
        return scores_RV


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_scores_that_are_no_numbers_end_one_text(served: Served, prompt_logprobs: int | None):
    engine = engine_of(served)
    engine._runner = Damaged(served, 20, 4)
    sampling = replace(GREEDY, prompt_logprobs=prompt_logprobs)
    requests = [Request(str(n), (5, 6, 7 if n == 2 else 8, 9, n), sampling, n=2) for n in range(4)]
    said = gather(engine.run(requests))
    for request in requests:
        for choice in (0, 1):
            one = said[request.id, choice]
            if request.id == "2":
                assert one.finish == "error" and "not finite numbers" in one.error and not one.ids
            else:
                assert one.ids == alone(served, request.prompt_ids)
    check_empty(engine)


def beams_alone(served: Served, prompt: tuple[int, ...], sampling: Sampling, n: int) -> list[BeamText]:
    """A beam search that computes all its texts anew at each step."""
    most = CONTEXT if sampling.max_new_tokens is None else sampling.max_new_tokens
    room = min(most, CONTEXT - len(prompt))
    search = BeamSearch(sampling, sampling.seed or 0, prompt, served.stop_ids, room)
    texts, is_done = [prompt], False
    while not is_done:
        with torch.no_grad():
            scores_BV = served.model.logits(served.model(torch.tensor(texts))[:, -1])[:, : served.tokenizer.vocab_size]
        parents, tokens, is_done = search.advance(scores_BV)
        texts = [(*texts[parent], token) for parent, token in zip(parents, tokens)]
    return search.results(n)


def test_beams(served: Served):
    """Among others, preempted and computed again, where texts share blocks that none may write."""
    options = [
        Sampling(temperature=0.0, max_new_tokens=18, num_beams=4),
        Sampling(max_new_tokens=18, num_beams=3, seed=4, early_stopping=True, prompt_logprobs=1),
        Sampling(temperature=0.0, max_new_tokens=26, num_beams=2, length_penalty=2.0, early_stopping="never"),
    ]
    requests = [
        Request(f"{n} {k}", prompt, one, n=2)
        for n, prompt in enumerate(prompts_of(3, 4, longest=15)) for k, one in enumerate(options)
    ]  # fmt: skip
    requests += [Request(f"{n}", prompt, GREEDY) for n, prompt in enumerate(prompts_of(8))]
    expected = {request.id: beams_alone(served, request.prompt_ids, request.sampling, 2)
                for request in requests if request.n > 1}  # fmt: skip
    for blocks, shares, kind in ((150, True, Engine), (26, True, Shaken), (26, False, Shaken)):
        engine = engine_of(served, blocks, kind=kind, prefix_sharing=shares)
        said = gather(engine.run(requests))
        for request in requests:
            told = request.sampling.prompt_logprobs is not None
            assert [token.id for token in said[request.id, 0].prompt] == list(request.prompt_ids) * told
            if request.n == 1:
                assert said[request.id, 0].ids == alone(served, request.prompt_ids)
                continue
            for choice, found in enumerate(expected[request.id]):
                one = said[request.id, choice]
                assert (one.ids, one.text) == (found.ids, served.tokenizer.decode(found.ids))
                assert one.finish == ("stop" if found.has_stopped else "length")
        assert (engine.stats().preemptions > 0) == (blocks != 150)
        check_empty(engine)


def test_log_probabilities(served: Served):
    prompts = prompts_of(6, 3)
    asked = Sampling(temperature=0.0, max_new_tokens=8, logprobs=2, prompt_logprobs=3)
    requests = [Request(str(n), prompt, replace(asked, max_new_tokens=14 * (n > 0)), n=2)
                for n, prompt in enumerate(prompts)]  # fmt: skip
    # The same prompts again are found in the cache, and yet their scores are told.
    requests += [replace(request, id=f"{request.id} again") for request in requests]
    engine = engine_of(served, 20)
    said = gather(engine.run(requests))
    assert engine.stats().preemptions and engine.stats().cached_tokens == 0
    for request in requests:
        one, ids = said[request.id, 0], request.prompt_ids
        with torch.no_grad():
            hidden = served.model(torch.tensor([[*ids, *one.ids]]))
            logprobs = served.model.logits(hidden)[0, :, : served.tokenizer.vocab_size].double().log_softmax(dim=1)
        assert tuple(token.id for token in one.prompt) == ids and one.prompt[0] == TokenScore(ids[0])
        assert one.ids == (alone(served, ids, request.sampling) if request.sampling.max_new_tokens else ())
        for place, token in enumerate((*one.prompt, *one.tokens)[1:]):
            count = 3 if place + 1 < len(ids) else 2
            assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-5)
            best = logprobs[place].topk(count)
            assert [found for found, _ in token.alternatives] == best.indices.tolist()
            assert [value for _, value in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_prompt_whose_scores_alone_are_wanted_may_fill_the_context(served: Served):
    ids = tuple(range(CONTEXT))
    only = Sampling(max_new_tokens=0, prompt_logprobs=0)
    (one,) = gather(engine_of(served).run([Request("a", ids, only)])).values()
    assert (len(one.prompt), one.text, one.finish) == (CONTEXT, "", "length")


def test_stop_texts_and_limits(served: Served):
    prompt = prompts_of(1, 2)[0]
    free = Sampling(temperature=0.0, ignores_eos=True)
    engine = engine_of(served, 40)
    (whole,) = gather(engine.run([Request("a", prompt, free)])).values()
    assert whole.finish == "length" and len(prompt) + len(whole.ids) == CONTEXT
    assert whole.ids == alone(served, prompt, free)
    stop = whole.text[5:8]
    end = whole.text.index(stop)
    for includes in (False, True):
        stopping = replace(free, stop=("never", stop), includes_stop=includes)
        (one,) = gather(engine.run([Request("a", prompt, stopping)])).values()
        assert (one.text, one.finish) == (whole.text[: end + 3 * includes], "stop")
    (one,) = gather(engine.run([Request("a", prompt, replace(free, stop_ids=frozenset({whole.ids[4]})))])).values()
    assert one.ids == whole.ids[: whole.ids.index(whole.ids[4])] and one.finish == "stop"
    check_empty(engine)


def test_refusals(served: Served):
    engine = engine_of(served, 10)
    engine.submit(Request("a", (1, 2), GREEDY))
    long, endless = replace(GREEDY, max_new_tokens=60), replace(GREEDY, max_new_tokens=None)
    for request, sentence in (
        (Request("a", (1,), GREEDY), "there is a request a already: give each its own id"),
        (Request("b", (), GREEDY), "the prompt is empty"),
        (Request("b", (1, 300), GREEDY), "the prompt has tokens that the tokenizer does not know: it has 0 to 299"),
        (Request("b", (1,) * 64, endless), "has 64 tokens, and the model knows .*: shorten it$"),
        (Request("b", (1,) * 5, long), "has 5 tokens and 60 are to follow, and the model knows 64 positions"),
        (Request("b", (1,) * 4, long), r"has 4 tokens and 60 are to follow, and the cache holds 40 tokens \(cache_tok"),
        (Request("b", (1,) * 50, endless), "has 50 tokens and 1 are to follow, and the c"),
        (Request("b", (1,), GREEDY, n=7), "is for 7 texts at once, and the engine writes 6"),
        (Request("b", (1,), GREEDY, adapter="x"), "there is no adapter x"),
        (Request("b", (1,), replace(GREEDY, top_p=2.0)), "top_p must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            engine.submit(request)
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(engine.run([Request("c", (1,), GREEDY), Request("d", (), GREEDY)]))
    said = gather(step for _ in range(20) for step in engine.step())
    assert list(said) == [("a", 0)]
    check_empty(engine)
    for options, sentence in (({"cache_gb": -1.0}, "cache_gb must not be negative, got -1"),
                              ({"block_size": 0}, "block_size must be at least 1, got 0")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            engine_of(served, **options)


def test_size_of_the_cache(served: Served, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 4 tokens: 2 layers, keys and values of 2 heads of 8 numbers of 4 bytes."""
    monkeypatch.setattr(pool, "_free_bytes", lambda device: 4_096_000)
    for options, count in (({}, 1000), ({"leaves_room": True}, 500), ({"cache_gb": 0.0001}, 97),
                           ({"cache_gb": 1.0}, 976562), ({"cache_tokens": 9}, 3),
                           ({"max_running": 2}, 32)):  # fmt: skip
        sizes = EngineOptions(block_size=4, **options)
        where = torch.float32, torch.device("cpu")
        assert pool.num_blocks_of(served.model.config, sizes, *where) == count, options
    monkeypatch.setattr(pool, "_free_bytes", lambda device: 4000)
    with pytest.raises(ValueError, match=r"0.000 GB are there for the cache.*cache_gb"):
        engine_of(served, 0)
    monkeypatch.undo()
    assert 1 < engine_of(served, 0).stats().blocks <= 6 * CONTEXT // 4


def test_without_a_limit_a_text_ends_where_the_cache_does(served: Served):
    engine = engine_of(served, 10)
    (one,) = gather(engine.run([Request("a", (1, 2, 3), Sampling(temperature=0.0, ignores_eos=True))])).values()
    assert one.finish == "length" and 30 < len(one.ids) + 3 <= 41
    check_empty(engine)


def test_the_prompt_that_is_being_computed_is_not_computed_twice(served: Served):
    engine = engine_of(served, 100, plain=True, tokens_a_step=16)
    begin = tuple(range(32))
    said = gather(engine.run(Request(str(n), (*begin, n), replace(GREEDY, max_new_tokens=1)) for n in range(5)))
    assert engine._runner.num_computed == 32 + 5
    assert [one.cached for one in said.values()] == [0, 32, 32, 32, 32]


def test_adapters_take_turns(served: Served, tokenizer: Tokenizer, tmp_path: Path):
    """Each text is its adapter's own, and those of one prompt share nothing across adapters."""
    peer("peft")
    from tests.adapter_folders import make_adapter, make_base

    base = make_base(tmp_path / "base", vocab_size=384, max_position_embeddings=CONTEXT)
    adapters = {name: make_adapter(tmp_path / name, base, seed, target_modules="all-linear", r=8, lora_alpha=64)
                for seed, name in enumerate("ab")}  # fmt: skip
    tokenizer.save_pretrained(base)
    mixed = load(base, adapters, torch.device("cpu"), torch.float32)
    names = [None, "a", "b"]
    greedy = replace(GREEDY, ignores_eos=True)
    requests = [Request(f"{n} {name}", prompt, greedy, adapter=name)
                for n, prompt in enumerate(prompts_of(5)) for name in names]  # fmt: skip
    engine = engine_of(mixed, 200, max_running=15, tokens_a_step=20)
    runner = engine._runner
    turns: list[str | None] = []
    engine._runner = type("Noting", (), {"run": lambda _, plan: (turns.append(plan.adapter), runner.run(plan))[1]})()
    said = gather(engine.run(requests))
    check_empty(engine)
    for request in requests:
        mixed.use(request.adapter)
        assert said[request.id, 0].ids == alone(mixed, request.prompt_ids, greedy)
    assert any(len({said[f"{n} {name}", 0].ids for name in names}) == 3 for n in range(5))
    # As long as all have work, one follows the other.
    busy = min(len(turns) - turns[::-1].index(name) for name in names)
    assert busy > 30 and all(len(set(turns[n : n + 3])) == 3 for n in range(busy - 3))
