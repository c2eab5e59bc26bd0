"""Named ranges for torch.profiler. One costs a microsecond while nothing is profiled; a bare record_function costs
twenty."""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING = nullcontext()


def is_profiling() -> bool:
    """Whether a profiler is running, in this thread or another."""
    # A private name of torch: without it, every range is recorded, at the full cost.
    return getattr(profiler, "_is_profiler_enabled", True)


def span(name: str) -> AbstractContextManager:
    """Context that shows as `name` in a profile."""
    return profiler.record_function(name) if is_profiling() else _NOTHING


def traffic_span(name: str, num_bytes: float) -> AbstractContextManager:
    """Context for a transfer: the name shows the megabytes that this rank sends; 0 if unknown."""
    return span(f"{name} ({num_bytes / 1e6:.1f} MB)" if num_bytes else name)
