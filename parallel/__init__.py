"""Data parallelism. Reading order: context.py, ddp.py (NaiveDDP first), layout.py, buffer.py, comm_stream.py."""

from parallel.comm_hooks import all_reduce_hook
from parallel.comm_stream import CommStream
from parallel.context import DistContext, destroy_context, init_context
from parallel.ddp import DistributedDataParallel, NaiveDDP

__all__ = [
    "CommStream",
    "DistContext",
    "DistributedDataParallel",
    "NaiveDDP",
    "all_reduce_hook",
    "destroy_context",
    "init_context",
]
