"""Floating-point operations of training, and the devices' peaks.

Model FLOPs utilisation (MFU) is FLOPs a token x tokens a second / the devices' dense peak (Chowdhery et al., PaLM,
2022). There are two counts of the FLOPs a token:

    strict   6 x parameters of a token's matmuls (the head where it is computed, not the input embedding; of the
             experts, those that the token is sent to) + attention to the keys that a query sees: half of all in a
             causal layer, fewer within a window
    seed     6 x all parameters + full attention: the formula of llm-zero2all, so that its tables compare

Below an adapter, a frozen matrix takes 4 FLOPs a parameter instead of 6: nobody computes its gradient, only that of its
input. The strict count says so, and counts the adapter's own matrices as trained ones; not the lengths of DoRA's rows,
whose cost does not grow with the tokens.
"""

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import ModelConfig

if TYPE_CHECKING:
    import torch

# Dense peak in TFLOP/s for bf16 and fp16, and for fp32 matmuls (without TF32), by a pattern in the device's name.
_PEAK_TFLOPS = (
    (r"B200|GB200", 2250.0, 80.0),
    (r"H200|H100 (?!PCIe|NVL)|H100$|GH200|H800", 989.0, 67.0),
    (r"H100 NVL", 835.0, 60.0),
    (r"H100 PCIe", 756.0, 51.0),
    (r"H20\b", 148.0, 44.0),
    (r"A100|A800", 312.0, 19.5),
    (r"A30\b", 165.0, 10.3),
    (r"L40S", 362.0, 91.6),
    (r"L40\b", 181.0, 90.5),
    (r"A40\b", 149.7, 37.4),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71.0, 35.6),
    (r"V100", 125.0, 15.7),
    (r"T4\b", 65.0, 8.1),
)


@dataclass(frozen=True)
class Frozen:
    """What trains where the matrices of the blocks do not."""

    added: int = 0
    """Parameters of the adapter's matmuls."""
    head_trains: bool = False


def _attention_parameters(config: ModelConfig) -> int:
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = config.hidden_size * (2 * query + 2 * kv)
    # Two layers C -> C / 2 -> C, each of a token and the one before it.
    local_filter = 2 * (2 * config.hidden_size * (config.hidden_size // 2)) if config.local_filter else 0
    return projections + local_filter


def _feed_forward_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters that a token meets."""
    if not config.has_experts(layer):
        return (3 if config.mlp == "swiglu" else 2) * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok + config.num_shared_experts
    return config.hidden_size * (config.num_local_experts + 3 * experts * config.moe_intermediate_size)


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the matmuls of a token: without embedding, biases, norms, and the experts that it is not sent
    to."""
    layers = range(config.num_hidden_layers)
    blocks = sum(_attention_parameters(config) + _feed_forward_parameters(config, layer) for layer in layers)
    return blocks + config.vocab_size * config.hidden_size


def unit_flops(config: ModelConfig, seq_len: float, head_share: float = 1.0) -> list[float]:
    """Forward and backward FLOPs a token of the embedding, of each block, and of the head.

    Args:
        seq_len, head_share: see flops_per_token_strict.
    """
    layers = range(config.num_hidden_layers)
    blocks = [
        6.0 * (_attention_parameters(config) + _feed_forward_parameters(config, layer))
        + _attention_flops(config, _mean_keys(seq_len, config.window_of(layer)))
        for layer in layers
    ]
    return [0.0, *blocks, 6.0 * head_share * config.vocab_size * config.hidden_size]


def _attention_flops(config: ModelConfig, keys: float) -> float:
    """FLOPs a token in one layer: two matmuls (scores, values) of 2 S D each a head for S keys, times 3 for forward and
    backward."""
    return 12.0 * config.num_attention_heads * config.head_dim * keys


def _mean_keys(seq_len: float, window: int) -> float:
    """Keys that a query sees, averaged over a sequence: all before it, or the latest `window` (0: all)."""
    window_len = min(window, seq_len) if window else seq_len
    return window_len - window_len**2 / (2 * seq_len) if seq_len else 0.0


def flops_per_token_strict(
    config: ModelConfig, seq_len: float, head_share: float = 1.0, frozen: Frozen | None = None
) -> float:
    """Forward and backward FLOPs a token, by the strict formula.

    Args:
        seq_len: length of a token's sequence, averaged over the tokens.
        head_share: share of the tokens that get logits.
        frozen: what trains, if it is not the whole model.
    """
    head = config.vocab_size * config.hidden_size
    blocks = active_parameters(config) - head
    matmuls = 6.0 * (blocks + head_share * head)
    if frozen is not None:
        matmuls = 4.0 * blocks + (6.0 if frozen.head_trains else 4.0) * head_share * head + 6.0 * frozen.added
    keys = (_mean_keys(seq_len, config.window_of(layer)) for layer in range(config.num_hidden_layers))
    return matmuls + sum(_attention_flops(config, number) for number in keys)


def flops_per_token_seed(config: ModelConfig, seq_len: int, num_parameters: int) -> float:
    """Forward and backward FLOPs a token by the original's formula.

    Args:
        num_parameters: all distinct parameters.
    """
    return 6.0 * num_parameters + config.num_hidden_layers * _attention_flops(config, seq_len)


def device_peak_flops(device: "torch.device", dtype: "torch.dtype") -> float | None:
    """Dense peak in FLOP/s: from a table for GPUs (None if the model is unknown), from a matmul timed now for CPUs."""
    import torch

    if device.type != "cuda":
        return _measure_gemm(device, dtype)
    name = torch.cuda.get_device_name(device)
    for pattern, half, single in _PEAK_TFLOPS:
        if re.search(pattern, name):
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


def _measure_gemm(device: "torch.device", dtype: "torch.dtype", budget_s: float = 0.5) -> float:
    """Best FLOP/s of square matmuls of growing size with the process's threads, within about `budget_s` seconds.

    The sizes grow, because a dtype without fast instructions (fp16 on most CPUs) would take seconds for a large one.
    They pass 1024, because with AMX a single thread does all the work up to there (oneDNN 3.x, two threads). The clock
    may not stop before 512: the first matmuls start the threads, which takes seconds on a busy machine.
    """
    import torch

    best, deadline = 0.0, time.perf_counter() + budget_s
    for size in (128, 256, 512, 1024, 1280, 2048):
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            now = time.perf_counter()
            best = max(best, 2.0 * size**3 / (now - start))
            if now > deadline and size >= 512:
                return best
    return best
