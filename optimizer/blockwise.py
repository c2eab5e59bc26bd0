"""State in 8 bits: blockwise dynamic quantization (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
ICLR 2022).

    scale    BLOCK values in a row are divided by their largest magnitude, which is kept in float32
    code     each quotient becomes the number of the nearest of 256 values, the code book
    bytes    1 + 4 / BLOCK a value, compared with 4

The code book is a dynamic tree (Dettmers, 2016). The decades from 1 to 0.1, from 0.1 to 0.01 and so on, seven in all,
are cut into equal parts, each decade into half as many as the one before, and the middles of the parts are values. So
the largest quotients are exact to 1 %, and quotients down to 10^-6 are still told from 0. One book has both signs, for
means; the other has twice as many positive values, for mean squares.

Blocks are counted from the start of each parameter, and slices begin between blocks (`Rule.alignment`), so neither
buckets nor shards change a bit.

To find a code, a quotient is cut to its sign, exponent and first 10 bits of the fraction. This leaves 2^19 cells, and a
table has the code nearest to the middle of each: one look-up instead of a search. The code is another than the nearest
only for quotients within a 2000th of the middle between two values. One rule is added to the paper's: a positive mean
square never becomes 0. Its root is a divisor, and zeros make steps explode (Li et al., "Memory Efficient Optimizers
with 4-bit States", NeurIPS 2023).
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from checkpoint.named import NamedState, Piece, flat_offset
from optimizer.param_groups import ParamGroups
from optimizer.rule import Gather, Rule, SliceState, Step, Work, chunk_size
from parallel.buffer import ParameterSlice
from parallel.contract import Named

BLOCK = 256
"""Values that share a scale."""
SMALLEST_QUANTIZED = 4096
"""Number of elements from which a parameter's state is quantized, as in bitsandbytes. Norms and biases gain little."""
CUT_BITS, CELL_MASK = 13, (1 << 19) - 1
"""A cell is a float32 without its last CUT_BITS bits."""
SMALLEST_SCALE = 2.0**-126
"""Least divisor of a block, so that a block of zeros stays zero."""


