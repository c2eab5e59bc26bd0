"""The kernel for one query a sequence against float64, and in a model."""

import random

import pytest
import torch
from torch import Tensor

from model.attend import alibi_slopes
from model.kernels import paged_decoding
from model.kernels.paged_attention import Single
from model.kernels.paged_decoding import Table, attend_table, attend_table_reference, num_parts_of, table_of
from model.paged import PagedCache, PagedStep, Segment
from tests.kernel_checks import DEVICE, DTYPES, draw, error_ratio
from tests.unit.test_paged import small

CPU = torch.device("cpu")


def texts_of(lengths: list[int], block_size: int) -> list[Single]:
    """In blocks here and there; rows of other texts lie between theirs."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = iter(random.Random(1).sample(range(sum(counts) + 2), sum(counts)))
    return [
        Single(2 * number + 1, length, [next(blocks) for _ in range(count)])
        for number, (length, count) in enumerate(zip(lengths, counts))
    ]  # fmt: skip


def inputs_of(
    lengths: list[int], block_size: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, window: int = 0,
    alibi: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Table]:  # fmt: skip
    """Queries, a pool of keys and values that is NaN where nobody shall look, and the table."""
    texts, slopes = texts_of(lengths, block_size), alibi_slopes(heads, torch.device(DEVICE)) if alibi else None
    table = table_of(texts, 99, block_size, window, slopes, torch.device(DEVICE))
    pool = torch.full((2, kv_heads, block_size * (sum(len(text.blocks) for text in texts) + 2), width), torch.nan)
    values = draw(2, kv_heads, pool.shape[2], width, dtype=dtype, seed=1)
    pool = pool.to(values)
    for text in texts:
        for place in range(max(text.length - window, 0) if window else 0, text.length):
            slot = text.blocks[place // block_size] * block_size + place % block_size
            pool[:, :, slot] = values[:, :, slot]
    return draw(len(texts), heads, width, dtype=dtype, scale=2), pool[0], pool[1], table


def check(*arguments, **options) -> None:
    q, keys, values, table = inputs_of(*arguments, **options)
    exact = attend_table_reference(q.double(), keys.double(), values.double(), table)
    eager = attend_table_reference(q, keys, values, table)
    assert error_ratio(attend_table(q, keys, values, table), eager, exact) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window", "alibi"), [
    (4, 4, 16, 0, False), (6, 2, 20, 5, False), (3, 1, 8, 0, True), (4, 2, 33, 70, True),
])  # fmt: skip
def test_against_float64(heads: int, kv_heads: int, width: int, window: int, alibi: bool, dtype: torch.dtype):
    check([1, 9, 64, 65, 130, 3], 4, heads, kv_heads, width, dtype, window, alibi)


@pytest.mark.parametrize("window", [0, 1, 2, 256, 258, 400])
def test_long_texts_in_parts(window: int):
    check([256, 257, 512, 700, 2], 16, 4, 2, 16, torch.float32, window)
    longest = max(
        (length - 1) // 256 - max(length - window if window else 0, 0) // 256 + 1 for length in range(1, 1500)
    )
    assert num_parts_of(1499, window) == longest


@pytest.mark.parametrize("window", [0, 300])
def test_bits_do_not_depend_on_the_other_texts(window: int):
    lengths = [600, 5, 300, 256]
    q, keys, values, table = inputs_of(lengths, 4, 4, 2, 16, torch.float32, window)
    together = attend_table(q, keys, values, table)
    for number, length in enumerate(lengths):
        own = slice(number, number + 1)
        alone = table._replace(blocks_NM=table.blocks_NM[own], lengths_N=table.lengths_N[own], longest=length)
        assert torch.equal(attend_table(q[own], keys, values, alone)[0], together[number])


@torch.inference_mode()
@pytest.mark.parametrize("options", [
    {}, {"position_embedding": "alibi", "sliding_window": 5}, {"sliding_window": 6, "full_attention_layers": "1"},
], ids=str)  # fmt: skip
def test_in_a_model(options: dict):
    """Texts with one new token beside one with several: as on a CPU."""
    model, steps = small(**options).to(DEVICE), ([7, 3, 9], [1, 4, 1], [1, 1, 1])
    found = []
    for kernel in (None, attend_table):
        cache = PagedCache(model.config, 12, 4, torch.float32, torch.device(DEVICE))
        cache.attend_table = kernel
        lengths, hidden = [0, 0, 0], []
        for step in steps:
            lengths = [length + new for length, new in zip(lengths, step)]
            blocks = ([2, 3, 4, 5], [9, 1, 0], [7, 11, 10])
            segments = [Segment(*its) for its in zip(step, lengths, blocks)]
            ids = torch.arange(sum(step), device=DEVICE)[None]
            hidden.append(model(ids, cache=PagedStep(cache, segments))[0])
        found.append(torch.cat(hidden))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_a_gpu_uses_the_kernel(monkeypatch: pytest.MonkeyPatch):
    from model.ops import choose_paged

    assert choose_paged(CPU, torch.float32) is None
    monkeypatch.setattr("model.kernels.support.unavailable_reason", lambda device: None)
    assert choose_paged(torch.device("cuda"), torch.bfloat16) is attend_table
    assert sum(found.is_plain for found in paged_decoding.IMPLEMENTATIONS) == 1
