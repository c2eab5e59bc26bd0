"""Rotary position embedding (Su et al., 2021) and its scalings to longer contexts."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig


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
    """Angle per position of each pair of channels, float32, shape (head_dim / 2,); for dynamic (..., head_dim / 2).

    none     theta ** (-2i / D)
    linear   that over the factor (Chen et al., "Extending context window ... via positional interpolation", 2023)
    dynamic  theta grows with a document's length beyond max_position_embeddings (NTK-aware scaling, bloc97, 2023)
    llama3   long wavelengths over the factor, short ones untouched, a linear blend between (Llama 3.1)

    Args:
        lengths: of the documents, int64 (...), for dynamic alone; see `sequence_lengths`.
    """
    dim, factor = config.head_dim, config.rope_scaling_factor
    theta: float | Tensor = config.rope_theta
    if config.rope_scaling == "dynamic":
        assert lengths is not None
        context = config.max_position_embeddings
        stretch = factor * lengths.clamp(min=context).double() / context - (factor - 1)
        theta = (theta * stretch ** (dim / (dim - 2))).float()[..., None]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    inv_freq = 1.0 / (theta**exponents)
    if config.rope_scaling == "linear":
        inv_freq = inv_freq / factor
    elif config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        wavelengths = 2 * math.pi / inv_freq
        blend = ((config.original_max_position_embeddings / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
        inv_freq = (1 - blend) * inv_freq / factor + blend * inv_freq
    return inv_freq


def rope_tables(inv_freq: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (B, 1, T, D / 2), float32 whatever the model's dtype.

    Args:
        inv_freq: (D / 2,), (B, 1, D / 2) or (B, T, D / 2).
    """
    angles = (positions_BT[..., None].float() * inv_freq)[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2), Hugging Face's convention, in float32; returns x's dtype."""
    first, second = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTD.dtype)
