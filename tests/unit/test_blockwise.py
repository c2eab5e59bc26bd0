"""State in 8 bits against a search for the nearest code, bitsandbytes, and the optimizers' formulas in float64."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.named import Box, Piece, keyed, load_named_state
from optimizer.adamw import adamw_reference
from optimizer.blockwise import BLOCK, Quantized, code_book, num_blocks, quantize_reference
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.lion import lion_reference
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rules import new_rules
from parallel.buffer import SliceWithGrad
from parallel.gradients import PlainGradients
from tests.peers import peer

NAME, SHAPE = "layers.0.mlp.up_proj.weight", (75, 64)
"""A parameter of 18 blocks and three quarters."""
NUMEL = SHAPE[0] * SHAPE[1]
EIGHT_BIT = ("adamw8bit", "lion8bit")


def values_of_all_sizes(numel: int, signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=generator) * 10.0 ** (-9 * torch.rand(numel, generator=generator))
    values[300:600] = 0.0
    return values if signed else values.square()


def write(values: Tensor, signed: bool) -> Quantized:
    kept = Quantized(torch.empty(len(values), dtype=torch.uint8), torch.empty(num_blocks(len(values))), signed)
    padded = torch.zeros(len(kept.scales) * BLOCK)
    padded[: len(values)] = values
    kept.write(padded, torch.empty(len(padded), dtype=torch.int32))
    return kept


def read(kept: Quantized) -> Tensor:
    size = len(kept.scales) * BLOCK
    out = torch.full((size,), 7.0)
    values = kept.read(out, torch.empty(size, dtype=torch.int32))
    assert not out[len(values) :].any()
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_becomes_the_nearest_of_the_code_book(signed: bool):
    values = values_of_all_sizes(5000, signed)
    kept, (codes, scales) = write(values, signed), quantize_reference(values, signed)
    assert torch.equal(kept.scales, scales)
    differ = kept.codes != codes
    assert differ.float().mean() < 0.02
    # Where the table has another code, both are nearly equally far away.
    book, quotients = code_book(signed).double(), (values / scales.repeat_interleave(BLOCK)[: len(values)]).double()
    ours, best = ((book[it.long()] - quotients).abs()[differ] for it in (kept.codes, codes))
    assert (ours - best <= 2.0**-10 * quotients.abs()[differ]).all()
    assert torch.equal(write(read(kept), signed).codes, kept.codes)
    assert torch.equal(read(kept) == 0, book[kept.codes.long()] == 0) and not read(kept)[300:600].any()
    # A positive mean square stays a divisor.
    assert signed or (read(kept)[values > 0] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_values_are_those_of_bitsandbytes(signed: bool):
    peer("bitsandbytes")
    from bitsandbytes import functional

    their_book = functional.create_dynamic_map(signed)
    assert torch.allclose(code_book(signed), their_book, rtol=1e-6, atol=0.0)
    values = values_of_all_sizes(5000, signed)
    kept = write(values, signed)
    # Its kernel for float32 on CPUs is coarse: below a thousandth, codes are off by up to 4. That for float64 searches.
    their_codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values.double(), their_book, BLOCK)
    assert torch.equal(kept.scales, scales)
    # A positive mean square is 0 there if it is small.
    apart = (kept.codes.int() - their_codes.int()).abs()[(their_codes != 0) | torch.tensor(signed)]
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02
    theirs = functional.dequantize_blockwise(kept.codes, absmax=kept.scales, code=their_book, blocksize=BLOCK)
    assert torch.allclose(read(kept), theirs, rtol=1e-6, atol=0.0)


def pieces_cut_at(cuts: list[int], dtype: torch.dtype = torch.float32) -> list[SliceWithGrad]:
    """The same parameter in slices, and a small one."""
    generator = torch.Generator().manual_seed(0)
    whole, ends = torch.randn(NUMEL, generator=generator).to(dtype), [0, *cuts, NUMEL]
    grad = torch.zeros(NUMEL, dtype=dtype)
    found = [
        SliceWithGrad(NAME, start, SHAPE, whole[start:end], grad[start:end], grad)
        for start, end in zip(ends, ends[1:])
    ]
    small = torch.zeros(500, dtype=dtype)
    return [*found, SliceWithGrad("norm.weight", 0, (500,), torch.ones(500, dtype=dtype), small, small)]


def new_optimizer(name: str, pieces: list[SliceWithGrad], clip: float = 0.0) -> MixedPrecisionOptimizer:
    rules = new_rules(name, AdamWConfig(), MuonConfig(), LionConfig())
    return MixedPrecisionOptimizer(PlainGradients([pieces]), rules, clip, LossScaler(enabled=False))


def gradients(step: int, numel: int = NUMEL) -> Tensor:
    """Gradients whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(numel, generator=generator) * torch.logspace(-4, 0, numel)


def trained(name: str, pieces: list[SliceWithGrad], steps: int = 4) -> MixedPrecisionOptimizer:
    optimizer = new_optimizer(name, pieces, clip=1.0)
    for step in range(steps):
        pieces[0].whole_grad.copy_(gradients(step))
        pieces[-1].grad.copy_(gradients(step, 500))
        optimizer.step(1e-2)
    return optimizer


