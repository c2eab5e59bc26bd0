"""Sampling of many answers at once.

The prompts of a batch have the same length, so nothing is padded: a batch holds several answers to one question and to
other questions that happen to be as long. A row that has ended leaves the batch.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from model import Decoder, KVCache
from serving.generation import Loaded
from tokenizer.chat_template import Message, template_of

_MOST_THREADS = 8
"""More threads would wait for Python's lock."""


class Answer(NamedTuple):
    text: str
    tokens: int
    """Length without the token that ends it."""
    ends: bool
    """Whether the answer ended by itself, before the room ran out."""


@torch.inference_mode()
def sample_rows(
    model: Decoder,
    prompts_BT: Tensor,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    temperature: float,
    generator: torch.Generator,
    vocab_size: int,
) -> list[list[int]]:
    """New tokens of each row, up to a stop id (left out) or max_new_tokens.

    Args:
        prompts_BT: token ids, int64.
        generator: on the CPU; the tokens depend on it and on which rows share the batch.
        vocab_size: the tokenizer's size; logits beyond it are padding.
    """
    device, dtype = prompts_BT.device, next(model.parameters()).dtype
    rows, width = prompts_BT.shape
    cache = KVCache(model.config, rows, width + max_new_tokens, dtype, device)
    inputs, drawn, going = prompts_BT, [[] for _ in range(rows)], list(range(rows))
    for _ in range(max_new_tokens):
        logits_BV = model.logits(model(inputs, cache=cache)[:, -1])[:, :vocab_size].float().cpu()
        ids_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]
        stay = []
        for at, (row, token_id) in enumerate(zip(going, ids_B.tolist())):
            if token_id not in stop_ids:
                drawn[row].append(token_id)
                stay.append(at)
        if not stay:
            break
        if len(stay) < len(going):
            going, ids_B = [going[at] for at in stay], ids_B[stay]
            cache.keep(stay)
        inputs = ids_B[:, None].to(device)
    return drawn


def batches_of_one_length(prompts: list[list[int]], rows: int) -> Iterator[list[int]]:
    """Indices of prompts that have the same length, at most `rows` in a batch."""
    by_length = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    for length in sorted(by_length):
        numbers = by_length[length]
        yield from (numbers[at : at + rows] for at in range(0, len(numbers), rows))


def answer_all(
    loaded: Loaded, questions: list[str], samples: int, max_new_tokens: int, temperature: float, seed: int,
    rows: int = 64,
) -> list[list[Answer]]:  # fmt: skip
    """`samples` answers to each question. A seed gives the same answers on any number of cores.

    Args:
        rows: largest batch.
    Raises:
        ValueError: a question leaves no room for an answer.
    """
    tokenizer = loaded.tokenizer
    template = template_of(tokenizer)
    asked = [template.prompt([Message("user", question)]) for question in questions]
    prompts = [prompt for prompt in asked for _ in range(samples)]
    room = min(max_new_tokens, loaded.model.config.max_position_embeddings - max(map(len, asked)))
    if room < 1:
        raise ValueError("a question is longer than what the model knows")
    drawn = draw_all(loaded, prompts, room, template.stop_ids | loaded.stop_ids, temperature, seed, rows)
    answers = [Answer(tokenizer.decode(ids), len(ids), len(ids) < room) for ids in drawn]
    return [answers[at : at + samples] for at in range(0, len(answers), samples)]


def draw_all(
    loaded: Loaded, prompts: list[list[int]], max_new_tokens: int, stop_ids: frozenset[int], temperature: float,
    seed: int, rows: int = 64,
) -> list[list[int]]:  # fmt: skip
    """New tokens for prompts of any length. On a CPU, several threads share the batches; torch's own threads would wait
    for each other in every such small product."""
    device, batches = next(loaded.model.parameters()).device, list(batches_of_one_length(prompts, rows))

    def draw(number: int) -> list[list[int]]:
        prompts_BT = torch.tensor([prompts[at] for at in batches[number]], device=device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return sample_rows(
            loaded.model, prompts_BT, max_new_tokens, stop_ids, temperature, generator, loaded.tokenizer.vocab_size
        )

    drawn: list[list[int]] = [[]] * len(prompts)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1) if device.type == "cpu" else 1) as pool:
        for numbers, ids in zip(batches, pool.map(draw, range(len(batches)))):
            for number, row in zip(numbers, ids):
                drawn[number] = row
    return drawn
