"""Texts of a model that is being trained, by a serving engine that lives no longer than one group of them.

Groups are the same on any number of ranks, and so are the texts. The engine's cache is as large as the group needs, but
bounded, since gradients and the optimizer's state stay where they are; texts that find no room wait.
"""

from collections.abc import Callable, Sequence

from evaluation.answering import engine_options, lent
from evaluation.asking import Writing, Written
from model import Decoder
from model.paged import PagedCache
from serving.engine import EngineOptions
from serving.loading import Speech

_GROUP = {"cpu": 16, "cuda": 64}
"""Texts of a group."""
_CACHE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Most memory of a cache, unless a single text needs more."""


def groups_of(count: int, device: str) -> list[range]:
    """Places of texts, group by group.

    Args:
        device: "cpu" or "cuda".
    """
    size = _GROUP[device]
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def write_texts(
    model: Decoder, speech: Speech, asked: Sequence[Writing], after_step: Callable[[], None]
) -> list[Written]:
    """A group of texts, in the order in which they are asked for.

    Args:
        model: whole. Afterwards it is as before.
        after_step: called after each forward pass; if it raises, the texts are broken off.
    Raises:
        ValueError: a prompt is empty or too long, or the model's scores are not numbers.
    """
    with lent(model, speech, _options_for(model, asked), after_step) as answerer:
        found = dict(answerer.write(asked))
    return [found[place] for place in range(len(asked))]


def _options_for(model: Decoder, asked: Sequence[Writing]) -> EngineOptions:
    parameter = next(model.parameters())
    size = engine_options(model).block_size
    needs = [-(-(len(one.prompt) + one.most) // size) for one in asked]
    bytes_of_block = PagedCache.block_bytes(model.config, size, parameter.dtype)
    room = _CACHE_BYTES[parameter.device.type] // bytes_of_block
    return engine_options(model, max_running=len(asked), cache_tokens=size * max(max(needs), min(sum(needs), room)))
