"""Output projection and cross entropy together, so that memory never holds all logits.

    logits = hidden W^T,   loss = cross_entropy(logits, labels)

N tokens are cut into chunks of n; the chunks share one buffer, which holds the logits of one chunk at a time.

`linear_cross_entropy_sum` returns the sum of the losses, whose upstream gradient is one number. So it computes the
gradients right after each chunk's losses, in the forward pass, and the backward pass multiplies them by that number
(as Liger-Kernel does, Hsu et al., 2024; this is exact, not an approximation). `linear_token_logprobs` returns each
token's log-probability, whose upstream gradients are known only later. It keeps two numbers a token (the maximum of its
logits and the sum of their exponentials relative to it) and computes each chunk's logits again in the backward pass, a
fourth matrix multiplication beside three.

Memory beyond inputs and gradients, bytes, with e for the size of an element of the logits:

    chunk of logits      n V e <= chunk_bytes; in plain PyTorch the softmax of low precision takes float32 beside it,
                         4 MiB on a CPU, n V 4 on a GPU
    losses and sums       linear_cross_entropy_sum 4 N + 12 n, linear_token_logprobs 12 N + 12 n (float32 in Triton: 20)
    for comparison       plain: N V (e + 4) forward, N V (2 e + 8) at its peak in backward

Gradients: N C e bytes for hidden; V C 4 bytes (float32) for the weight, unless it is added to an existing buffer.
Matrix multiplications accumulate in float32; on a CPU a chunk's bfloat16 weight gradient is rounded before it is added,
as torch has no mixed multiplication there.

float16: a rare token's row gets its gradient from probabilities, which are 1e-9 or less in a large vocabulary, and
float16 ends at 6e-8. So the logits' gradient, at most 1 in size, is rounded at a scale of its own, FP16_LOGITS_SCALE,
and not at the loss scale over the count of tokens, which is below 1 with 500,000 tokens a step. Both products are
computed in float32 and brought to the scale that was asked for; only then is that of hidden rounded to float16. This
takes n C 4 bytes more.

Under tensor parallelism each rank holds some rows of the weight, and never has whole logits (Megatron-LM: Shoeybi et
al., 2019). Of each chunk the ranks exchange three numbers a token: the highest logit, and then the sum of the
exponentials and the label's logit. A rank's gradient of hidden is its part of a sum.

Shapes: N tokens, C hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cross_entropy import TritonOps
from model.kernels.registry import Implementation, WhyNot, needs_package, needs_triton, runs_triton
from model.kernels.support import available
from model.loss import IGNORE_INDEX, cross_entropy, cross_entropy_sum, head_scores

CHUNK_BYTES = 96 << 20
"""Size of a chunk's logits. Chunks are few, since each reads and writes the whole gradient of the weight, and take less
than 100 MB."""
CHUNK_MULTIPLE = 128
"""Tokens a chunk, where there are enough: the tile of the matrix multiplications."""
TILE_ELEMENTS = 1 << 20
"""Logits that plain PyTorch takes at a time on a CPU: 4 MiB in float32."""
FP16_LOGITS_SCALE = 2.0**15
"""Size of the largest gradient of float16 logits: half of what float16 holds. Probabilities are normal numbers down to
2e-9, and not zero down to 1e-12."""


def linear_cross_entropy_reference(
    hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, ignore_index: int = IGNORE_INDEX, z_loss: float = 0.0
) -> Tensor:
    """The definition: losses (N,) from whole logits."""
    logits_NV = (hidden_NC @ weight_VC.T).float()
    losses = F.cross_entropy(logits_NV, labels_N, ignore_index=ignore_index, reduction="none")
    return losses + (z_loss * logits_NV.logsumexp(dim=-1).square()).where(labels_N != ignore_index, 0.0)


class ChunkOps(Protocol):
    """Operations on a chunk of logits (n, V)."""

    def stats_dtype(self, dtype: torch.dtype, /) -> torch.dtype:
        """dtype of `stats` for logits of a dtype."""

    def forward(
        self, logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, /
    ) -> tuple[Tensor, Tensor]:
        """Losses (n,), and stats (n, 2): the highest logit, and the sum of the exponentials relative to it."""

    def backward_(
        self, logits_NV: Tensor, labels_N: Tensor, stats_N2: Tensor, upstream_N: Tensor, ignore_index: int,
        z_loss: float, /,
    ) -> None:  # fmt: skip
        """Turn logits into the gradient of the losses, times `upstream`."""

    def with_gradient_(
        self, logits_NV: Tensor, labels_N: Tensor, scale: Tensor, ignore_index: int, z_loss: float, /
    ) -> Tensor:
        """Both with one upstream gradient: losses (n,)."""


class TorchOps:
    """The operations of cross_entropy.py's kernels on a chunk, in plain PyTorch. They compute in float32: in the memory
    of the logits, or in a float32 copy of a tile that fits into a CPU's cache. The logits are lost."""

    @staticmethod
    def tiles(logits_NV: Tensor, *of_tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows that a CPU takes at a time: each of ten passes over a whole chunk would wait for main memory."""
        tokens = len(logits_NV) if logits_NV.is_cuda else max(TILE_ELEMENTS // logits_NV.shape[1], 1)
        return zip(*(tensor.split(tokens) for tensor in (logits_NV, *of_tokens)))

    @staticmethod
    def _losses(logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, stats, exponentials relative to the maximum)."""
        is_supervised = labels_N != ignore_index
        maximum = logits_NV.amax(dim=-1).float()
        shifted = logits_NV.to(_wide(logits_NV)).sub_(maximum[:, None])
        picked = shifted.gather(-1, labels_N.where(is_supervised, 0)[:, None])[:, 0]
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1)
        losses = total.log() - picked + z_loss * (maximum + total.log()).square()
        return losses.where(is_supervised, 0.0), torch.stack((maximum, total), dim=-1), exponentials

    @staticmethod
    def _write_gradient(
        logits_NV: Tensor, exponentials: Tensor, labels_N: Tensor, stats_N2: Tensor, upstream_N: Tensor,
        ignore_index: int, z_loss: float,
    ) -> None:  # fmt: skip
        is_supervised = labels_N != ignore_index
        column_N1 = labels_N.where(is_supervised, 0)[:, None]
        upstream_N = upstream_N.where(is_supervised, 0.0)
        _write_gradient(logits_NV, exponentials, column_N1, 1.0, stats_N2, upstream_N, z_loss)

    @staticmethod
    def stats_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    @staticmethod
    def forward(logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor]:
        parts = [
            TorchOps._losses(logits, labels, ignore_index, z_loss)[:2]
            for logits, labels in TorchOps.tiles(logits_NV, labels_N)
        ]
        losses, stats = zip(*parts)
        return torch.cat(losses), torch.cat(stats)

    @staticmethod
    def backward_(
        logits_NV: Tensor, labels_N: Tensor, stats_N2: Tensor, upstream_N: Tensor, ignore_index: int, z_loss: float
    ) -> None:
        for logits, labels, stats, upstream in TorchOps.tiles(logits_NV, labels_N, stats_N2, upstream_N):
            exponentials = logits.to(_wide(logits)).sub_(stats[:, :1]).exp_()
            TorchOps._write_gradient(logits, exponentials, labels, stats, upstream, ignore_index, z_loss)

    @staticmethod
    def with_gradient_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        parts = []
        for logits, labels in TorchOps.tiles(logits_NV, labels_N):
            losses, stats, exponentials = TorchOps._losses(logits, labels, ignore_index, z_loss)
            upstream = scale.expand(len(labels))
            TorchOps._write_gradient(logits, exponentials, labels, stats, upstream, ignore_index, z_loss)
            parts.append(losses)
        return torch.cat(parts)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _write_gradient(
    logits_NV: Tensor, exponentials: Tensor, column_N1: Tensor, has_label: Tensor | float, stats_N2: Tensor,
    upstream_N: Tensor, z_loss: float,
) -> None:  # fmt: skip
    """Overwrite logits by their gradient.

    Args:
        exponentials: of the logits, relative to the maximum in `stats`; it is lost.
        column_N1: the labels' columns; any where there is none.
        has_label: 1 where the label is among these columns, otherwise 0; (n,) or one for all.
        upstream_N: 0 for tokens that are not supervised.
    """
    maximum, total = stats_N2.unbind(-1)
    of_z_loss = 2.0 * z_loss * (maximum + total.log())
    probability = exponentials.gather(1, column_N1)[:, 0] / total
    # The label's own entry apart: where its probability is close to 1, (1 + z) p - 1 would lose the digits of z p.
    of_label = upstream_N * ((probability - has_label) + of_z_loss * probability)
    exponentials *= (upstream_N * (1.0 + of_z_loss) / total)[:, None]
    exponentials.scatter_(1, column_N1, of_label[:, None])
    if exponentials.dtype != logits_NV.dtype:
        logits_NV.copy_(exponentials)


