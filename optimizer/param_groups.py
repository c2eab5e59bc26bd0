"""Parameters that decay, and parameters that Muon steps."""

from collections.abc import Mapping
from typing import Protocol

from parallel.contract import Named


class Role(Protocol):
    """What a model says of one of its parameters (model/roles.py)."""

    @property
    def decays(self) -> bool: ...

    @property
    def is_hidden(self) -> bool: ...


class ParamGroups:
    """
    Args:
        roles: parameter name -> its role; None: by `is_matrix` and `is_hidden_matrix`.
    """

    def __init__(self, roles: Mapping[str, Role] | None = None):
        self._roles = roles

    def decays(self, parameter: Named) -> bool:
        return is_matrix(parameter) if self._roles is None else self._roles[parameter.name].decays

    def is_hidden(self, parameter: Named) -> bool:
        return is_hidden_matrix(parameter) if self._roles is None else self._roles[parameter.name].is_hidden


def is_matrix(parameter: Named) -> bool:
    """Whether the whole parameter has two dimensions or more: only such decay. Norm weights and biases have no scale
    that decay should pull to zero."""
    return len(parameter.shape) >= 2


def is_hidden_matrix(parameter: Named) -> bool:
    """Whether it is a matrix inside a block, or a piece of one, which Muon can step: not the embedding or the head."""
    return len(parameter.shape) == 2 and parameter.name.startswith("layers.")
