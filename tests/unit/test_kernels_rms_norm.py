"""RMSNorm against float64, alone and after a residual addition with dropout."""

import itertools

import pytest
import torch
from torch import Tensor

from model.dropout import DropoutKey, dropout
from model.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernel_checks import DEVICE, DTYPES, compare, draw

EPS = 1e-5
SHAPES = [(1, 1), (9, 1), (1, 300), (10, 17), (2, 3, 64), (0, 8)]
CASES = [*itertools.product(SHAPES, DTYPES), ((4, 8200), torch.bfloat16)]


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def key_of(rows: int, forward_id: int = 2, layer: int | None = 5, seed: int = -(1 << 63) + 12345) -> DropoutKey:
    row_ids = torch.arange(rows, device=DEVICE) * 0x1_2345_6789 + 7
    return DropoutKey(seed, row_ids, forward_id, None if layer is None else torch.tensor(layer, device=DEVICE))


@pytest.mark.parametrize("shape, dtype", CASES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype):
    compare(
        lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), exact_norm,
        [draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 33])
def test_each_row_for_itself(columns: int, dtype: torch.dtype):
    """Includes rows of one element, whose gradient is the remainder of g - g n^2, of which float32 keeps a few bits."""
    compare(
        lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), exact_norm,
        [draw(64, columns, dtype=dtype, seed=11), draw(columns, dtype=dtype, seed=12)], by_row=True,
    )  # fmt: skip


@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rms_norm_of_another_dtype_than_its_weight(x_dtype: torch.dtype, weight_dtype: torch.dtype):
    compare(
        lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), exact_norm,
        [draw(9, 33, dtype=x_dtype), draw(33, dtype=weight_dtype, seed=1)],
    )  # fmt: skip


@pytest.mark.parametrize("view", [
    lambda x: x[:, ::2], lambda x: x.T, lambda x: x[1:, 3:], lambda x: x[:1].expand(6, -1),
    lambda x: x.view(2, 6, 12)[:, 1:4],
], ids=["strided columns", "transposed", "cut out", "expanded", "cut in the middle"])  # fmt: skip
def test_rms_norm_of_views(view):
    columns = view(torch.empty(12, 12)).shape[-1]
    compare(
        lambda x, w: rms_norm(view(x), w, EPS), lambda x, w: rms_norm_reference(view(x), w, EPS),
        lambda x, w: exact_norm(view(x), w), [draw(12, 12), draw(columns, seed=1)],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_extreme_rows(dtype: torch.dtype):
    x = draw(4, 40, dtype=dtype)
    x[0], x[1], x[2] = 0.0, x[1] * 1e4, x[2] * 1e-4
    weight = draw(40, dtype=dtype, seed=1)
    for row in x[:, None]:
        # One row at a time: a row of zeros has gradients of 1 / sqrt(eps), beside which other rows' errors do not show.
        compare(
            lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), exact_norm, [row, weight]
        )  # fmt: skip


@pytest.mark.parametrize("dtypes", [
    *((dtype, dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16), (torch.bfloat16, torch.float32, torch.float32),
], ids=lambda dtypes: ", ".join(str(d)[6:] for d in dtypes))  # fmt: skip
@pytest.mark.parametrize("shape, probability", [
    ((1, 2, 20), 0.3), ((2, 21), 0.3), ((1, 1, 1), 0.5), ((1, 2, 2, 12), 0.9), ((2, 4, 300), 0.0),
])  # fmt: skip
def test_add_rms_norm(dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], probability: float):
    key = key_of(shape[0])

    def exact(h: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = h + dropout(x, probability, key, 1)
        # The norm's input is rounded, in the eager path and in ours.
        rounded = h + (h.detach().to(torch.promote_types(*dtypes[:2])).double() - h.detach())
        return h, exact_norm(rounded, w)

    h, x, weight = (
        draw(*size, dtype=dtype, seed=i) for i, (size, dtype) in enumerate(zip((shape, shape, shape[-1:]), dtypes))
    )
    compare(
        lambda h, x, w: add_rms_norm(h, x, w, EPS, probability, key, 1),
        lambda h, x, w: add_rms_norm_reference(h, x, w, EPS, probability, key, 1), exact, [h, x, weight],
    )  # fmt: skip


def test_without_a_key_nothing_is_dropped():
    h, x, weight = draw(2, 3, 8), draw(2, 3, 8, seed=1), torch.ones(8, device=DEVICE)
    assert torch.equal(add_rms_norm(h, x, weight, EPS, 0.5, None)[0], h + x)


@pytest.mark.parametrize("shape", [(2, 2, 20), (2, 2, 13), (3, 6)])
@pytest.mark.parametrize("key, probability, site", [
    (key_of(4), 0.1, 0), (key_of(4, 0, None, 1), 0.5, 2), (key_of(4, 0xFFFF, 63, 1 << 40), 1 - 2**-33, 1),
], ids=["a", "b", "c"])  # fmt: skip
def test_dropout_bits(shape: tuple[int, ...], key: DropoutKey, probability: float, site: int):
    key = DropoutKey(key.seed, key.row_ids[: shape[0]], key.forward_id, key.layer)
    ones = torch.ones(shape, device=DEVICE, requires_grad=True)
    zeros, weight = torch.zeros_like(ones), torch.ones(shape[-1], device=DEVICE)
    h, _ = add_rms_norm(zeros, ones, weight, EPS, probability, key, site)
    expected = dropout(torch.ones_like(ones), probability, key, site)
    assert torch.equal(h, expected)
    assert torch.equal(torch.autograd.grad(h.sum(), ones)[0], expected)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_gradients_of_some_inputs_only(needed: tuple[int, ...]):
    for function in (add_rms_norm, add_rms_norm_reference):
        inputs = [draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8, seed=2)]
        for x, need in zip(inputs, needed):
            x.requires_grad_(bool(need))
        h, y = function(*inputs, EPS, 0.5, key_of(2))
        (h.sin().sum() + y.cos().sum()).backward()
        gradients = [x.grad for x in inputs]
        if function is add_rms_norm:
            ours = gradients
    for a, b, need in zip(ours, gradients, needed):
        assert (a is not None) == (b is not None) == bool(need)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unused", [0, 1])
def test_a_result_that_nobody_uses(unused: int):
    gradients = []
    for function in (add_rms_norm, add_rms_norm_reference):
        inputs = [draw(3, 8, seed=i).requires_grad_() for i in range(2)]
        function(*inputs, torch.ones(8, device=DEVICE), EPS)[1 - unused].sin().sum().backward()
        gradients.append([x.grad for x in inputs])
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time():
    x, weight = draw(12, 100).requires_grad_(), draw(100, seed=1).requires_grad_()
    runs = [torch.autograd.grad(rms_norm(x, weight, EPS).sin().sum(), (x, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_weights_gradient_keeps_float32_where_its_parameter_wants_that():
    x, weight = draw(12, 16, dtype=torch.bfloat16), torch.nn.Parameter(draw(16, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        rms_norm(draw(2, 4).double(), draw(4), EPS)
