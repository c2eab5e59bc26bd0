"""Steps of optimizers whose state lies in 8 bits, on flat tensors in one launch each: read, step and write of
blockwise.py in a single pass, which also converts the gradient to float32, writes the weights and zeroes the gradient.

A program holds ROWS blocks. The arithmetic is float32, so that m, v and p are those of the plain path within some
units in the last place; a code then differs, by one, only where a quotient lies that close to the edge of a cell.

Memory traffic, bytes a parameter: 8 for the main parameter, 2 for each state tensor, the gradient's 2 or 4 (twice that
if it is zeroed), 2 for bfloat16 weights. Code book and table are 45 KB as far as they are used, and stay in the cache.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optimizer import triton_launch
from optimizer.blockwise import BLOCK, CELL_MASK, CUT_BITS, SMALLEST_SCALE, Quantized, num_blocks, tables_on
from optimizer.config import AdamWConfig, LionConfig
from optimizer.triton_launch import constexpr, write_main

tl: Any = None
"""triton.language once the kernels are loaded."""

ROWS, NUM_WARPS = 4, 4
"""1024 elements a program, eight a thread."""


def _read(codes_ptr, scales_ptr, book_ptr, offsets, rows, inside, inside_rows):
    """Values of ROWS blocks: float32; 0 beyond the slice's end."""
    codes = tl.load(codes_ptr + offsets, mask=inside, other=0).to(tl.int32)
    scales = tl.load(scales_ptr + rows, mask=inside_rows, other=0.0)
    return tl.where(inside, tl.load(book_ptr + codes) * scales[:, None], 0.0)


def _write(
    values, codes_ptr, scales_ptr, table_ptr, offsets, rows, inside, inside_rows, smallest_scale,
    CUT_BITS: constexpr, CELL_MASK: constexpr,
):  # fmt: skip
    scales = tl.max(tl.abs(values), axis=1)
    quotients = tl.div_rn(values, tl.maximum(scales, smallest_scale)[:, None] + tl.zeros_like(values))
    cells = (quotients.to(tl.int32, bitcast=True) >> CUT_BITS) & CELL_MASK
    tl.store(codes_ptr + offsets, tl.load(table_ptr + cells), mask=inside)
    tl.store(scales_ptr + rows, scales, mask=inside_rows)


def _adamw8bit_kernel(
    main_ptr, avg_codes_ptr, avg_scales_ptr, sq_codes_ptr, sq_scales_ptr, grad_ptr, weights_ptr,
    signed_book_ptr, signed_table_ptr, book_ptr, table_ptr, numel,
    grad_divisor, beta1, beta2, one_minus_beta1, one_minus_beta2, decay, step_size, sqrt_correction2, eps,
    smallest_scale, WRITE_WEIGHTS: constexpr, ZERO_GRAD: constexpr, ROWS: constexpr, BLOCK: constexpr,
    CUT_BITS: constexpr, CELL_MASK: constexpr,
):  # fmt: skip
    """One AdamW step; ROWS blocks per program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, inside_rows = offsets < numel, rows * BLOCK < numel
    grad = tl.div_rn(tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32), grad_divisor)
    main = tl.load(main_ptr + offsets, mask=inside, other=0.0)
    exp_avg = _read(avg_codes_ptr, avg_scales_ptr, signed_book_ptr, offsets, rows, inside, inside_rows)
    exp_avg_sq = _read(sq_codes_ptr, sq_scales_ptr, book_ptr, offsets, rows, inside, inside_rows)
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), sqrt_correction2) + eps
    main -= decay * main + tl.div_rn(step_size * exp_avg, denominator)
    write_main(main, main_ptr, grad_ptr, weights_ptr, offsets, inside, WRITE_WEIGHTS, ZERO_GRAD)
    _write(exp_avg, avg_codes_ptr, avg_scales_ptr, signed_table_ptr, offsets, rows, inside, inside_rows,
           smallest_scale, CUT_BITS, CELL_MASK)  # fmt: skip
    _write(exp_avg_sq, sq_codes_ptr, sq_scales_ptr, table_ptr, offsets, rows, inside, inside_rows,
           smallest_scale, CUT_BITS, CELL_MASK)  # fmt: skip


def _lion8bit_kernel(
    main_ptr, codes_ptr, scales_ptr, grad_ptr, weights_ptr, book_ptr, table_ptr, numel,
    grad_divisor, one_minus_beta1, one_minus_beta2, decay, lr, smallest_scale,
    WRITE_WEIGHTS: constexpr, ZERO_GRAD: constexpr, ROWS: constexpr, BLOCK: constexpr, CUT_BITS: constexpr,
    CELL_MASK: constexpr,
):  # fmt: skip
    """One Lion step; ROWS blocks per program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, inside_rows = offsets < numel, rows * BLOCK < numel
    grad = tl.div_rn(tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32), grad_divisor)
    main = tl.load(main_ptr + offsets, mask=inside, other=0.0)
    exp_avg = _read(codes_ptr, scales_ptr, book_ptr, offsets, rows, inside, inside_rows)
    ahead = exp_avg + one_minus_beta1 * (grad - exp_avg)
    main -= decay * main + tl.where(ahead > 0.0, lr, tl.where(ahead < 0.0, -lr, 0.0))
    write_main(main, main_ptr, grad_ptr, weights_ptr, offsets, inside, WRITE_WEIGHTS, ZERO_GRAD)
    exp_avg += one_minus_beta2 * (grad - exp_avg)
    _write(exp_avg, codes_ptr, scales_ptr, table_ptr, offsets, rows, inside, inside_rows,
           smallest_scale, CUT_BITS, CELL_MASK)  # fmt: skip


