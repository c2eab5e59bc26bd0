"""Parameters that decay, and parameters that Muon steps."""

import math
from collections.abc import Mapping
from typing import Protocol

from parallel.contract import Named


class Role(Protocol):
    """A parameter's role in its model (model/roles.py)."""

    @property
    def decays(self) -> bool: ...

    @property
    def is_hidden(self) -> bool: ...

    @property
    def joined(self) -> int: ...


class ParamGroups:
    """Decides which parameters decay, and which Muon may step.

    Args:
        roles: parameter name -> its role; None: decide by `is_matrix` and `is_hidden_matrix`.
    """

    def __init__(self, roles: Mapping[str, Role] | None = None):
        self._roles = roles

    def decays(self, parameter: Named) -> bool:
        return is_matrix(parameter) if self._roles is None else self._roles[parameter.name].decays

    def is_hidden(self, parameter: Named) -> bool:
        return is_hidden_matrix(parameter) if self._roles is None else self._roles[parameter.name].is_hidden

    def matrices(self, parameter: Named) -> tuple[int, int, int]:
        """(Number, rows, columns) of the matrices that Muon steps each by itself: those of a stack (matrices, rows,
        columns), and those that are joined within each."""
        joined = 1 if self._roles is None else self._roles[parameter.name].joined
        *stack, rows, columns = parameter.shape
        return math.prod(stack) * joined, rows // joined, columns


def is_matrix(parameter: Named) -> bool:
    """Whether the whole parameter has two dimensions or more. Only these decay: norm weights and biases have no scale
    that decay should pull to zero."""
    return len(parameter.shape) >= 2


def is_hidden_matrix(parameter: Named) -> bool:
    """Whether the parameter is a matrix inside a block, a stack of those, or a piece of one, which Muon can step; the
    embedding and the head are not."""
    return len(parameter.shape) in (2, 3) and parameter.name.startswith("layers.")
