"""PowerSGD: low-rank compression of gradients (Vogels, Karimireddy and Jaggi, NeurIPS 2019).

Every matrix M_i (m x n, on the i-th process) travels as two thin factors with r columns. With warm start, a training
step is one step of the power method, so the factors follow the gradient's main directions:

    M_i <- G_i + E_i              add_residual        gradient plus the residual of earlier steps
    P_i <- M_i Q                  project_rows        m x r
    P   <- sum_i P_i              on the wire
    P   <- orthonormalize(P)      orthonormalize      the same on every rank
    Q_i <- M_i^T P                project_columns     n x r
    Q   <- sum_i Q_i              on the wire; Q of the next step
    D   <- P Q^T                  decompress          = P P^T sum_i M_i, the sum for the optimizer
    E_i <- M_i - P Q_i^T          update_residual

Gradients are summed here, so the residuals keep the invariant  sum_i (M_i - E_i) = D:  the part of a gradient that the
weights do not get now reaches them later. E_i is the part of M_i outside the span of P. (The difference M_i - D / N
would keep the invariant too, but would accumulate the differences between ranks for ever.) It is in units of the
unscaled gradient.

A stack of matrices, such as those of a layer's experts, is compressed matrix by matrix: each has r directions of its
own. In one tall matrix all experts would share r directions, although they learn from different tokens, and most of the
bytes (P) would be sent just the same.

A bucket takes two collectives: one for a flat buffer with all its P and its uncompressed parameters (vectors, small or
excluded matrices), one for all its Q. They run inside the hook, on the comm stream, so buckets cannot mix.

    main thread   backward ...                                 | wait | norm | decompress and step bucket 2, 1, 0
    comm stream   [M Q | sum P | orth. | M^T P | sum Q] [bucket 1 ...]

A bucket stays in factors until the optimizer takes it, and only then do residuals and Q change. So a skipped step
leaves no trace. `Eager` takes at once, for a loop that expects its gradients in the buckets.

float16 gradients are only read, and M, E and D are float32 with them. Unscaled gradients would underflow in float16,
and a sum that is decompressed and scaled again might overflow although the norm of its factors was finite.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.buffer import Bucket, sum_of_squares
from parallel.collectives import Collectives
from parallel.comm_hooks import CommHook, SavedStates, agreement_bytes, ranks_of, shared_fraction, sum_hook
from parallel.comm_stream import Handle
from parallel.config import PowerSGDConfig
from parallel.layout import ParameterSpec, Slot
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
"""Random columns for the estimate of the relative error."""


@dataclass
class _Matrix:
    """A compressed parameter: views of its factors, and its memory between steps. If it is a stack of matrices, all
    these tensors have the stack's dimension in front."""

    slot: Slot
    shape: tuple[int, ...]
    """(m, n), or (stack, m, n)."""
    rank: int
    p: Tensor
    q: Tensor
    own: Tensor
    """This rank's contribution to q; with a fixed Q, to p."""
    start_q: Tensor
    """[n, r] with unit columns: the Q to project with."""
    random_q: Tensor
    """[n, r]: replacements for columns of Q that have become zero."""
    residual: Tensor | None
    """[m, n]; None without error feedback, or if the residual is in the gradient buffer."""

    @property
    def q_key(self) -> str:
        """Name of Q in a checkpoint."""
        return f"{_label(self.slot.parameter)}/q"

    @property
    def residual_key(self) -> str:
        # Where several ranks compute the same gradient, the residual of one of them is enough for another mesh.
        copy = "" if self.slot.parameter.counts else "@copy"
        return f"{_label(self.slot.parameter)}{copy}/residual"


@dataclass
class _BucketState:
    collectives: Collectives
    matrices: list[_Matrix]
    others: list[tuple[Slot, Tensor]]
    """Uncompressed parameters: the slot, and its view of `p`."""
    p: Tensor
    """Flat: all P, then the others, padded to a multiple of the number of ranks that add them."""
    q: Tensor
    """Flat: all Q, padded."""
    own: Tensor
    """Flat, like q (with a fixed Q, like p): this rank's contributions."""
    compressed: bool = False
    """Whether the last step's sum is held as factors."""
    grad_is_residual: bool = False
    """With grad_buffer_is_powerSGD_error: whether `grad` holds the residual alone."""