def whole_state(optimizer: MixedPrecisionOptimizer) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for piece, tensors in optimizer.named_state():
        for state, tensor in tensors.items():
            parts.setdefault(f"{piece.name}/{state}", []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def quantized_in(optimizer: MixedPrecisionOptimizer, signs: dict[str, bool]) -> dict[str, Quantized]:
    state = whole_state(optimizer)
    return {
        kind: Quantized(state[f"{NAME}/{kind}_codes"], state[f"{NAME}/{kind}_scales"], signed)
        for kind, signed in signs.items()
    }


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_each_step_is_the_formulas_with_a_rounded_state(name: str):
    pieces, config, lr = pieces_cut_at([]), AdamWConfig(), 1e-2
    optimizer = new_optimizer(name, pieces)
    signs = {"exp_avg": True, "exp_avg_sq": False} if name == "adamw8bit" else {"exp_avg": True}
    for step in range(1, 6):
        pieces[0].grad.copy_(gradients(step))
        exact, grad = pieces[0].param.double(), pieces[0].grad.double()
        kept = quantized_in(optimizer, signs)
        values = {state: read(it).double() for state, it in kept.items()}
        optimizer.step(lr)
        if name == "adamw8bit":
            adamw_reference(exact, grad, *values.values(), step, lr, config.weight_decay, config)
        else:
            lion_reference(exact, grad, *values.values(), lr, config.weight_decay, LionConfig())
        assert torch.allclose(pieces[0].param.double(), exact, rtol=1e-6, atol=1e-8)
        for state, it in quantized_in(optimizer, signs).items():
            codes, scales = quantize_reference(values[state].float(), it.signed)
            assert torch.allclose(it.scales, scales, rtol=1e-6)
            apart = (it.codes.int() - codes.int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_slices_between_blocks_change_no_bit(name: str, dtype: torch.dtype):
    whole = whole_state(trained(name, pieces_cut_at([], dtype)))
    for cuts in ([BLOCK], [2 * BLOCK, 5 * BLOCK, 18 * BLOCK]):
        parts = whole_state(trained(name, pieces_cut_at(cuts, dtype)))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    kinds = {key.rpartition("/")[2]: tensor.dtype for key, tensor in whole.items() if key.startswith(NAME)}
    assert kinds["exp_avg_codes"] == torch.uint8 and len(whole[f"{NAME}/exp_avg_scales"]) == 19
    assert whole["norm.weight/exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_a_checkpoint_of_any_slices_is_read_into_any_others(tmp_path: Path, name: str):
    first = trained(name, pieces_cut_at([3 * BLOCK, 10 * BLOCK]))
    for number, (piece, tensors) in enumerate(first.named_state()):
        save_file(keyed(piece, tensors), tmp_path / f"optim-{number}.safetensors")
    for cuts in ([], [5 * BLOCK]):
        second = new_optimizer(name, pieces_cut_at(cuts))
        load_named_state([tmp_path], second.named_state())
        expected, found = whole_state(first), whole_state(second)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_scales_of_some_experts_are_parts_of_the_whole_stacks(tmp_path: Path):
    """Two ranks have two experts each; one process reads what they have saved."""
    shape, name = (4, 16, BLOCK // 4), "experts"
    whole = SliceWithGrad(name, 0, shape, *(torch.zeros(4 * 16 * BLOCK // 4) for _ in range(3)))
    for rank in range(2):
        held = Piece(name, shape, (Box((2 * rank, 0, 0), (2, *shape[1:])),))
        flat = torch.zeros(held.numel)
        optimizer = new_optimizer("adamw8bit", [SliceWithGrad(name, 0, (2, *shape[1:]), flat, flat, flat, held=held)])
        for number, (piece, tensors) in enumerate(optimizer.named_state()):
            for tensor in tensors.values():
                tensor.fill_(rank + 1)
            save_file(keyed(piece, tensors), tmp_path / f"optim-{rank}{number}.safetensors")
    together = new_optimizer("adamw8bit", [whole])
    load_named_state([tmp_path], together.named_state())
    for tensor in whole_state(together).values():
        assert (tensor == torch.tensor([1, 2]).repeat_interleave(len(tensor) // 2)).all()


def test_a_state_never_explodes():
    """Gradients that vanish, come back and span 30 orders of magnitude: a step stays of the size of the rate."""
    pieces = pieces_cut_at([])
    optimizer, before, draw = new_optimizer("adamw8bit", pieces), pieces[0].param.clone(), random.Random(0)
    for _ in range(30):
        pieces[0].grad.copy_(gradients(draw.randrange(9)) * 10.0 ** draw.uniform(-30, 0))
        if draw.random() < 0.3:
            pieces[0].grad.zero_()
        optimizer.step(1e-3)
        assert pieces[0].param.isfinite().all() and (pieces[0].param - before).abs().max() < 10 * 1e-3
        before = pieces[0].param.clone()
