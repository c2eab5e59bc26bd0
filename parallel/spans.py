"""Names for what goes on, in a profile of torch.profiler. They cost a microsecond each while nothing is profiled, where
a bare record_function costs twenty."""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING = nullcontext()


def is_profiling() -> bool:
    """Whether a profiler runs, in this thread or another."""
    # A private name, so looked up with care: without it the ranges are there at their price.
    return getattr(profiler, "_is_profiler_enabled", True)


def span(name: str) -> AbstractContextManager:
    """Around something that bears `name` in a profile."""
    return profiler.record_function(name) if is_profiling() else _NOTHING


def traffic_span(name: str, num_bytes: float) -> AbstractContextManager:
    """Around a transfer, named with the megabytes that this rank sends; 0 if unknown."""
    return span(f"{name} ({num_bytes / 1e6:.1f} MB)" if num_bytes else name)
