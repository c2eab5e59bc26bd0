"""Checksum with which replicas are compared."""

import pytest
import torch

from parallel.context import DistContext
from parallel.replicas import ReplicaDrift, checksum, require_same_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_bit_that_flips_changes_it(dtype: torch.dtype, offset: int):
    """Odd lengths, and a view whose memory begins in the middle of a word."""
    memory = torch.randn(24, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = [memory[offset : offset + 7], memory[offset + 7 : offset + 22].view(3, 5), torch.zeros(0, dtype=dtype)]
    expected = checksum(tensors)
    raw = memory.view(torch.uint8)
    first, end = offset * memory.itemsize, (offset + 22) * memory.itemsize
    for byte in range(first, end):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert checksum(tensors) != expected, (byte, bit)
            raw[byte] ^= 1 << bit
    assert checksum(tensors) == expected
    raw[:first], raw[end:] = 1, 1
    assert checksum(tensors) == expected, "what lies around the weights does not count"
    assert checksum(tensors[::-1]) != expected, "each tensor counts by its place"


def test_who_is_alone_is_named():
    class Context(DistContext):
        def gather(self, value: object) -> list:
            return [value, value + 1, value, value]

    weights = [torch.ones(3)]
    with pytest.raises(ReplicaDrift, match="the weights of rank 1 are not the same as the others' after step 7"):
        require_same_weights(Context(0, 4, 0, 4, torch.device("cpu")), weights, 7)
