"""Attention of texts that have one new token each, over keys in blocks: beside the matrices, what decoding many texts
spends most of its time on.

A layer's keys lie by head, so those of several texts are copied side by side by one call, and multiplied by another:

    keys   (K, slots, D)  ->  those of B texts, as many of each as the longest has   (K B, S, D)
    scores (K B, G, S) = q keys^T / sqrt(D), and -inf behind a text's end; softmax in float32

Texts whose lengths differ much are not put together. A text that is alone, and whose blocks lie side by side, is read
where it is.

torch's fused attention is made for many queries. With one query for each of 16 texts of 500 tokens, 12 heads of width
64, in ms by one thread of an AMD EPYC (Zen 5): 2.9 in float32 and 8.1 in bfloat16; this, with the copies, 3.4 and 1.7.

Shapes: B texts, S keys of the longest, H query heads, K key and value heads, G = H / K, D head dim, N new tokens of a
pass, n blocks of the longest text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Single(NamedTuple):
    """A text with one new token."""

    row: int
    """Place of the token among all new ones of the pass."""
    length: int
    """Tokens of the text, the new one included."""
    blocks: Sequence[int]
    """Blocks of the pool that hold them, in order."""


class Group(NamedTuple):
    """Texts that are attended to together."""

    rows_B: Tensor | None
    """Places of their tokens among all new ones, int64; None: they are all, in order."""
    place: int | None
    """Of a single text whose keys lie side by side: the first one's slot."""
    blocks: Tensor
    """The texts' blocks, int64 (B n,); of a text that has fewer, the last one again."""
    begin: int
    """Of a single text: the first key that is seen, from the beginning of its blocks."""
    num_keys: int
    """Number of keys, S."""
    bias: Tensor | None
    """What is added to scores, float32 (B, 1 or H, S): -inf for keys that are not seen."""


_ALIKE = 4
"""Texts of up to so many blocks are always together."""


def groups_of(
    texts: Sequence[Single], num_rows: int, block_size: int, window: int, slopes_H: Tensor | None,
    device: torch.device, exactly: bool = False,
) -> list[Group]:  # fmt: skip
    """The groups of a pass: a text has more than half as many blocks as any other of its group.

    Args:
        num_rows: new tokens of the pass, those of other texts included.
        window: latest keys that a query sees; 0: all.
        slopes_H: ALiBi's.
        exactly: each text is a group, and a copy of exactly the keys that it sees is read.
    """
    if exactly:
        return [_group([text], num_rows, block_size, window, slopes_H, device, True) for text in texts]
    by_size: dict[int, list[Single]] = {}
    for text in texts:
        seen = min(text.length, window) if window else text.length
        by_size.setdefault((max(-(-seen // block_size), _ALIKE) - 1).bit_length(), []).append(text)
    return [
        _group(members, num_rows, block_size, window, slopes_H, device, False) for members in by_size.values()
    ]


def _group(
    texts: Sequence[Single], num_rows: int, block_size: int, window: int, slopes_H: Tensor | None,
    device: torch.device, exactly: bool,
) -> Group:  # fmt: skip
    firsts = [max(text.length - window, 0) if window else 0 for text in texts]
    used = [
        list(text.blocks[first // block_size : -(-text.length // block_size)]) for text, first in zip(texts, firsts)
    ]
    longest = max(map(len, used))
    # A text's own block, whose numbers are finite if the text's are.
    blocks = [block for its in used for block in its + (longest - len(its)) * its[-1:]]
    rows = [text.row for text in texts]
    rows_B = None if rows == list(range(num_rows)) else torch.tensor(rows, device=device)
    blocks_Bn = torch.tensor(blocks, device=device)
    lengths = torch.tensor([[text.length] for text in texts], device=device)
    begins = [first // block_size * block_size for first in firsts]
    begin, place, count = 0, None, longest * block_size
    if len(texts) == 1:
        # Up to the end of the last block, unless only what is seen shall be read: oneDNN prepares itself for each new
        # number of keys, which in bfloat16 takes as long as both products.
        begin, begins = firsts[0] - begins[0], firsts
        count = texts[0].length - firsts[0] if exactly else count - begin
        if blocks == list(range(blocks[0], blocks[0] + longest)) and not exactly:
            place = blocks[0] * block_size + begin
    places = torch.tensor(begins, device=device)[:, None] + torch.arange(count, device=device)
    is_hidden = (places >= lengths) | (places < torch.tensor(firsts, device=device)[:, None])
    if slopes_H is not None:
        bias = _alibi(lengths, places, slopes_H)
    elif exactly:
        return Group(rows_B, place, blocks_Bn, begin, count, None)
    else:
        bias = torch.zeros(len(texts), 1, count, device=device)
    return Group(rows_B, place, blocks_Bn, begin, count, bias.masked_fill(is_hidden[:, None], -torch.inf))


def _alibi(lengths_B1: Tensor, places_BS: Tensor, slopes_H: Tensor) -> Tensor:
    """ALiBi's scores (B, H, S), for keys at these places."""
    distances_BS = (lengths_B1 - 1 - places_BS).float()
    return distances_BS[:, None] * -slopes_H.float()[:, None]


def attend_group(q_BHD: Tensor, keys_KSD: Tensor, values_KSD: Tensor, group: Group, block_size: int) -> Tensor:
    """Heads' outputs of a group's new tokens, (B, H, D).

    Args:
        keys_KSD, values_KSD: of all slots of the pool.
    """
    (batch, heads, width), num_kv = q_BHD.shape, len(keys_KSD)
    k_XSD, v_XSD = (_of_group(pool_KSD, group, batch, block_size) for pool_KSD in (keys_KSD, values_KSD))
    q_XGD = q_BHD.view(batch, num_kv, -1, width).transpose(0, 1).reshape(num_kv * batch, -1, width)
    scores_XGS, scale = torch.bmm(q_XGD, k_XSD.transpose(1, 2)), width**-0.5
    if group.bias is None:
        wide = torch.promote_types(scores_XGS.dtype, torch.float32)
        weights_XGS = (scores_XGS * scale).softmax(dim=-1, dtype=wide)
    else:
        # One row for all heads, or one for each.
        is_common = group.bias.shape[1] == 1
        bias_KBGS = group.bias.unflatten(1, (1, 1) if is_common else (num_kv, -1)).transpose(0, 1)
        scores_KBGS = torch.add(bias_KBGS, scores_XGS.view(num_kv, batch, heads // num_kv, -1), alpha=scale)
        weights_XGS = scores_KBGS.softmax(dim=-1).flatten(0, 1)
    out_XGD = torch.bmm(weights_XGS.to(v_XSD.dtype), v_XSD)
    return out_XGD.view(num_kv, batch, -1, width).transpose(0, 1).reshape(batch, heads, width)


def _of_group(pool_KSD: Tensor, group: Group, batch: int, block_size: int) -> Tensor:
    """Keys or values of a group's texts, (K B, S, D)."""
    if group.place is not None:
        return pool_KSD[:, group.place : group.place + group.num_keys]
    num_kv, _, width = pool_KSD.shape
    found = pool_KSD.view(num_kv, -1, block_size * width).index_select(1, group.blocks)
    return found.view(num_kv * batch, -1, width)[:, group.begin : group.begin + group.num_keys]

