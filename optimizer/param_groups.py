"""Which parameters are treated how."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from parallel.buffer import ParameterSlice
from parallel.contract import Named


class HasSlice(Protocol):
    @property
    def piece(self) -> ParameterSlice: ...


T = TypeVar("T", bound=HasSlice)


def split_by_decay(states: Sequence[T]) -> tuple[list[T], list[T]]:
    """Sort slices' states into (decaying, not decaying): matrices decay. Norm weights and biases have no scale that
    decay should pull to zero."""
    decaying = [state for state in states if state.piece.is_matrix]
    others = [state for state in states if not state.piece.is_matrix]
    return decaying, others


def is_hidden_matrix(parameter: Named) -> bool:
    """Whether it is (of) a matrix inside a block, which Muon can step: not the embedding's or the head's."""
    return len(parameter.shape) == 2 and parameter.name.startswith("layers.")
