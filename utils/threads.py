"""Threads beside the main one."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def _compute_alone() -> None:
    import torch

    # The first question in a thread takes over the process's number, which is then no longer asked for.
    torch.get_num_threads()
    torch.set_num_threads(1)


def background_threads(number: int, name: str) -> ThreadPoolExecutor:
    """Threads whose tensor operations are computed by themselves alone.

    Elsewhere an operation on a large tensor starts OpenMP's threads, for each thread that does one a set of its own,
    and keeps them. Where there are more than CPUs, GNU's OpenMP lets all of them sleep between any two operations, also
    those of the main thread: to wake them up each time made a small training step take half as long again.
    """
    # Not before: its import takes seconds, and dataset.audit, which reads no tensor, imports this file, too.
    import torch

    of_main, all_begun = torch.get_num_threads(), Barrier(number)
    pool = ThreadPoolExecutor(number, name, initializer=_compute_alone)
    for future in [pool.submit(all_begun.wait) for _ in range(number)]:
        future.result()
    # What was set there is also the default of threads that are yet to begin.
    torch.set_num_threads(of_main)
    return pool