@cache
def code_book(signed: bool) -> Tensor:
    """The 256 values in rising order: float32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 1 << ((6 if signed else 7) - exponent)
        middles = [(0.1 + 0.9 * (part + 0.5) / parts) * 10.0**-exponent for part in range(parts)]
        values += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64).float()


@cache
def code_table(signed: bool) -> Tensor:
    """Code of each cell: uint8, as the module's docstring says."""
    cells = torch.arange(CELL_MASK + 1, dtype=torch.int64) << CUT_BITS
    middles = (cells + (1 << (CUT_BITS - 1))).to(torch.int32).view(torch.float32).double()
    book = code_book(signed).double()
    codes = torch.bucketize(middles.nan_to_num(), (book[1:] + book[:-1]) / 2)
    # The cells of zero itself.
    zero = int(torch.searchsorted(book, 0.0))
    codes[0] = codes[(CELL_MASK + 1) // 2] = zero
    if not signed:
        codes[1:].clamp_(min=1)
    return codes.to(torch.uint8)


@cache
def tables_on(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """`code_book` and `code_table` on a device."""
    return code_book(signed).to(device), code_table(signed).to(device)


def quantize_reference(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The definition, by search: codes (uint8) and the scale of each block (float32) of 1-D float32 values."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    quotients = (blocks / scales.clamp(min=SMALLEST_SCALE)[:, None]).double().flatten()[: len(values)]
    book = code_book(signed).double()
    codes = (quotients[:, None] - book).abs().argmin(1)
    if not signed:
        codes = torch.where(quotients > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8), scales


def num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


@dataclass
class Quantized:
    """A slice's values in 8 bits."""

    codes: Tensor
    """uint8, as long as the slice."""
    scales: Tensor
    """float32, one a block."""
    signed: bool

    def part(self, start: int, end: int) -> "Quantized":
        """Elements [start, end); `start` is a multiple of BLOCK."""
        return Quantized(self.codes[start:end], self.scales[start // BLOCK : num_blocks(end)], self.signed)

    def read(self, out: Tensor, cells: Tensor) -> Tensor:
        """The values, in the first elements of `out`; returns these.

        Args:
            out: float32, at least as long as all blocks; those behind the last value become zero.
            cells: int32 for intermediate results, as long as `out`.
        """
        numel, book = len(self.codes), tables_on(out.device, self.signed)[0]
        torch.index_select(book, 0, cells[:numel].copy_(self.codes), out=out[:numel])
        blocks = out[: len(self.scales) * BLOCK]
        blocks[numel:].zero_()
        blocks.view(-1, BLOCK).mul_(self.scales[:, None])
        return out[:numel]

    def write(self, values: Tensor, cells: Tensor) -> None:
        """Replace the values by those in the first elements of `values`, which is overwritten; arguments as above."""
        numel, table = len(self.codes), tables_on(values.device, self.signed)[1]
        blocks = values[: len(self.scales) * BLOCK].view(-1, BLOCK)
        sizes = torch.abs(blocks, out=cells[: blocks.numel()].view(torch.float32).view(-1, BLOCK))
        torch.amax(sizes, 1, out=self.scales)
        blocks.div_(self.scales.clamp(min=SMALLEST_SCALE)[:, None])
        own = torch.bitwise_right_shift(values[:numel].view(torch.int32), CUT_BITS, out=cells[:numel])
        torch.index_select(table, 0, own.bitwise_and_(CELL_MASK), out=self.codes)


class BlockwiseRule(Rule):
    """A rule that keeps its state in 8 bits, for large parameters. The state "exp_avg", say, is two tensors: codes as
    "exp_avg_codes", and "exp_avg_scales".

    Args:
        kernel: "torch" (chunk by chunk: read, step, write) or "triton" (the same in one pass).
    """

    signs: dict[str, bool]
    """Name of a state -> whether its values have a sign."""
    alignment = BLOCK

    def __init__(self, weight_decay: float, groups: ParamGroups | None = None, kernel: str = "torch"):
        super().__init__(weight_decay, groups)
        self.kernel = kernel

    def takes(self, parameter: Named) -> bool:
        """Decides by parameter, never by what a rank has of it, so that no layout changes it."""
        whole = parameter.shape if parameter.held is None else parameter.held.shape
        return math.prod(whole) >= SMALLEST_QUANTIZED

    def new_tensors(self, piece: ParameterSlice, main: Tensor) -> dict[str, Tensor]:
        assert piece.offset % BLOCK == 0, f"{piece.name} is cut within a block, at {piece.offset}"
        tensors = {}
        for name, signed in self.signs.items():
            zero = int(torch.searchsorted(code_book(signed), 0.0))
            tensors[f"{name}_codes"] = torch.full_like(main, zero, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(num_blocks(len(main)), device=main.device)
        return tensors

    def named_state(self, state: SliceState) -> NamedState:
        """The scales are parts of a tensor with one element for each block of the parameter. (Of a parameter that is
        cut, a rank has elements that follow each other, such as some experts of a stack.)"""
        piece, tensors = state.piece, state.tensors
        first = flat_offset(piece.part.shape, piece.part.boxes)
        assert first is not None and first % BLOCK == 0, f"{piece.name} is cut within a block"
        codes = {f"{name}_codes": tensors[f"{name}_codes"] for name in self.signs}
        scales = {f"{name}_scales": tensors[f"{name}_scales"] for name in self.signs}
        of_blocks = (num_blocks(math.prod(piece.part.shape)),)
        place = Piece.flat(piece.name, of_blocks, first // BLOCK, num_blocks(len(state.main)))
        return [(piece.part, {"main": state.main, **codes}), (place, scales)]

    def step(self, works: Sequence[Work], step: Step, gather: Gather) -> bool:
        for work in works:
            if self.kernel == "triton":
                self.step_in_one_pass(work, step)
            else:
                for start in range(0, len(work.grad), chunk_size(work.grad.device)):
                    self._step_chunk(work, start, step)
                work.state.write_weights()
        return step.zero_grad and self.kernel == "triton"

    def _step_chunk(self, work: Work, start: int, step: Step) -> None:
        state, device, end = work.state, work.grad.device, min(start + chunk_size(work.grad.device), len(work.grad))
        kept = [self.quantized(state, name).part(start, end) for name in self.signs]
        cells = self.scratch.take("cells", device, torch.int32)
        memory = [self.scratch.take(name, device) for name in self.signs]
        values = [it.read(out, cells) for it, out in zip(kept, memory)]
        grad = self.scratch.as_float32(work.grad[start:end])
        self.step_chunk(state.main[start:end], grad, values, step, self.decay_of(state.piece))
        for it, out in zip(kept, memory):
            it.write(out, cells)

    def quantized(self, state: SliceState, name: str) -> Quantized:
        return Quantized(state.tensors[f"{name}_codes"], state.tensors[f"{name}_scales"], self.signs[name])

    @abstractmethod
    def step_chunk(self, main: Tensor, grad: Tensor, values: list[Tensor], step: Step, weight_decay: float) -> None:
        """Step part of a slice in float32, in place; `values`: its state, in the order of `signs`."""

    @abstractmethod
    def step_in_one_pass(self, work: Work, step: Step) -> None:
        """Step a slice by a Triton kernel, which also writes its weights and zeroes its gradients if that is asked."""
