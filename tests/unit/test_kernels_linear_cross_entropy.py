"""Projection and cross entropy in chunks, with the Triton kernels and in plain PyTorch, against float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.linear_cross_entropy import (
    chunk_size,
    linear_cross_entropy_reference,
    linear_cross_entropy_sum,
    linear_token_logprobs,
)  # fmt: skip
from model.ops import REFERENCE, build_ops
from tests.kernel_checks import DEVICE, DTYPES, compare, draw, root_mean_square

SHAPES = [(1, 1, 1), (7, 16, 33), (12, 24, 300), (0, 4, 8), (4, 8, 4999)]
"""(N, C, V)."""
with_and_without_triton = pytest.mark.parametrize("use_triton", [True, False], ids=["triton", "torch"])


def case(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and labels, some of them ignored."""
    tokens, size, vocab_size = shape
    labels = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(5))
    labels[3::4] = -100
    return draw(tokens, size, dtype=dtype), draw(vocab_size, size, dtype=dtype, seed=1), labels.to(DEVICE)


def exact_losses(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses + (z_loss * logits.logsumexp(-1).square()).where(labels != -100, 0.0)


def three_chunks(tokens: int, weight: Tensor) -> int:
    """chunk_bytes that cuts the tokens into three chunks."""
    return max(-(-tokens // 3), 1) * len(weight) * weight.element_size()


@with_and_without_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, z_loss", [*((shape, 0.0) for shape in SHAPES), ((7, 16, 33), 1e-3)])
@pytest.mark.parametrize("upstream, grad_scale", [(0.3, 0.3), (0.5, 1.0)], ids=["as expected", "half"])
def test_sum(
    shape: tuple[int, int, int], z_loss: float, upstream: float, grad_scale: float, dtype: torch.dtype, use_triton: bool
):
    """The expected upstream gradient, and one that is an exact multiple of it."""
    hidden, weight, labels = case(shape, dtype)
    options = {"z_loss": z_loss, "chunk_bytes": three_chunks(shape[0], weight), "use_triton": use_triton}
    compare(
        lambda h, w: linear_cross_entropy_sum(h, w, labels, grad_scale=grad_scale, **options),
        lambda h, w: linear_cross_entropy_reference(h, w, labels, z_loss=z_loss).sum(),
        lambda h, w: exact_losses(h, w, labels, z_loss).sum(), [hidden, weight],
        upstream=[torch.tensor(upstream, device=DEVICE)],
    )  # fmt: skip


@with_and_without_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_token_logprobs(shape: tuple[int, int, int], dtype: torch.dtype, use_triton: bool):
    hidden, weight, labels = case(shape, dtype)
    chunk_bytes = three_chunks(shape[0], weight)
    compare(
        lambda h, w: linear_token_logprobs(h, w, labels, chunk_bytes=chunk_bytes, use_triton=use_triton),
        lambda h, w: -linear_cross_entropy_reference(h, w, labels), lambda h, w: -exact_losses(h, w, labels),
        [hidden, weight],
    )  # fmt: skip


@with_and_without_triton
def test_errors_over_many_draws(use_triton: bool):
    """Most of the error comes from the matrix products, ours and eager's alike. For few tokens, luck decides which
    float32 error is larger; over a dozen draws ours are not larger."""
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(12):
        labels = torch.randint(0, 33, (7,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        leaves = [draw(7, 16, seed=100 + seed).requires_grad_(), draw(33, 16, seed=200 + seed).requires_grad_()]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        ours, eager, exact = (
            (loss.detach(), *torch.autograd.grad(loss, inputs))
            for loss, inputs in (
                (linear_cross_entropy_sum(*leaves, labels, chunk_bytes=400, use_triton=use_triton), leaves),
                (linear_cross_entropy_reference(*leaves, labels).sum(), leaves),
                (exact_losses(*wide, labels).sum(), wide),
            )
        )
        for i, tensors in enumerate(zip(ours, eager, exact)):
            for j in range(2):
                squares[j, i] += root_mean_square(tensors[j], tensors[2]) ** 2
    assert (squares[0] <= 1.1 * squares[1]).all()


@with_and_without_triton
@pytest.mark.parametrize("function", [linear_cross_entropy_sum, linear_token_logprobs])
def test_large_logits_and_all_labels_ignored(function, use_triton: bool):
    for scale, labels in ((100.0, [0, 8, -100]), (1.0, [-100, -100, -100])):
        hidden, weight = draw(3, 5, scale=scale).requires_grad_(), draw(9, 5, seed=1, scale=scale).requires_grad_()
        labels = torch.tensor(labels, device=DEVICE)
        ours = function(hidden, weight, labels, use_triton=use_triton, chunk_bytes=2 * 9 * 4).sum()
        eager = linear_cross_entropy_reference(hidden, weight, labels).sum()
        assert torch.allclose(ours.abs(), eager)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, eager))):
            assert a.isfinite().all() and torch.allclose(a.abs(), b.abs(), atol=1e-6)


@with_and_without_triton
@pytest.mark.parametrize("function", [linear_cross_entropy_sum, linear_token_logprobs])
@pytest.mark.parametrize("needed", [0, 1])
def test_gradient_of_one_input_only(needed: int, function, use_triton: bool):
    hidden, weight, labels = case((7, 6, 11))
    (hidden, weight)[needed].requires_grad_()
    ours = function(hidden, weight, labels, use_triton=use_triton, chunk_bytes=200).sum()
    eager = linear_cross_entropy_reference(hidden, weight, labels).sum()
    a, b = (torch.autograd.grad(x, (hidden, weight)[needed])[0] for x in (ours, eager))
    assert torch.allclose(a.abs(), b.abs(), rtol=1e-5, atol=1e-6)


@with_and_without_triton
def test_hidden_states_that_are_a_view(use_triton: bool):
    hidden, weight, labels = case((12, 6, 11))
    hidden.requires_grad_()
    view = hidden.view(3, 4, 6)[:, 1:]
    labels = labels.view(3, 4)[:, 1:]
    ours = linear_cross_entropy_sum(view, weight, labels, use_triton=use_triton, chunk_bytes=200)
    eager = linear_cross_entropy_reference(view.flatten(0, 1), weight, labels.flatten()).sum()
    a, b = (torch.autograd.grad(x, hidden)[0] for x in (ours, eager))
    assert torch.allclose(ours, eager) and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@with_and_without_triton
def test_without_gradients_only_the_losses_are_computed(use_triton: bool):
    hidden, weight, labels = case((7, 6, 11))
    weight.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, labels, use_triton=use_triton)
    assert not loss.requires_grad
    assert torch.allclose(loss, linear_cross_entropy_reference(hidden, weight, labels).sum())


@with_and_without_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_added_to_a_buffer(dtype: torch.dtype, use_triton: bool):
    hidden, weight, labels = case((20, 6, 33), dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    options = {"use_triton": use_triton, "chunk_bytes": 1000}
    expected = torch.autograd.grad(
        linear_cross_entropy_sum(hidden, weight, labels, grad_scale=0.25, **options) * 0.25, (hidden, weight)
    )
    buffer = torch.ones(33, 6, device=DEVICE)
    loss = linear_cross_entropy_sum(hidden, weight, labels, weight_grad=buffer, grad_scale=0.25, **options)
    (loss * 0.25).backward()
    assert weight.grad is None and torch.equal(hidden.grad, expected[0])
    assert torch.allclose(buffer - 1, expected[1].float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_another_upstream_gradient_than_the_buffer_was_promised_shows():
    hidden, weight, labels = case((5, 6, 7))
    hidden.requires_grad_(), weight.requires_grad_()
    buffer = torch.zeros(7, 6, device=DEVICE)
    linear_cross_entropy_sum(hidden, weight, labels, weight_grad=buffer, grad_scale=0.5).backward()
    assert hidden.grad.isnan().all()


@with_and_without_triton
def test_grad_scale_keeps_small_gradients_in_float16(use_triton: bool):
    """Softmax's tail underflows in float16 unless the loss scale reaches it before it is rounded."""
    weight = torch.eye(8, device=DEVICE).half()
    hidden = (torch.eye(8, device=DEVICE)[:1] * 18).half().requires_grad_()
    labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for grad_scale, survives in ((1024.0, True), (torch.tensor(1.0, device=DEVICE), False)):
        loss = linear_cross_entropy_sum(hidden, weight, labels, grad_scale=grad_scale, use_triton=use_triton)
        (gradient,) = torch.autograd.grad(loss * 1024.0, hidden)
        assert (gradient[0, 1:] > 0).all() == survives


def rare_tokens(num_tokens: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """float16 hidden states, weight and labels. All but 8 of the 300 words have probabilities from 1e-10 to 1e-8."""
    hidden, weight = draw(num_tokens, 24, seed=2), 0.25 * draw(300, 24, seed=3)
    hidden[:, 0], weight[:8, 0], weight[8:, 0] = 4.0, 5.0, 0.0
    labels = torch.randint(0, 8, (num_tokens,), generator=torch.Generator().manual_seed(4))
    labels[::5] = -100
    return hidden.half(), weight.half(), labels.to(DEVICE)


def sum_of(kind: str, upstream: float, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`upstream` times the sum of the losses, by the path that `kind` names."""
    if kind == "plain":
        return upstream * build_ops(dict(REFERENCE.names)).loss_sum(hidden, weight, labels, grad_scale=upstream)
    if kind == "plain logprobs":
        return -upstream * build_ops(dict(REFERENCE.names)).token_logprobs(hidden, weight, labels).sum()
    options = {"chunk_bytes": 40 * 300 * 2, "use_triton": "triton" in kind}
    if "logprobs" in kind:
        return -upstream * linear_token_logprobs(hidden, weight, labels, **options).sum()
    return upstream * linear_cross_entropy_sum(hidden, weight, labels, grad_scale=upstream, **options)


@pytest.mark.parametrize("kind", ["torch", "triton", "plain", "torch logprobs", "triton logprobs", "plain logprobs"])
@pytest.mark.parametrize("upstream", [0.13, 16.0, 5000.0])
def test_rows_of_rare_tokens_are_right_in_float16(kind: str, upstream: float):
    """Against float64, with a loss scale of 65,536 over 500,000, 4,096 or 13 tokens. Their rows were zero."""
    hidden, weight, labels = rare_tokens()
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = exact_hidden @ exact_weight.T
    # float16's rounding of the logits themselves is not tested here.
    rounded = logits + ((hidden @ weight.T).double() - logits).detach()
    loss = upstream * F.cross_entropy(rounded, labels, reduction="sum")
    *exact, of_logits = torch.autograd.grad(loss, (exact_hidden, exact_weight, rounded))
    assert 1e-10 < rounded.softmax(dim=-1)[:, 8:].mean() < 1e-8
    # Gradients accumulate in float32, as they do in the loop unless told otherwise.
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    weight.grad_dtype = torch.float32
    sum_of(kind, upstream, *leaves, labels).backward()
    error_of_rows = (weight.grad.double() - exact[1]).norm(dim=1) / exact[1].norm(dim=1)
    # Four times the cost of rounding a number to float16.
    assert error_of_rows.max() <= 2.0**-9
    # The gradient of each logit is rounded, then that of the hidden states.
    allowed = 1.01 * 2.0**-11 * (of_logits.abs() @ exact_weight.abs() + exact[0].abs()) + 2.0**-25
    assert bool(((hidden.grad.double() - exact[0]).abs() <= allowed).all())


@with_and_without_triton
def test_float16_rows_added_to_a_buffer(use_triton: bool):
    hidden, weight, labels = rare_tokens()
    weight.requires_grad_()
    weight.grad_dtype = torch.float32
    options = {"use_triton": use_triton, "grad_scale": 16.0}
    (linear_cross_entropy_sum(hidden, weight, labels, **options) * 16.0).backward()
    buffer = torch.zeros_like(weight.grad)
    (linear_cross_entropy_sum(hidden, weight, labels, weight_grad=buffer, **options) * 16.0).backward()
    assert torch.equal(buffer, weight.grad) and (buffer != 0).all()


@with_and_without_triton
@pytest.mark.parametrize("upstream", [[1e-30] * 4, [0.0] * 4, [3e4, 1, 0, 1e38], [1, float("inf"), 1, 0]], ids=str)
def test_float16_log_probabilities_with_upstream_gradients_of_any_size(upstream: list[float], use_triton: bool):
    """The last token is ignored, whatever gradient it gets. Infinities must arrive, because the step has to be
    skipped."""
    hidden, weight = draw(4, 6).half().requires_grad_(), draw(9, 6, seed=1).half().requires_grad_()
    labels, upstream = torch.tensor([1, 2, 3, -100], device=DEVICE), torch.tensor(upstream, device=DEVICE)
    weight.grad_dtype = torch.float32
    linear_token_logprobs(hidden, weight, labels, use_triton=use_triton).backward(upstream)
    wide = weight.detach().double().requires_grad_()
    losses = exact_losses(hidden.detach().double(), wide, labels)
    (exact,) = torch.autograd.grad(-losses, wide, upstream.double())
    if not torch.isfinite(upstream).all():
        assert not torch.isfinite(weight.grad).all() and not torch.isfinite(hidden.grad).all()
    else:
        assert (weight.grad.double() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("function", [linear_cross_entropy_sum, linear_token_logprobs])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_a_cpu_give_the_same_bits(function: Callable, dtype: torch.dtype, monkeypatch):
    """Tiles of 2 tokens instead of all 7."""
    hidden, weight, labels = (x.cpu() for x in case((7, 16, 33), dtype))
    results = []
    for elements in (1 << 18, 80):
        monkeypatch.setattr("model.kernels.linear_cross_entropy.TILE_ELEMENTS", elements)
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = function(*inputs, labels, use_triton=False)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[0][1].abs().max() > 0


def test_gradients_may_come_in_two_passes_but_not_in_three():
    """One pass for the hidden states and one for the weight, as under zero-bubble schedules."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in case((5, 6, 7))]

    def loss() -> torch.Tensor:
        return linear_cross_entropy_sum(*inputs, grad_scale=0.5, use_triton=False) * 0.25

    wanted, apart = torch.autograd.grad(loss(), inputs[:2]), loss()
    for tensor, gradient in zip(inputs, wanted):
        assert torch.equal(*torch.autograd.grad(apart, [tensor], retain_graph=True), gradient)
    with pytest.raises(RuntimeError, match="two backward passes"):
        apart.backward()
    another = loss()
    another.backward(retain_graph=True)
    assert torch.autograd.grad(2 * another, inputs[:1])[0].isnan().all()


@pytest.mark.parametrize("tokens, vocab_size, itemsize, chunk_bytes", [
    (16_384, 64_320, 2, 96 << 20), (16_384, 151_936, 2, 96 << 20), (5, 100, 4, 1), (1, 10, 4, 1 << 30), (0, 10, 2, 100),
    (1000, 1000, 2, 128 * 2000), (1000, 1000, 2, 127 * 2000),
])  # fmt: skip
def test_chunks_keep_to_the_budget_and_are_about_even(tokens: int, vocab_size: int, itemsize: int, chunk_bytes: int):
    size = chunk_size(tokens, vocab_size, itemsize, chunk_bytes)
    row = vocab_size * itemsize
    assert size >= 1 and (size * row <= chunk_bytes or size == 1)
    count = -(-tokens // size)
    limit = max(chunk_bytes // row, 1)
    fewest = -(-tokens // (limit - limit % 128 if limit >= 128 else limit))
    assert count == fewest


def test_what_does_not_fit_is_refused():
    hidden, weight, labels = case((5, 6, 7))
    with pytest.raises(ValueError, match="one dtype"):
        linear_cross_entropy_sum(hidden, weight.half(), labels)
    with pytest.raises(ValueError, match="4 labels"):
        linear_token_logprobs(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="float32"):
        linear_cross_entropy_sum(hidden, weight, labels, weight_grad=torch.zeros(7, 6, dtype=torch.float16))


@pytest.mark.parametrize("kind", ["reference", "chunked", "triton"])
def test_the_losses_behind_the_sum_are_told(kind: str):
    hidden, weight, labels = case((12, 24, 300))
    loss_sum = build_ops({"cross_entropy": kind}).loss_sum
    told = torch.full((12,), torch.nan, device=DEVICE)
    hidden.requires_grad_()
    total = loss_sum(hidden, weight, labels, told=told)
    exact = exact_losses(hidden.detach().double(), weight.double(), labels)
    torch.testing.assert_close(told.double(), exact, rtol=1e-5, atol=1e-5)
    assert told[3] == 0 and not told.requires_grad
    # Whoever asks for them gets the same gradient.
    total.backward()
    (gradient,), hidden.grad = (hidden.grad,), None
    loss_sum(hidden, weight, labels).backward()
    assert torch.equal(hidden.grad, gradient)
