"""Loading a model with its tokenizer, and generating text from it, one token after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import Decoder, KVCache
from serving.loading import load
from tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A model that is ready to generate."""

    model: Decoder
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """Tokens that end a text: the end of a document, and those that the folder's configuration names."""


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Model and tokenizer of a run (its last checkpoint), a checkpoint or a folder, ready to generate. See
    serving/loading.py, also for several adapters.

    Raises:
        ValueError: one of the two cannot be used, or they do not belong together.
    """
    served = load(path, {}, device, dtype)
    return Loaded(served.model, served.tokenizer, served.stop_ids)


def room_for_text(model: Decoder, prompt_ids: list[int]) -> int:
    """Number of tokens that may follow a prompt. The model knows `max_position_embeddings` positions, whatever the
    scaling of its rotary positions.

    Raises:
        ValueError: there is no room, or the prompt is empty.
    """
    context = model.config.max_position_embeddings
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if len(prompt_ids) >= context:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, and the model knows {context} positions "
            f"(max_position_embeddings): shorten it"
        )
    return context - len(prompt_ids)


def sample_token(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> int:
    """Draw a token id from scores of shape (V,).

    Args:
        temperature: divides the scores; 0 takes the highest score.
        top_k: keep only this many of the highest scores; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches it (Holtzman et al., 2020); 1 keeps all.
    """
    logits_V = logits_V.float().cpu()
    if temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))
    probabilities, order = logits_V.softmax(dim=-1).sort(descending=True)
    if top_p < 1.0:
        # The token that crosses the border stays.
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt_ids: list[int],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    agree: Callable[[int], int] = lambda token_id: token_id,
) -> Iterator[int]:
    """Yield new token ids one by one, up to a stop id (not yielded), max_new_tokens or the end of the model's context.

    Args:
        vocab_size: the tokenizer's; the model's scores beyond it are padding.
        dtype, device: those that the model computes in and on; None: those of its weights.
        agree: given the token that was drawn, returns the one to take.
    Raises:
        ValueError: an empty prompt, or one that fills the context.
    """
    max_new_tokens = min(max_new_tokens, room_for_text(model, prompt_ids))
    parameter = next(model.parameters())
    dtype, device = dtype or parameter.dtype, device or parameter.device
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    cache = KVCache(model.config, 1, len(prompt_ids) + max_new_tokens, dtype, device)
    inputs = torch.tensor([prompt_ids], device=device)
    for _ in range(max_new_tokens):
        logits_V = model.logits(model(inputs, cache=cache)[0, -1])[:vocab_size]
        token_id = agree(sample_token(logits_V, temperature, top_k, top_p, generator))
        if token_id in stop_ids:
            return
        yield token_id
        inputs = torch.tensor([[token_id]], device=device)
