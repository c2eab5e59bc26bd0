"""Attention of texts that have one new token each, over keys in blocks: beside the matrices, what decoding many texts
spends most of its time on.

    scores (K, G, S) = q keys^T / sqrt(D), and -inf behind a text's end; softmax in float32

A layer's keys lie by head. On a CPU, a text whose blocks lie side by side is a run: it is read where it is, alone. Keys
of other texts are copied side by side by one call, and multiplied by another; texts whose lengths differ much are not
put together:

    keys   (K, slots, D)  ->  those of B texts, as many of each as the longest has   (K B, S, D)

In ms, by one thread of an AMD EPYC (Zen 3) that had other work, too; 12 layers with 12 heads of width 64:

                               1 text of 160 tokens      16 of 80      16 of 160
    float32    runs                    2.4                  20             34
               copies                  4.1                  46             72
    bfloat16   runs                    3.4                  41             68
               copies                  4.1                  44             67

torch's fused attention is made for many queries: for such runs it took twice as long as these products.

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


class Run(NamedTuple):
    """A text whose keys lie side by side."""

    row: int
    """Place of its token among all new ones."""
    place: int
    """Slot of the first key that is seen."""
    num_keys: int
    """Number of keys from there on, S."""
    bias_HS: Tensor | None
    """What is added to scores, float32 (1 or H, S): -inf for keys behind the text's end."""


class Runs(NamedTuple):
    """Texts that are attended to one by one."""

    runs: list[Run]


class Group(NamedTuple):
    """Texts that are attended to together."""

    rows_B: Tensor | None
    """Places of their tokens among all new ones, int64; None: they are all, in order."""
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


def runs_of(
    texts: Sequence[Single], block_size: int, window: int, slopes_H: Tensor | None, dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Run], list[Single]]:  # fmt: skip
    """The texts that are runs, and the others. A GPU would rather have fewer calls, and oneDNN, too, in 16 bits; so
    there is none on a GPU, and in 16 bits only a text that is alone.

    Args:
        window, slopes_H: as of groups_of.
        dtype: of the keys.
    """
    is_narrow = dtype.itemsize < 4
    if device.type != "cpu" or (is_narrow and len(texts) > 1):
        return [], list(texts)
    runs: list[Run] = []
    others: list[Single] = []
    for text in texts:
        first = max(text.length - window, 0) if window else 0
        blocks = text.blocks[first // block_size : -(-text.length // block_size)]
        if list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
            others.append(text)
            continue
        place, bias_HS = blocks[0] * block_size + first % block_size, None
        end = place + text.length - first
        if is_narrow:
            # Up to the end of the last block: oneDNN prepares itself for each new number of keys, which in bfloat16
            # takes as long as both products.
            end = (blocks[-1] + 1) * block_size
        if is_narrow or slopes_H is not None:
            distances_1S = text.length - 1 - torch.arange(first, first + end - place, device=device)[None]
            bias_HS = torch.zeros(distances_1S.shape) if slopes_H is None else _alibi(distances_1S, slopes_H)[0]
            bias_HS = bias_HS.masked_fill(distances_1S < 0, -torch.inf)
        runs.append(Run(text.row, place, end - place, bias_HS))
    return runs, others


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
    begin, count = 0, longest * block_size
    if len(texts) == 1:
        # Up to the end of the last block, unless only what is seen shall be read: see runs_of.
        begin, begins = firsts[0] - begins[0], firsts
        count = texts[0].length - firsts[0] if exactly else count - begin
    places = torch.tensor(begins, device=device)[:, None] + torch.arange(count, device=device)
    is_hidden = (places >= lengths) | (places < torch.tensor(firsts, device=device)[:, None])
    if slopes_H is not None:
        bias = _alibi(lengths - 1 - places, slopes_H)
    elif exactly:
        return Group(rows_B, blocks_Bn, begin, count, None)
    else:
        bias = torch.zeros(len(texts), 1, count, device=device)
    return Group(rows_B, blocks_Bn, begin, count, bias.masked_fill(is_hidden[:, None], -torch.inf))


def _alibi(distances_BS: Tensor, slopes_H: Tensor) -> Tensor:
    """ALiBi's scores (B, H, S), for keys at these distances."""
    return distances_BS.float()[:, None] * -slopes_H.float()[:, None]


def attend_runs(
    q_HND: Tensor, runs: Sequence[Run], views: Sequence[tuple[Tensor, Tensor]], out_HND: Tensor
) -> None:
    """Write the heads' outputs of the new tokens of runs.

    Args:
        views: keys and values of each run where they are, (K, S, D) each.
    """
    num_kv = views[0][0].shape[0]
    q_KGND, out_KGND = (x_HND.unflatten(0, (num_kv, -1)) for x_HND in (q_HND * q_HND.shape[-1] ** -0.5, out_HND))
    for run, (k_KSD, v_KSD) in zip(runs, views):
        scores_KGS = torch.bmm(q_KGND.select(2, run.row), k_KSD.mT)
        if run.bias_HS is None:
            weights_KGS = scores_KGS.softmax(dim=-1)
        else:
            bias = run.bias_HS if run.bias_HS.shape[0] == 1 else run.bias_HS.view_as(scores_KGS)
            weights_KGS = (bias + scores_KGS).softmax(dim=-1).to(v_KSD.dtype)
        torch.bmm(weights_KGS, v_KSD, out=out_KGND.select(2, run.row))


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
    num_kv, _, width = pool_KSD.shape
    found = pool_KSD.view(num_kv, -1, block_size * width).index_select(1, group.blocks)
    return found.view(num_kv * batch, -1, width)[:, group.begin : group.begin + group.num_keys]

