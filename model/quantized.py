"""Linear layers whose frozen matrix is kept in 4 bits (QLoRA: Dettmers et al., 2023).

Elements of a matrix, row by row, are cut into blocks of 64, and the scales of the blocks into blocks of 256:

    W_i = nf4[code_i] * scale_b                        code_i: 4 bits, b = i // 64
    scale_b = map8[code_b] * nested_scale_c + offset   code_b: 8 bits, c = b // 256 ("double quantization")

A scale is the largest absolute value of its block, the offset the mean of all scales. nf4 has 16 values, which normally
distributed numbers use equally often. An element takes 4 + 8/64 + 32/(64 256) = 4.13 bits.

The arithmetic is that of bitsandbytes, on CPUs and on CUDA, and its Linear4bit computes the same. It is imported here
alone, when it is needed.

Shapes: C inputs, O outputs, N tokens.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import DropoutKey
from model.linear import Linear
from model.moe import Experts

BLOCK, NESTED_BLOCK = 64, 256
_PIECE = 2**24
"""Elements that are quantized at once, so that little memory is taken besides; a multiple of BLOCK."""


class Linear4bit(Linear):
    """y = x W^T + b, with a frozen W in 4 bits. It has no values before `set_matrix`.

    What W is stored as are buffers, not parameters: no optimizer, no role and no file of weights sees them. They are
    named as in the files of bitsandbytes, and keep their dtypes when the layer is moved.
    """

    weight: Tensor
    """Codes of the elements, two a byte."""
    absmax: Tensor
    """Codes of the scales."""
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        """
        Args:
            dtype: dtype in which it computes; `to` changes it.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        blocks = _ceil_div(in_features * out_features, BLOCK)
        self.register_buffer("weight", torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8, device=device))
        self.register_buffer("nested_absmax", torch.empty(_ceil_div(blocks, NESTED_BLOCK), device=device))
        self.register_buffer("nested_quant_map", torch.empty(NESTED_BLOCK, device=device))
        self.register_buffer("nested_offset", torch.empty((), device=device))
        values = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", values if bias else None)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.absmax, self.nested_absmax, self.nested_quant_map, self.nested_offset

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear4bit":
        """Move everything; only the bias takes another dtype."""
        moved = fn(torch.empty(0, device=self.weight.device, dtype=self.dtype))
        buffers, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        self._buffers = {name: buffer.to(moved.device) for name, buffer in buffers.items() if buffer is not None}
        self.dtype = moved.dtype
        return self

    @torch.no_grad()
    def set_matrix(self, matrix_OC: Tensor) -> None:
        """Quantize a matrix, on this layer's device."""
        functional = _bitsandbytes().functional
        flat = F.pad(matrix_OC.reshape(-1), (0, 2 * len(self.weight) - matrix_OC.numel()))
        pieces = [
            torch.ops.bitsandbytes.quantize_4bit(piece.to(self.weight.device, torch.float32), BLOCK, "nf4", torch.uint8)
            for piece in flat.split(_PIECE)
        ]
        scales = torch.cat([scales for _, scales in pieces])
        offset = scales.mean()
        absmax, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        values = torch.cat([codes.view(-1) for codes, _ in pieces]), absmax, nested.absmax, nested.code, offset
        for stored, value in zip(self._stored(), values):
            stored.copy_(value)

    def matrix(self) -> Tensor:
        """W (O, C) in the dtype of the layer."""
        return _dequantized(self.out_features, self.in_features, self.dtype, *self._stored())

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        return _Multiplied.apply(x, None, self.out_features, self.in_features, *self._stored())

    def forward(self, x: Tensor, key: DropoutKey | None = None) -> Tensor:
        """(..., C) -> (..., O)."""
        shape = self.out_features, self.in_features
        if x.is_cuda and not torch.is_grad_enabled() and self.in_features % BLOCK == 0:
            return _fused(x, self.bias, *shape, *self._stored())
        return _Multiplied.apply(x, self.bias, *shape, *self._stored())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Multiplied(torch.autograd.Function):
    """x W^T + b. Only the codes are kept for the backward pass, which computes W again."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, rows: int, columns: int, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape = rows, columns
        return F.linear(x, _dequantized(rows, columns, x.dtype, *stored), bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _input_gradient(dy, *ctx.shape, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, *(None for _ in range(7))


def _dequantized(
    rows: int, columns: int, dtype: torch.dtype, codes: Tensor, absmax: Tensor, nested_absmax: Tensor,
    nested_map: Tensor, offset: Tensor,
) -> Tensor:  # fmt: skip
    """W (rows, columns)."""
    operators = torch.ops.bitsandbytes
    scales = operators.dequantize_blockwise(absmax, nested_absmax, nested_map, NESTED_BLOCK, torch.float32) + offset
    # As a matrix of whole blocks: on CPUs with AVX512, bitsandbytes 0.50.2 returns wrong values if a row is longer than
    # a block and no multiple of it.
    blocks = operators.dequantize_4bit(codes[:, None], scales, BLOCK, "nf4", (len(absmax), BLOCK), dtype)
    return blocks.view(-1)[: rows * columns].view(rows, columns)


@torch.library.custom_op("zero2all::linear_4bit_backward", mutates_args=())
def _input_gradient(
    dy: Tensor, rows: int, columns: int, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, nested_map: Tensor,
    offset: Tensor,
) -> Tensor:  # fmt: skip
    """dy W. One operation, so that torch.compile does not see W computed twice, and keep it from the forward pass."""
    return dy @ _dequantized(rows, columns, dy.dtype, codes, absmax, nested_absmax, nested_map, offset)


@_input_gradient.register_fake
def _(dy, rows, columns, *_stored):
    return dy.new_empty(*dy.shape[:-1], columns)


def _fused(
    x: Tensor, bias: Tensor | None, rows: int, columns: int, codes: Tensor, absmax: Tensor, nested_absmax: Tensor,
    nested_map: Tensor, offset: Tensor,
) -> Tensor:  # fmt: skip
    """x W^T + b without a gradient, by a kernel that reads the codes where that is faster, as for few tokens."""
    return torch.ops.bitsandbytes.gemm_4bit(
        x, codes[:, None], (rows, columns), nested_absmax, BLOCK, "nf4", bias, absmax, nested_map, offset
    )


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Give a model without memory (on the meta device) its memory, without values, with a Linear4bit in the place of
    each Linear.

    Raises:
        ValueError: bitsandbytes is missing, or the model has matrices that cannot be quantized.
    """
    require_bitsandbytes()
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError(
            "--load_in_4bit: the matrices of experts are not quantized here, and they are most of such a model: leave "
            "it out"
        )
    for name, layer in list(model.named_modules()):
        if type(layer) is Linear:
            parent, _, child = name.rpartition(".")
            has_bias, dtype = layer.bias is not None, layer.weight.dtype
            quantized = Linear4bit(layer.in_features, layer.out_features, has_bias, device, dtype)
            setattr(model.get_submodule(parent), child, quantized)
    model.to_empty(device=device)


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """Name of each weight that the model keeps in 4 bits -> its layer."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def count_parameters(model: nn.Module) -> int:
    """Number of a model's parameters, with those that are kept in 4 bits."""
    quantized = sum(layer.in_features * layer.out_features for layer in quantized_layers(model).values())
    return quantized + sum(parameter.numel() for parameter in model.parameters())


def require_bitsandbytes() -> None:
    """
    Raises:
        ValueError: it is missing.
    """
    _bitsandbytes()


@cache
def _bitsandbytes() -> ModuleType:
    """The package, whose operators are in torch.ops once it is imported.

    On some CPUs its import fetches compiled code over the network by the package `kernels`, if that is there, and warns
    if it is not. No function that is called here uses that code, so the package is hidden.
    """
    logger, kernels = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.get("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"--load_in_4bit needs bitsandbytes ({error}): run `pip install -r requirements-qlora.txt`"
        ) from None
    finally:
        logger.setLevel(level)
        if kernels is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
