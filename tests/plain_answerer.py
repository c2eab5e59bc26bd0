"""Answerers for tests: a model that computes each question by itself, one that knows the answers, one that guesses."""

import math
import random
from collections.abc import Collection, Iterator, Sequence

import torch

from evaluation.asking import Score, Scoring, Writing, Written
from evaluation.journal import key_of
from model import Decoder
from tokenizer import Tokenizer


class PlainAnswerer:
    """What any Answerer must be equal to: whole sequences, one by one, without a cache. Greedy texts only."""

    can_write = True

    def __init__(self, model: Decoder, tokenizer: Tokenizer, context: int):
        self.model, self.tokenizer, self.context = model, tokenizer, context

    @torch.inference_mode()
    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        for place, one in enumerate(asked):
            ids = torch.tensor(one.context + one.continuation)
            assert one.context and one.continuation and len(ids) - 1 <= self.context
            logprobs = self._logits(ids[:-1])[len(one.context) - 1 :].log_softmax(-1)
            wanted = ids[len(one.context) :]
            logprob = logprobs.gather(1, wanted[:, None]).double().sum()
            yield place, Score(float(logprob), bool((logprobs.argmax(1) == wanted).all()))

    @torch.inference_mode()
    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        for place, one in enumerate(asked):
            assert one.prompt and one.temperature == 0 and len(one.prompt) + one.most <= self.context
            new: list[int] = []
            text, has_ended = "", False
            while len(new) < one.most and not has_ended:
                logits = self._logits(torch.tensor([*one.prompt, *new]))[-1]
                new.append(int(logits[: self.tokenizer.vocab_size].argmax()))
                has_ended = new[-1] in {self.tokenizer.eod_id, *one.stop_ids}
                text = self.tokenizer.decode(new[:-1] if has_ended else new)
                ends = [text.find(stop) for stop in one.stop if stop in text]
                if ends:
                    text, has_ended = text[: min(ends)], True
            yield place, Written(text, has_ended)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.logits(self.model(ids[None])[0]).float()


class Oracle:
    """One who knows some texts by heart, and nothing else. It answers in reverse order."""

    def __init__(self, tokenizer: Tokenizer, texts: Collection[str], context: int = 1024, can_write: bool = True):
        self.tokenizer, self.context, self.can_write = tokenizer, context, can_write
        self._texts = texts

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        for place in reversed(range(len(asked))):
            text = self.tokenizer.decode(asked[place].context + asked[place].continuation)
            is_known = any(known.startswith(text) for known in self._texts)
            yield place, Score(0.0, True) if is_known else Score(-100.0, False)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        for place in reversed(range(len(asked))):
            prompt = self.tokenizer.decode(asked[place].prompt)
            rest = next((text[len(prompt) :] for text in self._texts if text.startswith(prompt)), "?")
            for token in self.tokenizer.special_ids:
                rest = rest.partition(token)[0]
            for stop in asked[place].stop:
                rest = rest.partition(stop)[0] if rest.strip("\n") else rest
            yield place, Written(rest, True)


class Guesser:
    """One who knows nothing: each answer is drawn by what was asked."""

    def __init__(self, tokenizer: Tokenizer, context: int = 1024, seed: int = 0):
        self.tokenizer, self.context, self.can_write = tokenizer, context, True
        self._seed = seed

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        for place, one in enumerate(asked):
            yield place, Score(math.log(random.Random(f"{self._seed} {key_of(one)}").random()), False)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        for place, one in enumerate(asked):
            rng = random.Random(f"{self._seed} {key_of(one)}")
            yield place, Written("".join(rng.choices("abc 123\n", k=one.most)), rng.random() < 0.5)
