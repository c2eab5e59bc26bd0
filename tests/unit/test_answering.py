"""The engine as what answers an evaluation, against transformers, which reads one text at a time."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.answering import _WINDOW, EngineAnswerer, answerer_of, lent
from evaluation.asking import Score, Scoring, Writing, Written
from evaluation.journal import Journal
from model import Decoder
from serving.admission import EngineOptions
from serving.engine import Engine
from serving.generation import generate
from serving.loading import Served, load
from serving.requests import Request, Sampling
from tests.adapter_folders import make_adapter, make_base
from tests.peers import peer
from tests.plain_runner import PlainRunner
from tests.unit.test_tokenizer import training_texts
from tokenizer import Tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe

CONTEXT = 64
CPU = torch.device("cpu")
MODELS = {
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_hf_bbpe(training_texts(), 300, show_progress=False)


def folder_of(path: Path, tokenizer: Tokenizer, model_type: str) -> Path:
    """A model with more entries than its tokenizer has."""
    base = make_base(path / model_type, model_type, vocab_size=384, max_position_embeddings=CONTEXT,
                     initializer_range=0.2, **MODELS[model_type])  # fmt: skip
    tokenizer.save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return folder_of(tmp_path_factory.mktemp("models"), tokenizer, "llama")


@pytest.fixture(scope="module")
def served(base: Path) -> Served:
    return load(base, {}, CPU, torch.float32)


def questions(count: int, seed: int = 0) -> list[Scoring]:
    """Questions with several choices, some of one token, behind common examples; texts without a question; one that is
    asked twice, and one that is as long as can be."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(300) for _ in range(draw.randint(least, most)))

    asked, examples = [Scoring((5,), tuple(range(100, 100 + CONTEXT)))], text(20, 20)
    for number in range(count):
        context = examples[: draw.choice((0, 20))] + text(1, 24)
        choices = [(token,) for token in range(4)] if number % 3 == 0 else [text(1, 12) for _ in range(3)]
        asked += [Scoring(context, choice) for choice in choices]
    draw.shuffle(asked)
    return [*asked, asked[0]]


@torch.inference_mode()
def scores_of(model: torch.nn.Module, asked: list[Scoring]) -> list[Score]:
    """The definition."""
    found = []
    for one in asked:
        ids = torch.tensor([*one.context, *one.continuation])
        logprobs = model(ids[None, :-1]).logits[0, len(one.context) - 1 :].double().log_softmax(dim=1)
        wanted = ids[len(one.context) :]
        total = logprobs.gather(1, wanted[:, None]).sum().item()
        found.append(Score(total, bool((logprobs.argmax(1) == wanted).all())))
    return found


@torch.inference_mode()
def greedy_ones(model: torch.nn.Module) -> list[Scoring]:
    """Questions whose answers are the likeliest tokens, or all but the last one is."""
    found = []
    for seed in range(100):
        ids = [seed, 7, 9]
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if max(ids) < 300:
            found += [Scoring(tuple(ids[:3]), tuple(ids[3:])), Scoring(tuple(ids[:3]), (*ids[3:5], ids[5] ^ 1))]
    return found[:12]


SMALL = EngineOptions(max_running=6, tokens_a_step=20, scores_a_step=7, block_size=4, cache_tokens=160)
"""Prompts in pieces, scores in pieces, blocks that are taken away."""


@pytest.mark.parametrize("model_type", MODELS)
def test_scores_equal_transformers(tmp_path: Path, tokenizer: Tokenizer, model_type: str):
    from transformers import AutoModelForCausalLM

    base = folder_of(tmp_path, tokenizer, model_type)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    asked = questions(12) + greedy_ones(theirs)
    expected = scores_of(theirs, asked)
    assert 0 < sum(one.is_greedy for one in expected) < len(asked) / 2
    for options in (None, SMALL):
        answerer = answerer_of(load(base, {}, CPU, torch.float32), options)
        found = dict(answerer.score(asked))
        assert sorted(found) == list(range(len(asked)))
        worst = max(abs(found[n].logprob - expected[n].logprob) for n in found)
        assert worst < 1e-4, worst
        assert [found[n].is_greedy for n in range(len(asked))] == [one.is_greedy for one in expected]


