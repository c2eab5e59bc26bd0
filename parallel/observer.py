"""Instrumentation of data parallelism: profile spans, waits, the order of gradients, non-finite values.

The algorithms (ddp.py, zero1.py) report to an observer; none of their decisions depends on it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.buffer import Bucket
from parallel.context import DistContext
from parallel.spans import traffic_span
from parallel.waiting import WaitMeter

logger = logging.getLogger(__name__)


def no_gradient_error(missing: Sequence[str]) -> RuntimeError:
    """The error of a backward pass that left parameters of these names without gradients."""
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return RuntimeError(
        f"{len(missing)} parameters got no gradient in this backward pass: {shown}; "
        f"every parameter must take part in the loss, or be frozen before the model is wrapped"
    )


@dataclass
class SyncTrace:
    """Launches of the buckets in one synchronised backward pass."""

    arrived_before_launch: list[int]
    """Number of gradients that had arrived when bucket i was launched."""


class Observer:
    """Collects the reports of one data-parallel model.

    Args:
        check_for_nan: look for non-finite values in each bucket before it is reduced; see `nonfinite_parameters`.
    """

    def __init__(self, context: DistContext, check_for_nan: bool = False):
        self.check_for_nan = check_for_nan
        self.waits = WaitMeter(context.device, enabled=context.world_size > 1)
        """Waits of the main thread for reduced buckets and gathered parameters."""
        self.last_sync = SyncTrace([])
        """Launches in the last synchronised backward pass."""
        self.nonfinite_parameters: list[str] = []
        """With check_for_nan: this rank's parameters whose gradients were not finite in the last synchronised pass."""
        self.expects_order = True
        """Whether gradients should arrive in the planned order: in a pipeline, stages that share a matrix cannot."""
        self._warned_order = False
        self._begin()

    def _begin(self) -> None:
        self._trace = SyncTrace([])
        self._complete_order: list[int] = []
        self._flags: list[tuple[Bucket, Tensor]] = []

    def completed(self, bucket: int) -> None:
        """Report that a bucket's last gradient has arrived."""
        self._complete_order.append(bucket)

    def launched(self, gradients_arrived: int) -> None:
        """Report that the next bucket goes to the comm stream."""
        self._trace.arrived_before_launch.append(gradients_arrived)

    @contextmanager
    def reducing(self, bucket: Bucket, num_bytes: float) -> Iterator[None]:
        """Context for a bucket's reduction, on the comm stream."""
        if self.check_for_nan:
            self._flags.append((bucket, ~torch.isfinite(bucket.grad).all()))
        with traffic_span(f"bucket {bucket.index}", num_bytes):
            yield

    def waiting(self, name: str) -> AbstractContextManager[None]:
        """Context for a wait of the main thread."""
        return self.waits.waiting(name)

    def synchronised(self) -> None:
        """Report that all buckets of a backward pass are reduced."""
        self.last_sync = self._trace
        self.nonfinite_parameters = self._name_nonfinite()
        self._warn_if_order_differs()
        self._begin()

    def _name_nonfinite(self) -> list[str]:
        """Parameters whose sum holds a non-finite value, in buckets that this rank has flagged."""
        if not self._flags or not bool(torch.stack([flag for _, flag in self._flags]).any()):
            return []
        flagged = [bucket for bucket, flag in self._flags if flag]
        return [name for bucket in flagged for name, grad in bucket.views() if not torch.isfinite(grad).all()]

    def _warn_if_order_differs(self) -> None:
        """Warn once if gradients arrive in a different order than planned: that costs overlap, not correctness."""
        if self.expects_order and not self._warned_order and self._complete_order != sorted(self._complete_order):
            self._warned_order = True
            logger.warning(
                "gradients arrive in another order than planned (buckets complete as %s), so less communication is "
                "hidden: define modules in the order of their use",
                self._complete_order,
            )
