"""Rotary position embedding (Su et al., 2021) and its scalings to longer contexts.

With D rotated channels of each head and the base theta, pair i of channels turns by theta ** (-2i / D) a position:

    none          as it is
    linear        that over the factor (Chen et al., "Extending context window ... via positional interpolation", 2023)
    dynamic       theta grows with a document's length beyond max_position_embeddings (NTK-aware scaling, bloc97, 2023)
    llama3        long wavelengths over the factor, short ones untouched, a linear blend between (Llama 3.1)
    yarn          the same with a blend along the channels, and a scale (Peng et al., "YaRN", 2023)
    longrope      a divisor for each pair: one list for documents within the original context, another one for longer
                  documents, and a scale (Ding et al., "LongRoPE", 2024)
    proportional  over the factor; only the first pairs turn, each as if all did (transformers 5)

The scale multiplies queries and keys after their rotation. What depends on a document's length is decided for each
document by itself; while a text is generated, by its length so far. Keys in a cache keep the angles that they got when
they were new, as in transformers: a text that grows beyond the border mixes both kinds, and its scores are then not
those of the whole text read at once.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, rope_factors

Tables = tuple[Tensor, Tensor]
"""cos and sin of every position's angles, times the scale: (B or 1, 1, T, D / 2) each, float32."""


def rotary_tables(
    config: ModelConfig, positions_BT: Tensor, document_ids_BT: Tensor | None = None, lengths_BT: Tensor | None = None
) -> Tables:
    """Tables for `apply_rope`.

    Args:
        document_ids_BT: equal ids lie side by side; by default, each row is one document.
        lengths_BT: lengths of the tokens' documents, int64, if they are longer than what is given of them.
    """
    lengths = None
    if depends_on_length(config):
        lengths = sequence_lengths(positions_BT, document_ids_BT) if lengths_BT is None else lengths_BT
    inv_freq = inverse_frequencies(config, lengths, positions_BT.device)
    return rope_tables(inv_freq, positions_BT, attention_scale(config))


def depends_on_length(config: ModelConfig) -> bool:
    """Whether a token's angle depends on the length of its document, not only on its position."""
    return config.rope_scaling in ("dynamic", "longrope")


def length_group(config: ModelConfig, length: int) -> int:
    """Number that is the same for documents whose lengths give a token at one position the same angles, so that one may
    take the keys of another's beginning."""
    if config.rope_scaling == "dynamic":
        return max(length, config.max_position_embeddings)
    return int(config.rope_scaling == "longrope" and length > config.original_max_position_embeddings)


def sequence_lengths(positions_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Length of each token's document, which is its greatest position plus one: int64 (B, T), or (B, 1) if each row is
    one document.

    The width of a row does not count: it includes padding, which has position 0 and depends on the batch's other rows.

    Args:
        document_ids_BT: equal ids lie side by side.
    """
    if document_ids_BT is None:
        return positions_BT.amax(dim=1, keepdim=True) + 1
    begins = torch.zeros_like(document_ids_BT, dtype=torch.bool)
    begins[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    numbers = begins.cumsum(dim=1)
    greatest = torch.zeros_like(positions_BT).scatter_reduce(1, numbers, positions_BT, "amax")
    return greatest.gather(1, numbers) + 1


def inverse_frequencies(
    config: ModelConfig, lengths: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Angle per position of each pair of channels, float32, shape (D / 2,), or (..., D / 2) if it depends on lengths.

    Args:
        lengths: of the documents, int64 (...), if `depends_on_length`; see `sequence_lengths`.
    """
    dim, factor = config.rotary_dim, config.rope_scaling_factor
    theta: float | Tensor = config.rope_theta
    if config.rope_scaling == "dynamic":
        assert lengths is not None
        context = config.max_position_embeddings
        stretch = factor * lengths.clamp(min=context).double() / context - (factor - 1)
        theta = (theta * stretch ** (dim / (dim - 2))).float()[..., None]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    wavelengths = theta**exponents
    inv_freq = 1.0 / wavelengths
    if config.rope_scaling == "linear":
        return inv_freq / factor
    if config.rope_scaling == "llama3":
        blend = _llama3_blend(config, inv_freq)
        return (1 - blend) * inv_freq / factor + blend * inv_freq
    if config.rope_scaling == "yarn":
        blend = _yarn_blend(config, device)
        return (1 - blend) * (1.0 / (factor * wavelengths)) + blend * inv_freq
    if config.rope_scaling == "longrope":
        assert lengths is not None
        short, long = (
            torch.tensor(rope_factors(name, getattr(config, name)), dtype=torch.float32, device=device)
            for name in ("rope_short_factor", "rope_long_factor")
        )
        is_long = (lengths > config.original_max_position_embeddings)[..., None]
        return torch.where(is_long, 1.0 / (long * wavelengths), 1.0 / (short * wavelengths))
    if config.rope_scaling == "proportional":
        turns = torch.arange(dim // 2, device=device) < config.rotated_pairs
        return torch.where(turns, inv_freq, 0.0) / factor
    return inv_freq


def _llama3_blend(config: ModelConfig, inv_freq: Tensor) -> Tensor:
    """Share of each pair's own frequency, from 0 for long wavelengths to 1 for short ones."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    wavelengths = 2 * math.pi / inv_freq
    return ((config.original_max_position_embeddings / wavelengths - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_blend(config: ModelConfig, device: torch.device | None) -> Tensor:
    """Share of each pair's own frequency: 1 for pairs that turn more than beta_fast times within the original context,
    0 for those that turn less than beta_slow times."""
    dim, context = config.rotary_dim, config.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_that_turns(config.rope_beta_fast), pair_that_turns(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    # There are dim / 2 pairs; dim - 1 is the authors' bound, with which weights were trained.
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - first) / width).clamp(0.0, 1.0)


def attention_scale(config: ModelConfig) -> float:
    """Number by which queries and keys are multiplied besides their rotation."""
    if config.rope_scaling not in ("yarn", "longrope"):
        return 1.0
    if config.rope_attention_factor:
        return config.rope_attention_factor
    if config.rope_scaling == "yarn":
        return yarn_scale(config.rope_scaling_factor)
    return math.sqrt(1 + math.log(config.rope_scaling_factor) / math.log(config.original_max_position_embeddings))


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """Scale of YaRN for a factor, 1 if that does not stretch.

    Args:
        weight: of the term that depends on the factor; DeepSeek names it mscale.
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rope_tables(inv_freq: Tensor, positions_BT: Tensor, scale: float = 1.0) -> Tables:
    """cos and sin of every position's angles, each (B, 1, T, D / 2), float32 whatever the model's dtype.

    Args:
        inv_freq: (D / 2,), (B, 1, D / 2) or (B, T, D / 2).
        scale: see `attention_scale`.
    """
    angles = (positions_BT[..., None].float() * inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def apply_rope(x_BHTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels in float32; returns x's dtype. If the tables are narrower than half a head, the channels
    after the first D (twice their width) stay as they are.

    Args:
        interleaved: pair i has channels 2i and 2i + 1; otherwise i and i + D/2, Hugging Face's usual convention.
    """
    dim = 2 * cos.shape[-1]
    if dim < x_BHTD.shape[-1]:
        rotated = apply_rope(x_BHTD[..., :dim], cos, sin, interleaved)
        return torch.cat((rotated, x_BHTD[..., dim:]), dim=-1)
    if interleaved:
        first, second = x_BHTD.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return pairs.flatten(-2).to(x_BHTD.dtype)
    first, second = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTD.dtype)
