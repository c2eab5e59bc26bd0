"""Lion with its mean in 8 bits (blockwise.py): 5 bytes a parameter with main parameters, compared with AdamW's 12.

A step reads the mean, steps as lion.py does in float32, and writes the mean back. Only the sign of a mean of mean and
gradient moves a weight, so the rounding of the mean matters where the two nearly cancel.
"""

from torch import Tensor

from optimizer import blockwise_triton
from optimizer.blockwise import BlockwiseRule
from optimizer.config import LionConfig
from optimizer.lion import lion_step
from optimizer.param_groups import ParamGroups
from optimizer.rule import Step, Work


class Lion8bit(BlockwiseRule):
    """Lion for large parameters; lion.py steps the others."""

    name = "lion8bit"
    signs = {"exp_avg": True}

    def __init__(
        self, config: LionConfig, weight_decay: float, groups: ParamGroups | None = None, kernel: str = "torch"
    ):
        super().__init__(weight_decay, groups, kernel)
        self.config = config

    def step_chunk(self, main: Tensor, grad: Tensor, values: list[Tensor], step: Step, weight_decay: float) -> None:
        update = self.scratch.take("update", main.device)[: len(main)]
        lion_step(main, grad, values[0], update, step.lr, weight_decay, step.grad_divisor, self.config)

    def step_in_one_pass(self, work: Work, step: Step) -> None:
        state = work.state
        blockwise_triton.lion8bit_flat_step(
            state.main, self.quantized(state, "exp_avg"), work.grad, state.weights, step.lr,
            self.decay_of(state.piece), step.grad_divisor, self.config, step.zero_grad,
        )  # fmt: skip
