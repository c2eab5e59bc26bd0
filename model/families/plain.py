"""What families of 2022 and 2023 have in common: a key for each size, and heads that share the width evenly."""

from typing import Any

import torch

from model.config import ModelConfig
from model.families.family import Rule, Tensors
from model.families.values import REQUIRED, read_values, require_positive
from model.hf_files import shown

SIZES: dict[str, tuple[type, object]] = {
    "vocab_size": (int, REQUIRED), "hidden_size": (int, REQUIRED), "intermediate_size": (int, REQUIRED),
    "num_hidden_layers": (int, REQUIRED), "num_attention_heads": (int, REQUIRED), "rms_norm_eps": (float, 1e-6),
    "initializer_range": (float, 0.02), "tie_word_embeddings": (bool, False),
}  # fmt: skip
"""Key that has the name of our field -> (kind, value if it is missing or null)."""
SILU: dict[str, tuple[object, ...]] = {"hidden_act": ("silu", "swish")}
"""The one activation of a SwiGLU, by both of its names, for `harmless_at`."""


def read_sizes(values: dict, **others: tuple[type, object]) -> dict[str, Any]:
    """Fields for the keys of SIZES, some of them with another default, or others besides.

    Raises:
        ValueError: one is missing, or out of range.
    """
    fields: dict[str, Any] = read_values(values, SIZES | others)
    require_positive(fields, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads")  # fmt: skip
    return fields


def size_keys(config: ModelConfig) -> dict[str, object]:
    """The keys of SIZES."""
    return {name: getattr(config, name) for name in SIZES}


def even_heads(config: ModelConfig, grouped: bool = False) -> list[str]:
    """Reasons why a model does not have the heads that follow from hidden_size and num_attention_heads, for
    `Family.mismatches`. Zeros of a configuration that is not resolved mean that it has.

    Args:
        grouped: whether the family can have fewer heads of keys and values.
    """
    found = []
    if config.num_key_value_heads not in (0, config.num_attention_heads) and not grouped:
        found.append(f"it has as many key and value heads as query heads, not {config.num_key_value_heads}")
    if config.head_dim and config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"its head_dim is hidden_size / num_attention_heads, not {config.head_dim}")
    return found


def require_same(values: dict, *names: str) -> object:
    """The value of a key that has several names, or None.

    Raises:
        ValueError: they have different values.
    """
    given = {name: values[name] for name in names if values.get(name) is not None}
    for name, value in given.items():
        first, expected = next(iter(given.items()))
        if value != expected:
            raise ValueError(f"{first} is {shown(expected)} and {name} is {shown(value)}: take the wrong one out")
    return next(iter(given.values()), None)


def interleaved_rows(theirs: str, ours: tuple[str, ...], heads: int) -> Rule:
    """Rule for a tensor that holds the rows of several projections head by head: those of the first head in the order
    of `ours`, then those of the second one, ...

    Args:
        heads: number of heads, the same for all projections.
    """

    def join(tensors: Tensors) -> Tensors:
        return [torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)]

    def split(tensors: Tensors) -> Tensors:
        return [part.flatten(0, 1) for part in tensors[0].unflatten(0, (heads, len(ours), -1)).unbind(1)]

    return Rule((theirs,), ours, join, split)
