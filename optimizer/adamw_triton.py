"""AdamW (Loshchilov and Hutter, 2019) on flat tensors, with one launch per tensor, and the gradient's sum of squares.

    g <- g / grad_divisor       m <- m + (1 - b1) (g - m)
                                v <- v + (1 - b2) (g^2 - v)
                                p <- p - (lr wd p + (lr / c1) m / (sqrt(v) / sqrt(c2) + eps))

with c1 = 1 - b1^t and c2 = 1 - b2^t. This is optimizer/adamw.py's step in a single pass, which also converts the
gradient to float32, writes the model's weights and zeroes the gradient. Constants that depend on the step are computed
in float64 and rounded once; square root and division are rounded correctly. A step rounds p, m and v once each: the
moments are computed in float64 (about ten such operations for 30 bytes of memory traffic: by count, free on every GPU),
and the terms to subtract from p are added first. torch's fused AdamW rounds p twice, after the decay and after the
update.

Memory traffic, bytes a parameter: 24 for main parameter and moments, the gradient's 2 or 4 (twice that if it is
zeroed), 2 for bfloat16 weights.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optimizer import triton_launch
from optimizer.config import AdamWConfig
from optimizer.triton_launch import constexpr, write_main

tl: Any = None
"""triton.language once the kernels are loaded."""


BLOCK, NUM_WARPS = 1024, 4
"""Eight elements a thread: two 16-byte float32 loads per tensor."""
SQUARES_BLOCK, SQUARES_PROGRAMS = 2048, 1024
"""Block size, and largest number of programs, each of which adds up its blocks. Equal on every GPU, for equal bits."""


# The three kernels: plain Python functions until `load_kernels` passes them to Triton.


def _adamw_kernel(
    main_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, weights_ptr, numel,
    grad_factor: "fp64", one_minus_beta1: "fp64", one_minus_beta2: "fp64",  # type: ignore[name-defined]  # noqa: F821
    decay, step_size, sqrt_correction2, eps, WRITE_WEIGHTS: constexpr, ZERO_GRAD: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One AdamW step; BLOCK elements per program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    main = tl.load(main_ptr + offsets, mask=inside, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
    wide_grad = grad.to(tl.float64) * grad_factor
    wide_avg, wide_avg_sq = exp_avg.to(tl.float64), exp_avg_sq.to(tl.float64)
    exp_avg = (wide_avg + one_minus_beta1 * (wide_grad - wide_avg)).to(tl.float32)
    exp_avg_sq = (wide_avg_sq + one_minus_beta2 * (wide_grad * wide_grad - wide_avg_sq)).to(tl.float32)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), sqrt_correction2) + eps
    main -= decay * main + tl.div_rn(step_size * exp_avg, denominator)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=inside)
    write_main(main, main_ptr, grad_ptr, weights_ptr, offsets, inside, WRITE_WEIGHTS, ZERO_GRAD)


def _sum_of_squares_kernel(x_ptr, partial_ptr, numel, BLOCK: constexpr):
    """Partial sums in float64: each of P programs adds up every P-th block."""
    program, step = tl.program_id(0), tl.num_programs(0).to(tl.int64) * BLOCK
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in tl.range(program.to(tl.int64) * BLOCK, numel, step):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float64)
        sums += x * x
    tl.store(partial_ptr + program, tl.sum(sums, 0))


def _sum_kernel(partial_ptr, total_ptr, count, BLOCK: constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(total_ptr, tl.sum(tl.load(partial_ptr + offsets, mask=offsets < count, other=0.0), 0))


@cache
def load_kernels() -> dict[str, Any]:
    return triton_launch.compiled(write_main, _adamw_kernel, _sum_of_squares_kernel, _sum_kernel)


@torch.no_grad()
def adamw_flat_step(
    main: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, weights: Tensor | None, step: int, lr: float,
    weight_decay: float, grad_divisor: float, config: AdamWConfig, zero_grad: bool = False,
) -> None:  # fmt: skip
    """One step, in place, on contiguous tensors of n elements on one CUDA device.

    Args:
        main, exp_avg, exp_avg_sq: float32.
        grad: float32, bfloat16 or float16; read, and zeroed if `zero_grad`. The quotient is not written back.
        weights: low-precision copy of `main` to write; None: there is none.
        step: number of this step, from 1.
        grad_divisor: divisor of the gradients (loss scale over clipping factor).
    """
    tensors = {"main": main, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad, "weights": weights}
    triton_launch.check(tensors, float32=("main", "exp_avg", "exp_avg_sq"))
    if main.numel() == 0:
        return
    load_kernels()["_adamw_kernel"][(-(-main.numel() // BLOCK),)](
        main, exp_avg, exp_avg_sq, grad, weights, main.numel(), 1.0 / grad_divisor, 1 - config.beta1, 1 - config.beta2,
        lr * weight_decay, lr / (1 - config.beta1**step), math.sqrt(1 - config.beta2**step), config.adam_eps,
        WRITE_WEIGHTS=weights is not None, ZERO_GRAD=zero_grad, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


@torch.no_grad()
def sum_of_squares(tensor: Tensor) -> Tensor:
    """Sum of the squares of a contiguous float32, bfloat16 or float16 tensor's elements: float64 scalar on its device,
    with the same bits every time."""
    triton_launch.check({"tensor": tensor})
    num_programs = min(-(-tensor.numel() // SQUARES_BLOCK), SQUARES_PROGRAMS)
    partial = torch.empty(num_programs, dtype=torch.float64, device=tensor.device)
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    if num_programs:
        load_kernels()["_sum_of_squares_kernel"][(num_programs,)](
            tensor, partial, tensor.numel(), BLOCK=SQUARES_BLOCK, num_warps=NUM_WARPS
        )  # fmt: skip
        load_kernels()["_sum_kernel"][(1,)](partial, total, num_programs, BLOCK=SQUARES_PROGRAMS, num_warps=NUM_WARPS)
    return total
