"""PowerSGD: low-rank compression of gradients (Vogels, Karimireddy and Jaggi, NeurIPS 2019).

Every matrix M_i (m x n, on the i-th process) travels as two thin factors with r columns. With warm start this is one
step of the power method a training step, so that the factors follow the gradient's main directions:

    M_i <- G_i + E_i              add_residual        gradient plus what earlier steps left behind
    P_i <- M_i Q                  project_rows        m x r
    P   <- sum_i P_i              on the wire
    P   <- orthonormalize(P)      orthonormalize      the same on every rank
    Q_i <- M_i^T P                project_columns     n x r
    Q   <- sum_i Q_i              on the wire; Q of the next step
    D   <- P Q^T                  decompress          = P P^T sum_i M_i, the sum that the optimizer steps with
    E_i <- M_i - P Q_i^T          update_residual

Gradients are summed here, so the residuals keep the invariant  sum_i (M_i - E_i) = D:  what the weights are not told
now, they are told later. E_i is what of M_i lies outside the span of P. (The difference M_i - D / N would keep the
invariant too, but collects the differences between the ranks for ever.) It is in units of the unscaled gradient.

One bucket makes two collectives: all its P and the parameters that are not compressed (vectors, small or excluded
matrices) in one flat buffer, all its Q in another. They run inside the hook, on the comm stream: buckets cannot mix.

    main thread   backward ...                                 | wait | norm | decompress and step bucket 2, 1, 0
    comm stream   [M Q | sum P | orth. | M^T P | sum Q] [bucket 1 ...]

Lazy (what the training loop uses): a bucket stays in factors until the optimizer takes it (`load`), and only then do
residuals and Q change. So a step that is skipped leaves no trace. Not lazy: `reduce` leaves the sum in the bucket.

float16 gradients are only read. Unscaled they would underflow, and a sum that is decompressed and scaled again may
overflow after the norm of its factors has passed for finite: M, E and D are float32 there.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallel.buffer import Bucket, sum_of_squares
from parallel.collectives import Collectives
from parallel.comm_hooks import CommHook, agreement_bytes, shared_fraction, sum_hook
from parallel.comm_stream import Handle
from parallel.layout import Slot
from parallel.low_rank import (
    add_residual,
    decompress,
    gram_schmidt,
    orthonormalize,
    project_columns,
    project_rows,
    sum_over_ranks,
    update_residual,
)

SKETCH_COLUMNS = 8
"""Random columns by which the relative error is estimated."""


@dataclass(frozen=True)
class PowerSGDConfig:
    """Options. Names are llm-zero2all's and PyTorch's."""

    rank: int = 16
    """Columns of a factor (fewer for a matrix with a smaller side)."""
    warm_start: bool = True
    """Start from the last step's Q. Off: a new random Q at every step, the same on all ranks."""
    use_error_feedback: bool = True
    """Keep what a step left out, and add it to the next step's gradient."""
    start_iter: int = 0
    """Steps before this one are reduced without compression."""
    min_compression_rate: float = 2.0
    """Matrices that would shrink by less are not compressed."""
    orthogonalization_epsilon: float = 0.0
    """Damping of dependent columns, see `orthonormalize`."""
    orthogonalize_in_float32: bool = True
    """Keep 16-bit gradients' factors in float32, and orthonormalize them with float64 inside. Off: Gram-Schmidt in the
    gradients' dtype. float32 gradients always take the former."""
    use_fixed_Q: bool = False
    """Q is random and is not learnt: one collective a bucket, no orthonormalization, a higher rank needed. With
    warm_start it stays for the whole run (what lies outside its span never arrives); without, it is drawn anew."""
    grad_buffer_is_error: bool = False
    """The residual stays in the gradient buffer, where the next backward pass adds to it: neither memory of its own nor
    a pass to add it, but a non-finite gradient takes the bucket's residual with it."""
    exclude: tuple[str, ...] = ()
    """Parameters whose names contain one of these are not compressed."""
    wire_dtype: torch.dtype | None = None
    """dtype of factors on the wire; None: their own."""
    seed: int = 0


@dataclass
class _Matrix:
    """A compressed parameter: where its factors lie, and what is remembered between steps."""

    slot: Slot
    shape: tuple[int, int]
    rank: int
    p: Tensor
    q: Tensor
    own: Tensor
    """This rank's contribution to q; with a fixed Q, to p."""
    start_q: Tensor
    """[n, r] with unit columns: the Q to project with."""
    random_q: Tensor
    """[n, r]: lends its columns where one of Q vanished."""
    residual: Tensor | None
    """[m, n]; None where there is none, or where it lies in the gradient buffer."""


