"""Per-token cross entropy whose gradient overwrites the logits, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    cross_entropy_with_gradient_,
)  # fmt: skip
from tests.kernel_checks import DEVICE, DTYPES, compare, draw

SHAPES = [(1, 1), (5, 1), (1, 1000), (12, 37), (4, 300), (0, 8), (2, 9001)]


def exact(logits: Tensor, labels: Tensor, ignore_index: int = -100, z_loss: float = 0.0) -> Tensor:
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    return losses + (z_loss * logits.logsumexp(-1).square()).where(labels != ignore_index, 0.0)


def draw_labels(count: int, vocab_size: int, ignored: float = 0.25) -> Tensor:
    """The labels include the first and the last word, and ignored ones."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocab_size, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < ignored] = -100
    labels[:2] = torch.tensor([vocab_size - 1, 0])[:count]
    return labels.to(DEVICE)


def check(logits: Tensor, labels: Tensor, view=lambda x: x * 1, **options) -> None:
    compare(
        lambda x: cross_entropy(view(x), labels, **options),
        lambda x: cross_entropy_reference(view(x), labels, **options),
        lambda x: exact(view(x), labels, **options), [logits],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, z_loss", [*((shape, 0.0) for shape in SHAPES), ((12, 37), 1e-2), ((2, 9001), 1e-2)])
def test_cross_entropy(shape: tuple[int, int], z_loss: float, dtype: torch.dtype):
    check(draw(*shape, dtype=dtype, scale=3), draw_labels(*shape), z_loss=z_loss)


@pytest.mark.parametrize("vocab_size", [2, 37, 300])
def test_each_row_for_itself(vocab_size: int):
    """Half of the labels have the largest logit, so their losses are the logarithm of a sum just above 1. The
    exponentials of 16-bit logits are float32, and so small a loss is off by a unit or two."""
    logits, labels = draw(64, vocab_size, scale=3, seed=11), draw_labels(64, vocab_size, ignored=0.1)
    labels[2::2] = logits[2::2].float().argmax(dim=-1)
    compare(
        lambda x: cross_entropy(x * 1, labels), lambda x: cross_entropy_reference(x * 1, labels),
        lambda x: exact(x, labels), [logits], by_row=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extreme_logits(dtype: torch.dtype, scale: float):
    check(draw(8, 50, dtype=dtype, scale=scale), draw_labels(8, 50))


def test_logits_of_minus_infinity():
    """Some words are ruled out, among them the whole first block of a row."""
    logits = draw(3, 9001)
    logits[:, :4096] = -float("inf")
    labels = torch.tensor([9000, 4096, 5000], device=DEVICE)
    ours, eager = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = cross_entropy(ours, labels), cross_entropy_reference(eager, labels)
    assert torch.allclose(a, b)
    assert torch.allclose(*(torch.autograd.grad(x.sum(), y)[0] for x, y in ((a, ours), (b, eager))))


@pytest.mark.parametrize("labels", [[-100] * 4, [0, 0, 0, 0], [9, -100, 9, -100]], ids=["all ignored", "first", "last"])
def test_labels(labels: list[int]):
    check(draw(24, 10), torch.tensor(labels * 6, device=DEVICE))


def test_another_ignore_index_even_one_of_the_vocabulary():
    check(draw(4, 10), torch.tensor([0, 3, 5, 3], device=DEVICE), ignore_index=3)


@pytest.mark.parametrize("label", [10, -1, 2**40, -(2**40)])
def test_a_label_outside_the_vocabulary_is_noticed(label: int):
    logits = draw(3, 10).requires_grad_()
    losses = cross_entropy(logits, torch.tensor([1, label, 2], device=DEVICE))
    assert losses.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("view", [
    lambda x: (x * 1)[:, :7], lambda x: (x * 1)[:, ::2], lambda x: (x * 1).T, lambda x: (x[:1] * 1).expand(6, -1),
    lambda x: x, lambda x: x[1:, 2:],
], ids=["padded vocabulary", "strided", "transposed", "expanded", "a leaf", "a part of a leaf"])  # fmt: skip
def test_views(view):
    rows, columns = view(torch.empty(14, 14)).shape
    check(draw(14, 14), draw_labels(rows, columns), view=view)


def test_leading_dimensions_are_flattened():
    logits, labels = draw(2, 3, 10), draw_labels(6, 10).view(2, 3)
    assert torch.allclose(cross_entropy(logits, labels), cross_entropy_reference(logits.view(6, 10), labels.flatten()))


def test_the_gradient_takes_the_logits_memory():
    x, labels = draw(5, 20).requires_grad_(), draw_labels(5, 20)
    logits, gradients = x * 2, []
    logits.register_hook(gradients.append)
    before = logits.detach().clone()
    losses = cross_entropy(logits, labels)
    assert torch.equal(logits, before)
    losses.sum().backward()
    assert gradients[0].data_ptr() == logits.data_ptr()


def test_a_leaf_keeps_its_value():
    logits = draw(5, 20).requires_grad_()
    before = logits.detach().clone()
    cross_entropy(logits, draw_labels(5, 20)).sum().backward()
    assert torch.equal(logits, before)


def test_who_else_saved_the_logits_gets_an_error():
    x, labels = draw(5, 20).requires_grad_(), draw_labels(5, 20)
    logits = x * 2
    other = logits.square().sum()
    cross_entropy(logits, labels).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_second_backward_pass_is_an_error():
    losses = cross_entropy(draw(5, 20).requires_grad_() * 2, draw_labels(5, 20))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 9001)])
def test_losses_and_gradient_in_one_launch(shape: tuple[int, int], dtype: torch.dtype):
    labels, scale = draw_labels(*shape), torch.tensor(0.75, device=DEVICE)

    class InOne(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits: Tensor) -> Tensor:
            gradient = logits.clone()
            losses = cross_entropy_with_gradient_(gradient, labels, scale, -100, 1e-3)
            ctx.save_for_backward(gradient)
            return losses.sum() * scale

        @staticmethod
        def backward(ctx, upstream: Tensor) -> Tensor:
            return ctx.saved_tensors[0]

    compare(
        InOne.apply, lambda x: cross_entropy_reference(x, labels, z_loss=1e-3).sum() * scale,
        lambda x: exact(x, labels, z_loss=1e-3).sum() * scale.double(), [draw(*shape, dtype=dtype, scale=2)],
        upstream=[torch.ones((), device=DEVICE)],
    )  # fmt: skip
