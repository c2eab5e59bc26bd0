"""The energy counter of a GPU: it grows while the GPU works, by no more than the GPU can take."""

import time

import pytest
import torch

from utils.energy import EnergyMeter, gpu_counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_counts_its_energy():
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    meter = EnergyMeter(gpu_counters([uuid, "GPU-of-another-machine"]))
    if not meter.names:
        pytest.skip("this GPU, or its driver, has no counter")
    assert meter.names == [uuid]
    a, begun = torch.ones(4096, 4096, device="cuda"), time.monotonic()
    while time.monotonic() - begun < 1.0:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    assert 10.0 < meter.read() < 3000.0
