"""AdamW (Loshchilov and Hutter, 2019) on lists of flat float32 tensors.

m <- b1 m + (1 - b1) g          p <- p - lr wd p
v <- b2 v + (1 - b2) g^2        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from optimizer import adamw_triton
from optimizer.config import AdamWConfig
from optimizer.param_groups import ParamGroups
from optimizer.rule import Gather, Rule, Step, Work, chunk_size, within_range
from parallel.buffer import ParameterSlice


def adamw_reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float, weight_decay: float,
    config: AdamWConfig,
) -> None:  # fmt: skip
    """The plain formula, in place, for one tensor; `step` counts from 1. Tests compare the fused step with it."""
    exp_avg.mul_(config.beta1).add_(grad, alpha=1 - config.beta1)
    exp_avg_sq.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
    corrected_avg = exp_avg / (1 - config.beta1**step)
    corrected_sq = exp_avg_sq / (1 - config.beta2**step)
    param.mul_(1 - lr * weight_decay).sub_(lr * corrected_avg / (corrected_sq.sqrt() + config.adam_eps))


@torch.no_grad()
def adamw_flat_reference(
    main: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, weights: Tensor | None, step: int, lr: float,
    weight_decay: float, grad_divisor: float, config: AdamWConfig, zero_grad: bool = False,
) -> None:  # fmt: skip
    """The definition, in place; arguments as in `adamw_triton.adamw_flat_step`."""
    adamw_reference(main, grad.to(main.dtype) / grad_divisor, exp_avg, exp_avg_sq, step, lr, weight_decay, config)
    if weights is not None:
        weights.copy_(within_range(main, weights.dtype))
    if zero_grad:
        grad.zero_()


@torch.no_grad()
def adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: int, lr: float,
    weight_decay: float, grad_divisor: float, config: AdamWConfig,
) -> None:  # fmt: skip
    """One step with torch's fused kernel, in place, on flat float32 tensors of one device.

    Args:
        step: number of this step, from 1.
        grad_divisor: divisor of the gradients (loss scale over clipping factor). The kernel divides first, and writes
            the quotient back into `grads`.
    """
    if not params:
        return
    # Scalars are filled in on the device, as copying them there would wait for it.
    device = params[0].device
    torch_adamw(
        params, grads, exp_avgs, exp_avg_sqs, [],
        # The kernel itself adds 1 to each tensor's step.
        list(torch.full((len(params),), float(step - 1), device=device).unbind()),
        fused=True,
        grad_scale=torch.full((), grad_divisor, dtype=torch.float32, device=device),
        found_inf=torch.zeros((), dtype=torch.float32, device=device),
        amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=lr, weight_decay=weight_decay, eps=config.adam_eps,
        maximize=False,
    )  # fmt: skip


class AdamW(Rule):
    """AdamW for any slice. State: "exp_avg" (m) and "exp_avg_sq" (v), float32.

    Args:
        kernel: "torch" (its fused step) or "triton" (adamw_triton.py: gradients of any dtype, low-precision weights
            and the zeroing of gradients in the same pass).
    """

    name = "adamw"

    def __init__(self, config: AdamWConfig, groups: ParamGroups | None = None, kernel: str = "torch"):
        super().__init__(config.weight_decay, groups)
        self.config, self.kernel = config, kernel

    def new_tensors(self, piece: ParameterSlice, main: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}

    def step(self, works: Sequence[Work], step: Step, gather: Gather) -> bool:
        for decays in (True, False):
            group = [work for work in works if self.groups.decays(work.state.piece) == decays]
            weight_decay = self.weight_decay if decays else 0.0
            if self.kernel == "triton":
                self._step_in_one_pass(group, step, weight_decay)
            else:
                self._step_in_passes(group, step, weight_decay)
        return step.zero_grad and self.kernel == "triton"

    def _step_in_passes(self, works: Sequence[Work], step: Step, weight_decay: float) -> None:
        tensors = [(state.main, grad, state.tensors["exp_avg"], state.tensors["exp_avg_sq"]) for state, grad in works]
        if all(grad.dtype == torch.float32 for _, grad in works):
            self._step_at_once(tensors, step, weight_decay)
        else:
            # A float32 copy of 16-bit gradients lives for a chunk.
            for its_tensors in tensors:
                size = chunk_size(its_tensors[0].device)
                for main, grad, *moments in zip(*(tensor.split(size) for tensor in its_tensors)):
                    self._step_at_once([(main, self.scratch.as_float32(grad), *moments)], step, weight_decay)
        for state, _ in works:
            state.write_weights()

    def _step_at_once(self, tensors: Sequence[tuple[Tensor, ...]], step: Step, weight_decay: float) -> None:
        """
        Args:
            tensors: main parameters, gradients and moments of each slice.
        """
        params, grads, exp_avgs, exp_avg_sqs = ([its_tensors[i] for its_tensors in tensors] for i in range(4))
        adamw_step(
            params, grads, exp_avgs, exp_avg_sqs, step.number, step.lr, weight_decay, step.grad_divisor, self.config
        )

    def _step_in_one_pass(self, works: Sequence[Work], step: Step, weight_decay: float) -> None:
        for state, grad in works:
            adamw_triton.adamw_flat_step(
                state.main, state.tensors["exp_avg"], state.tensors["exp_avg_sq"], grad, state.weights, step.number,
                step.lr, weight_decay, step.grad_divisor, self.config, step.zero_grad,
            )  # fmt: skip
