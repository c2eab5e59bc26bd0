"""Learning rates that would ruin a model."""

import logging
import math

from optimizer.config import LIONS, OptimizerConfig
from training.config import RunConfig

logger = logging.getLogger(__name__)

_LARGE = 1_000_000_000
"""Number of parameters from which a small model's learning rate would ruin the weights."""


def warn_of_rate(run: RunConfig, rate: float, num_parameters: int) -> None:
    """Warn of a rate for small models, such as the default: it would ruin a large model within some steps."""
    most, usual = run.task.rate_of_large or (math.inf, 0.0)
    if num_parameters >= _LARGE and rate >= most:
        logger.warning(
            "learning_rate %g is likely to ruin the weights: %s of a model of %.1f B parameters usually takes about %g "
            "(--learning_rate=%g)",
            rate, run.task_type.upper(), num_parameters / 1e9, usual, usual,
        )  # fmt: skip


def warn_of_default_rate(optimizer: OptimizerConfig, given: frozenset[str]) -> None:
    """Warn of a default rate that is not meant for the optimizer.

    Args:
        given: names of the flags that were given.
    """
    if optimizer.optimizer in LIONS and "learning_rate" not in given:
        logger.warning(
            "learning_rate %g is AdamW's default, and Lion usually takes 3 to 10 times less, with a weight_decay 3 to "
            "10 times larger, such as --learning_rate=6e-5 --weight_decay=0.5",
            optimizer.learning_rate,
        )
