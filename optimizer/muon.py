"""Muon (Jordan et al., 2024): momentum whose singular values are all set to about one, for the matrices of the blocks.

    m <- b m + (1 - b) g        running mean of the gradient            (a shard of it is enough)
    u <- b m + (1 - b) g        once more: Nesterov's look ahead        (a shard of it is enough)
    o <- U V^T  of  u = U S V^T                                         (needs the whole matrix)
    w <- w - lr wd w - lr 0.2 sqrt(max(rows, columns)) o

A gradient matrix has a few large singular values and many small ones; setting them equal lets the rare directions
learn as fast as the common ones. The factor 0.2 sqrt(max) gives the step AdamW's usual root mean square (Liu et al.,
Moonlight, 2025), so one learning rate serves both. Embedding, head, norms and biases stay with AdamW: the spectrum of
the whole matrix says nothing about rows that are looked up by token. The matrices of a stack, such as those of
experts, are stepped each by itself, and so are gate and up where they are joined. Memory: 8 bytes a parameter (main
parameter and m), compared with AdamW's 12.

U V^T takes no singular value decomposition. An odd polynomial in u, (a + b u u^T + c (u u^T)^2) u, acts on the singular
values alone, and a few of them in a row bring every value in [LOWEST, 1] close to 1. The best coefficients of each
(Amsel et al., Polar Express, 2025) follow from those before it: `polynomials` computes them.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from optimizer.config import MuonConfig
from optimizer.param_groups import ParamGroups
from optimizer.rule import Gather, Rule, Step, Work, chunk_size
from parallel.buffer import ParameterSlice
from parallel.contract import Named

UPDATE_RMS = 0.2
"""Root mean square of a step at learning rate 1."""
LOWEST = {1: 0.3, 2: 0.1, 3: 0.03, 4: 0.01, 5: 0.003, 6: 0.001}
"""Iterations -> smallest singular value, as a share of the Frobenius norm, that ends near 1. A lower bound would leave
the others less exact. Values below it are raised, too, but not all the way."""
MARGIN = 1.01
"""Margin above the interval for bfloat16's rounding of singular values; beyond it, the polynomials grow fast."""


