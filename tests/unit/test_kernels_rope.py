"""Rotary embedding of queries and keys against float64."""

import pytest
import torch
from torch import Tensor

from model.kernels.rope import rope, rope_reference
from tests.kernel_checks import DEVICE, DTYPES, compare, draw

SHAPES = [(1, 1, 1, 1, 2), (2, 3, 4, 2, 16), (2, 2, 6, 1, 10), (1, 4, 3, 3, 48), (2, 0, 2, 1, 4), (1, 2, 32, 8, 64)]
"""(B, T, H, K, D)."""


def tables(batch: int, tokens: int, head_dim: int, wide: bool = False) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tokens, device=DEVICE) * 37 + 1000 * torch.arange(batch, device=DEVICE)[:, None]
    angles = positions[:, None, :, None] * 10_000.0 ** -torch.linspace(0, 1, head_dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    return (cos.double(), sin.double()) if wide else (cos, sin)


def exact_rope(*tensors: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> list[Tensor]:
    """As a product with complex numbers, whose real and imaginary parts are the channels of a pair."""
    turns, dim, rotated = torch.complex(cos.double(), sin.double()), 2 * cos.shape[-1], []
    for x in tensors:
        pairs = x[..., :dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
        product = torch.complex(*pairs.unbind(-1 if interleaved else -2)) * turns
        joined = torch.stack((product.real, product.imag), dim=-1 if interleaved else -2).flatten(-2)
        rotated.append(torch.cat((joined, x[..., dim:]), dim=-1))
    return rotated


def check(view, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> None:
    compare(
        lambda q, k: rope(view(q), view(k), cos, sin, interleaved),
        lambda q, k: rope_reference(view(q), view(k), cos, sin, interleaved),
        lambda q, k: exact_rope(view(q), view(k), cos=cos, sin=sin, interleaved=interleaved), [q, k],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_as_the_model_calls_it(shape: tuple[int, ...], dtype: torch.dtype):
    batch, tokens, q_heads, k_heads, head_dim = shape
    q, k = (draw(batch, tokens, heads, head_dim, dtype=dtype, seed=heads) for heads in (q_heads, k_heads))
    check(lambda x: x.transpose(1, 2), q, k, *tables(batch, tokens, head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("shape", "rotary_dim"), [(SHAPES[1], 16), (SHAPES[1], 4), (SHAPES[2], 6), (SHAPES[3], 46),
                                                   ((1, 2, 3, 1, 5), 4)])  # fmt: skip
def test_pairs_side_by_side_and_channels_that_stay(
    shape: tuple[int, ...], rotary_dim: int, interleaved: bool, dtype: torch.dtype
):
    batch, tokens, q_heads, k_heads, head_dim = shape
    q, k = (draw(batch, tokens, heads, head_dim, dtype=dtype, seed=heads) for heads in (q_heads, k_heads))
    cos, sin = tables(batch, tokens, rotary_dim)
    # As with a scale, the tables' squares do not add up to 1.
    check(lambda x: x.transpose(1, 2), q, k, 1.25 * cos, 1.25 * sin, interleaved)
    for ours in (rope, rope_reference):
        rotated = ours(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved)
        for before, after in zip((q, k), rotated):
            assert torch.equal(before.transpose(1, 2)[..., rotary_dim:], after[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_for_itself(dtype: torch.dtype):
    cos, sin = tables(40, 1, 2)
    compare(
        lambda q, k: rope(q, k, cos, sin), lambda q, k: rope_reference(q, k, cos, sin),
        lambda q, k: exact_rope(q, k, cos=cos, sin=sin),
        [draw(40, 1, 1, 2, dtype=dtype, seed=11), draw(40, 1, 1, 2, dtype=dtype, seed=12)], by_row=True,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"rotary_dim": 2, "interleaved": True}], ids=["whole", "interleaved part"])
@pytest.mark.parametrize("view", [
    lambda x: x, lambda x: x.transpose(0, 1), lambda x: x.transpose(1, 3), lambda x: x[:, :, :, ::2],
    lambda x: x[:, 1:3], lambda x: x[:, :1].expand(-1, 5, -1, -1), lambda x: x[:1].expand(2, -1, -1, -1),
], ids=["BHTD", "batch second", "channels second", "every other", "some heads", "one head", "one row"])  # fmt: skip
def test_rope_of_views(view, options: dict):
    x = draw(4, 4, 4, 4)
    batch, _, tokens, head_dim = view(x).shape
    cos, sin = tables(batch, tokens, options.get("rotary_dim", head_dim))
    check(view, x, draw(4, 4, 4, 4, seed=1), cos, sin, options.get("interleaved", False))


def test_one_table_for_all_rows_and_tables_that_are_views():
    cos, sin = tables(1, 2, 8)
    q, k = draw(3, 2, 2, 8), draw(3, 2, 2, 8, seed=1)
    check(lambda x: x, q, k, cos, sin)
    check(lambda x: x, q, k, cos.expand(3, -1, -1, -1), sin.transpose(2, 3).contiguous().transpose(2, 3))


def test_results_are_contiguous_when_transposed():
    cos, sin = tables(2, 5, 8)
    for x in rope(draw(2, 4, 5, 8), draw(2, 2, 5, 8), cos, sin):
        assert x.transpose(1, 2).is_contiguous()


def test_gradients_of_queries_only():
    cos, sin = tables(2, 5, 8)
    q, k = draw(2, 4, 5, 8).requires_grad_(), draw(2, 2, 5, 8, seed=1)
    ours, eager = (torch.autograd.grad(f(q, k, cos, sin)[0].sin().sum(), q)[0] for f in (rope, rope_reference))
    assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-6)


def test_wrong_tables_are_refused():
    q, k = draw(2, 4, 5, 8), draw(2, 2, 5, 8)
    for cos, sin in (tables(2, 4, 8), tables(2, 5, 16), tables(2, 5, 8, wide=True)):
        with pytest.raises(ValueError, match="tables"):
            rope(q, k, cos, sin)
