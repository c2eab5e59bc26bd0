"""The optimizer of the training loop: float32 main parameters under weights of any dtype.

A step, on the slices it was handed (all of them, or under ZeRO-1 the ones this rank owns):

    norm     global norm of the gradients, float64, over all ranks if the slices are shards
    check    a norm that is not finite, or too large for float32: every rank skips the step, all state stays as it was
    step     AdamW (the blocks' matrices: Muon, on request) on the float32 main parameters, gradients divided by loss
             scale / clipping factor on the way
    copy     main parameters -> the model's weights, where those are bf16 or fp16

Step and copy go bucket by bucket, the last bucket first, so that what follows (ZeRO-1's gather) can start early. With
overlap_optim_step they happen while other buckets are still reduced; then there is no norm before the step, hence no
clipping and no check.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoint.named import Piece
from optimizer import adamw_triton, muon
from optimizer.adamw import AdamWConfig, adamw_step, within_range
from optimizer.clip import clip_factor
from optimizer.muon import MuonConfig
from optimizer.param_groups import is_hidden_matrix, split_by_decay
from parallel.buffer import GradientSource, ParameterSlice, sum_of_squares


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch dtype of a --dtype; "auto" is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ValueError: bfloat16 on a GPU that lacks it.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bfloat16" and not has_bf16:
            raise ValueError("this GPU has no bfloat16: use --dtype=float16")
    else:
        # Private names, so looked up with care: without them the answer is float32, which is always right.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has_bf16 = any(hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)() for probe in probes)
    if name == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, name)


def choose_kernel(kernels: str, wanted: str, device: torch.device) -> str:
    """Of the optimizer's step, by --kernels and --adamw_kernel.

    Raises:
        ValueError: Triton was asked for and cannot be had.
    """
    reason = adamw_triton.unavailable_reason(device)
    asked = wanted == "triton" or (not wanted and kernels == "triton")
    if asked and reason:
        raise ValueError(f"--{'adamw_kernel' if wanted else 'kernels'}=triton cannot be used: {reason}")
    if wanted:
        return wanted
    return "torch" if kernels == "reference" or reason else "triton"


class LossScaler:
    """Dynamic loss scale for fp16 (Micikevicius et al., 2018): halved when gradients overflow, doubled after
    `growth_interval` good steps. With enabled=False the scale is 1 for ever (bf16, fp32)."""

    def __init__(self, enabled: bool, initial: float = 2.0**16, growth_interval: int = 1000):
        self.enabled, self.growth_interval = enabled, growth_interval
        self.scale = initial if enabled else 1.0
        self.good_steps = 0

    def update(self, overflowed: bool) -> None:
        if not self.enabled:
            return
        if overflowed:
            self.scale, self.good_steps = max(self.scale / 2.0, 2.0**-14), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = min(self.scale * 2.0, 2.0**24), 0

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict) -> None:
        if self.enabled:
            self.scale, self.good_steps = state["scale"], state["good_steps"]


def can_be_stepped_with(grad_norm: float, scale: float, clip: float) -> bool:
    """Whether float32 holds all that a step makes of gradients with this global norm (unscaled, before clipping).

    Sums of their squares, which both AdamW and Muon take after clipping, overflow beyond 1.8e19; the scaled gradients
    themselves, and what they are divided by, beyond 3.4e38. A moment that became infinite would stay so for ever.
    """
    return grad_norm * scale <= 1e37 and grad_norm * clip <= 1e18 and scale <= 1e37 * clip


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """Global norm of the unscaled gradients before clipping; infinite if they overflowed."""
    skipped: bool


@dataclass
class _State:
    """A slice and its optimizer state: flat float32 tensors of its length."""

    piece: ParameterSlice
    main: Tensor
    exp_avg: Tensor
    """AdamW's mean gradient, or Muon's momentum."""
    exp_avg_sq: Tensor | None
    """None: Muon steps it."""

    @staticmethod
    def of(piece: ParameterSlice, by_muon: bool) -> "_State":
        # float32 weights are their own main parameters
        main = piece.param if piece.param.dtype == torch.float32 else piece.param.float()
        return _State(piece, main, torch.zeros_like(main), None if by_muon else torch.zeros_like(main))

    def tensors(self) -> dict[str, Tensor]:
        found = {"main": self.main, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def write_weights(self) -> None:
        if self.main is not self.piece.param:
            self.piece.param.copy_(within_range(self.main, self.piece.param.dtype))


def _multiplied_together(states: Sequence[_State]) -> Iterable[list[_State]]:
    """Muon's matrices of one shape, in bfloat16 on a CPU. Elsewhere each by itself: its bits would depend on the others
    that are multiplied with it, so a run on the size of its buckets."""
    groups: dict[object, list[_State]] = {}
    for state in states:
        piece = state.piece
        at_once = piece.param.dtype == torch.bfloat16 and not piece.param.is_cuda
        groups.setdefault(piece.shape if at_once else piece.name, []).append(state)
    return groups.values()


@dataclass
class _OverlappedStep:
    lr: float
    squares: list[Tensor] = field(default_factory=list)


class MixedPrecisionOptimizer:
    """AdamW, and on request Muon, over flat slices.

    Args:
        slices: what to step, one list a bucket. Gradients may have any dtype; float32 ones are used in place.
        config: AdamW's constants.
        grad_clip: largest global norm, 0 for none.
        scaler: the loss scale that gradients carry.
        sum_over_ranks: adds a float64 scalar over all ranks if the slices are this rank's shards; None if every rank
            holds them all.
        source: where gradients come from if they are not in the slices yet; its norms are over all ranks already.
        kernel: "torch" (its fused AdamW) or "triton" (adamw_triton.py: gradients of any dtype and low-precision weights
            in the same pass); see `choose_kernel`.
        muon: step the matrices of the blocks by Muon; None: AdamW steps all.
        gather_updates: with Muon, where slices are shards: makes a bucket's gradients whole again, from what each rank
            has put in the place of its own (`Zero1.gather_in_gradients`). Called for every bucket, on all ranks.
        zero_grad: leave the slices' gradients zero after a step, at no cost with the Triton kernel.
    """

    def __init__(
        self,
        slices: Sequence[Sequence[ParameterSlice]],
        config: AdamWConfig,
        grad_clip: float,
        scaler: LossScaler,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        source: GradientSource | None = None,
        kernel: str = "torch",
        muon: MuonConfig | None = None,
        gather_updates: Callable[[int], None] | None = None,
        zero_grad: bool = False,
    ):
        self.kernel, self.muon, self.gather_updates, self.zero_grad = kernel, muon, gather_updates, zero_grad
        self.config, self.grad_clip, self.scaler = config, grad_clip, scaler
        self.sum_over_ranks, self.source = sum_over_ranks, source
        self.num_steps = 0
        self._buckets = [
            [_State.of(piece, muon is not None and is_hidden_matrix(piece)) for piece in bucket] for bucket in slices
        ]
        self._overlapped: _OverlappedStep | None = None

    @torch.no_grad()
    def step(self, lr: float, after_bucket: Callable[[int], None] | None = None) -> StepResult:
        """Step with learning rate `lr`; all ranks return the same.

        Args:
            after_bucket: called with each bucket's number once it is stepped, the last bucket first.
        """
        grad_norm = self._norm(sum(self._sum_of_squares(bucket) for bucket in range(len(self._buckets))))
        factor = clip_factor(grad_norm, self.grad_clip)
        if not can_be_stepped_with(grad_norm, self.scaler.scale, factor):
            self.scaler.update(overflowed=True)
            return StepResult(grad_norm, skipped=True)
        self.num_steps += 1
        grad_divisor = self.scaler.scale / factor
        for bucket in reversed(range(len(self._buckets))):
            self._step_bucket(bucket, lr, grad_divisor)
            if after_bucket is not None:
                after_bucket(bucket)
        self.scaler.update(overflowed=False)
        return StepResult(grad_norm, skipped=False)

    def begin_overlapped_step(self, lr: float) -> None:
        """From here on `step_bucket` may be called, for each bucket once, in any thread; then `end_overlapped_step`."""
        if self.grad_clip or self.scaler.enabled:
            raise ValueError("a step that overlaps with the reduction can neither clip nor be skipped (fp16)")
        self.num_steps += 1
        self._overlapped = _OverlappedStep(lr)

    @torch.no_grad()
    def step_bucket(self, bucket: int) -> None:
        """Step one bucket, whose gradients are summed, while others still are not."""
        self._overlapped.squares.append(self._sum_of_squares(bucket))
        self._step_bucket(bucket, self._overlapped.lr, 1.0)

    def end_overlapped_step(self) -> StepResult:
        """All buckets are stepped.

        Raises:
            FloatingPointError: the gradients were not finite, or too large for float32; the weights are lost.
        """
        grad_norm = self._norm(sum(self._overlapped.squares))
        self._overlapped = None
        if not can_be_stepped_with(grad_norm, 1.0, 1.0):
            raise FloatingPointError(
                "non-finite gradients, and --overlap_optim_step had already stepped with them: resume from the last "
                "checkpoint, without that flag if it happens again"
            )
        return StepResult(grad_norm, skipped=False)

    def _sum_of_squares(self, bucket: int) -> Tensor:
        """Of a bucket's scaled gradients: float64 scalar."""
        if self.source is not None:
            return self.source.sum_of_squares(bucket)
        if self.kernel == "triton":
            return sum(adamw_triton.sum_of_squares(state.piece.grad) for state in self._buckets[bucket])
        return sum_of_squares(state.piece.grad for state in self._buckets[bucket])

    def _norm(self, squares: Tensor) -> float:
        """The global norm of the unscaled gradients; infinite if anything is not finite."""
        squares = torch.as_tensor(squares, dtype=torch.float64).cpu()
        if self.sum_over_ranks is not None and self.source is None:
            squares = self.sum_over_ranks(squares)
        return math.sqrt(squares.item()) / self.scaler.scale if math.isfinite(squares.item()) else math.inf

    def _step_bucket(self, bucket: int, lr: float, grad_divisor: float) -> None:
        if self.source is not None:
            self.source.load(bucket)
        states = self._buckets[bucket]
        by_adamw = [state for state in states if state.exp_avg_sq is not None]
        step = self._step_in_one_pass if self.kernel == "triton" else self._step_in_passes
        for group, weight_decay in zip(split_by_decay(by_adamw), (self.config.weight_decay, 0.0)):
            step(group, lr, weight_decay, grad_divisor)
        if self.muon is not None:
            by_muon = [state for state in states if state.exp_avg_sq is None]
            self._step_matrices(bucket, by_muon, lr * self.muon.lr_ratio, grad_divisor)

    def _step_in_passes(self, states: list[_State], lr: float, weight_decay: float, grad_divisor: float) -> None:
        adamw_step(
            [state.main for state in states], [state.piece.grad.float() for state in states],
            [state.exp_avg for state in states], [state.exp_avg_sq for state in states],
            self.num_steps, lr, weight_decay, grad_divisor, self.config,
        )  # fmt: skip
        for state in states:
            state.write_weights()
            if self.zero_grad:
                state.piece.grad.zero_()

    def _step_in_one_pass(self, states: list[_State], lr: float, weight_decay: float, grad_divisor: float) -> None:
        for state in states:
            weights = state.piece.param if state.main is not state.piece.param else None
            adamw_triton.adamw_flat_step(
                state.main, state.exp_avg, state.exp_avg_sq, state.piece.grad, weights, self.num_steps, lr,
                weight_decay, grad_divisor, self.config, self.zero_grad,
            )  # fmt: skip

    def _step_matrices(self, bucket: int, states: list[_State], lr: float, grad_divisor: float) -> None:
        """By Muon. Shards of a matrix are updated each by its rank up to the point where all of it is needed."""
        for state in states:
            muon.look_ahead(state.exp_avg, state.piece.grad, self.muon.momentum, grad_divisor)
        if self.gather_updates is not None:
            self.gather_updates(bucket)
        for group in _multiplied_together(states):
            shape, weights = group[0].piece.shape, group[0].piece.param
            gradients = torch.stack([muon.ahead_in(state.piece.whole_grad).view(shape) for state in group])
            # float32 weights on a CPU: it may not be quick at bfloat16.
            quick = weights.is_cuda or weights.dtype == torch.bfloat16
            updates = muon.orthogonalize(
                gradients, self.muon.iterations, torch.bfloat16 if quick else torch.float32
            ).flatten(1)
            for state, update in zip(group, updates):
                piece = state.piece
                own = update[piece.offset : piece.offset + len(piece.grad)]
                state.main.mul_(1.0 - lr * self.config.weight_decay)
                state.main.sub_(own.float(), alpha=muon.step_size(shape, lr))
                state.write_weights()
                if self.zero_grad:
                    piece.grad.zero_()

    def named_state(self) -> list[tuple[Piece, dict[str, Tensor]]]:
        """Each slice with its {"main", "exp_avg", and "exp_avg_sq" but for Muon}: flat views, float32."""
        return [
            (Piece.flat(s.piece.name, s.piece.shape, s.piece.offset, len(s.main)), s.tensors())
            for bucket in self._buckets
            for s in bucket
        ]

    @torch.no_grad()
    def weights_from_main(self) -> None:
        """Set the model's weights from the main parameters, after those were loaded."""
        for bucket in self._buckets:
            for state in bucket:
                state.write_weights()

    def scalar_state(self) -> dict:
        return {
            "name": "adamw" if self.muon is None else "muon", "num_steps": self.num_steps,
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def load_scalar_state(self, state: dict) -> None:
        self.num_steps = state["num_steps"]
        self.scaler.load_state_dict(state["scaler"])
