"""Triton kernels of Lion and of steps on state in 8 bits, against their plain paths and formulas in float64."""

import pytest
import torch
from torch import Tensor

from optimizer.adamw8bit import AdamW8bit
from optimizer.blockwise import BlockwiseRule, num_blocks
from optimizer.config import AdamWConfig, LionConfig
from optimizer.lion import lion_flat_reference, lion_step
from optimizer.lion8bit import Lion8bit
from optimizer.lion_triton import lion_flat_step
from optimizer.rule import SliceState, Step, Work
from parallel.buffer import ParameterSlice
from tests.kernel_checks import DEVICE, DTYPES, draw, error_ratio

ADAMW, LION = AdamWConfig(), LionConfig()
SIZE = 5000
RULES = {
    "adamw8bit": lambda kernel: AdamW8bit(ADAMW, kernel=kernel),
    "lion8bit": lambda kernel: Lion8bit(LION, 0.5, kernel=kernel),
}


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_lions_steps_are_as_exact_as_the_plain_ones(grad_dtype: torch.dtype):
    size, zeros = 3001, lambda dtype: torch.zeros(3001, dtype=dtype, device=DEVICE)
    ours, plain = ([draw(size), zeros(torch.float32)] for _ in range(2))
    exact, weights = [draw(size).double(), zeros(torch.float64)], zeros(torch.bfloat16)
    for step in range(1, 5):
        grad = draw(size, dtype=grad_dtype, seed=step, scale=7.0)
        lr, decay, divisor = 1e-2 / step, 0.5 * (step % 2), 7.0 + step
        lion_flat_reference(*exact, grad.double(), None, lr, decay, divisor, LION)
        lion_step(plain[0], grad.float().clone(), plain[1], torch.empty(size, device=DEVICE), lr, decay, divisor, LION)
        lion_flat_step(*ours, grad, weights, lr, decay, divisor, LION, zero_grad=step == 4)
        assert (grad.count_nonzero() == 0) == (step == 4)
    for a, b, c in zip(ours, plain, exact):
        assert error_ratio(a, b, c) <= 1.0
    assert torch.equal(weights, ours[0].bfloat16())


def stepped(
    name: str, kernel: str, dtype: torch.dtype, grads: list[Tensor]
) -> tuple[BlockwiseRule, SliceState]:
    rule = RULES[name](kernel)
    piece = ParameterSlice("layers.0.w", 0, (SIZE, 1), draw(SIZE).to(dtype))
    state = rule.new_state(piece)
    for number, grad in enumerate(grads, 1):
        work = Work(state, grad.clone())
        is_zero = rule.step([work], Step(number, 1e-2, 3.0, zero_grad=True), dict)
        assert is_zero == (kernel == "triton") and (not is_zero or not work.grad.any())
    return rule, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_a_step_in_8_bits_is_the_plain_one(name: str, dtype: torch.dtype):
    """One step from the same state: main parameters within two units in the last place, codes at most one apart, and
    only where a quotient lies at the edge of a cell."""
    sizes = torch.logspace(-6, 0, SIZE, device=DEVICE)
    grads = [draw(SIZE, seed=seed).mul(sizes).to(dtype) for seed in range(2)]
    for count in (1, 2):
        (rule, ours), (_, plain) = (stepped(name, kernel, dtype, grads[:count]) for kernel in ("triton", "torch"))
        if count == 2:
            # The first step may leave other codes.
            changed = torch.zeros(SIZE, dtype=torch.bool, device=DEVICE)
            for state in rule.signs:
                changed |= ours.tensors[f"{state}_codes"] != plain.tensors[f"{state}_codes"]
            assert changed.float().mean() < 0.01
            continue
        assert torch.allclose(ours.main, plain.main, rtol=2.4e-7, atol=2.4e-9)
        assert ours.weights is None or torch.equal(ours.weights, ours.main.to(dtype))
        for state in rule.signs:
            a, b = rule.quantized(ours, state), rule.quantized(plain, state)
            assert len(a.scales) == num_blocks(SIZE) and torch.allclose(a.scales, b.scales, rtol=2.4e-7)
            apart = (a.codes.int() - b.codes.int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 0.005


def test_what_the_kernels_cannot_step_is_refused():
    rule = RULES["lion8bit"]("triton")
    state = rule.new_state(ParameterSlice("w", 0, (SIZE, 1), draw(SIZE)))
    state.tensors["exp_avg_scales"] = state.tensors["exp_avg_scales"][1:]
    with pytest.raises(ValueError, match="5000 codes and 19 scales"):
        rule.step([Work(state, draw(SIZE))], Step(1, 1e-2, 1.0, zero_grad=False), dict)
    with pytest.raises(ValueError, match="exp_avg must be float32"):
        lion_flat_step(draw(6), draw(6).half(), draw(6), None, 1e-2, 0.1, 1.0, LION)
