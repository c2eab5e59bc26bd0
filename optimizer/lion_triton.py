"""Lion on flat tensors in one launch each: the step of optimizer/lion.py in a single pass, which also converts the
gradient to float32, writes the model's weights and zeroes the gradient.

Both means of gradient and m are computed in float64, and p and m are rounded once each. Memory traffic, bytes a
parameter: 16 for main parameter and m, the gradient's 2 or 4 (twice that if it is zeroed), 2 for bfloat16 weights.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from optimizer import triton_launch
from optimizer.config import LionConfig
from optimizer.triton_launch import constexpr, write_main

tl: Any = None
"""triton.language once the kernel is loaded."""

BLOCK, NUM_WARPS = 1024, 4
"""Eight elements a thread: two 16-byte float32 loads per tensor."""


def _lion_kernel(
    main_ptr, exp_avg_ptr, grad_ptr, weights_ptr, numel,
    grad_factor: "fp64", one_minus_beta1: "fp64", one_minus_beta2: "fp64",  # type: ignore[name-defined]  # noqa: F821
    decay, lr, WRITE_WEIGHTS: constexpr, ZERO_GRAD: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One Lion step; BLOCK elements per program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32).to(tl.float64) * grad_factor
    main = tl.load(main_ptr + offsets, mask=inside, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    ahead = exp_avg + one_minus_beta1 * (grad - exp_avg)
    update = tl.where(ahead > 0.0, lr, tl.where(ahead < 0.0, -lr, 0.0))
    main -= decay * main + update
    tl.store(exp_avg_ptr + offsets, (exp_avg + one_minus_beta2 * (grad - exp_avg)).to(tl.float32), mask=inside)
    write_main(main, main_ptr, grad_ptr, weights_ptr, offsets, inside, WRITE_WEIGHTS, ZERO_GRAD)


@cache
def load_kernels() -> dict[str, Any]:
    return triton_launch.compiled(write_main, _lion_kernel)


@torch.no_grad()
def lion_flat_step(
    main: Tensor, exp_avg: Tensor, grad: Tensor, weights: Tensor | None, lr: float, weight_decay: float,
    grad_divisor: float, config: LionConfig, zero_grad: bool = False,
) -> None:  # fmt: skip
    """One step, in place, on contiguous tensors of n elements on one CUDA device.

    Args:
        main, exp_avg: float32.
        grad: float32, bfloat16 or float16; read, and zeroed if `zero_grad`.
        weights: low-precision copy of `main` to write; None: there is none.
        grad_divisor: divisor of the gradients (loss scale over clipping factor).
    """
    tensors = {"main": main, "exp_avg": exp_avg, "grad": grad, "weights": weights}
    triton_launch.check(tensors, float32=("main", "exp_avg"))
    if main.numel() == 0:
        return
    load_kernels()["_lion_kernel"][(-(-main.numel() // BLOCK),)](
        main, exp_avg, grad, weights, main.numel(), 1.0 / grad_divisor, 1 - config.lion_beta1, 1 - config.lion_beta2,
        lr * weight_decay, lr, WRITE_WEIGHTS=weights is not None, ZERO_GRAD=zero_grad, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
