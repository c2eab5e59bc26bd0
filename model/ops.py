"""Which implementation each operation of the model uses: decided once, before the first step.

    op             ours in plain PyTorch   ours in Triton   others, where they are installed
    rms_norm       reference               triton           liger, apex
    rope           reference               triton           liger
    swiglu         reference               triton           liger
    cross_entropy  reference, chunked      triton           liger
    attention      blocked (CPU), plain    -                sdpa, varlen (torch's own), flash_attn, xformers

`auto` is the fastest that was measured to be so: on a GPU the Triton kernels and varlen, on a CPU the loss in chunks
and, in bfloat16, attention in blocks (benchmarks/model_step.py). What is asked for by name and cannot be had is an
error, never another one in silence.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.dropout import DropoutKey
from model.kernels import attention as attn
from model.kernels import linear_cross_entropy as fused_loss
from model.kernels import rms_norm as norm
from model.kernels import rope as rotary
from model.kernels import support
from model.kernels import swiglu as gated
from model.loss import IGNORE_INDEX, cross_entropy, cross_entropy_sum, head_scores

CHOICES: dict[str, tuple[str, ...]] = {
    "rms_norm": ("reference", "triton", "liger", "apex"),
    "rope": ("reference", "triton", "liger"),
    "swiglu": ("reference", "triton", "liger"),
    "cross_entropy": ("reference", "chunked", "triton", "liger"),
    "attention": ("sdpa", "plain", "blocked", "varlen", "flash_attn", "xformers"),
}
_PACKAGES = {"liger": "liger_kernel", "apex": "apex", "flash_attn": "flash_attn", "xformers": "xformers"}
_PLAIN = {"rms_norm": "reference", "rope": "reference", "swiglu": "reference", "cross_entropy": "reference",
             "attention": "sdpa"}  # fmt: skip


def _plain_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0) -> Tensor:
    # The gradient comes with its scale: it is computed when that is known.
    return cross_entropy_sum(head_scores(hidden, weight), labels)


def _plain_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -cross_entropy(head_scores(hidden, weight), labels)


@dataclass(frozen=True)
class Ops:
    """The functions that the model calls. Shapes as in the files that they come from."""

    names: Mapping[str, str] = field(default_factory=lambda: dict(_PLAIN))
    """Op -> implementation."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = norm.rms_norm_reference
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = norm.add_rms_norm_reference
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotary.rope_reference
    swiglu: Callable[[Tensor, Tensor], Tensor] = gated.swiglu_reference
    swiglu_packed: Callable[[Tensor], Tensor] | None = None
    """Of gate and up side by side, which then come out of one matmul; None: two matmuls."""
    loss_sum: Callable[..., Tensor] = _plain_loss_sum
    """(hidden, head's weight, labels, grad_scale=1.0) -> sum of the losses; the scale: see linear_cross_entropy_sum."""
    token_logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = _plain_logprobs
    """(hidden, head's weight, labels) -> log-probability of each label."""
    causal: Callable[[Tensor, Tensor, Tensor], Tensor] = attn.sdpa_causal
    """Causal attention without mask and cache."""
    packed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    """Causal attention within documents, given where they begin; None: by a mask, or document by document."""

    @property
    def is_plain(self) -> bool:
        """Attention step by step."""
        return self.names["attention"] == "plain"

    def __str__(self) -> str:
        return " ".join(f"{op}={name}" for op, name in self.names.items())


REFERENCE = Ops()


