"""Values that get into parameters of which a process may hold a part alone.

A model that is larger than one process's memory is never whole in one place. It is outlined on the meta device, cut
over the processes (by rows, columns, layers, experts), and given memory for the part of each. Then its values come one
parameter after another: drawn, computed or read whole (or only the rows that are needed), and what belongs here is
kept. So at most one whole parameter is in memory beside the parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """What this process holds of a parameter."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    parts: Sequence[tuple[Tensor, tuple[slice, ...]]]
    """Views of its memory, and which part of the whole each is: a slice for each dimension."""

    @property
    def rows(self) -> slice:
        """The rows of the whole from the first to the last that is held in part."""
        places = [place[0] for _, place in self.parts]
        return slice(min((its.start for its in places), default=0), max((its.stop for its in places), default=0))


def _whole(parameter: Tensor) -> Held:
    shape = tuple(parameter.shape)
    return Held(shape, [(parameter.detach(), tuple(slice(0, size) for size in shape))])


@dataclass(frozen=True)
class Filling:
    """Puts values into the parameters of a model; by default, of one that is whole."""

    held: Callable[[Tensor], Held] = _whole
    dtype: torch.dtype | None = None
    """Values of trained parameters are rounded to it first, as if the model were kept in it; None: they are not."""

    def is_whole(self, parameter: Tensor) -> bool:
        shape, parts = self.held(parameter)
        return sum(memory.numel() for memory, _ in parts) == torch.Size(shape).numel()

    @torch.no_grad()
    def put(self, parameter: Tensor, values: Tensor, first: int = 0) -> None:
        """Set rows of a parameter, as far as they are held here.

        Args:
            values: rows of the whole parameter from `first` on, in any dtype and on any device; perhaps all of them.
        """
        for memory, (rows, *others) in self.held(parameter).parts:
            begin, end = max(first, rows.start), min(first + len(values), rows.stop)
            if begin >= end:
                continue
            own = values[begin - first : end - first][(slice(None), *others)]
            if self.dtype is not None and parameter.requires_grad:
                own = own.to(self.dtype)
            memory[begin - rows.start : end - rows.start].copy_(own)

    @torch.no_grad()
    def fill(self, parameter: Tensor, value: float) -> None:
        """Set all that is held of a parameter."""
        for memory, _ in self.held(parameter).parts:
            memory.fill_(value)
