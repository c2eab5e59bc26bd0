"""Data parallelism. README.md says how to read this folder."""

from parallel.collectives import Collectives, measure_bandwidth
from parallel.comm_hooks import AllReduce, CommHook, Compressed, ReduceScatter, sum_hook
from parallel.comm_stream import CommStream
from parallel.context import DistContext, destroy_context, init_context
from parallel.ddp import DistributedDataParallel, NaiveDDP
from parallel.powersgd import PowerSGD, PowerSGDConfig
from parallel.zero1 import Zero1

__all__ = [
    "AllReduce",
    "Collectives",
    "CommHook",
    "CommStream",
    "Compressed",
    "DistContext",
    "DistributedDataParallel",
    "NaiveDDP",
    "PowerSGD",
    "PowerSGDConfig",
    "ReduceScatter",
    "Zero1",
    "destroy_context",
    "init_context",
    "measure_bandwidth",
    "sum_hook",
]
