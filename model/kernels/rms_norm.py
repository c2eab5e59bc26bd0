"""RMSNorm (Zhang and Sennrich, 2019), alone and fused with the residual addition before it.

    y = w * x / sqrt(mean(x^2) + eps)

    r = 1 / sqrt(mean(x^2) + eps),   n = r x,   g = w * dy
    dx = r (g - n mean(g * n)),      dw = sum over rows of dy * n

The fused form is h' = h + dropout(x), y = rms_norm(h'): the step between two halves of a pre-norm transformer's blocks
(fused as in Apex's and flash-attention's layer norms, by Tri Dao among others). The dropout mask is that of
model/dropout.py, recomputed in the backward pass.

Arithmetic is float32. It is float64, rounded once at the end, if the weight is float32 (see launch.py), and for rows of
a few elements, whose gradient is the small difference of g and n mean(g * n): with one element, g (1 - n^2) with n^2
about 1.

Memory traffic, elements a row of C: forward 2 C (fused 4 C), backward 3 C (fused 4 C, 5 C where dx differs from dh).
Between the passes only r is kept, one number a row, in the dtype of the arithmetic.

Shapes: N rows (all but the last dimension), C columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.dropout import SITES_PER_LAYER, DropoutKey, dropout
from model.kernels.launch import (
    as_rows,
    check_dtypes,
    constexpr,
    jit,
    kernel_op,
    next_power_of_2,
    num_multiprocessors,
    tl,
    work_dtype,
)
from model.kernels.registry import Implementation, needs_package, needs_triton, runs_triton

ELEMENTS_PER_WARP = 512
"""Sixteen a thread: two 16-byte loads of bfloat16."""
MAX_WARPS = 32
WIDE_BELOW = 8
"""Rows with fewer columns are computed in float64, whatever their dtype."""
BACKWARD_WARPS_PER_MULTIPROCESSOR = 16
"""Warps of backward programs, of the 64 that a multiprocessor can hold: each program keeps the weights and a row of
their gradient in registers."""
BACKWARD_REGISTERS = 128
"""Registers a thread: with that many warps, all 65,536 of a multiprocessor. With more, not all programs would run at
once, and the last ones would take as long again. This is enough up to 8,192 columns, but for 80 bytes a thread with
dropout; in float64 up to 4,096.
"""


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: x (..., C), weight (C,) -> (..., C) in the weight's dtype."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(weight.dtype)


def add_rms_norm_reference(
    h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float = 0.0, key: DropoutKey | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of the fused form: (h + dropout(x), rms_norm of that)."""
    h_new = h + dropout(x, dropout_p, key, site)
    return h_new, rms_norm_reference(h_new, weight, eps)


@jit
def _load_row(pointer, row, row_stride, C: constexpr, BLOCK_C: constexpr):
    columns = tl.arange(0, BLOCK_C)
    return tl.load(pointer + row * row_stride + columns, mask=columns < C, other=0.0)


