"""Size of the cache of keys and values."""

import os
from pathlib import Path

import torch

from model.config import ModelConfig
from model.paged import PagedCache

_SHARE_OF_GPU, _SHARE_OF_CPU = 0.8, 0.25
"""Parts of free memory that the cache may take. On a CPU, others need memory, too."""
_MEMINFO = Path("/proc/meminfo")


def num_blocks_of(
    config: ModelConfig, block_size: int, cache_tokens: int, max_running: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Number of blocks of an engine's cache.

    Args:
        cache_tokens: how many tokens it shall hold; 0: as many as max_running texts have, as far as free memory allows.
    Raises:
        ValueError: there is no memory.
    """
    if cache_tokens:
        return -(-cache_tokens // block_size)
    blocks_of_text = -(-config.max_position_embeddings // block_size)
    bytes_of_block = PagedCache.block_bytes(config, block_size, dtype)
    free = _free_bytes(device)
    count = min(max_running * blocks_of_text, int(free * _share_of(device)) // bytes_of_block)
    if count < 1:
        raise ValueError(
            f"{free / 1e9:.1f} GB of memory are free, and a block of {block_size} tokens of the cache takes "
            f"{bytes_of_block / 1e9:.3f} GB: end other programs, or take a smaller model"
        )
    return count


def _share_of(device: torch.device) -> float:
    return _SHARE_OF_GPU if device.type == "cuda" else _SHARE_OF_CPU


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
