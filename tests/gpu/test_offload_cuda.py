"""The optimizer's state in host memory beside a GPU: steps, memory, and what the copy stream must wait for."""

import pytest
import torch
from torch import Tensor

from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.offload import OffloadedOptimizer
from optimizer.rules import new_rules
from parallel.buffer import SliceWithGrad
from parallel.gradients import PlainGradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE, BUCKETS = 1 << 22, 5


def new_optimizer(dtype: torch.dtype, offloads: bool) -> tuple[MixedPrecisionOptimizer, list[SliceWithGrad]]:
    slices = []
    for bucket in range(BUCKETS):
        torch.manual_seed(bucket)
        grad = torch.zeros(SIZE, dtype=torch.float32, device="cuda")
        weights = torch.randn(SIZE, device="cuda").to(dtype)
        slices.append(SliceWithGrad(f"layers.{bucket}", 0, (SIZE // 8, 8), weights, grad, grad))
    gradients = PlainGradients([[piece] for piece in slices])
    rules, scaler = new_rules("adamw", AdamWConfig(), MuonConfig(), LionConfig()), LossScaler(enabled=False)
    if offloads:
        return OffloadedOptimizer(gradients, rules, 1.0, scaler, torch.device("cuda", 0)), slices
    return MixedPrecisionOptimizer(gradients, rules, 1.0, scaler), slices


def mains(optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    return [tensors["main"] for _, tensors in optimizer.named_state()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_differs_by_one_unit_in_the_last_place(dtype: torch.dtype):
    """Of the larger of a parameter's values before and after the step. On the device, each step begins from what the
    host has, so that differences do not add up."""
    (here, on_host), (there, on_device) = new_optimizer(dtype, True), new_optimizer(dtype, False)
    for step in range(4):
        for (_, ours), (_, theirs) in zip(here.named_state(), there.named_state()):
            for name, tensor in ours.items():
                theirs[name].copy_(tensor)
        for bucket, (a, b) in enumerate(zip(on_host, on_device)):
            torch.manual_seed(100 * step + bucket)
            a.grad.normal_()
            b.grad.copy_(a.grad)
        before = [main.clone() for main in mains(here)]
        assert here.step(1e-3).grad_norm == there.step(1e-3).grad_norm
        # The model's next pass reads them at once.
        seen = [piece.param.clone() for piece in on_host]
        for weights, main, other, was in zip(seen, mains(here), mains(there), before):
            assert not main.is_cuda and torch.equal(weights, main.to(dtype).cuda())
            unit = torch.finfo(torch.float32).eps * torch.maximum(main.abs(), was.abs())
            assert ((main - other.cpu()).abs() <= unit).all()
        assert not any(piece.grad.any() for piece in on_host)


def test_the_device_holds_weights_and_gradients_alone():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    optimizer, slices = new_optimizer(torch.bfloat16, True)
    torch.cuda.reset_peak_memory_stats()
    for piece in slices:
        piece.grad.fill_(1e-3)
    optimizer.step(1e-3)
    # Of the norm in float64: two numbers of a bucket at a time, at most.
    assert torch.cuda.max_memory_allocated() - before < (2 + 4) * SIZE * BUCKETS + 16 * SIZE