@jit
def _dropout_factor(
    row, row_ids_ptr, layer_ptr, tokens_per_row, seed, where, threshold, scale,
    SITES: constexpr, HAS_LAYER: constexpr, C: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """Factors by which dropout multiplies one row of x: `scale` where model.dropout.dropout_mask is True, else 0."""
    row_id = tl.load(row_ids_ptr + row // tokens_per_row)
    row_low, row_high = (row_id & 0xFFFFFFFF).to(tl.uint32), ((row_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    if HAS_LAYER:
        where += SITES * tl.load(layer_ptr)
    where = where.to(tl.uint32)
    first = (row % tokens_per_row) * C
    if C % 4 == 0:
        # The four words of one Philox block belong to four neighbours.
        blocks = (first // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)
        word_0, word_1, word_2, word_3 = tl.philox(seed, blocks, row_low, row_high, where)
        words = tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3))
    else:
        elements = first + tl.arange(0, BLOCK_C)
        word_0, word_1, word_2, word_3 = tl.philox(seed, (elements // 4).to(tl.uint32), row_low, row_high, where)
        which = elements % 4
        words = tl.where(which < 2, tl.where(which == 0, word_0, word_1), tl.where(which == 2, word_2, word_3))
    return tl.where(words.to(tl.int64) >= threshold, scale, 0.0)


@jit
def _normalize(x, weight, eps, C: constexpr):
    """(y, rstd) of a row, in its dtype."""
    rstd = tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    normed = x * rstd
    if weight.dtype != tl.float32:
        # Before the product, as the definition does.
        normed = normed.to(tl.float32).to(weight.dtype).to(x.dtype)
    return normed * weight.to(x.dtype), rstd


@jit
def _rms_norm_forward_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, x_stride, eps, C: constexpr, BLOCK_C: constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    x = _load_row(x_ptr, row, x_stride, C, BLOCK_C).to(rstd_ptr.dtype.element_ty)
    y, rstd = _normalize(x, weight, eps, C)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * C + columns, y.to(tl.float32), mask=inside)


@jit(do_not_specialize=["seed", "where"])
def _add_rms_norm_forward_kernel(
    h_ptr, x_ptr, weight_ptr, h_new_ptr, y_ptr, rstd_ptr, h_stride, x_stride, eps,
    row_ids_ptr, layer_ptr, tokens_per_row, seed, where, threshold, scale,
    DROPOUT: constexpr, SITES: constexpr, HAS_LAYER: constexpr,
    C: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    work = rstd_ptr.dtype.element_ty
    h = _load_row(h_ptr, row, h_stride, C, BLOCK_C).to(work)
    x = _load_row(x_ptr, row, x_stride, C, BLOCK_C).to(work)
    if DROPOUT:
        x *= _dropout_factor(
            row, row_ids_ptr, layer_ptr, tokens_per_row, seed, where, threshold, scale, SITES, HAS_LAYER, C, BLOCK_C
        )
    # The norm is that of the stored sum, rounding included: the backward pass has nothing else.
    h_new = (h + x).to(tl.float32).to(h_new_ptr.dtype.element_ty)
    tl.store(h_new_ptr + row * C + columns, h_new, mask=inside)
    y, rstd = _normalize(h_new.to(work), weight, eps, C)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * C + columns, y.to(tl.float32), mask=inside)


@jit(do_not_specialize=["seed", "where"])
def _rms_norm_backward_kernel(
    h_ptr, weight_ptr, rstd_ptr, dy_ptr, dh_new_ptr, dh_ptr, dx_ptr, partial_dw_ptr, h_stride, dy_stride, dh_new_stride,
    num_rows, row_ids_ptr, layer_ptr, tokens_per_row, seed, where, threshold, scale,
    HAS_DH_NEW: constexpr, WRITE_DX: constexpr, WRITE_DW: constexpr,
    DROPOUT: constexpr, SITES: constexpr, HAS_LAYER: constexpr,
    C: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """Rows pid, pid + P, pid + 2 P ... of P programs: each adds up its rows' share of dw in registers."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    work = rstd_ptr.dtype.element_ty
    dw = tl.zeros((BLOCK_C,), dtype=work)
    h_next = _load_row(h_ptr, first, h_stride, C, BLOCK_C)
    dy_next = _load_row(dy_ptr, first, dy_stride, C, BLOCK_C)
    for row in tl.range(first, num_rows, step):
        h, dy = h_next.to(work), dy_next.to(work)
        # The next row is loaded while this one is computed; after the last row, the last is loaded again.
        next_row = tl.minimum(row + step, num_rows - 1)
        h_next = _load_row(h_ptr, next_row, h_stride, C, BLOCK_C)
        dy_next = _load_row(dy_ptr, next_row, dy_stride, C, BLOCK_C)
        if HAS_DH_NEW:
            dh_new = _load_row(dh_new_ptr, row, dh_new_stride, C, BLOCK_C)
        rstd = tl.load(rstd_ptr + row)
        normed = h * rstd
        if WRITE_DW:
            # Without the forward pass's rounding, which is closer to the exact gradient and less work.
            dw += dy * normed
        weighted = dy * weight.to(work)
        dh = rstd * (weighted - normed * (tl.sum(weighted * normed, 0) / C))
        if HAS_DH_NEW:
            dh += dh_new.to(work)
        tl.store(dh_ptr + row * C + columns, dh.to(tl.float32), mask=inside)
        if WRITE_DX:
            dx = dh
            if DROPOUT:
                dx *= _dropout_factor(
                    row, row_ids_ptr, layer_ptr, tokens_per_row, seed, where, threshold, scale, SITES, HAS_LAYER, C,
                    BLOCK_C,
                )  # fmt: skip
            tl.store(dx_ptr + row * C + columns, dx.to(tl.float32), mask=inside)
    if WRITE_DW:
        tl.store(partial_dw_ptr + first * C + columns, dw, mask=inside)


def _work_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the arithmetic."""
    return torch.float64 if len(weight) < WIDE_BELOW else work_dtype(weight.dtype)


def _launch_options(num_columns: int, work: torch.dtype) -> dict[str, int]:
    """Launch options of the kernels.

    Args:
        work: dtype of the arithmetic. A float64 takes two registers.
    """
    block, elements_per_warp = next_power_of_2(num_columns), ELEMENTS_PER_WARP * 4 // work.itemsize
    return {"C": num_columns, "BLOCK_C": block, "num_warps": min(max(block // elements_per_warp, 1), MAX_WARPS)}


def _dropout_arguments(
    num_rows: int, dropout_p: float, row_ids: Tensor | None, layer: Tensor | None, seed: int, where: int
) -> dict[str, object]:
    """The kernels' arguments about dropout; with `dropout_p` 0 nothing is dropped."""
    drops = dropout_p > 0.0
    tokens_per_row = num_rows // len(row_ids) if drops and row_ids is not None else 1
    return {
        "row_ids_ptr": row_ids, "layer_ptr": layer, "tokens_per_row": tokens_per_row,
        "seed": seed, "where": where, "threshold": round(dropout_p * 2.0**32), "scale": 1.0 / (1.0 - dropout_p),
        "DROPOUT": drops, "SITES": SITES_PER_LAYER, "HAS_LAYER": drops and layer is not None,
    }  # fmt: skip


def _empty_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(rows, dtype=_work_dtype(weight))


@kernel_op("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _empty_forward)
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd (N,))."""
    y, rstd = _empty_forward(x, weight, eps)
    x_NC = as_rows(x)
    _rms_norm_forward_kernel[(len(x_NC),)](
        x_NC, weight.contiguous(), y, rstd, x_NC.stride(0), eps, **_launch_options(x.shape[-1], rstd.dtype)
    )
    return y, rstd


def _empty_add_forward(
    h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float, row_ids: Tensor | None, layer: Tensor | None,
    seed: int, where: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        h.new_empty(h.shape, dtype=torch.promote_types(h.dtype, x.dtype)),
        h.new_empty(h.shape, dtype=weight.dtype),
        h.new_empty(h.numel() // h.shape[-1], dtype=_work_dtype(weight)),
    )


@kernel_op(
    "add_rms_norm_forward(Tensor h, Tensor x, Tensor weight, float eps, float dropout_p, Tensor? row_ids, "
    "Tensor? layer, int seed, int where) -> (Tensor, Tensor, Tensor)",
    _empty_add_forward,
)
def _add_forward(
    h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float, row_ids: Tensor | None, layer: Tensor | None,
    seed: int, where: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h_new, y, rstd (N,))."""
    h_new, y, rstd = _empty_add_forward(h, x, weight, eps, dropout_p, row_ids, layer, seed, where)
    h_NC, x_NC = as_rows(h), as_rows(x)
    _add_rms_norm_forward_kernel[(len(h_NC),)](
        h_NC, x_NC, weight.contiguous(), h_new, y, rstd, h_NC.stride(0), x_NC.stride(0), eps,
        **_dropout_arguments(len(h_NC), dropout_p, row_ids, layer, seed, where),
        **_launch_options(h.shape[-1], rstd.dtype),
    )  # fmt: skip
    return h_new, y, rstd


def _empty_backward(
    dh_new: Tensor | None, dy: Tensor, h_new: Tensor, weight: Tensor, rstd: Tensor, h_dtype: torch.dtype,
    x_dtype: torch.dtype, needs_dw: bool, dropout_p: float, row_ids: Tensor | None, layer: Tensor | None, seed: int,
    where: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    same = h_dtype == x_dtype and dropout_p == 0.0
    return (
        h_new.new_empty(h_new.shape, dtype=h_dtype),
        h_new.new_empty(0 if same else h_new.shape, dtype=x_dtype),
        h_new.new_empty(weight.shape if needs_dw else 0, dtype=torch.float32),
    )


@kernel_op(
    "rms_norm_backward(Tensor? dh_new, Tensor dy, Tensor h_new, Tensor weight, Tensor rstd, ScalarType h_dtype, "
    "ScalarType x_dtype, bool needs_dw, float dropout_p, Tensor? row_ids, Tensor? layer, int seed, int where) "
    "-> (Tensor, Tensor, Tensor)",
    _empty_backward,
)
def _backward(
    dh_new: Tensor | None, dy: Tensor, h_new: Tensor, weight: Tensor, rstd: Tensor, h_dtype: torch.dtype,
    x_dtype: torch.dtype, needs_dw: bool, dropout_p: float, row_ids: Tensor | None, layer: Tensor | None, seed: int,
    where: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh, dx or nothing if it equals dh, dw (C,) float32 or nothing). For plain RMSNorm, h_new is x and dh is dx."""
    dh, dx, dw = _empty_backward(
        dh_new, dy, h_new, weight, rstd, h_dtype, x_dtype, needs_dw, dropout_p, row_ids, layer, seed, where
    )
    h_NC, dy_NC = as_rows(h_new), as_rows(dy)
    dh_new_NC = as_rows(dh_new) if dh_new is not None else None
    options = _launch_options(h_new.shape[-1], rstd.dtype)
    per_multiprocessor = max(BACKWARD_WARPS_PER_MULTIPROCESSOR // options["num_warps"], 1)
    num_programs = min(num_multiprocessors(h_new.device) * per_multiprocessor, len(h_NC))
    partial_dw_PC = rstd.new_empty((num_programs, h_new.shape[-1]) if needs_dw else 0)
    _rms_norm_backward_kernel[(num_programs,)](
        h_NC, weight.contiguous(), rstd, dy_NC, dh_new_NC, dh, dx, partial_dw_PC, h_NC.stride(0), dy_NC.stride(0),
        dh_new_NC.stride(0) if dh_new_NC is not None else 0, len(h_NC),
        HAS_DH_NEW=dh_new is not None, WRITE_DX=dx.numel() > 0, WRITE_DW=needs_dw,
        **_dropout_arguments(len(h_NC), dropout_p, row_ids, layer, seed, where), **options,
        maxnreg=BACKWARD_REGISTERS if options["num_warps"] <= BACKWARD_WARPS_PER_MULTIPROCESSOR else None,
    )  # fmt: skip
    if needs_dw:
        dw.copy_(partial_dw_PC.sum(0))
    return dh, dx, dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        needs_dw = ctx.needs_input_grad[1]
        dx, _, dw = _backward(None, dy, x, weight, rstd, x.dtype, x.dtype, needs_dw, 0.0, None, None, 0, 0)
        return dx, dw if needs_dw else None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float, row_ids: Tensor | None,
        layer: Tensor | None, seed: int, where: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h_new, y, rstd = _add_forward(h, x, weight, eps, dropout_p, row_ids, layer, seed, where)
        ctx.save_for_backward(h_new, weight, rstd, row_ids, layer)
        ctx.dtypes, ctx.dropout = (h.dtype, x.dtype), (dropout_p, seed, where)
        return h_new, y

    @staticmethod
    def backward(ctx, dh_new: Tensor, dy: Tensor):
        h_new, weight, rstd, row_ids, layer = ctx.saved_tensors
        dropout_p, seed, where = ctx.dropout
        needs_dw = ctx.needs_input_grad[2]
        dh, dx, dw = _backward(
            dh_new, dy, h_new, weight, rstd, *ctx.dtypes, needs_dw, dropout_p, row_ids, layer, seed, where
        )
        return dh, dx if dx.numel() else dh, dw if needs_dw else None, None, None, None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x (..., C), weight (C,) -> (..., C) in the weight's dtype.

    The weight's gradient is added up in float32 and handed to autograd as such.
    """
    check_dtypes(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float = 0.0, key: DropoutKey | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h + dropout(x), rms_norm of that): h and x (B, ..., C), weight (C,).

    Args:
        h: may be wider than x and the weight; the sum has the wider dtype of h and x, the norm the weight's.
        dropout_p, key, site: as in model.dropout.dropout; nothing is dropped without a key.
    """
    check_dtypes(h, x, weight)
    if key is None or dropout_p == 0.0:
        return _AddRMSNorm.apply(h, x, weight, eps, 0.0, None, None, 0, 0)
    # An operator's integers are signed.
    seed = (key.seed & (2**64 - 1)) - ((key.seed & 2**63) << 1)
    where = (key.forward_id & 0xFFFF) << 16 | site
    return _AddRMSNorm.apply(h, x, weight, eps, dropout_p, key.row_ids.contiguous(), key.layer, seed, where)


def _functions(rms_norm: Callable, add_rms_norm: Callable) -> dict[str, Callable]:
    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}


def _after_addition(rms_norm: Callable[[Tensor, Tensor, float], Tensor]) -> dict[str, Callable]:
    """The functions for a package that has only the norm: the addition before it is plain PyTorch."""

    def add_rms_norm(
        h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float = 0.0, key: DropoutKey | None = None,
        site: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = h + dropout(x, dropout_p, key, site)
        return h, rms_norm(h, weight, eps)

    return _functions(rms_norm, add_rms_norm)


def _liger() -> dict[str, Callable]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # No offset, Llama's rounding, and not in place of the incoming gradient, which others may need.
        return LigerRMSNormFunction.apply(x.to(weight.dtype), weight, eps, 0.0, "llama", False)

    return _after_addition(rms_norm)


def _apex() -> dict[str, Callable]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return fused_rms_norm_affine(x.to(weight.dtype), weight, weight.shape, eps)

    return _after_addition(rms_norm)


IMPLEMENTATIONS = (
    Implementation(
        "rms_norm", "reference", lambda: _functions(rms_norm_reference, add_rms_norm_reference), is_plain=True
    ),
    Implementation("rms_norm", "triton", lambda: _functions(rms_norm, add_rms_norm), needs_triton, runs_triton),
    Implementation("rms_norm", "liger", _liger, needs_package("liger", "liger_kernel")),
    Implementation("rms_norm", "apex", _apex, needs_package("apex", "apex")),
)