@cache
def load_kernels() -> dict[str, Any]:
    return triton_launch.compiled(_read, _write, write_main, _adamw8bit_kernel, _lion8bit_kernel)


def _check(main: Tensor, grad: Tensor, weights: Tensor | None, *states: Quantized) -> None:
    triton_launch.check({"main": main, "grad": grad, "weights": weights}, float32=("main",))
    for state in states:
        codes, scales = state.codes, state.scales
        if not (codes.is_contiguous() and scales.is_contiguous() and codes.device == scales.device == main.device):
            raise ValueError("codes and scales must be contiguous and on the device of the main parameters")
        if len(codes) != len(main) or len(scales) != num_blocks(len(main)):
            raise ValueError(f"{len(main)} main parameters do not go with {len(codes)} codes and {len(scales)} scales")


def _options(weights: Tensor | None, zero_grad: bool) -> dict[str, Any]:
    return {
        "WRITE_WEIGHTS": weights is not None, "ZERO_GRAD": zero_grad, "ROWS": ROWS, "BLOCK": BLOCK,
        "CUT_BITS": CUT_BITS, "CELL_MASK": CELL_MASK, "num_warps": NUM_WARPS,
    }  # fmt: skip


def _grid(numel: int) -> tuple[int]:
    return (-(-num_blocks(numel) // ROWS),)


@torch.no_grad()
def adamw8bit_flat_step(
    main: Tensor, exp_avg: Quantized, exp_avg_sq: Quantized, grad: Tensor, weights: Tensor | None, step: int, lr: float,
    weight_decay: float, grad_divisor: float, config: AdamWConfig, zero_grad: bool = False,
) -> None:  # fmt: skip
    """One step, in place, on contiguous tensors of n elements on one CUDA device; arguments as in
    `adamw_triton.adamw_flat_step`."""
    _check(main, grad, weights, exp_avg, exp_avg_sq)
    if main.numel() == 0:
        return
    load_kernels()["_adamw8bit_kernel"][_grid(len(main))](
        main, exp_avg.codes, exp_avg.scales, exp_avg_sq.codes, exp_avg_sq.scales, grad, weights,
        *tables_on(main.device, True), *tables_on(main.device, False), main.numel(),
        grad_divisor, config.beta1, config.beta2, 1 - config.beta1, 1 - config.beta2, lr * weight_decay,
        lr / (1 - config.beta1**step), math.sqrt(1 - config.beta2**step), config.adam_eps, SMALLEST_SCALE,
        **_options(weights, zero_grad),
    )  # fmt: skip


@torch.no_grad()
def lion8bit_flat_step(
    main: Tensor, exp_avg: Quantized, grad: Tensor, weights: Tensor | None, lr: float, weight_decay: float,
    grad_divisor: float, config: LionConfig, zero_grad: bool = False,
) -> None:  # fmt: skip
    """One step, in place, on contiguous tensors of n elements on one CUDA device; arguments as in
    `lion_triton.lion_flat_step`."""
    _check(main, grad, weights, exp_avg)
    if main.numel() == 0:
        return
    load_kernels()["_lion8bit_kernel"][_grid(len(main))](
        main, exp_avg.codes, exp_avg.scales, grad, weights, *tables_on(main.device, True), main.numel(),
        grad_divisor, 1 - config.lion_beta1, 1 - config.lion_beta2, lr * weight_decay, lr, SMALLEST_SCALE,
        **_options(weights, zero_grad),
    )  # fmt: skip
