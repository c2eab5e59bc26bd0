"""Engines by name. A new engine is a module with a function that opens it, and a line here."""

from collections.abc import Callable

from parallel import data_parallel
from parallel.engine import Engine, EngineParts

ENGINES: dict[str, Callable[[EngineParts], Engine]] = {
    "naive": data_parallel.open_naive,
    "bucketed": data_parallel.open_bucketed,
}
"""--ddp_impl -> the function that opens it."""


def open_engine(parts: EngineParts) -> Engine:
    return ENGINES[parts.config.ddp_impl](parts)
