"""The optimizer of the training loop: float32 main parameters under weights of any dtype.

A step on the slices of a gradient source (all parameters, or under ZeRO-1 this rank's shards):

    norm      global norm of the gradients, in float64
    check     a norm that is not finite, or too large for float32: every rank skips the step, all state stays as it was
    take      the source hands over a bucket's summed gradients
    step      AdamW (the blocks' matrices: Muon, on request) on the float32 main parameters, gradients divided by loss
              scale / clipping factor on the way
    copy      main parameters -> the model's weights, where those are bf16 or fp16
    release   the bucket is zeroed, also after a skipped step

From take on it goes bucket by bucket, the last bucket first, so that ZeRO-1's gather can start early. With
overlap_optim_step a bucket is stepped while others are still reduced; then there is no norm before the step, hence no
clipping and no check. parallel/contract.py says what a source does.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint.named import Piece
from optimizer import adamw_triton, muon
from optimizer.adamw import adamw_step, within_range
from optimizer.clip import clip_factor
from optimizer.config import AdamWConfig, MuonConfig
from optimizer.param_groups import ParamGroups, Role
from parallel.buffer import ParameterSlice
from parallel.contract import GradientSource, StepResult


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


class _Work(NamedTuple):
    """A slice to step."""

    state: _State
    grad: Tensor
    """1-D view of its gradients."""

    @property
    def piece(self) -> ParameterSlice:
        return self.state.piece


def _multiplied_together(works: Sequence[_Work]) -> Iterable[list[int]]:
    """Places in `works` of Muon's matrices of one shape, in bfloat16 on a CPU. Elsewhere each by itself: its bits would
    depend on the others that are multiplied with it, so a run on the size of its buckets."""
    groups: dict[object, list[int]] = {}
    for place, work in enumerate(works):
        piece = work.state.piece
        at_once = piece.param.dtype == torch.bfloat16 and not piece.param.is_cuda
        groups.setdefault(piece.shape if at_once else piece.name, []).append(place)
    return groups.values()


@dataclass
class _OverlappedStep:
    lr: float
    squares: list[Tensor] = field(default_factory=list)
    unreleased: list[int] = field(default_factory=list)


class MixedPrecisionOptimizer:
    """AdamW, and on request Muon, over flat slices.

    Args:
        gradients: what to step, and with which gradients: of any dtype; float32 ones are used in place.
        grad_clip: largest global norm, 0 for none.
        scaler: the loss scale that gradients carry.
        kernel: "torch" (its fused AdamW) or "triton" (adamw_triton.py: gradients of any dtype and low-precision weights
            in the same pass); see `choose_kernel`.
        muon: step the matrices of the blocks by Muon; None: AdamW steps all.
        roles: parameter name -> its role, which says whether it decays and whether Muon may step it; None: by name and
            shape, see param_groups.py.
    """

    def __init__(
        self,
        gradients: GradientSource,
        config: AdamWConfig,
        grad_clip: float,
        scaler: LossScaler,
        kernel: str = "torch",
        muon: MuonConfig | None = None,
        roles: Mapping[str, Role] | None = None,
    ):
        self.groups = ParamGroups(roles)
        self.gradients, self.kernel, self.muon = gradients, kernel, muon
        self.config, self.grad_clip, self.scaler = config, grad_clip, scaler
        self.num_steps = 0
        self._buckets = [
            [_State.of(piece, muon is not None and self.groups.is_hidden(piece)) for piece in bucket]
            for bucket in gradients.slices
        ]
        self._overlapped: _OverlappedStep | None = None

    @torch.no_grad()
    def step(self, lr: float, after_bucket: Callable[[int], None] | None = None) -> StepResult:
        """Step with learning rate `lr`; all ranks return the same. The gradients are zero afterwards.

        Args:
            after_bucket: called with each bucket's number once it is stepped, the last bucket first.
        """
        order = range(len(self._buckets))
        grad_norm = self._norm([self.gradients.sum_of_squares(bucket) for bucket in order])
        factor = clip_factor(grad_norm, self.grad_clip)
        if not can_be_stepped_with(grad_norm, self._scale, factor):
            for bucket in order:
                self.gradients.release(bucket)
            self.scaler.update(overflowed=True)
            return StepResult(grad_norm, skipped=True)
        self.num_steps += 1
        for bucket in reversed(order):
            is_zero = self._step_bucket(bucket, lr, self._scale / factor)
            if after_bucket is not None:
                after_bucket(bucket)
            if not is_zero:
                self.gradients.release(bucket)
        self.scaler.update(overflowed=False)
        return StepResult(grad_norm, skipped=False)

    def begin_overlapped_step(self, lr: float) -> None:
        """From here on `step_bucket` may be called, for each bucket once, in any thread; then `end_overlapped_step`."""
        if self.grad_clip or self.scaler.enabled:
            raise ValueError("a step that overlaps with the reduction can neither clip nor be skipped (fp16)")
        self.num_steps += 1
        self._overlapped = _OverlappedStep(lr)

    @torch.no_grad()
    def step_bucket(self, bucket: int, release: bool = False) -> None:
        """Step one bucket, whose gradients are summed, while others still are not.

        Args:
            release: zero its gradients right away; otherwise `end_overlapped_step` does.
        """
        step = self._begun()
        step.squares.append(self.gradients.sum_of_squares(bucket))
        # Not in the kernel, unless asked: names of non-finite gradients are looked for once all buckets are reduced.
        is_zero = self._step_bucket(bucket, step.lr, 1.0, zero=release)
        if release and not is_zero:
            self.gradients.release(bucket)
        elif not is_zero:
            step.unreleased.append(bucket)

    @torch.no_grad()
    def end_overlapped_step(self) -> StepResult:
        """All buckets are stepped.

        Raises:
            FloatingPointError: the gradients were not finite, or too large for float32; the weights are lost.
        """
        step = self._begun()
        grad_norm = self._norm(step.squares)
        for bucket in step.unreleased:
            self.gradients.release(bucket)
        self._overlapped = None
        if not can_be_stepped_with(grad_norm, 1.0, 1.0):
            raise FloatingPointError(
                "non-finite gradients, and --overlap_optim_step had already stepped with them: resume from the last "
                "checkpoint, without that flag if it happens again"
            )
        return StepResult(grad_norm, skipped=False)

    def _begun(self) -> _OverlappedStep:
        assert self._overlapped is not None, "begin_overlapped_step comes first"
        return self._overlapped

    @property
    def _scale(self) -> float:
        """What the gradients that are taken are multiplied by."""
        return self.scaler.scale if self.gradients.keeps_scale else 1.0

    def _norm(self, squares: list[Tensor]) -> float:
        """The global norm of the unscaled gradients; infinite if anything is not finite."""
        total = self.gradients.over_ranks(torch.as_tensor(sum(squares), dtype=torch.float64).cpu()).item()
        return math.sqrt(total) / self._scale if math.isfinite(total) else math.inf

    def _step_bucket(self, bucket: int, lr: float, grad_divisor: float, zero: bool = True) -> bool:
        """Returns whether that has also zeroed the bucket, which it may with `zero`."""
        works = [_Work(*pair) for pair in zip(self._buckets[bucket], self.gradients.take(bucket))]
        by_adamw = [work for work in works if work.state.exp_avg_sq is not None]
        by_muon = [work for work in works if work.state.exp_avg_sq is None]
        # At no cost in that kernel's pass; Muon's gradients are still needed.
        zero = zero and self.kernel == "triton" and self.gradients.is_zeroed_by_step
        decaying = [work for work in by_adamw if self.groups.decays(work.piece)]
        others = [work for work in by_adamw if not self.groups.decays(work.piece)]
        for group, weight_decay in ((decaying, self.config.weight_decay), (others, 0.0)):
            if self.kernel == "triton":
                self._step_in_one_pass(group, lr, weight_decay, grad_divisor, zero)
            else:
                self._step_in_passes(group, lr, weight_decay, grad_divisor)
        if self.muon is not None:
            self._step_matrices(bucket, by_muon, lr * self.muon.muon_lr_ratio, grad_divisor, self.muon)
        return zero and not by_muon

    def needs_gather(self, bucket: int) -> bool:
        """Whether all ranks together step something of a bucket by Muon, which needs whole matrices."""
        return self.muon is not None and any(map(self.groups.is_hidden, self.gradients.parameters(bucket)))

    def _step_in_passes(self, works: list[_Work], lr: float, weight_decay: float, grad_divisor: float) -> None:
        states = [work.state for work in works]
        adamw_step(
            [state.main for state in states], [work.grad.float() for work in works],
            [state.exp_avg for state in states], [_second(state) for state in states],
            self.num_steps, lr, weight_decay, grad_divisor, self.config,
        )  # fmt: skip
        for state in states:
            state.write_weights()

    def _step_in_one_pass(
        self, works: list[_Work], lr: float, weight_decay: float, grad_divisor: float, zero_grad: bool
    ) -> None:
        for state, grad in works:
            weights = state.piece.param if state.main is not state.piece.param else None
            adamw_triton.adamw_flat_step(
                state.main, state.exp_avg, _second(state), grad, weights, self.num_steps, lr, weight_decay,
                grad_divisor, self.config, zero_grad,
            )  # fmt: skip

    def _step_matrices(
        self, bucket: int, works: list[_Work], lr: float, grad_divisor: float, config: MuonConfig
    ) -> None:
        """By Muon. Shards of a matrix are updated each by its rank up to the point where all of it is needed."""
        if not self.needs_gather(bucket):
            return
        for state, grad in works:
            muon.look_ahead(state.exp_avg, grad, config.muon_momentum, grad_divisor)
        whole = dict(zip((state.piece.name for state in self._buckets[bucket]), self.gradients.gather(bucket)))
        for group in _multiplied_together(works):
            states = [works[place].state for place in group]
            shape, weights = states[0].piece.shape, states[0].piece.param
            gradients = torch.stack([muon.ahead_in(whole[state.piece.name]).view(shape) for state in states])
            # float32 weights on a CPU: it may not be quick at bfloat16.
            quick = weights.is_cuda or weights.dtype == torch.bfloat16
            updates = muon.orthogonalize(
                gradients, config.muon_iterations, torch.bfloat16 if quick else torch.float32
            ).flatten(1)
            for state, update in zip(states, updates):
                piece = state.piece
                own = update[piece.offset : piece.offset + len(piece.param)]
                state.main.mul_(1.0 - lr * self.config.weight_decay)
                state.main.sub_(own.float(), alpha=muon.step_size(shape, lr))
                state.write_weights()

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


def _second(state: _State) -> Tensor:
    """AdamW's mean square."""
    assert state.exp_avg_sq is not None, state.piece.name
    return state.exp_avg_sq
