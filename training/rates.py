"""Learning rates that would ruin a model."""

import logging
import math

from training.config import RunConfig

logger = logging.getLogger(__name__)

_LARGE = 1_000_000_000
"""Parameters of a model that what suits a small one would ruin."""


def warn_of_rate(run: RunConfig, rate: float, num_parameters: int) -> None:
    """The default, and what suits a small model of one's own, would ruin a large one within some steps."""
    most, usual = run.task.rate_of_large or (math.inf, 0.0)
    if num_parameters >= _LARGE and rate >= most:
        logger.warning(
            "learning_rate %g is more than the weights are likely to survive: %s of a model of %.1f B parameters "
            "mostly takes about %g (--learning_rate=%g)",
            rate, run.task_type.upper(), num_parameters / 1e9, usual, usual,
        )  # fmt: skip
