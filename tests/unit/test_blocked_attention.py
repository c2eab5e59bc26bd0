"""Attention in blocks, for CPUs, against torch's attention with a mask in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attend import alibi_slopes, attention_mask, document_starts
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
    mask = attention_mask(width, width, documents, torch.device("cpu"))
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


def naive(documents: Tensor | None, window: int, slopes: Tensor | None):
    """Every score that a query does not see is -inf, and ALiBi's are added by distance."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, width, dim = q.shape
        ids = documents if documents is not None else torch.zeros(batch, width)
        back = torch.arange(width)[:, None] - torch.arange(width)
        seen = (back >= 0) & (back < (window or width)) & (ids[:, None, :, None] == ids[:, None, None, :])
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / dim**0.5 - (0 if slopes is None else slopes.double()[:, None, None] * back)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [0, 1, 50, 129, 300])
@pytest.mark.parametrize("width, dim", [(129, 32), (300, 8), (397, 64)])
@pytest.mark.parametrize("every", [None, 60])
def test_windows_and_alibi_equal_the_naive_formula(width: int, dim: int, window: int, every: float | None, alibi: bool):
    """Windows are narrower and wider than a block or a row; weights are kept or recomputed."""
    tensors = draw(2, width, (6, 3), dim, torch.float64)
    documents = documents_of(2, width, every) if every else None
    starts = document_starts(documents) if every else None
    slopes = alibi_slopes(6) if alibi else None
    ours = with_gradients(lambda q, k, v: blocked.blocked_attention(q, k, v, starts, window, slopes), *tensors)
    for found, expected in zip(ours, with_gradients(naive(documents, window, slopes), *tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_window_skips_the_blocks_before_it():
    """Counted: weights of 4,096 tokens in a window of 256, of which a block sees 256 + 127 before its end."""
    starts = torch.arange(0, 4097, 4096)
    with_window, without = (
        sum((block.end - block.first) * (block.end - block.first_key) for block in blocks)
        for window in (256, 0)
        for _, blocks in blocked._groups(1, 4, 4096, starts, window)
    )
    assert without == 4096 * (4096 + 128) // 2 and with_window < 4096 * (256 + 128)


@pytest.mark.parametrize("elements", [1, 2 * 4 * 128 * 150])
def test_rows_are_computed_alone_and_together_alike(elements: int, monkeypatch):
    tensors = draw(5, 150, (4, 2), 32, torch.float64)
    monkeypatch.setattr(blocked, "GROUP_ELEMENTS", elements)
    ours = with_gradients(blocked.blocked_attention, *tensors)
    for found, expected in zip(ours, with_gradients(under_a_mask(None, 150), *tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width, every", [(96, None), (400, None), (400, 50), (700, None)])
@pytest.mark.parametrize("window, alibi", [(0, False), (0, True), (60, True)])
def test_error_is_at_most_twice_the_plain_formulas(
    width: int, every: float | None, dtype: torch.dtype, window: int, alibi: bool
):
    tensors = draw(2, width, (4, 2), 64, dtype)
    documents = documents_of(2, width, every) if every else None
    starts = document_starts(documents) if every else None
    slopes = alibi_slopes(4) if alibi else None
    mask = attention_mask(width, width, documents, torch.device("cpu"), window=window, slopes_H=slopes)
    exact = with_gradients(naive(documents, window, slopes), *(x.double() for x in tensors))
    ours = with_gradients(lambda q, k, v: blocked.blocked_attention(q, k, v, starts, window, slopes), *tensors)
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, mask, 0.0, None), *tensors)
    for found, eager, expected in zip(ours, plain, exact):
        assert found.dtype == dtype
        assert (found - expected).norm() <= 2 * (eager - expected).norm()
        assert (found - expected).abs().max() <= 2 * (eager - expected).abs().max()


def test_weights_are_kept_for_the_backward_pass_of_short_rows_only():
    assert blocked.kept_size(2, 3, 512, 64) == 2 * 3 * 128 * (128 + 256 + 384 + 512)
    assert blocked.kept_size(2, 3, 513, 64) == 0
    # Of a window and its block there are fewer.
    assert blocked.kept_size(2, 3, 4096, 64, window=128) == 2 * 3 * 4096 * 256
    assert blocked.kept_size(2, 3, 4096, 64, window=129) == 0
    q, k, v, _ = draw(1, 64, (2, 2), 8, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        blocked.blocked_attention(q.detach().requires_grad_(), k, v)
    assert kept[-1] == 2 * 64 * 64
    with torch.no_grad():
        blocked.blocked_attention(q, k, v)


@pytest.mark.parametrize("every", [None, 20])
@pytest.mark.parametrize("window, slopes", [(0, None), (30, alibi_slopes(4))])
def test_shapes_are_known_without_computing(every: float | None, window: int, slopes: Tensor | None):
    """torch.compile relies on these shapes."""
    q, k, v, dout = draw(2, 140, (4, 2), 32, torch.float32)
    starts = document_starts(documents_of(2, 140, every)) if every else None
    limits, keep = (starts, window, slopes), blocked.kept_size(2, 4, 140, 32, window)
    memory = torch.ops.zero2all.blocked_attention(q, k, v, *limits, keep)[1]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.zero2all.blocked_attention.default, (q, k, v, *limits, keep), test_utils=checks)
    torch.library.opcheck(
        torch.ops.zero2all.blocked_attention_backward.default, (dout, q, k, v, *limits, memory), test_utils=checks
    )
