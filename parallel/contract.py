"""The contract between parallelism and the optimizer: gradients from the backward pass to the step.

    reduce     the comm hook sums a bucket over the ranks            comm stream, under the backward pass
    settle     the hook finishes its local part                      the thread that has waited for the bucket
    norm       sums of squares of the buckets -> the global norm     called by the optimizer, before it changes anything
    take       the hook hands over a bucket's sums                   called by the optimizer, unless it skips the step
    gather     every rank gets all ranks' shards                     called by the optimizer, for Muon under ZeRO-1
    release    the bucket is zeroed for the next backward pass       called by the optimizer, also after a skipped step

Units: the backward pass differentiates the loss times a scale (float16's loss scale, otherwise 1). Plain hooks leave
the scale in the sums; PowerSGD divides by it, since its residuals outlive it. `keeps_scale` of a source says which; the
optimizer divides where the scale is left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from checkpoint.named import NamedState, Piece
from parallel.buffer import ParameterSlice


class Named(Protocol):
    """A parameter, or a slice of one."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what this rank holds."""

    @property
    def held(self) -> Piece | None:
        """What this rank holds of the whole parameter; None: all."""


class GradientSource(Protocol):
    """The slices that an optimizer steps, and their gradients. Buckets are given by number."""

    @property
    def slices(self) -> Sequence[Sequence[ParameterSlice]]:
        """Slices that this rank steps, one list a bucket."""

    @property
    def keeps_scale(self) -> bool:
        """Whether the sums still include the loss scale."""

    @property
    def is_zeroed_by_step(self) -> bool:
        """Whether zeroing the gradients of every slice makes `release` unnecessary."""

    def parameters(self, bucket: int) -> Sequence[Named]:
        """Parameters of a bucket, whichever rank steps them."""

    def sum_of_squares(self, bucket: int) -> Tensor:
        """Sum of the squares of a bucket's sums, or of this rank's shard of them: float64 scalar. Before `take`."""

    def over_ranks(self, squares: Tensor) -> Tensor:
        """Sum of the squares of all gradients, from this rank's `sum_of_squares` over all buckets: float64 scalars on
        the CPU. Collective if slices are shards."""

    def take(self, bucket: int) -> list[Tensor]:
        """Summed gradients of the bucket's slices, 1-D each. The caller may overwrite them until `release`."""

    def gather(self, bucket: int) -> list[Tensor]:
        """For each slice the gradients of its whole parameter, 1-D, as every rank has overwritten its own since `take`.
        Collective if slices are shards."""

    def release(self, bucket: int) -> None:
        """Get the bucket ready for the next backward pass."""


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    """Global norm of the unscaled gradients before clipping; infinite if they overflowed."""
    skipped: bool


class Optimizer(Protocol):
    """The part of optimizer/mixed_precision.py that engines use."""

    def step(self, lr: float, after_bucket: Callable[[int], None] | None = None) -> StepResult: ...

    def begin_overlapped_step(self, lr: float) -> None: ...

    def step_bucket(self, bucket: int, release: bool = False) -> None: ...

    def end_overlapped_step(self, before_release: Callable[[], None] | None = None) -> StepResult: ...

    def needs_gather(self, bucket: int) -> bool: ...

    def named_state(self) -> NamedState: ...

    def weights_from_main(self) -> None: ...

    def scalar_state(self) -> dict: ...

    def load_scalar_state(self, state: dict) -> None: ...