class Exchange(Protocol):
    """Sums over the ranks that share the vocabulary, in place."""

    def add_(self, tensor: Tensor) -> None: ...

    def highest_(self, tensor: Tensor) -> None: ...


class ShardOps:
    """The same operations where each rank has the logits of its part of the vocabulary, in plain PyTorch.

    Args:
        first: entry of the vocabulary at which this rank's part begins.
    """

    def __init__(self, first: int, exchange: Exchange):
        self.first, self.exchange = first, exchange

    def _columns(self, labels_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Each label's place in this part of the vocabulary, (n, 1), and whether it has one; ignored labels have none,
        as they lie before any vocabulary."""
        columns_N = labels_N - self.first
        return columns_N.clamp(0, width - 1)[:, None], (labels_N >= 0) & (columns_N >= 0) & (columns_N < width)

    def stats_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def forward(
        self, logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        maximum_N = logits_NV.amax(dim=-1).to(_wide(logits_NV))
        self.exchange.highest_(maximum_N)
        sums_N2 = maximum_N.new_empty(len(maximum_N), 2)
        for logits, labels, maximum, sums in TorchOps.tiles(logits_NV, labels_N, maximum_N, sums_N2):
            shifted = logits.to(_wide(logits)) - maximum[:, None]
            column, is_here = self._columns(labels, logits.shape[1])
            sums[:, 1] = shifted.gather(1, column)[:, 0].where(is_here, 0.0)
            torch.sum(shifted.exp_(), dim=-1, out=sums[:, 0])
        self.exchange.add_(sums_N2)
        total_N, picked_N = sums_N2.unbind(-1)
        losses_N = total_N.log() - picked_N + z_loss * (maximum_N + total_N.log()).square()
        return losses_N.where(labels_N != ignore_index, 0.0), torch.stack((maximum_N, total_N), dim=-1)

    def backward_(
        self, logits_NV: Tensor, labels_N: Tensor, stats_N2: Tensor, upstream_N: Tensor, ignore_index: int,
        z_loss: float,
    ) -> None:  # fmt: skip
        upstream_N = upstream_N.where(labels_N != ignore_index, 0.0)
        for logits, labels, stats, upstream in TorchOps.tiles(logits_NV, labels_N, stats_N2, upstream_N):
            exponentials = logits.to(_wide(logits)).sub_(stats[:, :1]).exp_()
            column, is_here = self._columns(labels, logits.shape[1])
            has_label = is_here.to(exponentials.dtype)
            _write_gradient(logits, exponentials, column, has_label, stats, upstream, z_loss)

    def with_gradient_(
        self, logits_NV: Tensor, labels_N: Tensor, scale: Tensor, ignore_index: int, z_loss: float
    ) -> Tensor:
        losses_N, stats_N2 = self.forward(logits_NV, labels_N, ignore_index, z_loss)
        self.backward_(logits_NV, labels_N, stats_N2, scale.expand(len(labels_N)), ignore_index, z_loss)
        return losses_N


def chunk_size(num_tokens: int, vocab_size: int, itemsize: int, chunk_bytes: int) -> int:
    """Tokens a chunk: as few chunks as `chunk_bytes` allows, all about the same size."""
    limit = max(chunk_bytes // (vocab_size * itemsize), 1)
    multiple = CHUNK_MULTIPLE if limit >= CHUNK_MULTIPLE else 1
    limit -= limit % multiple
    even = -(-num_tokens // max(-(-num_tokens // limit), 1))
    return max(-(-even // multiple) * multiple, 1)


def _chunks(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, chunk_bytes: int):
    """(range of tokens, their hidden states, labels and logits), chunk by chunk; all logits share one memory."""
    size = chunk_size(len(hidden_NC), len(weight_VC), hidden_NC.element_size(), chunk_bytes)
    buffer = hidden_NC.new_empty(min(size, len(hidden_NC)), len(weight_VC))
    for start in range(0, len(hidden_NC), size):
        tokens = slice(start, min(start + size, len(hidden_NC)))
        logits = torch.mm(hidden_NC[tokens], weight_VC.T, out=buffer[: tokens.stop - start])
        yield tokens, hidden_NC[tokens], labels_N[tokens], logits


def _add_product_(total_VC: Tensor, a_VN: Tensor, b_NC: Tensor) -> None:
    """total += a b, total in float32."""
    if a_VN.dtype == torch.float32:
        total_VC.addmm_(a_VN, b_NC)
    elif total_VC.is_cuda:
        torch.addmm(total_VC, a_VN, b_NC, out_dtype=torch.float32, out=total_VC)
    elif a_VN.dtype == torch.float16:
        for words in _words(a_VN):
            total_VC[words].addmm_(a_VN[words].float(), b_NC.float())
    else:
        total_VC.add_(torch.mm(a_VN, b_NC))


def _wide_product(a_NV: Tensor, b_VC: Tensor) -> Tensor:
    """Product of float16 matrices in float32."""
    if a_NV.is_cuda:
        return torch.mm(a_NV, b_VC, out_dtype=torch.float32)
    total_NC = torch.zeros(len(a_NV), b_VC.shape[1])
    for words in _words(b_VC):
        total_NC.addmm_(a_NV[:, words].float(), b_VC[words].float())
    return total_NC


def _words(matrix: Tensor) -> Iterator[slice]:
    """Ranges of rows of a matrix (V, ...) that a CPU copies to float32 one after the other, to keep copies small."""
    step = max(TILE_ELEMENTS // max(matrix.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _write_hidden_gradient(out_NC: Tensor, logits_NV: Tensor, weight_VC: Tensor, factor: Tensor | None) -> None:
    """out <- the logits' gradient times the weight, and times `factor` before it is rounded, if there is one."""
    if factor is None:
        torch.mm(logits_NV, weight_VC, out=out_NC)
    else:
        out_NC.copy_(_wide_product(logits_NV, weight_VC).mul_(factor))


def _to_fp16_scale(upstream_N: Tensor) -> Tensor:
    """Power of two by which upstream gradients are multiplied to bring the logits' largest gradient close to
    FP16_LOGITS_SCALE; 1 if all are zero or one is not finite."""
    largest = upstream_N.abs().amax() if len(upstream_N) else upstream_N.new_zeros(())
    exponent = torch.log2(FP16_LOGITS_SCALE / largest).floor().clamp(-100.0, 100.0)
    return torch.where(torch.isfinite(largest) & (largest > 0.0), torch.exp2(exponent), 1.0)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float,
        weight_grad: Tensor | None, grad_scale: Tensor, chunk_bytes: int, ops: ChunkOps, with_gradients: bool,
        told: Tensor | None,
    ) -> Tensor:  # fmt: skip
        needs_dhidden, needs_dweight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden_NC) if needs_dhidden else None
        is_fp16 = hidden_NC.dtype == torch.float16
        logits_scale = torch.full_like(grad_scale, FP16_LOGITS_SCALE) if is_fp16 else grad_scale
        factor = grad_scale / FP16_LOGITS_SCALE if is_fp16 else None
        dweight = None
        if needs_dweight:
            is_own = weight_grad is None or is_fp16
            dweight = torch.zeros_like(weight_VC, dtype=torch.float32) if is_own else weight_grad
        losses = hidden_NC.new_empty(len(labels_N), dtype=torch.float32) if told is None else told
        for tokens, hidden, labels, logits in _chunks(hidden_NC, weight_VC, labels_N, chunk_bytes):
            if not (needs_dhidden or needs_dweight):
                losses[tokens] = ops.forward(logits, labels, ignore_index, z_loss)[0]
                continue
            losses[tokens] = ops.with_gradient_(logits, labels, logits_scale, ignore_index, z_loss)
            if dhidden is not None:
                _write_hidden_gradient(dhidden[tokens], logits, weight_VC, factor)
            if dweight is not None:
                _add_product_(dweight, logits.T, hidden)
        if dweight is not None and factor is not None:
            dweight.mul_(factor)
            if weight_grad is not None:
                weight_grad.add_(dweight)
        ctx.save_for_backward(dhidden, dweight if weight_grad is None else None, grad_scale)
        ctx.added_to_buffer = needs_dweight and weight_grad is not None
        ctx.factor, ctx.had_second_pass = None, False
        return losses.sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        dhidden, dweight, grad_scale = ctx.saved_tensors
        factor = upstream / grad_scale
        if ctx.added_to_buffer:
            # The gradient in the buffer cannot be scaled any more. To raise an error would mean waiting for the GPU;
            # a NaN shows at once in the norm of the gradients.
            factor = torch.where((factor - 1.0).abs() <= 1e-5, 1.0, float("nan"))
        if ctx.factor is not None:
            # The second pass takes what the first one has scaled; again, a NaN shows what is not meant.
            if ctx.had_second_pass:
                raise RuntimeError("linear_cross_entropy_sum bears two backward passes, not more")
            ctx.had_second_pass = True
            factor = torch.where(factor == ctx.factor, 1.0, float("nan"))
        else:
            ctx.factor = factor
        for gradient in (dhidden, dweight):
            if gradient is not None:
                # In place, as the weight's is large, and unseen by autograd, which would refuse the second pass.
                gradient.data.mul_(factor)
        return dhidden, dweight, *(None for _ in range(9))


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, ignore_index: int, chunk_bytes: int,
        ops: ChunkOps,
    ) -> Tensor:  # fmt: skip
        log_probs = hidden_NC.new_empty(len(labels_N), dtype=torch.float32)
        stats = hidden_NC.new_empty((len(labels_N), 2), dtype=ops.stats_dtype(hidden_NC.dtype))
        for tokens, _, labels, logits in _chunks(hidden_NC, weight_VC, labels_N, chunk_bytes):
            losses, stats[tokens] = ops.forward(logits, labels, ignore_index, 0.0)
            torch.neg(losses, out=log_probs[tokens])
        ctx.save_for_backward(hidden_NC, weight_VC, labels_N, stats)
        ctx.constants = ignore_index, chunk_bytes, ops
        return log_probs

    @staticmethod
    def backward(ctx, upstream_N: Tensor):
        hidden_NC, weight_VC, labels_N, stats = ctx.saved_tensors
        ignore_index, chunk_bytes, ops = ctx.constants
        dhidden = torch.empty_like(hidden_NC) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight_VC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        factor = None
        if hidden_NC.dtype == torch.float16:
            scale = _to_fp16_scale(upstream_N.where(labels_N != ignore_index, 0.0))
            upstream_N, factor = upstream_N * scale, 1.0 / scale
        for tokens, hidden, labels, logits in _chunks(hidden_NC, weight_VC, labels_N, chunk_bytes):
            ops.backward_(logits, labels, stats[tokens], -upstream_N[tokens], ignore_index, 0.0)
            if dhidden is not None:
                _write_hidden_gradient(dhidden[tokens], logits, weight_VC, factor)
            if dweight is not None:
                _add_product_(dweight, logits.T, hidden)
        if dweight is not None and factor is not None:
            dweight.mul_(factor)
        return dhidden, dweight, None, None, None, None


