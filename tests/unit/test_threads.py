"""Threads beside the main one."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from checkpoint.host_copies import HostCopies
from dataset.loader import TrainLoader
from utils.threads import background_threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def counts_in(pool: ThreadPoolExecutor, number: int) -> list[int]:
    """Number of threads that an operation may take, in each of a pool's threads."""
    together = Barrier(number)

    def count() -> int:
        together.wait()
        return torch.get_num_threads()

    return [future.result() for future in [pool.submit(count) for _ in range(number)]]


@pytest.mark.parametrize("number", [1, 4])
def test_they_compute_alone_and_no_other_does(number: int):
    with background_threads(number, "background") as pool, ThreadPoolExecutor(1) as other:
        assert counts_in(pool, number) == [1] * number
        assert torch.get_num_threads() == 3 and counts_in(other, 1) == [3]


def test_saves_and_the_loader_use_them():
    copies = HostCopies(torch.device("cpu"))
    loader = TrainLoader([], 0, 1, 1, 0, 1, num_workers=2)
    assert counts_in(copies._thread, 1) == [1] and counts_in(loader._pool, 2) == [1, 1]
    copies.close()
    loader.close()
