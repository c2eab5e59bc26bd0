"""Parameters that decay, and parameters that Muon steps."""

from collections.abc import Mapping
from typing import Protocol

from parallel.contract import Named


class Role(Protocol):
    """A parameter's role in its model (model/roles.py)."""

    @property
    def decays(self) -> bool: ...

    @property
    def is_hidden(self) -> bool: ...


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


def is_matrix(parameter: Named) -> bool:
    """Whether the whole parameter has two dimensions or more. Only these decay: norm weights and biases have no scale
    that decay should pull to zero."""
    return len(parameter.shape) >= 2


def is_hidden_matrix(parameter: Named) -> bool:
    """Whether the parameter is a matrix inside a block (or a piece of one), which Muon can step; the embedding and the
    head are not."""
    return len(parameter.shape) == 2 and parameter.name.startswith("layers.")
