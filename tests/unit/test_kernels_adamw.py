"""The Triton AdamW against the formula in float64 and torch's fused kernel."""

import pytest
import torch

from optimizer.adamw import adamw_flat_reference, adamw_reference, adamw_step
from optimizer.adamw_triton import adamw_flat_step, sum_of_squares
from optimizer.config import AdamWConfig
from tests.kernel_checks import DEVICE, DTYPES, draw, error_ratio, root_mean_square


def state(size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Main parameters and both moments at the start of training."""
    return [draw(size).to(dtype), *(torch.zeros(size, dtype=dtype, device=DEVICE) for _ in range(2))]


CONFIG = AdamWConfig()


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 3001])
def test_steps_are_as_exact_as_torchs(size: int, grad_dtype: torch.dtype):
    ours, fused, exact = state(size), state(size), state(size, torch.float64)
    for step in range(1, 6):
        grad = draw(size, dtype=grad_dtype, seed=step, scale=7.0)
        lr, weight_decay, divisor = 1e-2 / step, 0.1 * (step % 2), 7.0 + step
        adamw_flat_step(*ours, grad, None, step, lr, weight_decay, divisor, CONFIG)
        # torch's kernel divides the gradient in place.
        of_torch = grad.float().clone()
        adamw_step(*([x] for x in (fused[0], of_torch, *fused[1:])), step, lr, weight_decay, divisor, CONFIG)
        adamw_reference(exact[0], grad.double() / divisor, *exact[1:], step, lr, weight_decay, CONFIG)
    for a, b, c in zip(ours, fused, exact):
        assert error_ratio(a, b, c) <= 1.0
    if size > 1000:
        # Over so many elements the luck of single ones averages out. torch rounds the main parameters twice a step.
        of_ours, of_torch = ([root_mean_square(x, c) for x, c in zip(xs, exact)] for xs in (ours, fused))
        assert all(a <= limit * b for a, b, limit in zip(of_ours, of_torch, (0.8, 1.0, 0.9)))


def test_a_step_rounds_each_number_once():
    """Checked on tensors of one element, where torch's error may by luck be zero and excuses nothing."""
    for seed in range(30):
        start = draw(1, seed=seed)
        ours, exact = ([start.to(dtype), *state(1, dtype)[1:]] for dtype in (torch.float32, torch.float64))
        grad = draw(1, seed=100 + seed)
        adamw_flat_step(*ours, grad, None, 1, 1e-3, 0.1, 3.0, CONFIG)
        adamw_flat_reference(*exact, grad.double(), None, 1, 1e-3, 0.1, 3.0, CONFIG)
        assert all(error_ratio(a, b.float(), b) <= 1.0 for a, b in zip(ours, exact))


@pytest.mark.parametrize("size", [1, 777])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_the_rounded_main_parameters(size: int, dtype: torch.dtype):
    tensors, weights = state(size), draw(size, dtype=dtype)
    adamw_flat_step(*tensors, draw(size, dtype=dtype, seed=1), weights, 1, 1e-3, 0.1, 1.0, CONFIG)
    assert torch.equal(weights, tensors[0].to(dtype))


def test_weights_stay_in_the_range_of_float16():
    main, weights = torch.tensor([7e4, -7e4, 65504.0, 2.0], device=DEVICE), torch.zeros(4, device=DEVICE).half()
    flat = torch.zeros(4, device=DEVICE)
    adamw_flat_step(main, flat, flat.clone(), flat.clone(), weights, 1, 1e-3, 0.0, 1.0, CONFIG)
    assert weights.tolist() == [65504.0, -65504.0, 65504.0, 2.0] and main[0] == 7e4


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_the_gradient_is_zeroed_on_request_and_else_kept(grad_dtype: torch.dtype):
    for zero_grad in (False, True):
        grad = draw(100, dtype=grad_dtype)
        before = grad.clone()
        adamw_flat_step(*state(100), grad, None, 1, 1e-3, 0.0, 3.0, CONFIG, zero_grad=zero_grad)
        assert torch.equal(grad, torch.zeros_like(grad) if zero_grad else before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_that_zeroes_the_gradient_is_the_same_step(dtype: torch.dtype):
    results = []
    for zero_grad in (False, True):
        tensors, weights, grad = state(1500), draw(1500, dtype=dtype), draw(1500, dtype=dtype, seed=1)
        adamw_flat_step(*tensors, grad, weights, 1, 1e-3, 0.1, 2.0, CONFIG, zero_grad=zero_grad)
        results.append([*tensors, weights])
        assert (grad.count_nonzero() == 0) == zero_grad
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_slice_leaves_its_neighbours_alone():
    whole = [draw(100, seed=i).abs() for i in range(4)]
    before = [x.clone() for x in whole]
    adamw_flat_step(*(x[3:60] for x in whole), None, 1, 1e-2, 0.1, 1.0, CONFIG, zero_grad=True)
    for a, b in zip(whole, before):
        assert torch.equal(a[:3], b[:3]) and torch.equal(a[60:], b[60:]) and not torch.equal(a[3:60], b[3:60])


def test_extreme_gradients():
    grad = torch.tensor([0.0, 1e-30, 1e18, -1e18, 1e-8, 3.0], device=DEVICE)
    ours, exact = state(6), state(6, torch.float64)
    adamw_flat_step(*ours, grad, None, 1, 1e-2, 0.1, 1.0, CONFIG)
    adamw_flat_reference(*exact, grad.double(), None, 1, 1e-2, 0.1, 1.0, CONFIG)
    assert all(x.isfinite().all() for x in ours)
    assert torch.allclose(ours[0].double(), exact[0], rtol=1e-6)


def test_nothing_to_step():
    empty = torch.zeros(0, device=DEVICE)
    adamw_flat_step(empty, empty, empty, empty, None, 1, 1e-2, 0.1, 1.0, CONFIG)
    assert sum_of_squares(empty) == 0.0


def test_what_the_kernel_cannot_step_is_refused():
    flat, wide = draw(6), draw(6).double()
    with pytest.raises(ValueError, match="float64"):
        adamw_flat_step(flat, flat, flat, wide, None, 1, 1e-2, 0.1, 1.0, CONFIG)
    with pytest.raises(ValueError, match="must be float32"):
        adamw_flat_step(flat.half(), flat, flat, flat, None, 1, 1e-2, 0.1, 1.0, CONFIG)
    with pytest.raises(ValueError, match="contiguous"):
        adamw_flat_step(flat, flat, flat, draw(12)[::2], None, 1, 1e-2, 0.1, 1.0, CONFIG)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2047, 100_003])
def test_sum_of_squares(size: int, dtype: torch.dtype):
    x = draw(size, dtype=dtype, scale=1e-2)
    total = sum_of_squares(x)
    assert total.dtype == torch.float64
    assert torch.allclose(total, x.double().square().sum(), rtol=1e-13)
    assert torch.equal(total, sum_of_squares(x))


def test_sum_of_squares_beyond_float32():
    assert sum_of_squares(torch.full((3,), 1e30, device=DEVICE)).item() == pytest.approx(3e60)
    assert sum_of_squares(torch.tensor([1.0, float("inf")], device=DEVICE)).isinf()
