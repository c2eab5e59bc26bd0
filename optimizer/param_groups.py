"""Which parameters decay: matrices only. Norm weights and biases have no scale that decay should pull to zero."""

from collections.abc import Sequence
from typing import TypeVar

from parallel.buffer import ParameterSlice

T = TypeVar("T")


def split_by_decay(slices: Sequence[ParameterSlice], items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Sort `items`, one a slice, into (decaying, not decaying)."""
    decaying = [item for piece, item in zip(slices, items) if piece.is_matrix]
    others = [item for piece, item in zip(slices, items) if not piece.is_matrix]
    return decaying, others
