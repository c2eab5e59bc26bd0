"""The activation of a gated feed-forward layer (Shazeer, "GLU variants improve transformer", 2020).

    y = silu(g) * u,   silu(g) = g s(g),   s the logistic function

    dg = dy u s(g) (1 + g (1 - s(g))),   du = dy silu(g)

The backward pass computes silu again from g, so only the inputs are kept. If gate and up come out of one merged
projection, `swiglu_packed` takes its output as it is and returns one gradient for it, so that neither pass copies.
Arithmetic is float32, and float64 for float32 tensors (see launch.py).

Memory traffic, elements: forward 3 of y's size, backward 5.

Shapes: N rows, I intermediate size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.launch import as_rows, check_dtypes, constexpr, jit, kernel_op, next_power_of_2, tl, work_dtype
from model.kernels.registry import Implementation, needs_package, needs_triton, runs_triton

MAX_BLOCK = 1024
"""Columns a program."""
ELEMENTS_PER_WARP = 256
"""Eight a thread: one 16-byte load of bfloat16 of each tensor."""


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition: two tensors (..., I) -> (..., I)."""
    return F.silu(gate) * up


def swiglu_packed_reference(gate_up: Tensor) -> Tensor:
    """The definition of the packed form: (..., 2 I), gates before ups -> (..., I)."""
    return swiglu_reference(*gate_up.chunk(2, dim=-1))


@jit
def _swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_columns, WIDE: constexpr, BLOCK: constexpr
):  # fmt: skip
    """BLOCK columns of one row a program. WIDE: in float64."""
    work = tl.float64 if WIDE else tl.float32
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(work)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(work)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * num_columns + columns, y.to(tl.float32), mask=inside)


@jit
def _swiglu_backward_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, gate_stride, up_stride, dy_stride, dgate_stride, dup_stride,
    num_columns, WIDE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """BLOCK columns of one row a program. WIDE: in float64."""
    work = tl.float64 if WIDE else tl.float32
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(work)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(work)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(work)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dgate_ptr + row * dgate_stride + columns, dgate.to(tl.float32), mask=inside)
    tl.store(dup_ptr + row * dup_stride + columns, dup.to(tl.float32), mask=inside)


def _grid_and_options(x_NI: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(next_power_of_2(x_NI.shape[1]), MAX_BLOCK)
    options = {"BLOCK": block, "num_warps": max(block // ELEMENTS_PER_WARP, 1)}
    return (len(x_NI), -(-x_NI.shape[1] // block)), options | {"WIDE": work_dtype(x_NI.dtype) == torch.float64}


def _empty_forward(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@kernel_op("swiglu_forward(Tensor gate, Tensor up) -> Tensor", _empty_forward)
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _empty_forward(gate, up)
    gate_NI, up_NI = as_rows(gate), as_rows(up)
    grid, options = _grid_and_options(gate_NI)
    _swiglu_forward_kernel[grid](
        gate_NI, up_NI, y, gate_NI.stride(0), up_NI.stride(0), gate_NI.shape[1], **options
    )  # fmt: skip
    return y


def _empty_backward(gate: Tensor, up: Tensor, dy: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    if packed:
        return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1])), gate.new_empty(0)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@kernel_op("swiglu_backward(Tensor gate, Tensor up, Tensor dy, bool packed) -> (Tensor, Tensor)", _empty_backward)
def _backward(gate: Tensor, up: Tensor, dy: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """(dgate, dup); if packed, (both side by side, nothing)."""
    gradients = _empty_backward(gate, up, dy, packed)
    gate_NI, up_NI, dy_NI = as_rows(gate), as_rows(up), as_rows(dy)
    grid, options = _grid_and_options(gate_NI)
    dgate_NI, dup_NI = as_rows(gradients[0]).chunk(2, dim=-1) if packed else map(as_rows, gradients)
    _swiglu_backward_kernel[grid](
        gate_NI, up_NI, dy_NI, dgate_NI, dup_NI, gate_NI.stride(0), up_NI.stride(0), dy_NI.stride(0),
        dgate_NI.stride(0), dup_NI.stride(0), gate_NI.shape[1], **options,
    )  # fmt: skip
    return gradients


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward(*ctx.saved_tensors, dy, False)


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx, dy: Tensor):
        (gate_up,) = ctx.saved_tensors
        return _backward(*gate_up.chunk(2, dim=-1), dy, True)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors (..., I) of one dtype, which may be slices of something larger."""
    check_dtypes(gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate and up must be alike: {tuple(gate.shape)} {gate.dtype}, {tuple(up.shape)} {up.dtype}")
    return _SwiGLU.apply(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of one tensor (..., 2 I), gates before ups -> (..., I). The gradient is contiguous (..., 2 I)."""
    check_dtypes(gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension holds gates and ups, so it is even, not {gate_up.shape[-1]}")
    return _SwiGLUPacked.apply(gate_up)


def _liger() -> dict[str, Callable]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return LigerSiLUMulFunction.apply(gate, up)

    return {"swiglu": swiglu}


IMPLEMENTATIONS = (
    Implementation("swiglu", "reference", lambda: {"swiglu": swiglu_reference}, is_plain=True),
    Implementation(
        "swiglu", "triton", lambda: {"swiglu": swiglu, "swiglu_packed": swiglu_packed}, needs_triton, runs_triton
    ),
    Implementation("swiglu", "liger", _liger, needs_package("liger", "liger_kernel")),
)
