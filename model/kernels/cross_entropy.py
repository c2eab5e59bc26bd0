"""Cross entropy of each token, with the z-loss of PaLM (Chowdhery et al., 2022).

    m = max_v x_v,   s = sum_v exp(x_v - m),   lse = m + log s
    loss = log s - (x_label - m) + z lse^2
    dx_v = dloss (p_v - [v = label] + 2 z lse p_v),   p_v = exp(x_v - m) / s

The forward pass reads the logits once, keeping a running maximum and a sum relative to it ("online" softmax: Milakov
and Gimelshein, 2018), and stores m and s: where logits are large, lse alone would have lost the digits of s. The
backward pass reads the logits again and overwrites them with the gradient, which so takes no memory of its own
(Liger-Kernel's idea: Hsu et al., 2024). Nothing else may need the logits once backward has begun. Autograd is told that
they changed, and raises an error if another operation has saved them; a leaf is copied first.

Arithmetic is float32, and float64 for float32 logits (see launch.py). Losses are always float32, so the few numbers a
row are always computed in float64: the sum of the threads' sums, its logarithm, the loss.

Memory traffic, elements: forward N V, backward 2 N V. `cross_entropy_with_gradient_` does both in one launch; its
second reading of a row mostly comes out of the cache.

Shapes: N tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.launch import check_dtypes, constexpr, jit, kernel_op, next_power_of_2, tl, work_dtype
from model.loss import IGNORE_INDEX

MAX_BLOCK = 4096
"""Vocabulary entries at once."""
ELEMENTS_PER_WARP = 512
"""Sixteen a thread: two 16-byte loads of bfloat16."""


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, z_loss: float = 0.0
) -> Tensor:
    """The definition: (N, V), int64 (N,) -> losses (N,) in float32, 0 where ignored."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")
    if z_loss:
        losses = losses + (z_loss * logits.float().logsumexp(dim=-1).square()).where(labels != ignore_index, 0.0)
    return losses


@jit
def _row_losses(logits_row_ptr, label, V, z_loss, BLOCK: constexpr):
    """(loss, m, s) of one row, float64. A label outside the vocabulary makes loss and s NaN, which a run notices."""
    work = tl.float64 if logits_row_ptr.dtype.element_ty == tl.float32 else tl.float32
    maximum = tl.full((), -float("inf"), work)
    sums = tl.zeros((BLOCK,), dtype=work)
    for start in tl.range(0, V, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row_ptr + entries, mask=entries < V, other=-float("inf")).to(work)
        larger = tl.maximum(maximum, tl.max(x, 0))
        # While all logits so far are -inf, the differences must not be -inf - -inf.
        origin = tl.where(larger == -float("inf"), 0.0, larger)
        # One exponential an element: the sums stay spread over the threads until the end.
        sums = sums * tl.exp(maximum - origin) + tl.exp(x - origin)
        maximum = larger
    exists = (label >= 0) & (label < V)
    picked = tl.load(logits_row_ptr + label, mask=exists, other=0.0).to(tl.float64)
    total = tl.where(exists, tl.sum(sums.to(tl.float64), 0), float("nan"))
    maximum = maximum.to(tl.float64)
    log_total = tl.log(total)
    lse = maximum + log_total
    return log_total - (picked - maximum) + z_loss * (lse * lse), maximum, total


@jit
def _write_gradient(logits_row_ptr, start, label, maximum, total, upstream, V, ignore_index, z_loss, BLOCK: constexpr):
    """Overwrite BLOCK logits of one row, from `start` on, with their gradient."""
    work = tl.float64 if logits_row_ptr.dtype.element_ty == tl.float32 else tl.float32
    maximum, total = maximum.to(work), total.to(work)
    entries = start + tl.arange(0, BLOCK)
    inside = entries < V
    if label == ignore_index:
        tl.store(logits_row_ptr + entries, tl.zeros((BLOCK,), dtype=tl.float32), mask=inside)
    else:
        x = tl.load(logits_row_ptr + entries, mask=inside, other=0.0).to(work)
        probability = tl.exp(x - maximum) * (1.0 / total)
        gradient = probability - tl.where(entries == label, 1.0, 0.0)
        gradient += 2.0 * z_loss * (maximum + tl.log(total)) * probability
        tl.store(logits_row_ptr + entries, (upstream * gradient).to(tl.float32), mask=inside)


@jit
def _nothing():
    return tl.full((), 0.0, tl.float64)


