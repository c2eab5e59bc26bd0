"""AdamW with both moments in 8 bits (blockwise.py): 6 bytes a parameter with main parameters, compared with AdamW's 12.

A step reads the moments, steps as adamw.py does in float32, and writes the moments back (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", ICLR 2022). Rates, decay and betas are AdamW's.
"""

from torch import Tensor

from optimizer import blockwise_triton
from optimizer.adamw import adamw_step
from optimizer.blockwise import BlockwiseRule
from optimizer.config import AdamWConfig
from optimizer.param_groups import ParamGroups
from optimizer.rule import Step, Work


class AdamW8bit(BlockwiseRule):
    """AdamW for large parameters; adamw.py steps the others."""

    name = "adamw8bit"
    signs = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(self, config: AdamWConfig, groups: ParamGroups | None = None, kernel: str = "torch"):
        super().__init__(config.weight_decay, groups, kernel)
        self.config = config

    def step_chunk(self, main: Tensor, grad: Tensor, values: list[Tensor], step: Step, weight_decay: float) -> None:
        exp_avg, exp_avg_sq = values
        adamw_step(
            [main], [grad], [exp_avg], [exp_avg_sq], step.number, step.lr, weight_decay, step.grad_divisor, self.config
        )

    def step_in_one_pass(self, work: Work, step: Step) -> None:
        state = work.state
        blockwise_triton.adamw8bit_flat_step(
            state.main, self.quantized(state, "exp_avg"), self.quantized(state, "exp_avg_sq"), work.grad,
            state.weights, step.number, step.lr, self.decay_of(state.piece), step.grad_divisor, self.config,
            step.zero_grad,
        )  # fmt: skip
