"""A row of things with costs, cut into parts that cost about the same."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf


def balance(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """Number of units in each of `count` parts, none of which is empty, so that the most expensive part is as cheap as
    possible; of these, so that the squares of the parts' costs have the smallest sum; of these, with few units in the
    first parts: of a pipeline's stages, these hold the activations of most micro-batches.

    Args:
        costs: each unit's, in order.
    """
    most, _ = _best_cut(costs, count, max, inf)
    # Sums of the same numbers may differ in their rounding.
    _, parts = _best_cut(costs, count, lambda part, others: part**2 + others, most * (1 + 1e-9))
    return parts


def _best_cut(
    costs: Sequence[float], count: int, join: Callable[[float, float], float], most: float
) -> tuple[float, tuple[int, ...]]:
    """The cut of units into parts with the lowest value: the value, and the number of units in each part.

    Args:
        join: cost of a part, value of those after it -> value of all of them.
        most: highest cost that a part may have.
    """
    until = [0.0, *accumulate(costs)]
    # First unit -> best cut of it and all after it into some number of parts, beginning with none.
    best: dict[int, tuple[float, tuple[int, ...]]] = {len(costs): (0.0, ())}
    for _ in range(count):
        best = {
            start: min(cuts)
            for start in range(len(costs))
            if (cuts := [
                (join(until[end] - until[start], value), (end - start, *parts))
                for end, (value, parts) in best.items()
                if end > start and until[end] - until[start] <= most
            ])
        }  # fmt: skip
    return best[0]
