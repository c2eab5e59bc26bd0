"""Rotary position embedding (Su et al., 2021) and its stretchings to longer contexts."""

import math

import torch
from torch import Tensor

from model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig, seq_len: int, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of channels, float32, shape (head_dim / 2,).

    none     theta ** (-2i / D)
    linear   the same over the factor (Chen et al., "Extending context window ... via positional interpolation", 2023)
    dynamic  theta grows with seq_len beyond max_position_embeddings (NTK-aware scaling, bloc97, 2023)
    llama3   long wavelengths over the factor, short ones untouched, a linear blend between (Llama 3.1)
    """
    dim, theta, factor = config.head_dim, config.rope_theta, config.rope_scaling_factor
    if config.rope_scaling == "dynamic":
        context = config.max_position_embeddings
        theta *= (factor * max(seq_len, context) / context - (factor - 1)) ** (dim / (dim - 2))
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
    """cos and sin of every position's angles, float32 whatever the model's dtype, each (B, 1, T, D / 2)."""
    angles = positions_BT[:, None, :, None].float() * inv_freq
    return angles.cos(), angles.sin()


def apply_rope(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2), Hugging Face's convention, in float32; returns x's dtype."""
    first, second = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTD.dtype)
