"""Tasks that need no data from elsewhere: their questions are made by our own makers with fixed seeds."""

from evaluation.task import OwnTask

TASKS: dict[str, OwnTask] = {}
"""By name; all begin with "zero_"."""