@jit
def _cross_entropy_forward_kernel(
    logits_ptr, labels_ptr, losses_ptr, stats_ptr, logits_stride, V, ignore_index, z_loss, BLOCK: constexpr
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    loss, maximum, total = _nothing(), _nothing(), _nothing()
    if label != ignore_index:
        loss, maximum, total = _row_losses(logits_ptr + row * logits_stride, label, V, z_loss, BLOCK)
    tl.store(losses_ptr + row, loss.to(tl.float32))
    tl.store(stats_ptr + 2 * row, maximum.to(stats_ptr.dtype.element_ty))
    tl.store(stats_ptr + 2 * row + 1, total.to(stats_ptr.dtype.element_ty))


@jit
def _cross_entropy_with_gradient_kernel(
    logits_ptr, labels_ptr, losses_ptr, scale_ptr, logits_stride, V, ignore_index, z_loss, BLOCK: constexpr
):
    """One row a program; its logits become `scale` times their gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    scale = tl.load(scale_ptr)
    logits_row_ptr = logits_ptr + row * logits_stride
    loss, maximum, total = _nothing(), _nothing(), _nothing()
    if label != ignore_index:
        loss, maximum, total = _row_losses(logits_row_ptr, label, V, z_loss, BLOCK)
    tl.store(losses_ptr + row, loss.to(tl.float32))
    # No thread may overwrite the label's logit before all threads have read it.
    tl.debug_barrier()
    for start in tl.range(0, V, BLOCK):
        _write_gradient(logits_row_ptr, start, label, maximum, total, scale, V, ignore_index, z_loss, BLOCK)


@jit
def _cross_entropy_backward_kernel(
    logits_ptr, labels_ptr, stats_ptr, upstream_ptr, logits_stride, upstream_stride, V, ignore_index, z_loss,
    BLOCK: constexpr,
):  # fmt: skip
    """BLOCK entries of one row a program; the logits become their gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    maximum, total = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
    upstream, start = tl.load(upstream_ptr + row * upstream_stride), tl.program_id(1) * BLOCK
    logits_row_ptr = logits_ptr + row * logits_stride
    _write_gradient(logits_row_ptr, start, label, maximum, total, upstream, V, ignore_index, z_loss, BLOCK)


def _launch_options(vocab_size: int) -> dict[str, int]:
    block = min(next_power_of_2(vocab_size), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(block // ELEMENTS_PER_WARP, 1)}


def _empty_forward(logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor]:
    num_tokens = len(logits_NV)
    losses = logits_NV.new_empty(num_tokens, dtype=torch.float32)
    return losses, logits_NV.new_empty((num_tokens, 2), dtype=work_dtype(logits_NV.dtype))


@kernel_op(
    "cross_entropy_forward(Tensor logits, Tensor labels, int ignore_index, float z_loss) -> (Tensor, Tensor)",
    _empty_forward,
)
def cross_entropy_forward(
    logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(losses (N,) in float32, m and s (N, 2) in `work_dtype`), 0 where ignored. Logits: columns lie side by side."""
    losses, stats = _empty_forward(logits_NV, labels_N, ignore_index, z_loss)
    vocab_size = logits_NV.shape[1]
    _cross_entropy_forward_kernel[(len(logits_NV),)](
        logits_NV, labels_N.contiguous(), losses, stats, logits_NV.stride(0), vocab_size, ignore_index, z_loss,
        **_launch_options(vocab_size),
    )  # fmt: skip
    return losses, stats


@kernel_op(
    "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor stats, Tensor upstream, int ignore_index, "
    "float z_loss) -> ()",
    lambda *args: None,
)
def cross_entropy_backward_(
    logits_NV: Tensor, labels_N: Tensor, stats_N2: Tensor, upstream_N: Tensor, ignore_index: int, z_loss: float
) -> None:
    """Overwrite the logits with their gradient, given the gradient of each token's loss, float32 (N,)."""
    vocab_size, options = logits_NV.shape[1], _launch_options(logits_NV.shape[1])
    _cross_entropy_backward_kernel[(len(logits_NV), -(-vocab_size // options["BLOCK"]))](
        logits_NV, labels_N.contiguous(), stats_N2, upstream_N, logits_NV.stride(0), upstream_N.stride(0), vocab_size,
        ignore_index, z_loss, **options,
    )  # fmt: skip


@kernel_op(
    "cross_entropy_with_gradient_(Tensor(a!) logits, Tensor labels, Tensor scale, int ignore_index, float z_loss) "
    "-> Tensor",
    lambda logits_NV, *args: logits_NV.new_empty(len(logits_NV), dtype=torch.float32),
)
def cross_entropy_with_gradient_(
    logits_NV: Tensor, labels_N: Tensor, scale: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """Losses, float32 (N,); overwrites the logits with the gradient of `scale` (float32 scalar) times their sum."""
    losses = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    vocab_size = logits_NV.shape[1]
    _cross_entropy_with_gradient_kernel[(len(logits_NV),)](
        logits_NV, labels_N.contiguous(), losses, scale, logits_NV.stride(0), vocab_size, ignore_index, z_loss,
        **_launch_options(vocab_size),
    )  # fmt: skip
    return losses


class TritonOps:
    """The operators under names that linear_cross_entropy.py also has in plain PyTorch."""

    forward = staticmethod(cross_entropy_forward)
    backward_ = staticmethod(cross_entropy_backward_)
    with_gradient_ = staticmethod(cross_entropy_with_gradient_)
    stats_dtype = staticmethod(work_dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        losses, stats = cross_entropy_forward(logits_NV, labels_N, ignore_index, z_loss)
        ctx.save_for_backward(logits_NV, labels_N, stats)
        ctx.constants = ignore_index, z_loss
        return losses

    @staticmethod
    def backward(ctx, upstream_N: Tensor):
        logits_NV, labels_N, stats = ctx.saved_tensors
        cross_entropy_backward_(logits_NV, labels_N, stats, upstream_N, *ctx.constants)
        if not torch.compiler.is_compiling():
            # Any other user of the saved logits, a second backward pass included, gets an error and no wrong gradient.
            torch.autograd.graph.increment_version(logits_NV)
        return logits_NV, None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, z_loss: float = 0.0) -> Tensor:
    """Per-token losses, float32 (N,), of logits (..., V) and int64 labels (...), N tokens in all; 0 where ignored.

    The backward pass overwrites the logits: they must be an intermediate result that nothing else needs.
    """
    check_dtypes(logits)
    if logits.is_leaf and logits.requires_grad:
        logits = logits.clone()
    logits_NV = logits.flatten(0, -2)
    if logits_NV.stride(1) != 1 or logits_NV.stride(0) < logits_NV.shape[1]:
        # Expanded rows share memory, which cannot hold a gradient for each.
        logits_NV = logits_NV.clone(memory_format=torch.contiguous_format)
    return _CrossEntropy.apply(logits_NV, labels.flatten(), ignore_index, z_loss)
