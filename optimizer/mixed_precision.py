"""The optimizer of the training loop: float32 main parameters with weights of any dtype.

A step on the slices of a gradient source (all parameters, or with ZeRO-1 this rank's shards):

    norm      global norm of the gradients, in float64
    check     if the norm is not finite, or too large for float32, every rank skips the step and keeps all its state
    take      the source hands over a bucket's summed gradients
    step      the optimizer's rule (rule.py) on the float32 main parameters, with the gradients divided by
              loss scale / clipping factor
    copy      main parameters -> the model's weights, if those are bf16 or fp16
    release   the bucket is zeroed, also after a skipped step

From take on, the step goes bucket by bucket, the last bucket first, so that ZeRO-1's gather can start early. With
overlap_optim_step, a bucket is stepped while others are still being reduced; there is then no norm before the step, and
so no clipping and no check. parallel/contract.py describes the source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from checkpoint.named import Piece
from optimizer import triton_launch
from optimizer.clip import clip_factor
from optimizer.rule import Rule, SliceState, Step, Work
from parallel.buffer import ParameterSlice
from parallel.contract import GradientSource, Named, StepResult


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch dtype for --dtype; "auto" means bfloat16 if the hardware can multiply it, otherwise float32.

    Raises:
        ValueError: bfloat16 is requested, but this GPU lacks it.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bfloat16" and not has_bf16:
            raise ValueError("this GPU has no bfloat16: use --dtype=float16")
    else:
        # Private names of torch: without them the answer is float32, which is always right.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has_bf16 = any(hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)() for probe in probes)
    if name == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, name)


def choose_kernel(kernels: str, wanted: str, device: torch.device) -> str:
    """Kernel for the optimizer's step, from --kernels and --adamw_kernel.

    Raises:
        ValueError: Triton is requested but not available.
    """
    reason = triton_launch.unavailable_reason(device)
    needs_triton = wanted == "triton" or (not wanted and kernels == "triton")
    if needs_triton and reason:
        raise ValueError(f"--{'adamw_kernel' if wanted else 'kernels'}=triton cannot be used: {reason}")
    if wanted:
        return wanted
    return "torch" if kernels == "reference" or reason else "triton"


class LossScaler:
    """Dynamic loss scale for fp16 (Micikevicius et al., 2018): halved when gradients overflow, doubled after
    `growth_interval` good steps. With enabled=False (bf16, fp32) the scale is always 1."""

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
    """Whether a step on gradients with this global norm (unscaled, before clipping) stays within float32's range.

    Sums of squares, which both AdamW and Muon compute after clipping, overflow for gradients beyond 1.8e19; the scaled
    gradients themselves, and their divisor, overflow beyond 3.4e38. An infinite moment would stay infinite for ever.
    """
    return grad_norm * scale <= 1e37 and grad_norm * clip <= 1e18 and scale <= 1e37 * clip


@dataclass
class _OverlappedStep:
    lr: float
    squares: list[Tensor] = field(default_factory=list)
    unreleased: list[int] = field(default_factory=list)


class MixedPrecisionOptimizer:
    """The step of a run, over flat slices.

    Args:
        gradients: source of the slices and of their gradients, of any dtype; float32 gradients are used in place.
        rules: see rules.py; the first rule that takes a parameter steps it. The first one's name stands in checkpoints.
        grad_clip: largest global norm; 0 for no clipping.
        scaler: the loss scale of the gradients.
    """

    def __init__(self, gradients: GradientSource, rules: Sequence[Rule], grad_clip: float, scaler: LossScaler):
        self.gradients, self.rules, self.grad_clip, self.scaler = gradients, rules, grad_clip, scaler
        self.num_steps = 0
        self._buckets = [self._new_states(bucket, pieces) for bucket, pieces in enumerate(gradients.slices)]
        self._overlapped: _OverlappedStep | None = None

    def _new_states(self, bucket: int, pieces: Sequence[ParameterSlice]) -> list[SliceState]:
        return [self._rule_of(piece).new_state(piece) for piece in pieces]

    def _rule_of(self, parameter: Named) -> Rule:
        return next(rule for rule in self.rules if rule.takes(parameter))

    @torch.no_grad()
    def step(self, lr: float, after_bucket: Callable[[int], None] | None = None) -> StepResult:
        """Step with learning rate `lr`. All ranks return the same result; the gradients are zero afterwards.

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
        self._step_all(lr, self._scale / factor, after_bucket)
        self.scaler.update(overflowed=False)
        return StepResult(grad_norm, skipped=False)

    def _step_all(self, lr: float, grad_divisor: float, after_bucket: Callable[[int], None] | None) -> None:
        """Step every bucket, the last one first, and zero its gradients."""
        for bucket in reversed(range(len(self._buckets))):
            is_zero = self._step_bucket(bucket, lr, grad_divisor)
            if after_bucket is not None:
                after_bucket(bucket)
            if not is_zero:
                self.gradients.release(bucket)

    def begin_overlapped_step(self, lr: float) -> None:
        """Begin a step: call `step_bucket` once for each bucket, from any thread, and then `end_overlapped_step`."""
        if self.grad_clip or self.scaler.enabled:
            raise ValueError("a step that overlaps with the reduction can neither clip nor be skipped (fp16)")
        self.num_steps += 1
        self._overlapped = _OverlappedStep(lr)

    @torch.no_grad()
    def step_bucket(self, bucket: int, release: bool = False) -> None:
        """Step one bucket, whose gradients are already summed, while others are not.

        Args:
            release: zero its gradients right away; otherwise `end_overlapped_step` does.
        """
        step = self._overlapped_step()
        step.squares.append(self.gradients.sum_of_squares(bucket))
        # Zero in the kernel only with `release`: non-finite gradients are named once all buckets are reduced.
        is_zero = self._step_bucket(bucket, step.lr, 1.0, zero=release)
        if release and not is_zero:
            self.gradients.release(bucket)
        elif not is_zero:
            step.unreleased.append(bucket)

    @torch.no_grad()
    def end_overlapped_step(self, before_release: Callable[[], None] | None = None) -> StepResult:
        """End the step, once all buckets are stepped.

        Args:
            before_release: called before the gradients are zeroed, as for the start of ZeRO-1's gathers.
        Raises:
            FloatingPointError: the gradients were not finite, or too large for float32; the weights are lost.
        """
        step = self._overlapped_step()
        grad_norm = self._norm(step.squares)
        if before_release is not None:
            before_release()
        for bucket in step.unreleased:
            self.gradients.release(bucket)
        self._overlapped = None
        if not can_be_stepped_with(grad_norm, 1.0, 1.0):
            raise FloatingPointError(
                "non-finite gradients, and --overlap_optim_step had already stepped with them: resume from the last "
                "checkpoint, without that flag if it happens again"
            )
        return StepResult(grad_norm, skipped=False)

    def _overlapped_step(self) -> _OverlappedStep:
        assert self._overlapped is not None, "begin_overlapped_step comes first"
        return self._overlapped

    @property
    def _scale(self) -> float:
        """Factor on the gradients that `take` returns."""
        return self.scaler.scale if self.gradients.keeps_scale else 1.0

    def _norm(self, squares: list[Tensor]) -> float:
        """Global norm of the unscaled gradients; infinite if any value is not finite."""
        total = self.gradients.over_ranks(torch.as_tensor(sum(squares), dtype=torch.float64).cpu()).item()
        return math.sqrt(total) / self._scale if math.isfinite(total) else math.inf

    def _step_bucket(self, bucket: int, lr: float, grad_divisor: float, zero: bool = True) -> bool:
        """Step a bucket; may zero its gradients if `zero`. Returns whether it has zeroed them all."""
        zero = zero and self.gradients.is_zeroed_by_step
        step = Step(self.num_steps, lr, grad_divisor, zero)
        return self._step_slices(bucket, self.gradients.take(bucket), step)

    def _step_slices(self, bucket: int, gradients: Sequence[Tensor], step: Step) -> bool:
        """Step a bucket's slices; returns whether all gradients are zeroed."""
        works: dict[Rule, list[Work]] = {rule: [] for rule in self._rules_of(bucket)}
        for state, grad in zip(self._buckets[bucket], gradients):
            works[self._rule_of(state.piece)].append(Work(state, grad))
        is_zero = step.zero_grad
        for rule, its_works in works.items():
            is_zero = rule.step(its_works, step, partial(self._gather, bucket)) and is_zero
        return is_zero

    def _rules_of(self, bucket: int) -> list[Rule]:
        """Rules that step parameters of a bucket, on any rank, in one order."""
        its_rules = {self._rule_of(parameter) for parameter in self.gradients.parameters(bucket)}
        return [rule for rule in self.rules if rule in its_rules]

    def _gather(self, bucket: int) -> dict[str, Tensor]:
        return {state.piece.name: whole for state, whole in zip(self._buckets[bucket], self.gradients.gather(bucket))}

    def needs_gather(self, bucket: int) -> bool:
        """Whether any rank steps part of a bucket by a rule that needs whole gradients."""
        return any(rule.needs_whole_gradients for rule in self._rules_of(bucket))

    def named_state(self) -> list[tuple[Piece, dict[str, Tensor]]]:
        """Each slice with its main parameters ("main") and what its rule keeps: flat views."""
        return [
            named for bucket in self._buckets for state in bucket
            for named in self._rule_of(state.piece).named_state(state)
        ]  # fmt: skip

    @torch.no_grad()
    def weights_from_main(self) -> None:
        """Set the model's weights from the main parameters, once those are loaded."""
        for bucket in self._buckets:
            for state in bucket:
                state.write_weights()

    def scalar_state(self) -> dict:
        return {"name": self.rules[0].name, "num_steps": self.num_steps, "scaler": self.scaler.state_dict()}

    def load_scalar_state(self, state: dict) -> None:
        self.num_steps = state["num_steps"]
        self.scaler.load_state_dict(state["scaler"])
