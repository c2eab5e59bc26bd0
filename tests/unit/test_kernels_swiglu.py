"""silu(gate) * up against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.swiglu import swiglu, swiglu_packed, swiglu_packed_reference, swiglu_reference
from tests.kernel_checks import DTYPES, compare, draw

SHAPES = [(1, 1), (9, 1), (1, 300), (5, 33), (2, 3, 64), (0, 8), (1, 2500)]


def exact(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype):
    compare(swiglu, swiglu_reference, exact, [draw(*shape, dtype=dtype, scale=3), draw(*shape, dtype=dtype, seed=1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_packed(shape: tuple[int, ...], dtype: torch.dtype):
    gate_up = draw(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=2)
    compare(swiglu_packed, swiglu_packed_reference, lambda x: exact(*x.chunk(2, dim=-1)), [gate_up])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33])
def test_each_row_for_itself(columns: int, dtype: torch.dtype):
    gate, up = draw(64, columns, dtype=dtype, scale=3, seed=11), draw(64, columns, dtype=dtype, seed=12)
    compare(swiglu, swiglu_reference, exact, [gate, up], by_row=True)


@pytest.mark.parametrize("view", [
    lambda x: (x[:, :6], x[:, 6:]), lambda x: (x[:, ::2], x[:, 1::2]), lambda x: (x.T[:6], x.T[6:]),
    lambda x: (x[:1].expand(5, -1), x[1:6]), lambda x: (x, x),
], ids=["halves", "interleaved", "transposed", "expanded", "the same"])  # fmt: skip
def test_swiglu_of_views(view):
    compare(lambda x: swiglu(*view(x)), lambda x: swiglu_reference(*view(x)), lambda x: exact(*view(x)), [draw(12, 12)])


def test_packed_gradient_is_one_contiguous_tensor():
    gate_up = draw(5, 14).requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu_packed(gate_up).sum(), gate_up)
    assert gradient.is_contiguous() and gradient.untyped_storage().nbytes() == gate_up.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extreme_gates(dtype: torch.dtype, scale: float):
    gate, up = draw(6, 30, dtype=dtype, scale=scale), draw(6, 30, dtype=dtype, seed=1)
    compare(swiglu, swiglu_reference, exact, [gate, up])


@pytest.mark.parametrize("needed", [0, 1])
def test_gradient_of_one_input_only(needed: int):
    inputs = [draw(4, 9), draw(4, 9, seed=1)]
    inputs[needed].requires_grad_()
    ours, eager = (torch.autograd.grad(f(*inputs).sin().sum(), inputs[needed])[0] for f in (swiglu, swiglu_reference))
    assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="alike"):
        swiglu(draw(2, 4), draw(2, 5))
    with pytest.raises(ValueError, match="even"):
        swiglu_packed(draw(2, 5))
