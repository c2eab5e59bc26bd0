"""Parts of rows: which positions each of several processes has, and what its queries attend to."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder, ModelConfig
from model.attend import RowShare, attend_to, document_tails
from model.attention import Attention
from model.kernels.attention import repeat_heads
from model.ops import REFERENCE

WIDTH, CPU = 24, torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=WIDTH,
).resolve()  # fmt: skip


def share_of(number: int, count: int, gather: Callable[[Tensor], Tensor] = lambda own: own) -> RowShare:
    return RowShare(number, count, gather, lambda own: own)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_position_belongs_to_one_process_and_work_is_even(count: int):
    shares = [share_of(number, count) for number in range(count)]
    assert sorted(n for share in shares for n in share.chunks) == list(range(2 * count))
    places = torch.arange(WIDTH)
    parts = [share.part(places, 0) for share in shares]
    assert torch.equal(torch.cat(parts).sort().values, places)
    assert len({(part + 1).sum().item() for part in parts}) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gathered_keys_and_values_are_in_the_order_of_the_row(count: int):
    k, v = torch.randn(2, 3, 2, WIDTH, 4).unbind(0)
    shares = [share_of(number, count) for number in range(count)]
    brought: list[Tensor] = []
    for share in shares:
        replace(share, gather=lambda own: (brought.append(own), own.new_zeros(2 * count, *own.shape[1:]))[1]).whole(
            share.part(k, 2), share.part(v, 2)
        )
    for share in shares:
        found = replace(share, gather=lambda own: torch.cat(brought)).whole(share.part(k, 2), share.part(v, 2))
        assert torch.equal(found[0], k) and torch.equal(found[1], v)


def naive_tails(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, window: int = 0, slopes: Tensor | None = None
) -> Tensor:
    """Document by document: its queries are the last ones of its keys."""
    q, k, v = q.transpose(1, 2), *(repeat_heads(x, q.shape[1]).transpose(1, 2) for x in (k, v))
    batch, out = len(q), []
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    for (first, end), (first_key, end_key) in zip(*(its.unfold(0, 2, 1).tolist() for its in (starts, key_starts))):
        distances = torch.arange(first_key - end_key, 0)[-(end - first) :, None] if end > first else torch.empty(0, 1)
        distances = distances - torch.arange(first_key - end_key, 0)
        bias = torch.zeros(len(q), *distances.shape, dtype=q.dtype)
        if slopes is not None:
            bias -= slopes[:, None, None] * distances
        bias.masked_fill_((distances < 0) | ((distances >= window) if window else False), -torch.inf)
        keys = slice(first_key, end_key)
        out.append(F.scaled_dot_product_attention(q[:, first:end], k[:, keys], v[:, keys], bias))
    return torch.cat(out, 1).transpose(0, 1).unflatten(0, (batch, -1)).transpose(1, 2)


@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize(("window", "alibi"), [(0, False), (5, False), (0, True)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_starts_of_queries_and_keys_say_the_same_as_a_mask(count: int, window: int, alibi: bool, with_documents: bool):
    config = replace(CONFIG, sliding_window=window, position_embedding="alibi" if alibi else "rope")
    q, k, v = (torch.randn(4, heads, WIDTH, 4, dtype=torch.float64) for heads in (4, 2, 2))
    begins = torch.rand(4, WIDTH, generator=torch.Generator().manual_seed(count)) < 0.2
    # One row of a single document, one of single tokens.
    begins[0], begins[1] = False, True
    ids, positions = begins.cumsum(1), torch.arange(WIDTH).expand(4, -1)
    by_mask = Attention(config, REFERENCE, 0)
    by_starts = Attention(config, replace(REFERENCE, tails=naive_tails, by_mask=False), 0)
    for number in range(count):
        share = share_of(number, count)
        masked, started = (
            attend_to(
                config, [window], WIDTH, CPU, positions, ids if with_documents else None,
                document_tails(ids, share.chunks, 2 * count) if by_tails and with_documents else None,
                by_mask=not by_tails, share=share, by_tails=by_tails, dtype=torch.float64,
            )[window]
            for by_tails in (False, True)
        )  # fmt: skip
        for place, queries in enumerate(share.part(q, 2).chunk(2, 2)):
            outputs = []
            for layer, attend in ((by_mask, masked), (by_starts, started)):
                chunk = attend.chunks[place]
                keys, values = (x[:, :, chunk.first_key : chunk.end] for x in (k, v))
                outputs.append(layer._attended(queries, keys, values, chunk, None))
            torch.testing.assert_close(*outputs, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "reason"),
    [({"local_filter": True}, "the local filter of this model"), ({"hidden_dropout": 0.1}, "--hidden_dropout=0"),
     ({"sliding_window": 5}, "ring knows neither windows"), ({"head_dim": 4}, "a multiple of 8, not 4")],
)  # fmt: skip
def test_models_that_need_whole_rows_are_refused(field: dict, reason: str):
    model = Decoder(replace(CONFIG, **{"head_dim": 8} | field))
    with pytest.raises(ValueError, match=reason):
        model.share_rows(0, 2, lambda own: own, lambda own: own, lambda q, k, v: q)