@cache
def polynomials(iterations: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of a x + b x^3 + c x^5 for each iteration.

    Each polynomial is the best approximation of 1 (smallest largest error) on the interval to which the one before it
    has narrowed the values. Remez' algorithm finds it, as the error of the best one alternates at four points.

    Raises:
        ValueError: the number of iterations is not in LOWEST.
    """
    if iterations not in LOWEST:
        raise ValueError(f"Muon takes {min(LOWEST)} to {max(LOWEST)} iterations, not {iterations}")
    low, high, found = LOWEST[iterations], MARGIN, []
    for _ in range(iterations):
        points = np.linspace(low, high, 4)
        for _ in range(50):
            powers = np.stack((points, points**3, points**5, (-1.0) ** np.arange(4)), axis=1)
            a, b, c, error = np.linalg.solve(powers, np.ones(4))
            # The extrema inside the interval: a + 3 b x^2 + 5 c x^4 = 0.
            inner = np.sort(np.sqrt(np.roots((5 * c, 3 * b, a)).real))
            moved = np.array((low, *inner, high))
            if np.allclose(moved, points, rtol=1e-13, atol=0.0):
                break
            points = moved
        found.append((float(a), float(b), float(c)))
        low, high = 1.0 - abs(error), (1.0 + abs(error)) * MARGIN
    return tuple(found)


def orthogonalize_reference(matrix: Tensor) -> Tensor:
    """The definition: U V^T of a matrix U S V^T, in its dtype."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ vh).to(matrix.dtype)


def orthogonalize(matrices: Tensor, iterations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximately U V^T of each matrix, computed and returned in `dtype`.

    Args:
        matrices: (..., rows, columns) of any float dtype. Six of 384 x 384 in bfloat16 on a CPU took 12 ms at once, 22
            one after the other. The bits of each do not depend on the others there; in float32 they may.
        iterations: see LOWEST; each takes two products of the smaller side's Gram matrix and one with the matrix.
        dtype: bfloat16 is exact enough (Jordan et al.).
    """
    x = matrices.reshape(-1, *matrices.shape[-2:])
    # Norms one by one, and transposes contiguous: otherwise the order of sums, and so their bits, would depend on the
    # number of matrices.
    norms = torch.stack([matrix.float().norm() for matrix in x])
    x = x.to(dtype, copy=True).div_(norms[:, None, None] + 1e-30)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT.contiguous()
    for a, b, c in polynomials(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def look_ahead(momentum: Tensor, grad: Tensor, beta: float, grad_divisor: float = 1.0) -> None:
    """Update, in place, m <- b m + (1 - b) g, and then u <- b m + (1 - b) g with the new m; g = grad / grad_divisor.

    Args:
        momentum: m: float32, any shape, contiguous.
        grad: same shape. Afterwards its `ahead_in` holds u times a number from 1 to 2, as only the direction matters.
    """
    # A power of two, which rounds nothing, and large enough that nothing overflows.
    unit = 2.0 ** math.floor(math.log2(grad_divisor))
    # A float32 copy of 16-bit gradients lives for a chunk.
    size = max(grad.numel(), 1) if grad.dtype == torch.float32 else chunk_size(grad.device)
    for m, g in zip(momentum.view(-1).split(size), grad.view(-1).split(size)):
        ahead = g.float()
        m.mul_(beta).add_(ahead, alpha=(1.0 - beta) / grad_divisor)
        ahead.mul_((1.0 - beta) / unit).add_(m, alpha=beta * (grad_divisor / unit))
        if ahead is not g:
            ahead_in(g).copy_(ahead)


def ahead_in(grad: Tensor) -> Tensor:
    """View of the gradient's memory in which `look_ahead` leaves u: bfloat16 instead of float16, because the loss scale
    keeps gradients in float16's range, but not u."""
    return grad.view(torch.bfloat16) if grad.dtype == torch.float16 else grad


def step_size(shape: tuple[int, int], lr: float) -> float:
    """Factor on an orthogonal matrix of this shape."""
    return lr * UPDATE_RMS * max(shape) ** 0.5


class Muon(Rule):
    """Muon for the matrices of the blocks; AdamW, with the same weight decay, steps the rest. State: "exp_avg" (m)."""

    name = "muon"
    needs_whole_gradients = True

    def __init__(self, config: MuonConfig, weight_decay: float, groups: ParamGroups | None = None):
        super().__init__(weight_decay, groups)
        self.config = config

    def takes(self, parameter: Named) -> bool:
        return self.groups.is_hidden(parameter)

    def new_tensors(self, piece: ParameterSlice, main: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(main)}

    def step(self, works: Sequence[Work], step: Step, gather: Gather) -> bool:
        """Each rank updates its own shard until the update needs the whole matrix."""
        lr = step.lr * self.config.muon_lr_ratio
        for state, grad in works:
            look_ahead(state.tensors["exp_avg"], grad, self.config.muon_momentum, step.grad_divisor)
        whole = gather()
        for group in self._groups_to_multiply(works):
            states = [work.state for work in group]
            matrices, weights = self.groups.matrices(states[0].piece), states[0].piece.param
            gradients = torch.stack([ahead_in(whole[state.piece.name]).view(matrices) for state in states])
            # With float32 weights on a CPU, bfloat16 may be slow.
            quick = weights.is_cuda or weights.dtype == torch.bfloat16
            updates = orthogonalize(
                gradients, self.config.muon_iterations, torch.bfloat16 if quick else torch.float32
            ).flatten(1)
            for state, update in zip(states, updates):
                piece = state.piece
                own = update[piece.offset : piece.offset + len(piece.param)]
                state.main.mul_(1.0 - lr * self.weight_decay)
                state.main.sub_(own.float(), alpha=step_size(matrices[1:], lr))
                state.write_weights()
        return False

    def _groups_to_multiply(self, works: Sequence[Work]) -> Iterable[list[Work]]:
        """Works whose matrices are multiplied at once: bfloat16 matrices of one shape on a CPU, in stacks of one
        height. All others stay alone, as their bits would depend on the rest of the group, and the run on the size of
        its buckets."""
        groups: dict[object, list[Work]] = {}
        for work in works:
            piece = work.state.piece
            at_once = piece.param.dtype == torch.bfloat16 and not piece.param.is_cuda
            groups.setdefault(self.groups.matrices(piece) if at_once else piece.name, []).append(work)
        return groups.values()
