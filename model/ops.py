"""Which implementation each operation of the model uses: decided once, before the first step.

    op             ours in plain PyTorch   ours in Triton   others, where they are installed
    rms_norm       reference               triton           liger, apex
    rope           reference               triton           liger
    swiglu         reference               triton           liger
    experts        reference, sorted       -                grouped (torch's own)
    cross_entropy  reference, chunked      triton           liger
    attention      blocked (CPU), plain    -                sdpa, varlen (torch's own), flash_attn, xformers

Each file of model/kernels/ declares its implementations, where they can be used and where they were measured to be the
fastest (benchmarks/model_step.py): `auto` takes those. Asking by name for one that cannot be had is an error; another
one never takes its place in silence. The same holds for one that lacks what the model needs, such as ALiBi; `auto` then
takes another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels import attention, blocked_attention, experts, paged_decoding
from model.kernels import linear_cross_entropy as fused_loss
from model.kernels import rms_norm as norm
from model.kernels import rope as rotary
from model.kernels import swiglu as gated
from model.kernels.registry import Implementation

_FILES = (norm, rotary, gated, experts, fused_loss, attention, blocked_attention)
"""The files that declare implementations; a new file is added here."""


def _by_op() -> dict[str, dict[str, Implementation]]:
    found: dict[str, dict[str, Implementation]] = {}
    for file in _FILES:
        for implementation in file.IMPLEMENTATIONS:
            found.setdefault(implementation.op, {})[implementation.name] = implementation
    return found


IMPLEMENTATIONS = _by_op()
"""Operation -> name -> implementation."""
CHOICES: dict[str, tuple[str, ...]] = {op: tuple(named) for op, named in IMPLEMENTATIONS.items()}
"""Operation -> names, which are the values of its flag."""
_PLAIN = {op: next(name for name, found in named.items() if found.is_plain) for op, named in IMPLEMENTATIONS.items()}


@dataclass(frozen=True)
class Ops:
    """The functions that the model calls. Shapes as in the files that they come from."""

    names: Mapping[str, str] = field(default_factory=lambda: dict(_PLAIN))
    """Op -> implementation."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = norm.rms_norm_reference
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = norm.add_rms_norm_reference
    rope: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]] = rotary.rope_reference
    swiglu: Callable[[Tensor, Tensor], Tensor] = gated.swiglu_reference
    swiglu_packed: Callable[[Tensor], Tensor] | None = None
    """SwiGLU of gate and up side by side, which then come out of one matmul; None: two matmuls."""
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = experts.experts_reference
    loss_sum: Callable[..., Tensor] = fused_loss.plain_loss_sum
    """(hidden, head's weight, labels, grad_scale=1.0, told=None) -> sum of the losses; see linear_cross_entropy_sum."""
    token_logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = fused_loss.plain_token_logprobs
    """(hidden, head's weight, labels) -> log-probability of each label."""
    causal: Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor] = attention.sdpa_causal
    """(q, k, v, window, ALiBi's slopes) -> causal attention without mask and cache."""
    packed: Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], Tensor] | None = None
    """(q, k, v, starts, window, slopes) -> causal attention within documents, given where they begin; None: by a mask,
    or document by document."""
    tails: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor | None], Tensor] | None = None
    """(q, k, v, starts, starts among keys, window, slopes) -> the same where queries are the last tokens of documents
    and keys all of theirs; None: by a mask."""
    by_mask: bool = True
    """Whether attention needs a mask for windows and ALiBi, rather than numbers."""
    step_by_step: bool = False
    """Attention is always the plain formula under a mask."""

    def __str__(self) -> str:
        return " ".join(f"{op}={name}" for op, name in self.names.items())


REFERENCE = Ops()


def needs_of(config: ModelConfig) -> frozenset[str]:
    """What a model needs of implementations, of registry.NEEDS."""
    has_rope = config.position_embedding == "rope"
    needs = {
        "window": config.sliding_window > 0,
        "alibi": not has_rope,
        "interleaved": has_rope and config.rope_interleaved,
        "partial": has_rope and config.rotary_dim != config.head_dim,
    }
    return frozenset(need for need, is_needed in needs.items() if is_needed)


def choose_ops(
    kernels: str,
    overrides: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    needs: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Op -> implementation.

    Args:
        kernels: auto, reference or triton, for every op that `overrides` (op -> name, "" for none) leaves open.
        needs: of the model, see `needs_of`.

    Raises:
        ValueError: an implementation that was asked for cannot be had here, or cannot do what the model needs.
    """
    return {
        op: _required(op, overrides[op], device, dtype, needs)
        if overrides.get(op) else _chosen(kernels, op, device, dtype, needs)
        for op in IMPLEMENTATIONS
    }  # fmt: skip


def choose_paged(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """What attends to the blocks of a cache from one query a sequence, see kernels/paged_decoding.py; None: torch's
    products, see kernels/paged_attention.py. It has no flag, since only serving uses it."""
    fastest = (
        found for found in paged_decoding.IMPLEMENTATIONS
        if found.why_not(device, dtype) is None and found.is_fastest(device, dtype)
    )  # fmt: skip
    chosen = next(fastest, None)
    return chosen.build()["paged"] if chosen is not None else None


def _required(op: str, wanted: str, device: torch.device, dtype: torch.dtype, needs: frozenset[str]) -> str:
    """The implementation that a flag names."""
    named = IMPLEMENTATIONS[op]
    if wanted not in named:
        raise ValueError(f"{op} can be {', '.join(named)}, not {wanted}")
    if reason := named[wanted].reason_against(device, dtype, needs):
        raise ValueError(f"--{op}_kernel={wanted} cannot be used: {reason}")
    return wanted


def _chosen(kernels: str, op: str, device: torch.device, dtype: torch.dtype, needs: frozenset[str]) -> str:
    """The implementation of an operation whose flag is not given."""
    named = IMPLEMENTATIONS[op]
    if kernels == "triton" and "triton" in named:
        if reason := named["triton"].reason_against(device, dtype, needs):
            raise ValueError(f"--kernels=triton cannot be used: {reason}")
        return "triton"
    plain = next(name for name, found in named.items() if found.is_plain)
    if kernels == "reference":
        return plain
    can = (name for name, found in named.items() if found.reason_against(device, dtype, needs) is None)
    return next((name for name in can if named[name].is_fastest(device, dtype)), plain)


def build_ops(names: Mapping[str, str]) -> Ops:
    """The functions that names stand for; see `choose_ops`."""
    functions: dict[str, Any] = {}
    for op, name in names.items():
        functions |= IMPLEMENTATIONS[op][name].build()
    return Ops(dict(names), **functions)
