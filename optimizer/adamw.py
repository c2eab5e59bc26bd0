"""AdamW (Loshchilov and Hutter, 2019) on lists of flat float32 tensors.

m <- b1 m + (1 - b1) g          p <- p - lr wd p
v <- b2 v + (1 - b2) g^2        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from optimizer.config import AdamWConfig


def within_range(main: Tensor, dtype: torch.dtype) -> Tensor:
    """Main parameters, clamped for rounding to weights of `dtype`: values beyond float16's range become its largest
    number, as an infinite weight would spoil every activation. The main parameters themselves do not change."""
    largest = torch.finfo(torch.float16).max
    return main.clamp(-largest, largest) if dtype == torch.float16 else main


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
