"""The mathematics of PowerSGD, on one matrix or a list of them; powersgd.py explains the algorithm.

Shapes: a matrix is [m, n], its factors are P [m, r] and Q [n, r]; all may have a dimension in front, for a stack of
matrices, each of which is treated by itself. Nothing here waits for a GPU.
"""

import torch
from torch import Tensor

from parallel.collectives import Collectives
from parallel.comm_hooks import narrow, widen

RIDGE = 1e-13
"""Smallest shift of the Gram matrix of unit columns."""
NOISE = 4.0
"""Threshold below which the remainder of a column counts as rounding: units of its dtype, relative to its length."""


def add_residual(gradient: Tensor, residual: Tensor) -> None:
    """M <- G + E, in the gradient's memory."""
    gradient.add_(residual)


def project_rows(matrix: Tensor, q: Tensor, p: Tensor) -> None:
    """P <- M Q: [m, n] x [n, r] -> [m, r]."""
    q = q.to(matrix.dtype)
    torch.matmul(matrix, q, out=p) if p.dtype == matrix.dtype else p.copy_(matrix @ q)


def project_columns(matrix: Tensor, p: Tensor, q: Tensor) -> None:
    """Q <- M^T P: [n, m] x [m, r] -> [n, r]."""
    project_rows(matrix.mT, p, q)


def orthonormalize(factors: list[Tensor], epsilon: float) -> None:
    """Replace each [m, r] tensor by an orthonormal basis of its columns, in place: Cholesky-QR in float64.

    With unit columns C (each column over its norm) and L L^T = C^T C + s I, the basis is C L^-T. It takes only matrix
    products and r x r factorisations, which are fast on GPUs and CPUs, and never waits for a GPU. Zero columns stay
    zero.

    The shift s makes it safe for any columns (Fukaya et al., Shifted Cholesky QR, SIAM J. Sci. Comput. 2020). The
    rounding error of the Gram matrix, at most u r m in norm for m rows, can make it indefinite if columns depend on
    each other. With a smaller s the factorisation then fails, or yields a basis that is a million times too long. With
    this s no direction comes out longer than 1. A column of which the earlier columns leave a share t of its length
    comes out with length t / sqrt(t^2 + s): 0.88 for t = 1e-5 at 4,096 x 32, 0.85 for t = 1e-4 at 131,072 x 128.

    Args:
        epsilon: larger shift; damps columns that depend on earlier ones.
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for factor in factors:
        by_shape.setdefault(factor.shape[-2:], []).append(factor)
    for (m, rank), group in by_shape.items():
        wide = torch.cat([factor.reshape(-1, m, rank) for factor in group]).double()
        gram = wide.mT @ wide
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        inverse_norms = torch.where(norms > 0.0, 1.0 / norms, torch.zeros_like(norms))
        gram = gram * inverse_norms[:, :, None] * inverse_norms[:, None, :]
        identity = torch.eye(rank, dtype=torch.float64, device=gram.device)
        shift = max(epsilon, RIDGE, torch.finfo(torch.float64).eps * rank * (m + rank))
        lower, failed = torch.linalg.cholesky_ex(gram + shift * identity)
        # Non-finite values make it fail. The factor then covers only part of the matrix; the basis must not look sound.
        lower = torch.where((failed != 0)[:, None, None], torch.nan, lower)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        basis = wide @ (inverse_norms[:, :, None] * inverse.mT)
        counts = [factor.numel() // (m * rank) for factor in group]
        for factor, columns in zip(group, basis.split(counts)):
            factor.copy_(columns.view(factor.shape))


def gram_schmidt(factors: list[Tensor], epsilon: float) -> None:
    """Orthonormalize each [m, r] tensor in place and in its own dtype: modified Gram-Schmidt, column by column.

    Slower than `orthonormalize` and, in 16 bits, less exact; the residual absorbs the error. If earlier columns leave
    only rounding error of a column, it becomes zero. Scaled to full length, it would point along existing columns, and
    P P^T M, longer than M, would make the residual grow from step to step.
    """
    for factor in (matrix for stack in factors for matrix in stack.view(-1, *stack.shape[-2:])):
        rounding = NOISE * torch.finfo(factor.dtype).eps * factor.norm(dim=0)
        for index in range(factor.shape[1]):
            column = factor[:, index]
            norm = column.norm()
            # An infinity is not rounding.
            is_noise = (norm <= rounding[index]) & torch.isfinite(norm)
            column.copy_(torch.where(is_noise, 0.0, column / (norm + epsilon)))
            rest = factor[:, index + 1 :]
            rest.sub_(torch.outer(column, column @ rest))


def decompress(p: Tensor, q: Tensor, out: Tensor) -> None:
    """D <- P Q^T: [m, r] x [r, n] -> [m, n]."""
    torch.matmul(p.to(out.dtype), q.to(out.dtype).mT, out=out)


def update_residual(matrix: Tensor, p: Tensor, own_q: Tensor) -> None:
    """E <- M - P Q_i^T, in the memory of M."""
    add_product = matrix.addmm_ if matrix.dim() == 2 else matrix.baddbmm_
    add_product(p.to(matrix.dtype), own_q.to(matrix.dtype).mT, alpha=-1.0)


def sum_over_ranks(
    factors: Tensor, wire_dtype: torch.dtype, collectives: Collectives, own: Tensor | None = None
) -> None:
    """Sum a flat tensor over the ranks in place, with `wire_dtype` on the wire.

    Args:
        own: receives this rank's contribution. The contributions add up to the sum that all ranks now hold: each is the
            rank's rounded values, plus the errors of the sums that it has rounded. So the residuals, formed from the
            contributions, also absorb the wire's rounding.
    """
    if wire_dtype == factors.dtype:
        if own is not None:
            own.copy_(factors)
        handle = collectives.all_reduce(factors)
        if handle is not None:
            handle.wait()
        return
    on_wire = torch.empty_like(factors, dtype=wire_dtype)
    scale = narrow(factors, on_wire, collectives)
    if own is not None:
        own.copy_(on_wire)
    collectives.reduce_scatter(on_wire, rounding=own)
    collectives.all_gather(on_wire)
    if own is not None and scale is not None:
        own.div_(scale)
    widen(on_wire, scale, factors)
