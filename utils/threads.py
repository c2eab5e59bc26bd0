"""Threads beside the main one."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def _compute_alone() -> None:
    import torch

    # The first question in a thread takes over the process's number, which is then no longer asked for.
    torch.get_num_threads()
    torch.set_num_threads(1)


def background_threads(number: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute their tensor operations alone, without OpenMP's threads.

    In any other thread, an operation on a large tensor starts a set of OpenMP threads of its own, which stay. If there
    are more of these than CPUs, GNU's OpenMP lets all of them sleep between any two operations, also those of the main
    thread: to wake them each time made a small training step take half as long again.
    """
    # Not at the top: the import takes seconds, and dataset.audit, which reads no tensors, imports this file, too.
    import torch

    of_main, all_begun = torch.get_num_threads(), Barrier(number)
    pool = ThreadPoolExecutor(number, name, initializer=_compute_alone)
    for future in [pool.submit(all_begun.wait) for _ in range(number)]:
        future.result()
    # The setting in those threads is also the default of threads that are yet to begin.
    torch.set_num_threads(of_main)
    return pool
