"""torch.compile takes every kernel into one graph, forward and backward."""

import pytest
import torch
from torch import Tensor

from model.dropout import DropoutKey
from model.kernels.cross_entropy import cross_entropy
from model.kernels.rms_norm import add_rms_norm, rms_norm
from model.kernels.rope import rope
from model.kernels.swiglu import swiglu, swiglu_packed
from tests.kernel_checks import DEVICE, draw


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


def check(function, leaves: list[Tensor], *others) -> None:
    """Bits are the same when compiled by the backend that computes as eager does."""

    def run(function) -> list[Tensor]:
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        results = function(*inputs, *others)
        loss = sum((x.float() * torch.arange(x.numel(), device=DEVICE).view(x.shape).sin()).sum() for x in results)
        return [x.detach() for x in results] + list(torch.autograd.grad(loss, inputs))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(function), run(compiled)):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_kernels_of_a_block():
    def block(h: Tensor, x: Tensor, weight: Tensor, q: Tensor, k: Tensor, gate_up: Tensor, key: DropoutKey, cos: Tensor,
              sin: Tensor) -> list[Tensor]:  # fmt: skip
        h, y = add_rms_norm(h, x, weight, 1e-5, 0.25, key, 1)
        rotated = rope(q.view(2, 3, 4, 6).transpose(1, 2), k.view(2, 3, 2, 6).transpose(1, 2), cos, sin)
        activated = swiglu_packed(gate_up), swiglu(gate_up[..., :8], gate_up[..., 8:])
        return [h, rms_norm(y, weight, 1e-5), *rotated, *activated]

    key = DropoutKey(5, torch.arange(2, device=DEVICE) + 7, 0, torch.tensor(3, device=DEVICE))
    half = [draw(2, 3, size, dtype=torch.bfloat16, seed=size) for size in (20, 24, 12, 16)]
    leaves = [draw(2, 3, 20), half[0], draw(20, dtype=torch.bfloat16), *half[1:]]
    check(block, leaves, key, draw(2, 1, 3, 3), draw(2, 1, 3, 3, seed=1))


def test_cross_entropy():
    labels = torch.tensor([0, -100, 3, 39, 2], device=DEVICE)
    check(lambda x: [cross_entropy(x * 2, labels, z_loss=0.1)], [draw(5, 40)])
