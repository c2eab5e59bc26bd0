"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023): every weight moves by the learning rate,
in the direction of a mean of its gradients.

    u <- sign(b1 m + (1 - b1) g)        p <- p - lr wd p
    m <- b2 m + (1 - b2) g              p <- p - lr u

One state tensor instead of AdamW's two: 8 bytes a parameter with main parameters, compared with 12. All elements of u
have size 1, which is larger than AdamW's usual step: Lion takes a learning rate 3 to 10 times smaller, and a weight
decay larger by the same factor, since decay acts by their product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizer import lion_triton
from optimizer.config import LionConfig
from optimizer.param_groups import ParamGroups
from optimizer.rule import Gather, Rule, Step, Work, chunk_size, within_range
from parallel.buffer import ParameterSlice


def lion_reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, lr: float, weight_decay: float, config: LionConfig
) -> None:
    """The plain formula, in place, for one tensor."""
    update = (config.lion_beta1 * exp_avg + (1 - config.lion_beta1) * grad).sign()
    exp_avg.mul_(config.lion_beta2).add_(grad, alpha=1 - config.lion_beta2)
    param.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


def lion_flat_reference(
    main: Tensor, exp_avg: Tensor, grad: Tensor, weights: Tensor | None, lr: float, weight_decay: float,
    grad_divisor: float, config: LionConfig, zero_grad: bool = False,
) -> None:  # fmt: skip
    """The definition, in place; arguments as in `lion_triton.lion_flat_step`."""
    lion_reference(main, grad.to(main.dtype) / grad_divisor, exp_avg, lr, weight_decay, config)
    if weights is not None:
        weights.copy_(within_range(main, weights.dtype))
    if zero_grad:
        grad.zero_()


def lion_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, update: Tensor, lr: float, weight_decay: float, grad_divisor: float,
    config: LionConfig,
) -> None:  # fmt: skip
    """One step, in place, on flat float32 tensors, without other memory than `update`, whose contents are lost, as are
    those of `grad`."""
    grad.div_(grad_divisor)
    torch.lerp(exp_avg, grad, 1 - config.lion_beta1, out=update).sign_()
    exp_avg.lerp_(grad, 1 - config.lion_beta2)
    param.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


class Lion(Rule):
    """Lion for any slice. State: "exp_avg" (m), float32.

    Args:
        kernel: "torch" (passes over chunks) or "triton" (lion_triton.py: gradients of any dtype, low-precision weights
            and the zeroing of gradients in one pass).
    """

    name = "lion"

    def __init__(
        self, config: LionConfig, weight_decay: float, groups: ParamGroups | None = None, kernel: str = "torch"
    ):
        super().__init__(weight_decay, groups)
        self.config, self.kernel = config, kernel

    def new_tensors(self, piece: ParameterSlice, main: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(main)}

    def step(self, works: Sequence[Work], step: Step, gather: Gather) -> bool:
        for work in works:
            if self.kernel == "triton":
                self._step_in_one_pass(work, step)
            else:
                self._step_in_passes(work, step)
        return step.zero_grad and self.kernel == "triton"

    def _step_in_passes(self, work: Work, step: Step) -> None:
        state, size, decay = work.state, chunk_size(work.grad.device), self.decay_of(work.state.piece)
        for main, grad, exp_avg in zip(
            state.main.split(size), work.grad.split(size), state.tensors["exp_avg"].split(size)
        ):
            update = self.scratch.take("update", main.device)[: len(main)]
            lion_step(
                main, self.scratch.as_float32(grad), exp_avg, update, step.lr, decay, step.grad_divisor, self.config
            )
        state.write_weights()

    def _step_in_one_pass(self, work: Work, step: Step) -> None:
        state = work.state
        lion_triton.lion_flat_step(
            state.main, state.tensors["exp_avg"], work.grad, state.weights, step.lr, self.decay_of(state.piece),
            step.grad_divisor, self.config, step.zero_grad,
        )  # fmt: skip
