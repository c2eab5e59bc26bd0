"""Settings of the machine."""

import ctypes
import subprocess
import sys

import pytest

from utils.machine import keep_freed_memory

FAULTS = """
import resource, sys
import numpy
from utils.machine import keep_freed_memory
assert sys.argv[1] == "plain" or keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = numpy.ones(64 << 20, dtype=numpy.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
print(faults)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_a_second_block_gets_the_memory_of_the_first():
    """Counted in pages that the system had to provide."""
    faults = {}
    for way in ("plain", "kept"):
        result = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        faults[way] = int(result.stdout)
    assert faults["kept"] < 100 and faults["plain"] > 20 * max(faults["kept"], 1)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