def choose_ops(
    kernels: str, overrides: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Op -> implementation.

    Args:
        kernels: auto, reference or triton, for every op that `overrides` (op -> name, "" for none) leaves open.

    Raises:
        ValueError: what was asked for cannot be had here.
    """
    names = {}
    for op, choices in CHOICES.items():
        wanted = overrides.get(op, "")
        if wanted and wanted not in choices:
            raise ValueError(f"{op} can be {', '.join(choices)}, not {wanted}")
        if wanted:
            if (op, wanted, dtype) == ("cross_entropy", "liger", torch.float16):
                raise ValueError(
                    "--cross_entropy_kernel=liger cannot be used: it rounds the logits' gradient to float16 before the "
                    "loss scale reaches it; use triton, or --dtype=bfloat16"
                )
            if reason := _why_not(wanted, device, dtype):
                raise ValueError(f"--{op}_kernel={wanted} cannot be used: {reason}")
            names[op] = wanted
        elif kernels == "triton" and "triton" in choices:
            if reason := support.unavailable_reason(device):
                raise ValueError(f"--kernels=triton cannot be used: {reason}")
            names[op] = "triton"
        elif kernels == "reference":
            names[op] = _PLAIN[op]
        elif device.type != "cuda":
            names[op] = (_PLAIN | _fastest_on_cpu(dtype))[op]
        elif op == "attention":
            names[op] = "sdpa" if _why_not("varlen", device, dtype) else "varlen"
        else:
            names[op] = "triton" if support.available(device) else "reference"
    return names


def _fastest_on_cpu(dtype: torch.dtype) -> dict[str, str]:
    """What is not plain there."""
    return {"cross_entropy": "chunked"} | ({"attention": "blocked"} if dtype == torch.bfloat16 else {})


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot be used; None if it can."""
    if name == "triton":
        return support.unavailable_reason(device)
    if name == "varlen":
        if device.type != "cuda":
            return "it needs a CUDA device"
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "this torch has no torch.nn.attention.varlen"
    if name == "blocked" and device.type != "cpu":
        return "it is for CPUs"
    if name in _PACKAGES:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            return f"the package {_PACKAGES[name]} is not installed"
        if device.type != "cuda":
            return f"{name} needs a CUDA device"
    if name in ("varlen", "flash_attn") and dtype not in (torch.bfloat16, torch.float16):
        return f"{name} takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def build_ops(names: Mapping[str, str]) -> Ops:
    """The functions that names stand for; see `choose_ops`."""
    rms = {"reference": (norm.rms_norm_reference, norm.add_rms_norm_reference),
           "triton": (norm.rms_norm, norm.add_rms_norm)}  # fmt: skip
    rms_norm, add_rms_norm = rms.get(names["rms_norm"]) or _foreign_norm(names["rms_norm"])
    ropes = {"reference": rotary.rope_reference, "triton": rotary.rope}
    swiglus = {"reference": gated.swiglu_reference, "triton": gated.swiglu}
    losses = {
        "reference": (_plain_loss_sum, _plain_logprobs),
        "chunked": (_chunked_loss_sum, _chunked_logprobs),
        "triton": (_triton_loss_sum, fused_loss.linear_token_logprobs),
    }
    loss_sum, logprobs = losses.get(names["cross_entropy"]) or (_liger_loss_sum, fused_loss.linear_token_logprobs)
    causal, packed = attn.implementation(names["attention"])
    return Ops(
        dict(names), rms_norm, add_rms_norm, ropes.get(names["rope"]) or _liger_rope,
        swiglus.get(names["swiglu"]) or _liger_swiglu,
        gated.swiglu_packed if names["swiglu"] == "triton" else None, loss_sum, logprobs, causal, packed,
    )  # fmt: skip


def _triton_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0) -> Tensor:
    return fused_loss.linear_cross_entropy_sum(hidden, weight, labels, grad_scale=grad_scale)


def _chunked_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0) -> Tensor:
    return fused_loss.linear_cross_entropy_sum(hidden, weight, labels, grad_scale=grad_scale, use_triton=False)


def _chunked_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fused_loss.linear_token_logprobs(hidden, weight, labels, use_triton=False)


def _foreign_norm(name: str) -> tuple[Callable, Callable]:
    """RMSNorm of Liger or Apex, and the addition before it in plain PyTorch."""
    if name == "liger":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            # No offset, Llama's rounding, and not over the incoming gradient, which others may need.
            return LigerRMSNormFunction.apply(x.to(weight.dtype), weight, eps, 0.0, "llama", False)
    else:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return fused_rms_norm_affine(x.to(weight.dtype), weight, weight.shape, eps)

    def add_rms_norm(
        h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float = 0.0, key: DropoutKey | None = None,
        site: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = h + norm.dropout(x, dropout_p, key, site)
        return h, rms_norm(h, weight, eps)

    return rms_norm, add_rms_norm


def _liger_rope(q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    # It takes both halves, (B, T, D).
    wide_cos, wide_sin = (torch.cat((table, table), dim=-1)[:, 0].to(q_BHTD.dtype) for table in (cos, sin))
    return LigerRopeFunction.apply(q_BHTD, k_BKTD, wide_cos, wide_sin)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden.flatten(0, -2), weight, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
