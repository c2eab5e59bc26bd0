"""Values that get into parameters of which a process may hold some rows alone.

A model that is larger than one process's memory is never whole in one place. It is outlined on the meta device, cut by
rows over the processes, and given memory for the rows of each. Then its values come one parameter after another: drawn,
computed or read whole (or only the rows that are needed), and the rows that belong here are kept. So at most one whole
parameter is in memory beside the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _whole(parameter: Tensor) -> tuple[Tensor, slice]:
    return parameter.detach(), slice(0, len(parameter))


@dataclass(frozen=True)
class Filling:
    """Puts values into the parameters of a model; by default, of one that is whole."""

    held: Callable[[Tensor], tuple[Tensor, slice]] = _whole
    """A parameter -> the memory of its rows that this process holds, and which rows they are."""
    dtype: torch.dtype | None = None
    """Values of trained parameters are rounded to it first, as if the model were kept in it; None: they are not."""

    def rows(self, parameter: Tensor) -> slice:
        """The rows that this process holds."""
        return self.held(parameter)[1]

    def is_whole(self, parameter: Tensor) -> bool:
        return self.rows(parameter) == slice(0, len(parameter))

    @torch.no_grad()
    def put(self, parameter: Tensor, values: Tensor, first: int = 0) -> None:
        """Set rows of a parameter, as far as they are held here.

        Args:
            values: rows of the parameter from `first` on, in any dtype and on any device; perhaps all of them.
        """
        memory, rows = self.held(parameter)
        begin, end = max(first, rows.start), min(first + len(values), rows.stop)
        if begin >= end:
            return
        values = values[begin - first : end - first]
        if self.dtype is not None and parameter.requires_grad:
            values = values.to(self.dtype)
        memory[begin - rows.start : end - rows.start].copy_(values)
