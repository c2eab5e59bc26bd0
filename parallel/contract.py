"""The contract between parallelism and the optimizer: gradients from the backward pass to the step.

    reduce     the comm hook sums a bucket over the ranks            comm stream, under the backward pass
    settle     it does what it still owes without other ranks        whoever has waited for the bucket
    norm       sums of squares of the buckets -> the global norm     the optimizer asks, before it changes anything
    take       the hook hands over a bucket's sums                   the optimizer asks, for a step that takes place
    gather     all ranks get what each put into its own shard        the optimizer asks, for Muon under ZeRO-1
    release    the bucket is zeroed for the next backward pass       the optimizer asks, also after a skipped step

Units: the backward pass is of the loss times a scale (float16's loss scale; else 1). Plain hooks leave it in the sums;
PowerSGD takes it out, since its residuals outlive it. A source says which by `keeps_scale`; the optimizer divides.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from parallel.buffer import ParameterSlice


class Named(Protocol):
    """A parameter, or a slice of one."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class GradientSource(Protocol):
    """What an optimizer steps, and where its gradients come from. Buckets go by their numbers."""

    @property
    def slices(self) -> Sequence[Sequence[ParameterSlice]]:
        """What this rank steps, one list a bucket."""

    @property
    def keeps_scale(self) -> bool:
        """Whether the sums still bear the loss scale."""

    @property
    def is_zeroed_by_step(self) -> bool:
        """Whether `release` has nothing left to do once every slice's gradients were zeroed."""

    def parameters(self, bucket: int) -> Sequence[Named]:
        """The parameters of a bucket, whichever rank steps them."""

    def sum_of_squares(self, bucket: int) -> Tensor:
        """Sum of the squares of a bucket's sums, or of this rank's shard of them: float64 scalar. Before `take`."""

    def over_ranks(self, squares: Tensor) -> Tensor:
        """`sum_of_squares` of all buckets together, a float64 scalar on the CPU -> that of all gradients. Collective
        where slices are shards."""

    def take(self, bucket: int) -> list[Tensor]:
        """Summed gradients of the bucket's slices, 1-D each. They may be written over until `release`."""

    def gather(self, bucket: int) -> list[Tensor]:
        """After `take`: for each slice the gradients of its whole parameter, 1-D, with what every rank has written over
        its own. Collective where slices are shards."""

    def release(self, bucket: int) -> None:
        """Get the bucket ready for the next backward pass."""


class Piece(Protocol):
    """A part of a parameter (checkpoint/named.py)."""

    name: str


NamedState = Iterable[tuple[Piece, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """Global norm of the unscaled gradients before clipping; infinite if they overflowed."""
    skipped: bool


class Optimizer(Protocol):
    """What engines use of optimizer/mixed_precision.py."""

    def step(self, lr: float, after_bucket: Callable[[int], None] | None = None) -> StepResult: ...

    def begin_overlapped_step(self, lr: float) -> None: ...

    def step_bucket(self, bucket: int, release: bool = False) -> None: ...

    def end_overlapped_step(self) -> StepResult: ...

    def needs_gather(self, bucket: int) -> bool: ...

    def named_state(self) -> NamedState: ...

    def weights_from_main(self) -> None: ...

    def scalar_state(self) -> dict: ...

    def load_scalar_state(self, state: dict) -> None: ...
