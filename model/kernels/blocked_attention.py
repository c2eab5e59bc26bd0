"""Causal attention on a CPU by ordinary matrix multiplications, one block of queries at a time.

    S = q k^T / sqrt(D)     P = softmax(S)              O = P v
    dP = dO v^T             dS = P (dP - rowsum(P dP))  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D),  dv = P^T dO

A block has 128 queries. It sees the keys from the beginning of its first document to its own end, so half of the T x T
weights are never computed, and neither are most of those between documents. When measured, torch's fused kernel for
CPUs ran in bfloat16 at a sixth of the matrix multiplications' rate; it computes the weights that a mask throws away.

The weights P are kept for the backward pass if they take no more memory than q, k, v and O, which is up to T = 8 D. For
longer rows they are computed again, block by block, and memory grows only with T.

With a window a block sees no key that lies before the window of its first query. ALiBi's scores (Press et al., 2022)
depend on distances alone, so one table serves all blocks, and the multiplication adds to it.

In low precision S, P and dS are rounded to the inputs' dtype, as in eager PyTorch; sums over blocks are float32.

Shapes: B batch, R rows that are computed together, T tokens, H query heads, K key and value heads, G = H / K, D head
dim, n queries of a block, S keys that they see, L the largest S.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.registry import Implementation

BLOCK = 128
"""Queries a block: of 128, 256 and 512 the fastest, or as fast as any, at 256 to 1,024 tokens."""
GROUP_ELEMENTS = 1 << 22
"""Weights of one block of all rows that are computed together: 8 MiB in bfloat16."""


class Block(NamedTuple):
    """Queries of some rows that are computed together, and the keys that they see."""

    first: int
    end: int
    """Queries [first, end)."""
    first_key: int
    """Keys [first_key, end)."""
    borders: list[tuple[int, int]]
    """(row, beginning of a document) for documents that begin after the first key."""


def _blocks(width: int, borders: list[list[int]], window: int) -> Iterator[Block]:
    """Blocks of rows whose documents begin at `borders`, ascending, from 0."""
    for first in range(0, width, BLOCK):
        end = min(first + BLOCK, width)
        # Each row's first key, then the beginnings of documents among the queries.
        needed = [row[bisect_right(row, first) - 1 : bisect_left(row, end)] for row in borders]
        first_key = max(min(row[0] for row in needed), first - window + 1 if window else 0)
        yield Block(first, end, first_key, [(i, b) for i, row in enumerate(needed) for b in row if b > first_key])


def _groups(
    batch: int, heads: int, width: int, starts: Tensor | None, window: int
) -> Iterator[tuple[slice, list[Block]]]:
    """Rows that are computed together, and their blocks; `starts` as in model.attend.document_starts."""
    borders: list[list[int]] = [[] for _ in range(batch)]
    for start in range(0, batch * width, width) if starts is None else starts.tolist()[:-1]:
        borders[start // width].append(start % width)
    num_keys = min(width, window + BLOCK) if window else width
    rows = max(GROUP_ELEMENTS // (heads * BLOCK * num_keys), 1)
    for first in range(0, batch, rows):
        group = slice(first, min(first + rows, batch))
        yield group, list(_blocks(width, borders[group], window))


def kept_size(batch: int, heads: int, width: int, head_dim: int, window: int = 0) -> int:
    """Number of weights kept for rows of a single document, which need the most; 0 if none are kept."""
    # A query's keys are at most those of its row, and on average half of these, or those of its block's window.
    most = min(width, 2 * (window + BLOCK)) if window else width
    if most > 8 * head_dim:
        return 0
    # No loop over _blocks: torch.compile cannot look into bisect.
    whole, rest = divmod(width, BLOCK)
    num = BLOCK**2 * whole * (whole + 1) // 2 + rest * width
    return batch * heads * (min(num, width * (window + BLOCK)) if window else num)


class _Limits:
    """What hides keys from queries, and what ALiBi adds, for all blocks alike: both depend on distances alone."""

    def __init__(self, like: Tensor, width: int, window: int, slopes_H: Tensor | None):
        self.window = window
        unlimited = torch.full((BLOCK, BLOCK), math.inf, dtype=like.dtype)
        self.after = unlimited.masked_fill(torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu_(1), -math.inf)
        """Upper limit of the scores between a block's queries and its own keys."""
        self.before = self.after.T if window else None
        """The same for the keys from the beginning of the first query's window on."""
        self.alibi = _alibi(like.dtype, width, window, slopes_H) if slopes_H is not None else None

    def scores(self, rows: int, q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
        """S (R K, G n, S) of a block, from q (R K, G n, D) and k (R K, S, D)."""
        num, num_keys = block.end - block.first, k.shape[1]
        scores = q.new_empty(len(q), q.shape[1], num_keys)
        by_query = scores.view(rows, -1, num, num_keys)
        if self.alibi is not None:
            # The table ends where a whole block would.
            last = self.alibi.shape[-1] - BLOCK + num
            by_query.copy_(self.alibi[:, :num, last - num_keys : last])
            scores.baddbmm_(q, k.transpose(1, 2), alpha=scale)
        else:
            torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
            # A minimum takes half as long as masked_fill_.
            on_diagonal = by_query[..., -num:]
            torch.minimum(on_diagonal, self.after[:num, :num], out=on_diagonal)
            if self.before is not None:
                skipped = block.first_key - (block.first - self.window + 1)
                if skipped < num - 1:
                    oldest = by_query[..., : num - 1 - skipped]
                    torch.minimum(oldest, self.before[:num, skipped : num - 1], out=oldest)
        for row, border in block.borders:
            by_query[row, :, max(border - block.first, 0) :, : border - block.first_key] = -math.inf
        return scores

    def weights(
        self, rows: int, q: Tensor, k: Tensor, block: Block, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """P (R K, G n, S)."""
        return torch.softmax(self.scores(rows, q, k, block, scale), dim=-1, out=out)


def _alibi(dtype: torch.dtype, width: int, window: int, slopes_H: Tensor) -> Tensor:
    """ALiBi's scores (H, BLOCK, L) of a block whose own keys are the last ones; -inf for keys that are not seen."""
    blocks = -(-width // BLOCK)
    num_keys = min(blocks * BLOCK, window + BLOCK - 1) if window else blocks * BLOCK
    distances = torch.arange(BLOCK)[:, None] - torch.arange(BLOCK - num_keys, BLOCK)
    hidden = (distances < 0) | ((distances >= window) if window else False)
    exact = torch.promote_types(dtype, torch.float32)
    scores = distances.to(exact) * -slopes_H.to(exact)[:, None, None]
    return scores.masked_fill_(hidden, -math.inf).to(dtype)


def _by_token(like_BHTD: Tensor) -> Tensor:
    """Uninitialised memory of shape (B, H, T, D) laid out as (B, T, H, D), as projections read and write it."""
    batch, heads, width, dim = like_BHTD.shape
    return like_BHTD.new_empty(batch, width, heads, dim).transpose(1, 2)


class _Rows:
    """Tensors of R rows, with query heads grouped by the keys that they share."""

    def __init__(self, k_RKTD: Tensor, v_RKTD: Tensor, *of_queries_RHTD: Tensor):
        self.k, self.v = (x.contiguous().flatten(0, 1) for x in (k_RKTD, v_RKTD))
        self.of_queries = of_queries_RHTD

    def block(self, block: Block) -> tuple[Tensor, ...]:
        """A block's k and v (R K, S, D), then its tensors of queries (R K, G n, D)."""
        keys, shape = slice(block.first_key, block.end), (len(self.k), -1, self.k.shape[-1])
        # Contiguous: each multiplication in bfloat16 would copy it, and a transposed one slowly.
        queries = (x[:, :, block.first : block.end].reshape(shape).contiguous() for x in self.of_queries)
        return self.k[:, keys].contiguous(), self.v[:, keys].contiguous(), *queries


class _Kept:
    """The memory of all kept weights, handed out block by block in the order of their computation."""

    def __init__(self, memory: Tensor):
        self.memory, self.used = memory, 0

    def next(self, *shape: int) -> Tensor | None:
        """Memory for the next block's weights; None if none are kept."""
        if not self.memory.numel():
            return None
        begin, self.used = self.used, self.used + math.prod(shape)
        return self.memory[begin : self.used].view(shape)


@torch.library.custom_op("zero2all::blocked_attention", mutates_args=(), device_types="cpu")
def _forward(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor | None, window: int, slopes_H: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(O, kept weights of `keep` elements)."""
    batch, heads, width, dim = q_BHTD.shape
    out_BHTD, memory = _by_token(q_BHTD), q_BHTD.new_empty(keep)
    kept, limits = _Kept(memory), _Limits(q_BHTD, width, window, slopes_H)
    for rows, blocks in _groups(batch, heads, width, starts, window):
        tensors, out_RHTD = _Rows(k_BKTD[rows], v_BKTD[rows], q_BHTD[rows]), out_BHTD[rows]
        for block in blocks:
            k, v, q = tensors.block(block)
            weights = limits.weights(
                len(out_RHTD), q, k, block, dim**-0.5, kept.next(len(k), q.shape[1], k.shape[1])
            )
            out = out_RHTD[:, :, block.first : block.end]
            out.copy_(torch.bmm(weights, v).view(out.shape))
    return out_BHTD, memory


@_forward.register_fake
def _(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor | None, window: int, slopes_H: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _by_token(q_BHTD), q_BHTD.new_empty(keep)


@torch.library.custom_op("zero2all::blocked_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    dout_BHTD: Tensor, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor | None, window: int,
    slopes_H: Tensor | None, memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    batch, heads, width, dim = q_BHTD.shape
    scale = dim**-0.5
    gradients = _by_token(q_BHTD), _by_token(k_BKTD), _by_token(v_BKTD)
    kept, limits = _Kept(memory), _Limits(q_BHTD, width, window, slopes_H)
    sum_dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    for rows, blocks in _groups(batch, heads, width, starts, window):
        tensors = _Rows(k_BKTD[rows], v_BKTD[rows], q_BHTD[rows], dout_BHTD[rows])
        dq_RHTD, dk_RKTD, dv_RKTD = (gradient[rows] for gradient in gradients)
        dk_sum, dv_sum = (torch.zeros_like(x, dtype=sum_dtype) for x in (tensors.k, tensors.v))
        for block in blocks:
            k, v, q, dout = tensors.block(block)
            weights = kept.next(len(k), q.shape[1], k.shape[1])
            if weights is None:
                weights = limits.weights(len(dq_RHTD), q, k, block, scale)
            dweights = torch.bmm(dout, v.transpose(1, 2))
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq = dq_RHTD[:, :, block.first : block.end]
            dq.copy_(torch.baddbmm(q, dscores, k, beta=0, alpha=scale).view(dq.shape))
            dk_sum[:, block.first_key : block.end] += torch.baddbmm(
                k, dscores.transpose(1, 2), q, beta=0, alpha=scale
            )
            dv_sum[:, block.first_key : block.end] += torch.bmm(weights.transpose(1, 2), dout)
        dk_RKTD.copy_(dk_sum.view(dk_RKTD.shape))
        dv_RKTD.copy_(dv_sum.view(dv_RKTD.shape))
    return gradients


@_backward.register_fake
def _(
    dout_BHTD: Tensor, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor | None, window: int,
    slopes_H: Tensor | None, memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _by_token(q_BHTD), _by_token(k_BKTD), _by_token(v_BKTD)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, starts: Tensor | None, window: int,
        slopes_H: Tensor | None, keep: int,
    ) -> Tensor:  # fmt: skip
        out_BHTD, memory = _forward(q_BHTD, k_BKTD, v_BKTD, starts, window, slopes_H, keep)
        ctx.window = window
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, starts, slopes_H, memory)
        return out_BHTD

    @staticmethod
    def backward(ctx, dout_BHTD: Tensor):
        q_BHTD, k_BKTD, v_BKTD, starts, slopes_H, memory = ctx.saved_tensors
        gradients = _backward(dout_BHTD, q_BHTD, k_BKTD, v_BKTD, starts, ctx.window, slopes_H, memory)
        return *gradients, None, None, None, None


def blocked_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    starts: Tensor | None = None,
    window: int = 0,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Causal attention on a CPU, (B, H, T, D); heads of k and v, (B, K, T, D), are not copied.

    Args:
        starts: offsets of the documents among the tokens of all rows, see model.attend.document_starts; tokens attend
            within their document. None: each row is one document.
        window: latest keys that a query sees, itself among them; 0: all.
        slopes_H: ALiBi's slope of each head, float32, see model.attend.alibi_slopes; None: no ALiBi.
    """
    batch, heads, width, dim = q_BHTD.shape
    keep = kept_size(batch, heads, width, dim, window) if torch.is_grad_enabled() else 0
    return _BlockedAttention.apply(q_BHTD, k_BKTD, v_BKTD, starts, window, slopes_H, keep)


def _causal(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int = 0, slopes_H: Tensor | None = None
) -> Tensor:
    return blocked_attention(q_BHTD, k_BKTD, v_BKTD, None, window, slopes_H)


IMPLEMENTATIONS = (
    Implementation(
        "attention", "blocked", lambda: {"causal": _causal, "packed": blocked_attention, "by_mask": False},
        why_not=lambda device, dtype: None if device.type == "cpu" else "it is for CPUs",
        is_fastest=lambda device, dtype: device.type == "cpu" and dtype == torch.bfloat16,
    ),
)  # fmt: skip
