"""Sampling of many answers at once.

The prompts are cut into groups that always are the same, and each group has an engine of its own. So an answer depends
neither on the number of threads nor on the others that it is drawn beside.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from serving.engine import Engine, EngineOptions
from serving.loading import Served
from serving.requests import Request, Sampling
from tokenizer.chat_template import Message, template_of

_MOST_THREADS = 8
"""More threads would wait for Python's lock."""


class Answer(NamedTuple):
    text: str
    tokens: int
    """Length without the token that ends it."""
    ends: bool
    """Whether the answer ended by itself, before the room ran out."""


def answer_all(
    served: Served, questions: list[str], samples: int, max_new_tokens: int, temperature: float, seed: int,
    rows: int = 64,
) -> list[list[Answer]]:  # fmt: skip
    """`samples` answers to each question. A seed gives the same answers on any number of cores.

    Args:
        rows: answers that are drawn together.
    Raises:
        ValueError: a question leaves no room for an answer, or the model's scores are not numbers.
    """
    template = template_of(served.tokenizer)
    prompts = [template.prompt([Message("user", question)]) for question in questions]
    room = min(max_new_tokens, served.model.config.max_position_embeddings - max(map(len, prompts)))
    if room < 1:
        raise ValueError("a question is longer than what the model knows")
    return draw_all(served, prompts, samples, room, template.stop_ids, temperature, seed, rows)


def draw_all(
    served: Served, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, stop_ids: frozenset[int],
    temperature: float, seed: int, rows: int = 64,
) -> list[list[Answer]]:  # fmt: skip
    """`samples` texts for each prompt. On a CPU, several threads share the groups; torch's own threads would wait for
    each other in every such small product.

    Args:
        stop_ids: tokens that end a text, besides those that the model's folder names.
    """
    drawing = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=stop_ids)
    requests = [
        Request(str(number), tuple(prompt), replace(drawing, seed=seed * 1_000_003 + number), samples)
        for number, prompt in enumerate(prompts)
    ]
    each = max(1, rows // samples)
    groups = [requests[begin : begin + each] for begin in range(0, len(requests), each)]
    # Before the threads begin, or each engine would do it.
    served.pack()
    is_cpu = next(served.model.parameters()).device.type == "cpu"
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1) if is_cpu else 1) as pool:
        drawn = pool.map(lambda group: _draw(served, group), groups)
        return [answers for group in drawn for answers in group]


def _draw(served: Served, requests: Sequence[Request]) -> list[list[Answer]]:
    texts: dict[tuple[str, int], str] = {}
    counts: dict[tuple[str, int], int] = {}
    finishes = {}
    engine = Engine(served, EngineOptions(max_running=max(64, *(request.n for request in requests))))
    for piece in engine.run(requests):
        if piece.finish == "error":
            raise ValueError(piece.error)
        key = piece.request, piece.choice
        texts[key] = texts.get(key, "") + piece.text
        counts[key] = counts.get(key, 0) + len(piece.tokens)
        finishes[key] = piece.finish
    return [
        [Answer(texts[key], counts[key], finishes[key] == "stop")
         for key in ((request.id, choice) for choice in range(request.n))]
        for request in requests
    ]  # fmt: skip
