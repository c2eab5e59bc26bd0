"""The engine on several ranks that hold parts of one model: the first one plans, and all compute.

    rank 0      plan -> | forward pass -> scores -> tokens -> plan -> | forward pass -> ...
    others      follow  | forward pass                                | forward pass

Rank 0 has the engine: it alone knows the requests, and draws the tokens. A plan (plan.py) is some numbers for each
sequence: a kilobyte or two before each forward pass. The others run it, as they are needed for its sums, and drop the
scores.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from parallel.context import has_lost_peer
from serving.plan import Part, StepPlan

logger = logging.getLogger(__name__)

OfFirst = Callable[[Any], Any]
"""Returns rank 0's value, which must fit JSON, on every rank. Collective."""


class RunsPlans(Protocol):
    """What computes the scores of a plan; see serving/runner.py."""

    def run(self, plan: StepPlan) -> Tensor: ...


class Lockstep:
    """Runner on rank 0 that lets the other ranks run each plan, too; they `follow`.

    Args:
        runner: this rank's.
        of_first: see `OfFirst`.
    """

    def __init__(self, runner: RunsPlans, of_first: OfFirst):
        self._runner, self._of_first = runner, of_first
        self._is_running = False

    @property
    def has_failed(self) -> bool:
        """Whether a step has failed, between two calls: then the ranks cannot go on."""
        return self._is_running

    def run(self, plan: StepPlan) -> Tensor:
        """Scores of a plan, on rank 0.

        Raises:
            RuntimeError: a step failed before: the other ranks may be anywhere in it.
        """
        if self._is_running:
            raise RuntimeError("a step failed on some of the ranks, which cannot go on: start them anew")
        self._is_running = True
        self._of_first(plan)
        scores = self._runner.run(plan)
        self._is_running = False
        return scores

    def follow(self) -> None:
        """Run all plans that rank 0 sends, until it ends.

        Raises:
            ConnectionError: another rank has gone without a word. It has been logged.
        """
        try:
            while (sent := self._of_first(None)) is not None:
                parts, copies, adapter = sent
                plan = StepPlan([Part(*part) for part in parts], [(old, new) for old, new in copies], adapter)
                self._runner.run(plan)
        except RuntimeError as error:
            if not has_lost_peer(error):
                raise
            sentence = "another rank has ended without a word to this one, which ends, too"
            logger.error(sentence)
            raise ConnectionError(sentence) from error

    def end(self) -> None:
        """Let the others go; on rank 0. If it leaves in the middle of a plan, they wait for its part of a sum, not for
        a plan: then they end when its connections close."""
        if not self._is_running:
            self._of_first(None)