class PowerSGD(CommHook):
    """Hook that sends buckets as low-rank factors.

    Args:
        buckets: the DDP's.
        collectives: those for buckets that have none of their own.
        wire_dtype: dtype of factors on the wire; None: their own.
        seed: key of the random Q.
        loss_scale: returns the present factor on the gradients (float16's loss scale, a power of two).
        iteration: number of the first step; start_powerSGD_iter and random Q depend on it.
    Raises:
        ValueError: options that exclude each other.
    """

    takes_in_place, knows_norm, keeps_scale = False, True, False
    remembers = ("residual", "q")

    def __init__(
        self,
        buckets: list[Bucket],
        collectives: Collectives,
        config: PowerSGDConfig,
        wire_dtype: torch.dtype | None = None,
        seed: int = 0,
        loss_scale: Callable[[], float] = lambda: 1.0,
        iteration: int = 0,
    ):
        config.check()
        # A stage of a pipeline may train nothing.
        grad = buckets[0].grad if buckets else torch.empty(0)
        self._is_fp16 = grad.dtype == torch.float16
        if config.grad_buffer_is_powerSGD_error and not config.use_error_feedback:
            raise ValueError("a residual in the gradient buffer needs error feedback")
        if self._is_fp16 and config.grad_buffer_is_powerSGD_error:
            raise ValueError("a residual in the gradient buffer does not go with float16, where it underflows unscaled")
        if self._is_fp16 and not config.orthogonalize_in_float32:
            raise ValueError(
                "PowerSGD's factors of unscaled gradients underflow in float16: leave out --no-orthogonalize_in_float32"
                ", or reduce in another dtype"
            )
        self.buckets, self.collectives, self.config, self.seed = buckets, collectives, config, seed
        self.loss_scale, self.iteration = loss_scale, iteration
        self.saves_gradients = config.grad_buffer_is_powerSGD_error
        self.measure = False
        """Whether to estimate `relative_error` in the next step; must be the same on all ranks."""
        self.relative_error: dict[str, float] = {}
        """Parameter name -> estimate of |sum M_i - D| / |sum M_i|. Residuals of single ranks may be larger, as they
        partly cancel in the sum."""
        narrow_factors = grad.itemsize < 4 and not config.orthogonalize_in_float32
        self._factor_dtype = grad.dtype if narrow_factors or grad.itemsize >= 4 else torch.float32
        self._orthonormalize = gram_schmidt if narrow_factors else orthonormalize
        self._given_wire, self._wire_dtype = wire_dtype, wire_dtype or self._factor_dtype
        narrower = self._wire_dtype.itemsize < grad.itemsize
        self._uncompressed = sum_hook(collectives, self._wire_dtype if narrower else None)
        self._matrix_dtype = torch.float32 if self._is_fp16 else grad.dtype
        self._excluded = [word.strip() for word in config.powerSGD_exclude.split(",") if word.strip()]
        self._states = [self._plan(bucket) for bucket in buckets]
        self._scratch: Tensor | None = None
        """One bucket's decompressed sum, in `_matrix_dtype`; with float16, before that its M."""
        if buckets and (config.grad_buffer_is_powerSGD_error or self._is_fp16):
            longest = max((bucket.grad for bucket in buckets), key=len)
            self._scratch = torch.zeros_like(longest, dtype=self._matrix_dtype)

    def _plan(self, bucket: Bucket) -> _BucketState:
        """Choose the parameters of a bucket to compress, and lay out their factors."""
        config, device, collectives = self.config, bucket.grad.device, ranks_of(bucket, self.collectives)
        chosen, others = [], []
        for slot in bucket.slots:
            shape = _matrix_shape(slot.parameter)
            m, n = shape[-2:]
            rank = min(m, n, config.matrix_approximation_rank)
            excluded = any(word in slot.parameter.name for word in self._excluded)
            if rank and not excluded and m * n >= config.min_compression_rate * (m + n) * rank:
                chosen.append((slot, shape, rank))
            else:
                others.append(slot)
        p_sizes = [math.prod(shape[:-1]) * rank for _, shape, rank in chosen]
        p_sizes += [slot.parameter.numel for slot in others]
        q_sizes = [math.prod(shape[:-2]) * shape[-1] * rank for _, shape, rank in chosen]
        p, q = (self._factors(sum(sizes), device, collectives) for sizes in (p_sizes, q_sizes))
        own = torch.zeros_like(p if config.use_fixed_Q else q)
        ps, qs = _cut(p, p_sizes), _cut(q, q_sizes)
        owns = _cut(own, p_sizes if config.use_fixed_Q else q_sizes)
        matrices = []
        for (slot, shape, rank), its_p, its_q, its_own in zip(chosen, ps, qs, owns):
            residual = None
            if config.use_error_feedback and not config.grad_buffer_is_powerSGD_error:
                residual = torch.zeros(shape, dtype=self._matrix_dtype, device=device)
            random_q = self._random_q(slot.parameter.name, shape, rank, 0).to(device)
            rows = (*shape[:-1], rank)
            matrices.append(
                _Matrix(
                    slot, shape, rank, its_p.view(rows), _columns(its_q, shape, rank),
                    its_own.view(rows) if config.use_fixed_Q else _columns(its_own, shape, rank),
                    random_q.clone(), random_q, residual,
                )
            )  # fmt: skip
        return _BucketState(collectives, matrices, list(zip(others, ps[len(chosen) :])), p, q, own)

    def _factors(self, size: int, device: torch.device, collectives: Collectives) -> Tensor:
        ranks = collectives.world_size
        return torch.zeros(-(-size // ranks) * ranks, dtype=self._factor_dtype, device=device)

    def _random_q(self, name: str, shape: tuple[int, ...], rank: int, iteration: int) -> Tensor:
        """[n, r] with unit columns, orthonormal for a fixed Q, for each matrix of a parameter. It depends only on seed,
        name and iteration, so all ranks draw the same without communication.

        Args:
            shape: the parameter's, as in `_Matrix`.
        """
        key = f"{self.seed} {iteration} {name}".encode()
        generator = torch.Generator().manual_seed(zlib.crc32(key))
        size = math.prod(shape[:-2]) * shape[-1] * rank
        q = _columns(torch.randn(size, generator=generator), shape, rank)
        if self.config.use_fixed_Q:
            orthonormalize([q], 0.0)
        return (q / q.norm(dim=-2, keepdim=True)).to(self._factor_dtype)

    def reduce(self, bucket: Bucket) -> Handle | None:
        """Sum the bucket's factors. Every rank sends two flat tensors (with a fixed Q, one)."""
        state = self._states[bucket.index]
        iteration = self.iteration
        if bucket.index == len(self.buckets) - 1:
            self.iteration += 1
        if bucket.index == 0:
            self.relative_error = {}
        state.compressed, state.grad_is_residual = iteration >= self.config.start_powerSGD_iter, False
        if not state.compressed:
            return self._uncompressed.reduce(bucket)
        unscaled = self._unscaled(bucket)
        gradients = [bucket.piece(unscaled, matrix.slot).view(matrix.shape) for matrix in state.matrices]
        for matrix, gradient in zip(state.matrices, gradients):
            if matrix.residual is not None:
                add_residual(gradient, matrix.residual)
            if not self.config.warm_start:
                fresh = self._random_q(matrix.slot.parameter.name, matrix.shape, matrix.rank, iteration)
                matrix.start_q.copy_(fresh)
            project_rows(gradient, matrix.start_q, matrix.p)
        for slot, place in state.others:
            place.copy_(bucket.piece(unscaled, slot))
        if self.config.use_fixed_Q:
            sum_over_ranks(state.p, self._wire_dtype, state.collectives, state.own)
        else:
            sum_over_ranks(state.p, self._wire_dtype, state.collectives)
            if state.matrices:
                self._orthonormalize([matrix.p for matrix in state.matrices], self.config.orthogonalization_epsilon)
                for matrix, gradient in zip(state.matrices, gradients):
                    project_columns(gradient, matrix.p, matrix.q)
                sum_over_ranks(state.q, self._wire_dtype, state.collectives, state.own)
        if self.measure and state.matrices:
            self._estimate_errors(state, gradients)
        return None

    def _unscaled(self, bucket: Bucket) -> Tensor:
        """The bucket's gradients without the loss scale: in place, or for float16 in the scratch buffer."""
        scale = self.loss_scale()
        if scale != 1.0 and self.config.grad_buffer_is_powerSGD_error:
            raise ValueError("a residual in the gradient buffer does not go with a loss scale")
        # The scale is a power of two, so nothing is rounded.
        if self._is_fp16:
            return self._room(bucket).copy_(bucket.grad).mul_(1.0 / scale)
        return bucket.grad.mul_(1.0 / scale) if scale != 1.0 else bucket.grad

    def _room(self, bucket: Bucket) -> Tensor:
        """Memory for the bucket's decompressed sum: the gradient buffer, or the scratch buffer in its place."""
        return bucket.grad if self._scratch is None else self._scratch[: len(bucket.grad)]

    def settle(self, bucket: Bucket) -> None:
        """Turn M into E in the gradient buffer, if the residual is kept there."""
        state = self._states[bucket.index]
        if not (self.config.grad_buffer_is_powerSGD_error and state.compressed):
            return
        for matrix in state.matrices:
            gradient = bucket.piece(bucket.grad, matrix.slot).view(matrix.shape)
            update_residual(gradient, *self._own_factors(matrix))
        for slot, _ in state.others:
            bucket.piece(bucket.grad, slot).zero_()

    def _own_factors(self, matrix: _Matrix) -> tuple[Tensor, Tensor]:
        """The two factors whose product is this rank's contribution to the sum."""
        return (matrix.own, matrix.start_q) if self.config.use_fixed_Q else (matrix.p, matrix.own)

    def _estimate_errors(self, state: _BucketState, gradients: list[Tensor]) -> None:
        """Compare sum M_i Z with D Z for a few random columns Z: |A Z| estimates |A| (their squares agree on average),
        and summing M Z is as cheap as summing another P."""
        exact, approximate = [], []
        for matrix, gradient in zip(state.matrices, gradients):
            name = f"sketch {matrix.slot.parameter.name}"
            z = self._random_q(name, matrix.shape, SKETCH_COLUMNS, self.iteration).to(gradient)
            exact.append((gradient @ z).flatten())
            approximate.append((matrix.p.to(z) @ (self._summed_q(matrix).to(z).mT @ z)).flatten())
        sums = self._factors(sum(map(len, exact)), exact[0].device, state.collectives)
        sums[: sum(map(len, exact))] = torch.cat(exact)
        sum_over_ranks(sums, sums.dtype, state.collectives)
        for matrix, wanted, got in zip(state.matrices, _cut(sums, list(map(len, exact))), approximate):
            norm = wanted.float().norm().item()
            error = (wanted - got).float().norm().item() / norm if norm else 0.0
            if math.isfinite(error):
                self.relative_error[matrix.slot.parameter.name] = error

    def take(self, bucket: Bucket) -> Tensor:
        """Decompress the bucket's sum, and update residuals and Q."""
        state, out = self._states[bucket.index], self._room(bucket)
        if not state.compressed:
            return self._unscaled(bucket)
        for matrix in state.matrices:
            if matrix.residual is not None:
                gradient = bucket.piece(bucket.grad, matrix.slot).view(matrix.shape)
                update_residual(self._with_residual(matrix, matrix.residual, gradient), *self._own_factors(matrix))
            decompress(matrix.p, self._summed_q(matrix), bucket.piece(out, matrix.slot).view(matrix.shape))
            if self.config.warm_start and not self.config.use_fixed_Q:
                norms = matrix.q.norm(dim=-2, keepdim=True)
                torch.where(norms > 0.0, matrix.q / norms, matrix.random_q, out=matrix.start_q)
        for slot, place in state.others:
            bucket.piece(out, slot).copy_(place)
        state.grad_is_residual = self.config.grad_buffer_is_powerSGD_error
        return out

    def dtype_taken(self, bucket: Bucket) -> torch.dtype:
        return self._matrix_dtype

    def _summed_q(self, matrix: _Matrix) -> Tensor:
        return matrix.start_q if self.config.use_fixed_Q else matrix.q

    def _with_residual(self, matrix: _Matrix, residual: Tensor, gradient: Tensor) -> Tensor:
        """M, in the residual's memory: copied from the gradient buffer, or with float16 computed again."""
        if self._is_fp16:
            return residual.add_(gradient, alpha=1.0 / self.loss_scale())
        return residual.copy_(gradient)

    def sum_of_squares(self, bucket: Bucket) -> Tensor:
        """Sum of squares without decompressing: |P Q^T|^2 = sum of the elements of (P^T P) * (Q^T Q). Not finite if any
        rank's gradient was not."""
        state = self._states[bucket.index]
        if not state.compressed:
            return sum_of_squares([bucket.grad]) / self.loss_scale() ** 2
        total = sum_of_squares(place for _, place in state.others)
        for matrix in state.matrices:
            p, q = matrix.p.float(), self._summed_q(matrix).float()
            total = total.to(p.device) + ((p.mT @ p).double() * (q.mT @ q).double()).sum()
        return total

    def release(self, bucket: Bucket) -> None:
        # A residual in the gradient buffer stays: the next backward pass adds to it.
        if not self._states[bucket.index].grad_is_residual:
            bucket.grad.zero_()

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None, by_machine: bool = False) -> float:
        state = self._states[bucket.index]
        sums = [state.p] if self.config.use_fixed_Q or not state.matrices else [state.p, state.q]
        share = shared_fraction(state.collectives, by_machine)
        factors = 2 * share * sum(map(len, sums)) * (itemsize or self._wire_dtype.itemsize)
        return factors + len(sums) * agreement_bytes(self._wire_dtype, state.collectives)

    def check_wrapped(self, dtype: torch.dtype) -> None:
        raise ValueError("PowerSGD narrows its factors itself: give it wire_dtype instead of wrapping it")

    @property
    def compression_ratio(self) -> float:
        """Elements of the gradients per element sent."""
        states = self._states
        sent = sum(len(state.p) + (0 if self.config.use_fixed_Q else len(state.q)) for state in states)
        return sum(len(bucket.grad) for bucket in self.buckets) / sent if sent else 1.0

    def compressed_names(self) -> list[str]:
        """Names of the compressed parameters."""
        return [matrix.slot.parameter.name for state in self._states for matrix in state.matrices]

    def describe(self) -> str:
        wire = f", {str(self._given_wire).removeprefix('torch.')} on the wire" if self._given_wire else ""
        return f"PowerSGD 1:{self.compression_ratio:.1f}{wire}"

    def begin_step(self, number: int) -> None:
        interval = self.config.powerSGD_log_interval
        self.measure = interval > 0 and number % interval == 0

    def records(self) -> Mapping[str, dict]:
        """The share of the gradients that was left for later, in measured steps."""
        errors = self.relative_error if self.measure else {}
        if not errors:
            return {}
        mean = sum(errors.values()) / len(errors)
        return {"compression": {"ratio": self.compression_ratio, "mean_relative_error": mean, "relative_error": errors}}

    def saved_state(self) -> dict[str, Tensor]:
        """Memory between two steps: "name/residual" of this rank, and "name/q", which all ranks share that add this
        gradient. Of a part of a parameter, the name says which one."""
        tensors = {}
        for state, bucket in zip(self._states, self.buckets):
            for matrix in state.matrices:
                residual = self._residual(matrix, bucket)
                if residual is not None:
                    tensors[matrix.residual_key] = residual
                tensors[matrix.q_key] = matrix.start_q
        return tensors

    def take_states(self, states: SavedStates, step: int) -> list[str]:
        """Residuals go to the ranks with their numbers, or to those that replace them; Q was the same on all ranks."""
        self.iteration, sentences = step, []
        for index, (saved, is_mine) in enumerate(states):
            if index == 0:
                self.take_q(saved)
            dropped = self.add_residuals(saved) if is_mine else []
            if dropped:
                sentences.append(
                    f"residuals are dropped, as these parameters are no longer compressed, or are cut in another way: "
                    f"{', '.join(dropped)}"
                )
        return sentences

    def add_residuals(self, saved: Mapping[str, Tensor]) -> list[str]:
        """Add a saved rank's residuals to this one's. A rank may take up several: only their sum over ranks matters.

        Returns:
            parameters whose saved residual has no place here, because they are no longer compressed, or cut in another
            way.
        """
        left = {key for key in saved if key.endswith("/residual")}
        for state, bucket in zip(self._states, self.buckets):
            for matrix in state.matrices:
                residual, key = self._residual(matrix, bucket), matrix.residual_key
                if residual is not None and key in left:
                    left.remove(key)
                    residual.add_(saved[key].to(residual.device).view(matrix.shape))
            state.grad_is_residual = self.config.grad_buffer_is_powerSGD_error
        return sorted({key.rpartition("/")[0].partition("@")[0] for key in left})

    def take_q(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a saved Q. If its number of columns differs, use as many as both have."""
        for state in self._states:
            for matrix in state.matrices:
                q = saved.get(matrix.q_key)
                if q is not None and not self.config.use_fixed_Q:
                    columns = min(q.shape[-1], matrix.rank)
                    matrix.start_q[..., :columns] = q[..., :columns].to(matrix.start_q)

    def _residual(self, matrix: _Matrix, bucket: Bucket) -> Tensor | None:
        if self.config.grad_buffer_is_powerSGD_error:
            return bucket.piece(bucket.grad, matrix.slot).view(matrix.shape)
        return matrix.residual


class Eager(CommHook):
    """PowerSGD whose sums are in the buckets once they are reduced, for a loop that never calls `take`, such as one
    with a torch optimizer. A non-finite sum arrives as NaN and leaves PowerSGD's state unchanged; on CUDA, the host
    waits for each bucket to see that.

    Raises:
        ValueError: the residual is in the gradient buffer, which then cannot hold the sum.
    """

    def __init__(self, hook: PowerSGD):
        if hook.config.grad_buffer_is_powerSGD_error:
            raise ValueError("a residual in the gradient buffer does not go with Eager: the sum has no other place")
        self.hook = hook

    def reduce(self, bucket: Bucket) -> None:
        handle = self.hook.reduce(bucket)
        if handle is not None:
            handle.wait()
        if torch.isfinite(self.hook.sum_of_squares(bucket)):
            torch.mul(self.hook.take(bucket), self.hook.loss_scale(), out=bucket.grad)
        else:
            for _, gradient in bucket.views():
                gradient.fill_(torch.nan)

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None, by_machine: bool = False) -> float:
        return self.hook.bytes_sent(bucket, itemsize, by_machine)

    def check_wrapped(self, dtype: torch.dtype) -> None:
        if dtype == torch.float16:
            self.hook.check_wrapped(dtype)


def _matrix_shape(parameter: ParameterSpec) -> tuple[int, ...]:
    """Shape of a parameter as a matrix (m, n), or as a stack of matrices (stack, m, n); a vector has no columns. The
    kernel of a convolution, with four dimensions, is a matrix (outputs, rest)."""
    shape = parameter.shape
    if len(shape) in (2, 3):
        return shape
    return (shape[0], parameter.numel // shape[0]) if len(shape) > 3 else (parameter.numel, 0)


def _label(parameter: ParameterSpec) -> str:
    """Name of what this rank holds of a parameter: "up_proj.weight@0:16,0:64" of its first 16 rows."""
    held = parameter.held
    if held is None or len(held.boxes) == 1 and held.boxes[0].length == held.shape:
        return parameter.name
    boxes = (",".join(map("{}:{}".format, box.start, box.length)) for box in held.boxes)
    return f"{parameter.name}@{'+'.join(boxes)}"


def _columns(flat: Tensor, shape: tuple[int, ...], rank: int) -> Tensor:
    """[n, r] view of n r elements for each matrix of a parameter, column by column: BLAS multiplies M by few columns
    fastest in this layout."""
    return flat.view(*shape[:-2], rank, shape[-1]).mT


def _cut(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(flat.split([*sizes, len(flat) - sum(sizes)])[: len(sizes)])
