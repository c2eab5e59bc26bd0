"""Size of the cache of keys and values."""

import os
from pathlib import Path

import torch

from model.config import ModelConfig
from model.paged import PagedCache
from serving.admission import EngineOptions

_SHARE_OF_GPU, _SHARE_OF_CPU = 0.8, 0.25
"""Parts of free memory that the cache may take. On a CPU, others need memory, too."""
_MEMINFO = Path("/proc/meminfo")


def num_blocks_of(config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device) -> int:
    """Number of blocks of an engine's cache. Ranks that share a model must agree on one.

    Args:
        dtype, device: those that the model computes in and on.
    Raises:
        ValueError: there is no memory.
    """
    size = options.block_size
    if options.cache_tokens:
        return -(-options.cache_tokens // size)
    bytes_of_block = PagedCache.block_bytes(config, size, dtype)
    share = (_SHARE_OF_GPU if device.type == "cuda" else _SHARE_OF_CPU) / (2 if options.leaves_room else 1)
    memory = options.cache_gb * 1e9 or _free_bytes(device) * share
    count = int(memory // bytes_of_block)
    if not options.cache_gb:
        count = min(count, options.max_running * -(-config.max_position_embeddings // size))
    if count < 1:
        raise ValueError(
            f"{memory / 1e9:.3f} GB are there for the cache, and a block of {size} tokens takes "
            f"{bytes_of_block / 1e9:.3f} GB: give it more (cache_gb), end other programs, or take a smaller model"
        )
    return count


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # PyTorch keeps what it has freed, and gives it out again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if _MEMINFO.exists():
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
