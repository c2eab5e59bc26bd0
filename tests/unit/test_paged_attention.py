"""Attention of texts with one new token each: against the formula in float64, text by text."""

import random

import pytest
import torch
from torch import Tensor

from model import ModelConfig
from model.attend import alibi_slopes
from model.kernels.paged_attention import Single, attend_group, attend_runs, groups_of, runs_of
from model.paged import PagedCache, PagedStep, Segment
from tests.unit.test_paged import new_model

CPU = torch.device("cpu")
HEADS, WIDTH, SIZE = 6, 8, 4


def texts_of(lengths: list[int], is_scattered: bool) -> list[Single]:
    draw = random.Random(3)
    blocks = list(range(sum(-(-length // SIZE) for length in lengths) + 3))
    if is_scattered:
        draw.shuffle(blocks)
    # Rows of other texts lie between them.
    taken = ([blocks.pop(0) for _ in range(-(-length // SIZE))] for length in lengths)
    return [Single(2 * number + 1, length, its) for number, (length, its) in enumerate(zip(lengths, taken))]


def of_text(pool_KSD: Tensor, text: Single, window: int) -> tuple[Tensor, int]:
    first = max(text.length - window, 0) if window else 0
    slots = [text.blocks[place // SIZE] * SIZE + place % SIZE for place in range(first, text.length)]
    return pool_KSD[:, slots], first


def by_formula(q_HD: Tensor, keys: Tensor, values: Tensor, text: Single, window: int, slopes: Tensor | None) -> Tensor:
    (k_KSD, first), (v_KSD, _) = (of_text(pool, text, window) for pool in (keys, values))
    k_HSD, v_HSD = (x.repeat_interleave(HEADS // len(x), dim=0) for x in (k_KSD, v_KSD))
    wide = torch.promote_types(q_HD.dtype, torch.float32)
    scores_HS = torch.einsum("hd,hsd->hs", q_HD, k_HSD) / WIDTH**0.5
    if slopes is not None:
        distances_S = text.length - 1.0 - torch.arange(first, text.length, dtype=wide)
        scores_HS = scores_HS - slopes[:, None].to(wide) * distances_S
    return torch.einsum("hs,hsd->hd", scores_HS.softmax(-1, dtype=wide).to(v_HSD.dtype), v_HSD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("lengths", [[1], [9], [16], [3, 12, 4, 5], [1, 2, 60, 33, 17, 64]], ids=str)
def test_against_the_formula(lengths: list[int], kv_heads: int, window: int, has_slopes: bool, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    slopes = alibi_slopes(HEADS) if has_slopes else None
    for is_scattered, exactly in ((False, False), (True, False), (False, True)):
        texts = texts_of(lengths, is_scattered)
        slots = (max(block for text in texts for block in text.blocks) + 1) * SIZE
        keys, values = torch.randn(2, kv_heads, slots, WIDTH, generator=generator).to(dtype)
        q_HND = torch.randn(HEADS, 2 * len(texts) + 1, WIDTH, generator=generator).to(dtype)
        found = torch.zeros_like(q_HND)
        runs, others = ([], texts) if exactly else runs_of(texts, SIZE, window, slopes, dtype, CPU)
        assert bool(others) != bool(runs) or is_scattered
        if runs:
            views = [tuple(x[:, run.place : run.place + run.num_keys] for x in (keys, values)) for run in runs]
            attend_runs(q_HND, runs, views, found)
        for group in groups_of(others, q_HND.shape[1], SIZE, window, slopes, CPU, exactly):
            out = attend_group(q_HND[:, group.rows_B].transpose(0, 1), keys, values, group, SIZE)
            found[:, group.rows_B] = out.transpose(0, 1)
        for text in texts:
            exact = by_formula(*(x.double() for x in (q_HND[:, text.row], keys, values)), text, window, slopes)
            error = (found[:, text.row].double() - exact).abs().max()
            assert error <= 1e-12 if dtype == torch.float64 else error <= 2 * plain_error(
                q_HND[:, text.row], keys, values, text, window, slopes, exact
            ), (text, error)  # fmt: skip
    assert not found[:, ::2].any()


def plain_error(
    q_HD: Tensor, keys: Tensor, values: Tensor, text: Single, window: int, slopes: Tensor | None, exact: Tensor
) -> float:
    """Of the formula step by step in the same dtype, with softmax in float32 as in transformers' eager attention; or
    half a unit in the last place of a value."""
    plain = by_formula(q_HD, keys, values, text, window, slopes)
    unit = torch.finfo(q_HD.dtype).eps * values.abs().max()
    return max(float((plain.double() - exact).abs().max()), float(unit) / 2)


def test_texts_of_alike_lengths_are_together():
    texts = [Single(row, length, range(length)) for row, length in enumerate((1, 3, 9, 700, 16, 1000, 33, 40, 513))]
    groups = groups_of(texts, len(texts), 1, 0, None, CPU)
    members = [[texts[row].length for row in group.rows_B] for group in groups]
    assert members == [[1, 3], [9, 16], [700, 1000, 513], [33, 40]]
    assert all(group.num_keys < 2 * min(its) or max(its) <= 4 for group, its in zip(groups, members))


@pytest.mark.parametrize("num_texts", [1, 2])
@pytest.mark.parametrize("num_new", [1, 2])
def test_what_others_left_in_a_block_is_never_seen(num_new: int, num_texts: int):
    """Not even numbers that no mask hides."""
    config = ModelConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model, ids = new_model(config.resolve(32, 32)), torch.arange(16).view(1, 16) % 32

    def run(left: float) -> Tensor:
        cache = PagedCache(model.config, 8, SIZE, torch.float32, CPU)
        cache.append(0, torch.tensor([0]), *torch.zeros(2, 2, 1, 8))
        cache.pool.fill_(left)
        outputs = []
        for end in range(num_new, 8 + num_new, num_new):
            # Alone, or attended to together.
            segments = [Segment(num_new, end, [5, 1, 7]), Segment(num_new, end, [2, 6, 3])][:num_texts]
            outputs.append(model(ids[:, : num_texts * num_new] + end, cache=PagedStep(cache, segments)))
        return torch.cat(outputs, dim=1)

    with torch.no_grad():
        assert torch.equal(run(float("nan")), run(0.0))
