"""The rule of an optimizer: which tensors it keeps for a slice, and how it steps slices by their gradients.

    adamw.py   muon.py   ...     one rule a file, below its formula
    rules.py                     the rules of --optimizer
    mixed_precision.py           the step around them: norm, clipping, skipped steps, order of the buckets

A rule sees flat slices on one device. It knows nothing of buckets, ranks and hooks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint.named import NamedState
from optimizer.param_groups import ParamGroups
from parallel.buffer import ParameterSlice
from parallel.contract import Named


def within_range(main: Tensor, dtype: torch.dtype) -> Tensor:
    """Main parameters, clamped for rounding to weights of `dtype`: values beyond float16's range become its largest
    number, as an infinite weight would spoil every activation. The main parameters themselves do not change."""
    largest = torch.finfo(torch.float16).max
    return main.clamp(-largest, largest) if dtype == torch.float16 else main


@dataclass
class SliceState:
    """A slice and its optimizer state."""

    piece: ParameterSlice
    main: Tensor
    """float32 main parameters, 1-D: float32 weights themselves, or a copy of other weights."""
    tensors: dict[str, Tensor]
    """The state that the rule keeps, by name."""

    @property
    def weights(self) -> Tensor | None:
        """Low-precision weights to write after each step; None if they are the main parameters."""
        return None if self.main is self.piece.param else self.piece.param

    def write_weights(self) -> None:
        if self.weights is not None:
            self.weights.copy_(within_range(self.main, self.weights.dtype))


class Work(NamedTuple):
    """A slice to step."""

    state: SliceState
    grad: Tensor
    """1-D view of its gradients, of any dtype, which a rule may overwrite."""


class Step(NamedTuple):
    """Figures that all slices of a step share."""

    number: int
    """Number of the step, from 1."""
    lr: float
    grad_divisor: float
    """Divisor of the gradients: loss scale over clipping factor."""
    zero_grad: bool
    """Whether a rule that can zero the gradients at no cost shall do so."""


def chunk_size(device: torch.device) -> int:
    """Elements to step at once where intermediate results need memory. On a CPU they stay in the cache."""
    return 1 << (17 if device.type == "cpu" else 22)


class Scratch:
    """Memory for the intermediate results of a chunk, kept for the next one."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """1-D tensor of `chunk_size` elements, with any contents."""
        if (name, device) not in self._memory:
            self._memory[name, device] = torch.empty(chunk_size(device), dtype=dtype, device=device)
        return self._memory[name, device]

    def as_float32(self, grad: Tensor) -> Tensor:
        """A chunk of gradients, itself if it is float32, otherwise a copy."""
        if grad.dtype == torch.float32:
            return grad
        return self.take("grad", grad.device)[: len(grad)].copy_(grad)


Gather = Callable[[], Mapping[str, Tensor]]
"""Parameter name -> gradients of the whole parameter, 1-D, as every rank has overwritten its own by now. Collective if
slices are shards."""


class Rule(ABC):
    """How an optimizer steps its slices.

    Args:
        weight_decay: decay of the parameters that decay, as a share of the learning rate.
        groups: tells which parameters decay.
    """

    name: str
    """Name in checkpoints and of --optimizer."""
    needs_whole_gradients = False
    """Whether `step` calls `gather`."""
    alignment = 1
    """Slices must begin at a multiple of it in their parameter."""

    def __init__(self, weight_decay: float, groups: ParamGroups | None = None):
        self.weight_decay, self.groups, self.scratch = weight_decay, groups or ParamGroups(), Scratch()

    def decay_of(self, parameter: Named) -> float:
        return self.weight_decay if self.groups.decays(parameter) else 0.0

    def takes(self, parameter: Named) -> bool:
        """Whether this rule may step a parameter, or its slices."""
        return True

    def new_state(self, piece: ParameterSlice) -> SliceState:
        main = piece.param if piece.param.dtype == torch.float32 else piece.param.float()
        return SliceState(piece, main, self.new_tensors(piece, main))

    @abstractmethod
    def new_tensors(self, piece: ParameterSlice, main: Tensor) -> dict[str, Tensor]:
        """State of a slice before its first step, by name.

        Args:
            main: its main parameters; the tensors lie on the same device.
        """

    def named_state(self, state: SliceState) -> NamedState:
        """All tensors of a slice for a checkpoint, as views."""
        return [(state.piece.part, {"main": state.main, **state.tensors})]

    @abstractmethod
    def step(self, works: Sequence[Work], step: Step, gather: Gather) -> bool:
        """Step slices of one bucket, and write their weights. Returns whether it has zeroed their gradients.

        If `needs_whole_gradients`, this is called on all ranks for every bucket that has parts of parameters which the
        rule takes, also on a rank that owns none of them.
        """
