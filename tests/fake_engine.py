"""An engine without a model, for tests of what stands around it: it says each prompt again, token by token."""

import math
import threading
from collections.abc import Iterable

from serving.requests import EngineStats, Finish, Piece, Request, TokenScore
from tokenizer import Tokenizer


class FakeEngine:
    """Keeps the contract of serving/engine.py. Its answer to a prompt is the prompt's last tokens again and again.

    Args:
        context: most tokens of prompt and answer.
        stop_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, context: int = 128, stop_ids: Iterable[int] = ()):
        self.tokenizer, self.context, self.stop_ids = tokenizer, context, frozenset(stop_ids)
        self.open: dict[str, tuple[Request, list[list[int]]]] = {}
        self.seen: list[Request] = []
        self.cancelled: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Exception | None = None
        self.steps = self.new_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def submit(self, request: Request) -> None:
        if len(request.prompt_ids) > self.context:
            raise ValueError("the prompt is too long for the engine")
        assert request.id not in self.open
        self.seen.append(request)
        self.open[request.id] = (request, [[] for _ in range(request.n)])

    def cancel(self, request_id: str) -> None:
        del self.open[request_id]
        self.cancelled.append(request_id)

    def step(self) -> list[Piece]:
        self.gate.wait(20)
        self.steps += 1
        if self.fails is not None:
            raise self.fails
        pieces = []
        for name, (request, texts) in list(self.open.items()):
            for choice, ids in enumerate(texts):
                pieces += self._next(name, request, choice, ids)
            if len(texts[-1]) >= (request.sampling.max_new_tokens or 0):
                self.open.pop(name, None)
        return pieces

    def _next(self, name: str, request: Request, choice: int, ids: list[int]) -> list[Piece]:
        sampling = request.sampling
        prompt = ()
        if not ids and sampling.prompt_logprobs is not None:
            prompt = tuple(self._score(one, sampling.prompt_logprobs if number else None)
                           for number, one in enumerate(request.prompt_ids))  # fmt: skip
        if not sampling.max_new_tokens:
            return [Piece(name, choice, finish="length", prompt=prompt)]
        new = request.prompt_ids[len(ids) % len(request.prompt_ids)]
        ids.append(new)
        self.new_tokens += 1
        done: Finish | None = "length" if len(ids) == sampling.max_new_tokens else None
        return [Piece(name, choice, self.tokenizer.decode([new]), (self._score(new, sampling.logprobs),), done, prompt)]

    def _score(self, token_id: int, top: int | None) -> TokenScore:
        if top is None:
            return TokenScore(token_id)
        return TokenScore(token_id, math.log(0.5), tuple((one, -1.0 - one) for one in range(top)))

    def stats(self) -> EngineStats:
        return EngineStats(len(self.open), 0, 8, len(self.open), 0, 0, self.new_tokens, 0, self.steps)