def _ops(use_triton: bool | None, device: torch.device) -> ChunkOps:
    use_triton = available(device) if use_triton is None else use_triton
    return TritonOps if use_triton else TorchOps


def _flat_inputs(hidden: Tensor, weight_VC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states as (N, C) and labels as (N,).

    Raises:
        ValueError: the dtypes differ, or there are not as many labels as hidden states.
    """
    hidden_NC, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if hidden.dtype != weight_VC.dtype:
        raise ValueError(f"hidden states and weight must have one dtype, not {hidden.dtype} and {weight_VC.dtype}")
    if len(hidden_NC) != len(labels_N):
        raise ValueError(f"{len(hidden_NC)} hidden states but {len(labels_N)} labels")
    return hidden_NC, labels_N


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, z_loss: float = 0.0,
    weight_grad: Tensor | None = None, grad_scale: float | Tensor = 1.0, chunk_bytes: int = CHUNK_BYTES,
    use_triton: bool | None = None, ops: ChunkOps | None = None, told: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum of the supervised tokens' losses, a float32 scalar. Its backward pass may run twice, as in pipelines that
    take the gradients of inputs and weights apart, if the upstream gradient is the same.

    Args:
        hidden: (..., C).
        weight: (V, C), same dtype.
        labels: int64 (...).
        weight_grad: float32 (V, C); if given, `grad_scale` times the weight's gradient is added to it in this call, and
            autograd gets none. Then the sum must be multiplied by `grad_scale` and by nothing else on its way into the
            loss: any other upstream gradient turns the hidden states' gradient into NaN.
        grad_scale: the upstream gradient to expect (loss scale over token count). The logits' gradient (in float16, the
            hidden states') carries it when it is rounded to their dtype, as on the plain path. With another upstream
            gradient, the hidden states' gradient is multiplied by the ratio of the two and rounded once more; in
            float16 that loses what the loss scale was to save.
        chunk_bytes: largest memory of a chunk's logits.
        use_triton: whether chunks use the kernel or plain PyTorch; None: the kernel wherever it is available.
        ops: other operations on a chunk, such as ShardOps.
        told: float32 (N,), filled with each token's loss, without gradient: 0 where ignored.
    """
    hidden_NC, labels_N = _flat_inputs(hidden, weight, labels)
    if weight_grad is not None and (weight_grad.dtype != torch.float32 or weight_grad.shape != weight.shape):
        raise ValueError(f"weight_grad must be float32 {tuple(weight.shape)}: it is {weight_grad.dtype} "
                         f"{tuple(weight_grad.shape)}")  # fmt: skip
    if not isinstance(grad_scale, Tensor):
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=hidden.device)
    return _LinearCrossEntropySum.apply(
        hidden_NC, weight, labels_N, ignore_index, z_loss, weight_grad, grad_scale, chunk_bytes,
        ops or _ops(use_triton, hidden.device), torch.is_grad_enabled(), told,
    )  # fmt: skip


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, chunk_bytes: int = CHUNK_BYTES,
    use_triton: bool | None = None, ops: ChunkOps | None = None,
) -> Tensor:  # fmt: skip
    """Log-probability of each label, float32 (N,), 0 where ignored; arguments as in `linear_cross_entropy_sum`."""
    hidden_NC, labels_N = _flat_inputs(hidden, weight, labels)
    return _LinearTokenLogprobs.apply(
        hidden_NC, weight, labels_N, ignore_index, chunk_bytes, ops or _ops(use_triton, hidden.device)
    )


