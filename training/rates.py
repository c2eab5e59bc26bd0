"""Learning rates that would ruin a model."""

import logging

from configurator import Config

logger = logging.getLogger(__name__)

_LARGE = 1_000_000_000
"""Parameters."""
_RATES_OF_LARGE = {"sft": (1e-4, 2e-5), "dpo": (1e-5, 5e-7)}
"""Task -> (the learning rate from which on it undoes what a large model knows, a usual one)."""


def warn_of_rate(config: Config, num_parameters: int) -> None:
    """The default, and what suits a small model of one's own, would ruin a large one within some steps."""
    task, rate = config.run.task_type, config.optimizer.learning_rate
    most, usual = _RATES_OF_LARGE.get(task, (float("inf"), 0.0))
    if num_parameters >= _LARGE and rate >= most:
        logger.warning(
            "learning_rate %g is more than the weights are likely to survive: %s of a model of %.1f B parameters "
            "mostly takes about %g (--learning_rate=%g)", rate, task.upper(), num_parameters / 1e9, usual, usual,
        )  # fmt: skip