class Watched(Engine):
    """Notes how many requests it has at once."""

    most = 0

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.most = max(self.most, len(self._open))


def watched(served: Served, **options: int) -> tuple[EngineAnswerer, Watched, PlainRunner]:
    """An answerer, its engine, and a runner that counts the tokens that it computes."""
    sizes = EngineOptions(**{"block_size": 4, "cache_tokens": 2000, "tokens_a_step": 64} | options)
    runner = PlainRunner(served, -(-sizes.cache_tokens // sizes.block_size), sizes.block_size)
    engine = Watched(served, sizes, runner)
    return EngineAnswerer(served, engine), engine, runner


def test_what_questions_share_is_computed_once(served: Served):
    draw = random.Random(0)
    examples = tuple(draw.randrange(300) for _ in range(32))
    asked = [
        Scoring((*examples, number, 7, 8, 9), (letter,)) for number in range(20) for letter in (40, 41, 42, 43)
    ]
    draw.shuffle(asked)
    answerer, engine, runner = watched(served)
    assert len(dict(answerer.score(asked))) == len(asked)
    assert runner.num_computed == 32 + 20 * 4
    assert not engine.has_work and engine.stats().used_blocks == 0


def test_the_engine_has_a_bounded_number_of_requests(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evaluation.answering._WINDOW", 16)
    monkeypatch.setattr("evaluation.answering._OPEN", 5)
    assert _WINDOW > 16
    answerer, engine, _ = watched(served)
    asked = [Scoring((n % 290, 3), (4, 5)) for n in range(50)]
    assert len(dict(answerer.score(asked))) == 50 and engine.most == 5


def written_by(served: Served, asked: Writing) -> Written:
    """Greedy text of the plain loop."""
    ids = list(generate(served.model, list(asked.prompt), asked.most, served.stop_ids, 0.0,
                        vocab_size=served.tokenizer.vocab_size))  # fmt: skip
    text = served.tokenizer.decode(ids)
    places = [place for stop in asked.stop if (place := text.find(stop)) >= 0]
    return Written(text[: min(places)] if places else text, bool(places) or len(ids) < asked.most)


def test_texts(served: Served):
    draw = random.Random(1)
    asked = [
        Writing(tuple(draw.randrange(300) for _ in range(draw.randint(1, 30))), draw.randint(1, 20), stop=stop)
        for stop in ((), ("e",), ("zzz", "th", "\n")) for _ in range(8)
    ]  # fmt: skip
    found = dict(answerer_of(served, SMALL).write(asked))
    assert [found[n] for n in range(len(asked))] == [written_by(served, one) for one in asked]
    # A template's tokens end a text as the model's own do.
    one = max(asked[:8], key=lambda one: one.most)
    ids = list(generate(served.model, list(one.prompt), one.most, frozenset(), 0.0,
                        vocab_size=served.tokenizer.vocab_size))  # fmt: skip
    ended = Written(served.tokenizer.decode(ids[: ids.index(ids[-1])]), True)
    assert dict(answerer_of(served, SMALL).write([replace(one, stop_ids=(ids[-1],))])) == {0: ended}
    # Drawn texts are those of their own seeds, whoever else is asked.
    drawn = [Writing((n, 2, 3), 12, temperature=1.0, top_p=0.9, top_k=50, seed=n) for n in range(6)]
    together = dict(answerer_of(served, SMALL).write(drawn))
    for n, one in enumerate(drawn):
        assert dict(answerer_of(served).write([one])) == {0: together[n]}


def test_adapters_answer_for_themselves(base: Path, tmp_path: Path):
    peer("peft")
    from peft import AutoPeftModelForCausalLM

    folders = {name: make_adapter(tmp_path / name, base, seed) for seed, name in enumerate("ab")}
    served = load(base, folders, CPU, torch.float32)
    engine, asked = Engine(served, SMALL), questions(4)
    for name, folder in folders.items():
        expected = scores_of(AutoPeftModelForCausalLM.from_pretrained(folder).eval(), asked)
        found = dict(EngineAnswerer(served, engine, name).score(asked))
        assert max(abs(found[n].logprob - one.logprob) for n, one in enumerate(expected)) < 1e-4


def test_a_journal_asks_for_the_rest_alone(served: Served, tmp_path: Path):
    asked = questions(6)
    expected = dict(answerer_of(served).score(asked))
    journal = Journal(answerer_of(served), tmp_path, "f" * 16)
    begun: Iterator[tuple[int, Score]] = journal.score(asked)
    first = [next(begun) for _ in range(4)]
    begun.close()
    journal.close()
    answerer, engine, _ = watched(served)
    journal = Journal(answerer, tmp_path, "f" * 16)
    found = dict(journal.score(asked))
    assert found.keys() == expected.keys() >= dict(first).keys()
    assert max(abs(found[n].logprob - expected[n].logprob) for n in found) < 1e-4
    assert journal.num_known >= 4 and engine.stats().prompt_tokens < sum(len(one.context) for one in asked)
    journal.close()


@pytest.mark.parametrize("asked, sentence", [
    (Scoring((1,) * CONTEXT, (2, 3)), "the prompt has 65 tokens, and the model knows 64 positions"),
    (Scoring((), (2,)), "the prompt is empty"), (Scoring((1,), ()), "a continuation is empty"),
    (Scoring((1,), (300,)), "a continuation has tokens that the tokenizer does not know: it has 0 to 299"),
])  # fmt: skip
def test_mistakes_leave_the_engine_empty(served: Served, asked: Scoring, sentence: str):
    answerer, engine, _ = watched(served)
    with pytest.raises(ValueError, match=sentence):
        dict(answerer.score([Scoring((1, 2), (3,)), asked]))
    assert not engine.has_work and engine.stats().used_blocks == 0


def test_scores_that_are_no_numbers_are_a_mistake(base: Path):
    served = load(base, {}, CPU, torch.float32)
    with torch.no_grad():
        served.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(ValueError, match="the model's scores are not finite numbers"):
        dict(answerer_of(served).score([Scoring((1, 7), (3,))]))


def test_what_was_lent_is_given_back_as_it_was(base: Path):
    """A step of training after it has the bits of one without it."""

    def trained(asks: bool) -> dict[str, torch.Tensor]:
        served = load(base, {}, CPU, torch.float32)
        model: Decoder = served.model.train()
        model.requires_grad_(True)
        model.norm.weight.requires_grad_(False)
        if asks:
            with lent(model, served.speech_of(None)) as answerer:
                dict(answerer.score(questions(3)))
                dict(answerer.write([Writing((1, 2), 5)]))
        assert all(module.training for module in model.modules())
        assert not model.norm.weight.requires_grad and model.embed_tokens.weight.requires_grad
        model.logits(model(torch.tensor([[1, 2, 3, 4]]))).logsumexp(-1).sum().backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    plain, after = trained(False), trained(True)
    assert plain.keys() == after.keys() and all(torch.equal(plain[name], after[name]) for name in plain)


def test_continuations_stand_beside_other_requests(served: Served):
    """Scores and texts of one engine at the same time."""
    engine = Engine(served, SMALL)
    told = {}
    for piece in engine.run([
        Request("text", (1, 2, 3), Sampling(temperature=0.0, max_new_tokens=9, prompt_logprobs=1)),
        Request("score", (1, 2, 3), continuations=((4, 5), (4, 6), (9,))),
    ]):  # fmt: skip
        if piece.finish:
            told[piece.request, piece.choice] = piece
    assert [told["score", n].finish for n in range(3)] == ["length"] * 3
    expected = dict(answerer_of(served).score([Scoring((1, 2, 3), ids) for ids in ((4, 5), (4, 6), (9,))]))
    for n, score in expected.items():
        assert sum(token.logprob for token in told["score", n].tokens) == pytest.approx(score.logprob, abs=1e-4)
