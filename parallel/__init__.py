"""Data parallelism. README.md says how to read this folder."""

from importlib import import_module

_ROOMS = {
    "collectives": ("Collectives", "measure_bandwidth"),
    "comm_hooks": ("AllReduce", "CommHook", "Compressed", "ReduceScatter", "sum_hook"),
    "comm_stream": ("CommStream",),
    "context": ("DistContext", "destroy_context", "init_context"),
    "ddp": ("DistributedDataParallel",),
    "naive": ("NaiveDDP", "NaiveZero1", "naive_powersgd"),
    "config": ("ParallelConfig", "PowerSGDConfig"),
    "engine": ("Engine",),
    "gradients": ("BucketGradients", "PlainGradients"),
    "mesh": ("Mesh",),
    "observer": ("Observer",),
    "powersgd": ("Eager", "PowerSGD"),
    "zero1": ("Zero1",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> object:
    """Import a name from its module at first use: launched.py then needs no torch."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"parallel.{_ROOM_OF[name]}"), name)
