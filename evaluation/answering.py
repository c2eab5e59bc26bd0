"""Our serving engine as what answers an evaluation.

    asked, 100,000 of them -> windows of 2,048, sorted -> one request per context -> engine, at most 256 at a time

Requests are sorted by their tokens within a window, so those that begin alike are neighbours: what they share, such as
the examples before a question, is found in the engine's cache. Choices of one question are one request, whose prompt is
computed once, but for the tokens behind its last full block of the cache. The engine pads nothing, so lengths need no
order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import TypeVar

from evaluation.asking import Score, Scoring, Writing, Written
from model import Decoder
from serving.engine import Engine, EngineOptions
from serving.loading import Served, Speech
from serving.local import Asked, pieces_of
from serving.requests import Piece, Request, Sampling

_WINDOW = 2048
"""Questions that are put in order together."""
_OPEN = 256
"""Requests that the engine has at most."""
_SCORES_AT_ONCE = 1 << 24
"""Numbers that one step's wanted scores may be: 64 MB in float32."""

Asking = TypeVar("Asking", Scoring, Writing)


def engine_options(model: Decoder, **other: object) -> EngineOptions:
    """Sizes of an engine that nobody waits for: large steps, and as many scores at once as fit into 64 MB.

    Args:
        other: fields of EngineOptions that are given.
    """
    # Not every rank of a pipeline has the embedding.
    is_cpu = next(model.parameters()).device.type == "cpu"
    tokens = 512 if is_cpu else 8192
    scores = max(16, min(tokens, _SCORES_AT_ONCE // model.config.vocab_size))
    # Tokens of a question behind its last full block are computed for each choice: fewer, if blocks are small.
    given = {"tokens_a_step": tokens, "scores_a_step": scores, "max_running": 64 if is_cpu else 256,
             "block_size": 8 if is_cpu else 16}  # fmt: skip
    return EngineOptions(**(given | other))  # type: ignore[arg-type]


class EngineAnswerer:
    """An Answerer; see asking.py.

    Args:
        served: the model of the engine.
        engine: nobody else asks it meanwhile. See `engine_options`.
        adapter: name of the one that answers; None: the model without one.
    """

    can_write = True

    def __init__(self, served: Served, engine: Asked, adapter: str | None = None):
        self._engine, self._adapter = engine, adapter
        self.tokenizer = served.speech_of(adapter).tokenizer
        self.context = served.model.config.max_position_embeddings

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        """
        Raises:
            ValueError: one of them does not fit into the model's context, or its scores are not numbers.
        """
        members: dict[str, list[int]] = {}

        def requests() -> Iterator[Request]:
            for places in _windows(asked, lambda one: one.context):
                for context, group in groupby(places, lambda place: asked[place].context):
                    its = list(group)
                    name = str(its[0])
                    members[name] = its
                    yield Request(name, context, adapter=self._adapter, continuations=tuple(
                        asked[n].continuation for n in its
                    ))  # fmt: skip

        for piece in self._pieces(requests()):
            its = members[piece.request]
            place, tokens = its[piece.choice], piece.tokens
            is_greedy = all(token.id == token.alternatives[0][0] for token in tokens)
            yield place, Score(sum(token.logprob or 0.0 for token in tokens), is_greedy)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        """
        Raises:
            ValueError: as for `score`.
        """
        texts: dict[str, str] = {}

        def requests() -> Iterator[Request]:
            for places in _windows(asked, lambda one: one.prompt):
                for place in places:
                    one = asked[place]
                    sampling = Sampling(
                        max_new_tokens=one.most, temperature=one.temperature, top_k=one.top_k, top_p=one.top_p,
                        seed=one.seed, stop=one.stop, stop_ids=frozenset(one.stop_ids),
                    )  # fmt: skip
                    yield Request(str(place), one.prompt, sampling, adapter=self._adapter)

        for piece in self._pieces(requests()):
            texts[piece.request] = texts.get(piece.request, "") + piece.text
            if piece.finish:
                yield int(piece.request), Written(texts.pop(piece.request), piece.finish == "stop")

    def _pieces(self, requests: Iterable[Request]) -> Iterator[Piece]:
        for piece in pieces_of(self._engine, requests, _OPEN):
            if piece.error:
                raise ValueError(piece.error)
            yield piece


def answerer_of(served: Served, options: EngineOptions | None = None, adapter: str | None = None) -> EngineAnswerer:
    """A model that answers, by an engine of its own in this process.

    Args:
        options: None: see `engine_options`.
    Raises:
        ValueError: the options do not fit together, or there is too little memory.
    """
    return EngineAnswerer(served, Engine(served, options or engine_options(served.model)), adapter)


class _Watched:
    """An engine whose owner looks at something else after each step."""

    def __init__(self, engine: Engine, after_step: Callable[[], None]):
        self._engine, self._after_step = engine, after_step
        self.submit, self.cancel = engine.submit, engine.cancel

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def step(self) -> list[Piece]:
        pieces = self._engine.step()
        self._after_step()
        return pieces


@contextmanager
def lent(
    model: Decoder, speech: Speech, options: EngineOptions | None = None, after_step: Callable[[], None] = lambda: None
) -> Iterator[EngineAnswerer]:
    """A model that is being trained, as one that answers. Its matrices stay as they are, so this is slower than
    `answerer_of`; afterwards each module is in the mode, and each parameter wants the gradients, that it had.

    Args:
        options: without batch_invariant, which would change the model's experts.
        after_step: called after each forward pass; what it raises comes out of the answers.
    Raises:
        ValueError: as for `answerer_of`.
    """
    options = options or engine_options(model)
    if options.batch_invariant:
        raise ValueError("batch_invariant changes a model for good: leave it out while the model is trained")
    modes = [(module, module.training) for module in model.modules()]
    wishes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        served = Served(model, speech, may_pack=False)
        yield EngineAnswerer(served, _Watched(Engine(served, options), after_step))
    finally:
        for module, is_training in modes:
            module.training = is_training
        for parameter, wants_gradient in wishes:
            parameter.requires_grad_(wants_gradient)


def _windows(asked: Sequence[Asking], tokens_of: Callable[[Asking], tuple[int, ...]]) -> Iterator[list[int]]:
    """Places of what is asked, a window after the other, each in the order of the tokens."""
    places = iter(range(len(asked)))
    while window := list(islice(places, _WINDOW)):
        yield sorted(window, key=lambda place: tokens_of(asked[place]))
