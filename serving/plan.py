"""What one forward pass of the engine computes. Plain data that fits JSON, so that several ranks can run the same plan.

    scheduler.py -> StepPlan -> runner.py -> scores -> sampling.py
"""

from typing import NamedTuple


class Part(NamedTuple):
    """Tokens of one sequence that are new to the cache."""

    tokens: list[int]
    start: int
    """Number of the sequence's tokens that the cache holds already."""
    blocks: list[int]
    """Blocks of the cache that hold the sequence, in order, up to its last new token."""
    num_scores: int
    """Number of its last tokens whose scores are wanted: 0 for a piece of a prompt that goes on, usually 1, or all."""
    prompt_length: int = 0
    """Tokens of the sequence's prompt, for models whose rotary angles depend on a text's length: so a prompt may come
    in pieces, and a text be computed again. See model.paged.Segment; and model.rope.length_group, for whose blocks may
    be shared."""


class StepPlan(NamedTuple):
    """A forward pass over tokens of several sequences."""

    parts: list[Part]
    copies: list[tuple[int, int]]
    """Blocks to copy before it, as (from, to)."""
    adapter: str | None = None
    """Name of the adapter in use; None: none, or the one that stays."""
