"""Lion against its formula in float64."""

import pytest
import torch

from optimizer.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig
from optimizer.lion import lion_reference
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rules import new_rules
from parallel.buffer import SliceWithGrad
from parallel.gradients import PlainGradients
from training.rates import warn_of_default_rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_formula(dtype: torch.dtype):
    config, decay, clip = LionConfig(lion_beta1=0.8, lion_beta2=0.95), AdamWConfig(weight_decay=0.3), 1.0
    generator = torch.Generator().manual_seed(0)
    pieces = [
        SliceWithGrad(name, 0, shape, torch.randn(shape, generator=generator).to(dtype).flatten(), grad, grad)
        for name, shape in (("w", (300, 7)), ("bias", (50,)))
        for grad in [torch.zeros(torch.Size(shape).numel(), dtype=dtype)]
    ]
    rules = new_rules("lion", decay, MuonConfig(), config)
    optimizer = MixedPrecisionOptimizer(PlainGradients([pieces]), rules, clip, LossScaler(enabled=False))
    exact = [(piece.param.double(), torch.zeros(len(piece.param)).double()) for piece in pieces]
    for step in range(5):
        for piece in pieces:
            piece.grad.copy_(torch.randn(len(piece.grad), generator=generator))
        grads = [piece.grad.double() for piece in pieces]
        norm, lr = optimizer.step(1e-2 / (step + 1)).grad_norm, 1e-2 / (step + 1)
        for (param, exp_avg), grad, weight_decay in zip(exact, grads, (0.3, 0.0)):
            lion_reference(param, grad * (clip / norm), exp_avg, lr, weight_decay, config)
    for (_, tensors), (param, exp_avg), weights in zip(optimizer.named_state(), exact, pieces):
        assert tensors.keys() == {"main", "exp_avg"}
        # Each step rounds a main parameter twice.
        assert torch.allclose(tensors["main"].double(), param, rtol=10 * 2.0**-24, atol=1e-8)
        assert torch.allclose(tensors["exp_avg"].double(), exp_avg, rtol=0, atol=1e-8)
        assert torch.equal(weights.param, tensors["main"].to(dtype)) and not weights.grad.any()


def test_adamws_default_rate_is_warned_of(caplog: pytest.LogCaptureFixture):
    for optimizer, given in (("adamw", frozenset()), ("lion", frozenset({"learning_rate"})), ("lion8bit", frozenset())):
        assert "3 to 10 times less" not in caplog.text
        warn_of_default_rate(OptimizerConfig(optimizer=optimizer), given)
    assert "3 to 10 times less" in caplog.text
