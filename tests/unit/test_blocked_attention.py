"""Attention in blocks, for CPUs, against torch's attention with a mask in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attend import causal_mask, document_starts
from model.kernels import blocked_attention as blocked
from model.kernels.attention import plain_attention

GROUPS = [(4, 4), (4, 2), (3, 1)]
"""(query heads, key and value heads)."""


def draw(batch: int, width: int, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, with the strides that projections write."""
    generator = torch.Generator().manual_seed(width)
    counts = heads[0], heads[1], heads[1], heads[0]
    return [
        torch.randn(batch, width, count, dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for count in counts
    ]


def documents_of(batch: int, width: int, every: float) -> Tensor:
    """Ids of documents of random lengths, different in each row."""
    generator = torch.Generator().manual_seed(int(every))
    return (torch.rand(batch, width, generator=generator) < 1 / every).cumsum(dim=1)


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def under_a_mask(documents: Tensor | None, width: int):
    mask = causal_mask(width, width, documents, torch.device("cpu"))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("width, dim", [(1, 8), (127, 16), (128, 16), (129, 32), (300, 8), (300, 64)])
@pytest.mark.parametrize("every", [None, 1, 3, 60, 200])
def test_equals_torchs(width: int, dim: int, heads: tuple[int, int], every: float | None):
    """Rows are shorter and longer than a block; weights are kept (up to 8 dim tokens) or recomputed; documents have one
    token, several to a block, or several blocks."""
    tensors = draw(3, width, heads, dim, torch.float64)
    documents = documents_of(3, width, every) if every else None
    starts = document_starts(documents) if every else None
    ours = with_gradients(lambda q, k, v: blocked.blocked_attention(q, k, v, starts), *tensors)
    for found, expected in zip(ours, with_gradients(under_a_mask(documents, width), *tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elements", [1, 2 * 4 * 128 * 150])
def test_rows_are_computed_alone_and_together_alike(elements: int, monkeypatch):
    tensors = draw(5, 150, (4, 2), 32, torch.float64)
    monkeypatch.setattr(blocked, "GROUP_ELEMENTS", elements)
    ours = with_gradients(blocked.blocked_attention, *tensors)
    for found, expected in zip(ours, with_gradients(under_a_mask(None, 150), *tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width, every", [(96, None), (400, None), (400, 50), (700, None)])
def test_error_is_at_most_twice_the_plain_formulas(width: int, every: float | None, dtype: torch.dtype):
    tensors = draw(2, width, (4, 2), 64, dtype)
    documents = documents_of(2, width, every) if every else None
    starts = document_starts(documents) if every else None
    mask = causal_mask(width, width, documents, torch.device("cpu"))
    exact = with_gradients(under_a_mask(documents, width), *(x.double() for x in tensors))
    ours = with_gradients(lambda q, k, v: blocked.blocked_attention(q, k, v, starts), *tensors)
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, mask, 0.0, None), *tensors)
    for found, eager, expected in zip(ours, plain, exact):
        assert found.dtype == dtype
        assert (found - expected).norm() <= 2 * (eager - expected).norm()
        assert (found - expected).abs().max() <= 2 * (eager - expected).abs().max()


def test_weights_are_kept_for_the_backward_pass_of_short_rows_only():
    assert blocked.kept_size(2, 3, 512, 64) == 2 * 3 * 128 * (128 + 256 + 384 + 512)
    assert blocked.kept_size(2, 3, 513, 64) == 0
    q, k, v, _ = draw(1, 64, (2, 2), 8, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        blocked.blocked_attention(q.detach().requires_grad_(), k, v)
    assert kept[-1] == 2 * 64 * 64
    with torch.no_grad():
        blocked.blocked_attention(q, k, v)


@pytest.mark.parametrize("every", [None, 20])
def test_shapes_are_known_without_computing(every: float | None):
    """torch.compile relies on these shapes."""
    q, k, v, dout = draw(2, 140, (4, 2), 32, torch.float32)
    starts = document_starts(documents_of(2, 140, every)) if every else None
    keep = blocked.kept_size(2, 4, 140, 32)
    memory = torch.ops.zero2all.blocked_attention(q, k, v, starts, keep)[1]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.zero2all.blocked_attention.default, (q, k, v, starts, keep), test_utils=checks)
    torch.library.opcheck(
        torch.ops.zero2all.blocked_attention_backward.default, (dout, q, k, v, starts, memory), test_utils=checks
    )