def plain_loss_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0, told: Tensor | None = None
) -> Tensor:
    """Sum of the losses from whole logits. `grad_scale` has no effect: the backward pass knows its scale."""
    scores = head_scores(hidden, weight)
    if told is not None:
        told.copy_(cross_entropy(scores.detach(), labels))
    return cross_entropy_sum(scores, labels)


def plain_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label from whole logits."""
    return -cross_entropy(head_scores(hidden, weight), labels)


def _in_chunks(use_triton: bool | None = None, ops: ChunkOps | None = None) -> dict[str, Callable]:
    def loss_sum(
        hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0, told: Tensor | None = None
    ) -> Tensor:
        return linear_cross_entropy_sum(
            hidden, weight, labels, grad_scale=grad_scale, use_triton=use_triton, ops=ops, told=told
        )  # fmt: skip

    return {"loss_sum": loss_sum, "token_logprobs": partial(linear_token_logprobs, use_triton=use_triton, ops=ops)}


def on_shards(first: int, exchange: Exchange) -> dict[str, Callable]:
    """The functions of model/ops.py where each rank has a part of the head's rows; see ShardOps."""
    return _in_chunks(ops=ShardOps(first, exchange))


def _liger() -> dict[str, Callable]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss_sum(
        hidden: Tensor, weight: Tensor, labels: Tensor, grad_scale: float = 1.0, told: Tensor | None = None
    ) -> Tensor:
        if told is not None:
            # Liger's function keeps them to itself.
            with torch.no_grad():
                torch.neg(linear_token_logprobs(hidden, weight, labels), out=told)
        return liger_fused_linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    return {"loss_sum": loss_sum, "token_logprobs": linear_token_logprobs}


def _no_float16_and(otherwise: WhyNot) -> WhyNot:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float16:
            return (
                "it rounds the logits' gradient to float16 before the loss scale reaches it; use triton, or "
                "--dtype=bfloat16"
            )
        return otherwise(device, dtype)

    return why_not


IMPLEMENTATIONS = (
    Implementation(
        "cross_entropy", "reference", lambda: {"loss_sum": plain_loss_sum, "token_logprobs": plain_token_logprobs},
        is_plain=True,
    ),
    Implementation(
        "cross_entropy", "chunked", partial(_in_chunks, use_triton=False),
        is_fastest=lambda device, dtype: device.type != "cuda",
    ),
    Implementation("cross_entropy", "triton", _in_chunks, needs_triton, runs_triton),
    Implementation("cross_entropy", "liger", _liger, _no_float16_and(needs_package("liger", "liger_kernel"))),
)  # fmt: skip
