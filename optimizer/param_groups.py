"""Which parameters decay: matrices only. Norm weights and biases have no scale that decay should pull to zero."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from parallel.buffer import ParameterSlice


class HasSlice(Protocol):
    piece: ParameterSlice


T = TypeVar("T", bound=HasSlice)


def split_by_decay(states: Sequence[T]) -> tuple[list[T], list[T]]:
    """Sort slices' states into (decaying, not decaying)."""
    decaying = [state for state in states if state.piece.is_matrix]
    others = [state for state in states if not state.piece.is_matrix]
    return decaying, others
