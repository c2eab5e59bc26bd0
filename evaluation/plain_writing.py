"""Answers of a live model, one after the other, token by token."""

from collections.abc import Callable

import torch

from evaluation.asking import Writing, Written
from model import Decoder
from serving.generation import generate
from serving.requests import TokenScore
from serving.text import TextStream
from tokenizer import Tokenizer


def write_text(
    model: Decoder, tokenizer: Tokenizer, stop_ids: frozenset[int], asked: Writing, dtype: torch.dtype,
    device: torch.device, on_token: Callable[[], None],
) -> Written:  # fmt: skip
    """An answer.

    Args:
        model: whole, not training.
        stop_ids: tokens that end a text.
        dtype: that the model computes in.
        on_token: called after each token.
    Raises:
        ValueError: the prompt is empty, or fills the context.
    """
    stream, pieces, count = TextStream(tokenizer, asked.stop), [], 0
    ids = generate(
        model, list(asked.prompt), asked.most, stop_ids, asked.temperature, asked.top_k, asked.top_p, asked.seed,
        tokenizer.vocab_size, dtype, device,
    )  # fmt: skip
    for token_id in ids:
        on_token()
        count += 1
        released = stream.push(TokenScore(token_id))
        pieces.append(released.text)
        if released.stopped:
            return Written("".join(pieces), has_ended=True)
    last = stream.flush()
    room = min(asked.most, model.config.max_position_embeddings - len(asked.prompt))
    return Written("".join([*pieces, last.text]), has_ended=last.stopped or count < room)
