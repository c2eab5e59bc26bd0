"""The optimizer of the training loop: float32 main parameters under weights of any dtype.

A step, on the slices it was handed (all of them, or under ZeRO-1 the ones this rank owns):

    norm     global norm of the gradients, float64, over all ranks if the slices are shards
    check    a non-finite norm: every rank skips the step and all state stays as it was
    step     AdamW on the float32 main parameters, gradients divided by loss scale / clipping factor on the way
    copy     main parameters -> the model's weights, where those are bf16 or fp16
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer.adamw import AdamWConfig, adamw_step
from optimizer.clip import clip_factor, sum_of_squares
from optimizer.param_groups import split_by_decay
from parallel.buffer import ParameterSlice


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


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """Global norm of the unscaled gradients before clipping; not finite if they overflowed."""
    skipped: bool


_STATES = ("main", "exp_avg", "exp_avg_sq")


class MixedPrecisionOptimizer:
    """AdamW over flat slices.

    Args:
        slices: what to step. Gradients may have any dtype; float32 ones are used in place.
        config: AdamW's constants.
        grad_clip: largest global norm, 0 for none.
        scaler: the loss scale that gradients carry.
        sum_over_ranks: adds a float64 scalar over all ranks if the slices are this rank's shards; None if every rank
            holds them all.
    """

    def __init__(
        self,
        slices: Sequence[ParameterSlice],
        config: AdamWConfig,
        grad_clip: float,
        scaler: LossScaler,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ):
        self.slices, self.config, self.grad_clip, self.scaler = list(slices), config, grad_clip, scaler
        self.sum_over_ranks = sum_over_ranks
        self.num_steps = 0
        # float32 weights are their own main parameters
        self.main = [s.param if s.param.dtype == torch.float32 else s.param.float() for s in self.slices]
        self.exp_avg = [torch.zeros_like(main) for main in self.main]
        self.exp_avg_sq = [torch.zeros_like(main) for main in self.main]

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Step with learning rate `lr`; all ranks return the same."""
        squares = sum_of_squares(s.grad for s in self.slices).cpu()
        if self.sum_over_ranks is not None:
            squares = self.sum_over_ranks(squares)
        grad_norm = math.sqrt(squares.item()) / self.scaler.scale if math.isfinite(squares.item()) else math.inf
        if not math.isfinite(grad_norm):
            self.scaler.update(overflowed=True)
            return StepResult(grad_norm, skipped=True)

        self.num_steps += 1
        grads = [s.grad.float() for s in self.slices]
        grad_divisor = self.scaler.scale / clip_factor(grad_norm, self.grad_clip)
        columns = [split_by_decay(self.slices, c) for c in (self.main, grads, self.exp_avg, self.exp_avg_sq)]
        for group, weight_decay in ((0, self.config.weight_decay), (1, 0.0)):
            adamw_step(*(c[group] for c in columns), self.num_steps, lr, weight_decay, grad_divisor, self.config)
        self.weights_from_main()
        self.scaler.update(overflowed=False)
        return StepResult(grad_norm, skipped=False)

    def named_state(self) -> list[tuple[str, int, dict[str, Tensor]]]:
        """(parameter name, offset in it, {"main", "exp_avg", "exp_avg_sq"}) of each slice, flat float32 views."""
        return [
            (piece.name, piece.offset, dict(zip(_STATES, tensors)))
            for piece, *tensors in zip(self.slices, self.main, self.exp_avg, self.exp_avg_sq)
        ]

    @torch.no_grad()
    def weights_from_main(self) -> None:
        """Set the model's weights from the main parameters: after a step, or after those were loaded."""
        for piece, main in zip(self.slices, self.main):
            if main is not piece.param:
                piece.param.copy_(main)

    def scalar_state(self) -> dict:
        return {"num_steps": self.num_steps, "scaler": self.scaler.state_dict()}

    def load_scalar_state(self, state: dict) -> None:
        self.num_steps = state["num_steps"]
        self.scaler.load_state_dict(state["scaler"])