@dataclass
class _BucketState:
    matrices: list[_Matrix]
    others: list[tuple[Slot, Tensor]]
    """Not compressed: the slot, and its place in `p`."""
    p: Tensor
    """Flat: all P, then the others, padded to a multiple of the world size."""
    q: Tensor
    """Flat: all Q, padded."""
    own: Tensor
    """Flat, like q (with a fixed Q, like p): this rank's contributions."""
    compressed: bool = False
    """Whether the last step's sum is in the factors."""
    grad_is_residual: bool = False
    """With grad_buffer_is_error: `grad` holds the residual and nothing else."""


@dataclass(frozen=True)
class _Afterwards:
    """Work that is left to the thread that waits for a bucket."""

    work: Callable[[], None]

    def wait(self) -> None:
        self.work()


class PowerSGD(CommHook):
    """The hook, and the optimizer's source of gradients.

    Args:
        buckets, collectives: the DDP's.
        lazy: leave sums in factors until `load`; False: decompress at the end of `reduce`.
        loss_scale: by how much gradients are scaled at present (fp16); residuals are kept unscaled.
        iteration: number of the first step; start_iter and random Q depend on it.
    Raises:
        ValueError: options that exclude each other.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        collectives: Collectives,
        config: PowerSGDConfig,
        lazy: bool = False,
        loss_scale: Callable[[], float] = lambda: 1.0,
        iteration: int = 0,
    ):
        if config.rank < 1:
            raise ValueError(f"the rank of PowerSGD must be at least 1, got {config.rank}")
        if config.grad_buffer_is_error and not (lazy and config.use_error_feedback):
            raise ValueError("a residual in the gradient buffer needs error feedback and a lazy hook")
        grad = buckets[0].grad
        self._is_fp16 = grad.dtype == torch.float16
        if self._is_fp16 and config.grad_buffer_is_error:
            raise ValueError("a residual in the gradient buffer does not go with float16, which unscaled it underflows")
        if self._is_fp16 and not config.orthogonalize_in_float32:
            raise ValueError(
                "PowerSGD's factors of unscaled gradients underflow in float16: leave out --no-orthogonalize_in_float32"
                ", or reduce in another dtype"
            )
        self.buckets, self.collectives, self.config = buckets, collectives, config
        self.lazy, self.loss_scale, self.iteration = lazy, loss_scale, iteration
        self.measure = False
        """Set it on all ranks before a step to get `relative_error` of that step."""
        self.relative_error: dict[str, float] = {}
        """Parameter name -> estimate of |sum M_i - D| / |sum M_i|; the residuals of single ranks may be larger, as they
        partly cancel in the sum."""
        narrow_factors = grad.itemsize < 4 and not config.orthogonalize_in_float32
        self._factor_dtype = grad.dtype if narrow_factors or grad.itemsize >= 4 else torch.float32
        self._orthonormalize = gram_schmidt if narrow_factors else orthonormalize
        self._wire_dtype = config.wire_dtype or self._factor_dtype
        narrower = self._wire_dtype.itemsize < grad.itemsize
        self._uncompressed = sum_hook(collectives, self._wire_dtype if narrower else None)
        self._matrix_dtype = torch.float32 if self._is_fp16 else grad.dtype
        self._states = [self._plan(bucket) for bucket in buckets]
        self._scratch: Tensor | None = None
        """For one bucket at a time, in `_matrix_dtype`: its decompressed sum; with float16 M, too, on its way there."""
        if config.grad_buffer_is_error or self._is_fp16:
            longest = max((bucket.grad for bucket in buckets), key=len)
            self._scratch = torch.zeros_like(longest, dtype=self._matrix_dtype)
            for bucket in buckets if lazy else ():
                bucket.reduced = self._scratch[: len(bucket.grad)]

    def _plan(self, bucket: Bucket) -> _BucketState:
        """Choose what is compressed in a bucket, and lay out its factors."""
        config, device = self.config, bucket.grad.device
        chosen, others = [], []
        for slot in bucket.slots:
            shape = slot.parameter.shape
            m, n = (shape[0], slot.parameter.numel // shape[0]) if len(shape) >= 2 else (0, 0)
            rank = min(m, n, config.rank)
            excluded = any(part in slot.parameter.name for part in config.exclude)
            if rank and not excluded and m * n >= config.min_compression_rate * (m + n) * rank:
                chosen.append((slot, m, n, rank))
            else:
                others.append(slot)
        p_sizes = [m * rank for _, m, _, rank in chosen] + [slot.parameter.numel for slot in others]
        q_sizes = [n * rank for _, _, n, rank in chosen]
        p, q = self._factors(sum(p_sizes), device), self._factors(sum(q_sizes), device)
        own = torch.zeros_like(p if config.use_fixed_Q else q)
        ps, qs = _cut(p, p_sizes), _cut(q, q_sizes)
        owns = _cut(own, p_sizes if config.use_fixed_Q else q_sizes)
        matrices = []
        for (slot, m, n, rank), its_p, its_q, its_own in zip(chosen, ps, qs, owns):
            residual = None
            if config.use_error_feedback and not config.grad_buffer_is_error:
                residual = torch.zeros(m, n, dtype=self._matrix_dtype, device=device)
            random_q = self._random_q(slot.parameter.name, n, rank, 0).to(device)
            matrices.append(
                _Matrix(
                    slot, (m, n), rank, its_p.view(m, rank), _columns(its_q, rank),
                    its_own.view(m, rank) if config.use_fixed_Q else _columns(its_own, rank),
                    random_q.clone(), random_q, residual,
                )
            )  # fmt: skip
        return _BucketState(matrices, list(zip(others, ps[len(chosen) :])), p, q, own)

    def _factors(self, size: int, device: torch.device) -> Tensor:
        ranks = self.collectives.world_size
        return torch.zeros(-(-size // ranks) * ranks, dtype=self._factor_dtype, device=device)

    def _random_q(self, name: str, n: int, rank: int, iteration: int) -> Tensor:
        """[n, r] with unit columns, orthonormal for a fixed Q. A function of seed, name and iteration: the same on all
        ranks, without a word between them."""
        key = f"{self.config.seed} {iteration} {name}".encode()
        generator = torch.Generator().manual_seed(zlib.crc32(key))
        q = _columns(torch.randn(n * rank, generator=generator), rank)
        if self.config.use_fixed_Q:
            orthonormalize([q], 0.0)
        return (q / q.norm(dim=0)).to(self._factor_dtype)

    def reduce(self, bucket: Bucket) -> Handle | None:
        """Sum the bucket, or under `lazy` its factors. Every rank sends two flat tensors (a fixed Q: one)."""
        state = self._states[bucket.index]
        iteration = self.iteration
        if bucket.index == len(self.buckets) - 1:
            self.iteration += 1
        if bucket.index == 0:
            self.relative_error = {}
        state.compressed, state.grad_is_residual = iteration >= self.config.start_iter, False
        if not state.compressed:
            return self._uncompressed.reduce(bucket)
        unscaled = self._unscaled(bucket)
        gradients = [bucket.piece(unscaled, matrix.slot).view(matrix.shape) for matrix in state.matrices]
        for matrix, gradient in zip(state.matrices, gradients):
            if matrix.residual is not None:
                add_residual(gradient, matrix.residual)
            if not self.config.warm_start:
                fresh = self._random_q(matrix.slot.parameter.name, matrix.shape[1], matrix.rank, iteration)
                matrix.start_q.copy_(fresh)
            project_rows(gradient, matrix.start_q, matrix.p)
        for slot, place in state.others:
            place.copy_(bucket.piece(unscaled, slot))
        if self.config.use_fixed_Q:
            sum_over_ranks(state.p, self._wire_dtype, self.collectives, state.own)
        else:
            sum_over_ranks(state.p, self._wire_dtype, self.collectives)
            if state.matrices:
                self._orthonormalize([matrix.p for matrix in state.matrices], self.config.orthogonalization_epsilon)
                for matrix, gradient in zip(state.matrices, gradients):
                    project_columns(gradient, matrix.p, matrix.q)
                sum_over_ranks(state.q, self._wire_dtype, self.collectives, state.own)
        if self.measure and state.matrices:
            self._estimate_errors(state, gradients)
        if self.config.grad_buffer_is_error:
            return _Afterwards(partial(self._keep_residual_in_grad, state, bucket))
        if not self.lazy:
            self._unpack(state, bucket)
        return None

    def _unscaled(self, bucket: Bucket) -> Tensor:
        """The bucket's gradients without the loss scale: in their own memory, float16 ones beside it."""
        scale = self.loss_scale()
        if scale != 1.0 and self.config.grad_buffer_is_error:
            raise ValueError("a residual in the gradient buffer does not go with a loss scale")
        if self._is_fp16:
            # A power of two: nothing is rounded.
            return self._scratch[: len(bucket.grad)].copy_(bucket.grad).mul_(1.0 / scale)
        return bucket.grad.mul_(1.0 / scale) if scale != 1.0 else bucket.grad

    def _keep_residual_in_grad(self, state: _BucketState, bucket: Bucket) -> None:
        """Turn M into E in the gradient buffer: done by whoever waits for the bucket, while the next is on its way."""
        for matrix in state.matrices:
            gradient = bucket.piece(bucket.grad, matrix.slot).view(matrix.shape)
            update_residual(gradient, *self._own_factors(matrix))
        for slot, _ in state.others:
            bucket.piece(bucket.grad, slot).zero_()

    def _own_factors(self, matrix: _Matrix) -> tuple[Tensor, Tensor]:
        """The two factors whose product this rank contributed to the sum."""
        return (matrix.own, matrix.start_q) if self.config.use_fixed_Q else (matrix.p, matrix.own)

    def _estimate_errors(self, state: _BucketState, gradients: list[Tensor]) -> None:
        """Compare sum M_i Z with D Z for a few random columns Z: |A Z| estimates |A| (their squares agree on average),
        and M Z is as cheap to sum as another P."""
        exact, approximate = [], []
        for matrix, gradient in zip(state.matrices, gradients):
            z = self._random_q(f"sketch {matrix.slot.parameter.name}", matrix.shape[1], SKETCH_COLUMNS, self.iteration)
            z = z.to(gradient)
            q = matrix.start_q if self.config.use_fixed_Q else matrix.q
            exact.append((gradient @ z).flatten())
            approximate.append((matrix.p.to(z) @ (q.to(z).T @ z)).flatten())
        sums = self._factors(sum(map(len, exact)), exact[0].device)
        sums[: sum(map(len, exact))] = torch.cat(exact)
        sum_over_ranks(sums, sums.dtype, self.collectives)
        for matrix, wanted, got in zip(state.matrices, _cut(sums, list(map(len, exact))), approximate):
            norm = wanted.float().norm().item()
            error = (wanted - got).float().norm().item() / norm if norm else 0.0
            if math.isfinite(error):
                self.relative_error[matrix.slot.parameter.name] = error

    def load(self, bucket: int) -> None:
        """Decompress a bucket's sum into `bucket.reduced`, and keep what it left out: the step is taken."""
        self._unpack(self._states[bucket], self.buckets[bucket])

    def _unpack(self, state: _BucketState, bucket: Bucket) -> None:
        if not state.compressed:
            if bucket.reduced is not bucket.grad:
                bucket.reduced.copy_(bucket.grad)
            return
        out = self._scratch[: len(bucket.grad)] if self._is_fp16 and not self.lazy else bucket.reduced
        # A lazy hook is asked only once the sum was found to be finite.
        is_finite = None if self.lazy else torch.isfinite(self.sum_of_squares(bucket.index))
        for matrix in state.matrices:
            before = [kept.clone() for kept in self._kept(matrix)] if is_finite is not None else []
            gradient = bucket.piece(bucket.grad, matrix.slot).view(matrix.shape)
            if matrix.residual is not None:
                update_residual(self._with_residual(matrix, gradient), *self._own_factors(matrix))
            decompress(
                matrix.p, matrix.start_q if self.config.use_fixed_Q else matrix.q,
                bucket.piece(out, matrix.slot).view(matrix.shape),
            )  # fmt: skip
            if self.config.warm_start and not self.config.use_fixed_Q:
                norms = matrix.q.norm(dim=0)
                torch.where(norms > 0.0, matrix.q / norms, matrix.random_q, out=matrix.start_q)
            for now, old in zip(self._kept(matrix), before):
                now.copy_(torch.where(is_finite, now, old))
        for slot, place in state.others:
            bucket.piece(out, slot).copy_(place)
        state.grad_is_residual = self.config.grad_buffer_is_error
        scale = self.loss_scale()
        if scale != 1.0:
            out.mul_(scale)
        if out is not bucket.reduced:
            bucket.reduced.copy_(out)

    def _with_residual(self, matrix: _Matrix, gradient: Tensor) -> Tensor:
        """M, in the residual's memory: as `reduce` left it in the gradient, or once more where it only read that."""
        if self._is_fp16:
            return matrix.residual.add_(gradient, alpha=1.0 / self.loss_scale())
        return matrix.residual.copy_(gradient)

    @staticmethod
    def _kept(matrix: _Matrix) -> list[Tensor]:
        """What is remembered between steps."""
        return [matrix.start_q] if matrix.residual is None else [matrix.start_q, matrix.residual]

    def sum_of_squares(self, bucket: int) -> Tensor:
        """Of the bucket's sum, without decompressing it: |P Q^T|^2 = sum of the elements of (P^T P) * (Q^T Q).

        float64 scalar, in the units of the scaled gradients; not finite if a gradient of any rank was not.
        """
        state = self._states[bucket]
        if not state.compressed:
            return sum_of_squares([self.buckets[bucket].grad])
        total = sum_of_squares(place for _, place in state.others)
        for matrix in state.matrices:
            p = matrix.p.float()
            q = (matrix.start_q if self.config.use_fixed_Q else matrix.q).float()
            total = total.to(p.device) + ((p.T @ p).double() * (q.T @ q).double()).sum()
        return total * self.loss_scale() ** 2

    def zero_grad(self, bucket: Bucket) -> None:
        # A residual in the gradient buffer stays: the next backward pass adds to it.
        if not self._states[bucket.index].grad_is_residual:
            bucket.grad.zero_()

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None) -> float:
        state = self._states[bucket.index]
        sums = [state.p] if self.config.use_fixed_Q or not state.matrices else [state.p, state.q]
        factors = 2 * shared_fraction(self.collectives) * sum(map(len, sums)) * (itemsize or self._wire_dtype.itemsize)
        return factors + len(sums) * agreement_bytes(self._wire_dtype, self.collectives)

    def check_wrapped(self, dtype: torch.dtype) -> None:
        if self.lazy or dtype == torch.float16:
            raise ValueError("PowerSGD narrows its factors itself: give it wire_dtype instead of wrapping it")

    @property
    def compression_ratio(self) -> float:
        """Elements of the gradients over elements that travel."""
        states = self._states
        sent = sum(len(state.p) + (0 if self.config.use_fixed_Q else len(state.q)) for state in states)
        return sum(len(bucket.grad) for bucket in self.buckets) / sent

    def compressed_names(self) -> list[str]:
        """Parameters that are compressed."""
        return [matrix.slot.parameter.name for state in self._states for matrix in state.matrices]

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, between two steps: "name/residual" of this rank, "name/q" that all ranks share."""
        tensors = {}
        for state, bucket in zip(self._states, self.buckets):
            for matrix in state.matrices:
                residual = self._residual(matrix, bucket)
                if residual is not None:
                    tensors[f"{matrix.slot.parameter.name}/residual"] = residual
                tensors[f"{matrix.slot.parameter.name}/q"] = matrix.start_q
        return tensors

    def add_residuals(self, saved: Mapping[str, Tensor]) -> list[str]:
        """Add a saved rank's residuals to this one's. A rank may take up several: only their sum over ranks matters.

        Returns:
            parameters whose saved residual has no place here, because they are not compressed now.
        """
        left = {key.removesuffix("/residual") for key in saved if key.endswith("/residual")}
        for state, bucket in zip(self._states, self.buckets):
            for matrix in state.matrices:
                residual, name = self._residual(matrix, bucket), matrix.slot.parameter.name
                if residual is not None and name in left:
                    left.remove(name)
                    residual.add_(saved[f"{name}/residual"].to(residual.device).view(matrix.shape))
            state.grad_is_residual = self.config.grad_buffer_is_error
        return sorted(left)

    def take_q(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a saved Q; of another rank, with as many columns as both have."""
        for state in self._states:
            for matrix in state.matrices:
                q = saved.get(f"{matrix.slot.parameter.name}/q")
                if q is not None and not self.config.use_fixed_Q:
                    columns = min(q.shape[1], matrix.rank)
                    matrix.start_q[:, :columns] = q[:, :columns].to(matrix.start_q)

    def _residual(self, matrix: _Matrix, bucket: Bucket) -> Tensor | None:
        if self.config.grad_buffer_is_error:
            return bucket.piece(bucket.grad, matrix.slot).view(matrix.shape)
        return matrix.residual


def _columns(flat: Tensor, rank: int) -> Tensor:
    """[n, r] view of n r elements, column after column: in this layout BLAS multiplies M by few columns fastest."""
    return flat.view(rank, -1).T


def _cut(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(flat.split([*sizes, len(flat) - sum(sizes)])[: len(sizes)])
