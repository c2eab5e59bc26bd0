"""A whole model trained for 20 steps: on the plain ops, on the Triton kernels, and in float64.

The losses are compared with those of float64, so that the tolerance is not a guess: the root mean square, over the
steps, of the fused run's deviation may be at most twice that of the plain run in the same dtype (or one unit in the
loss's last place as float32, if that is more). A single step's deviation is luck, but the root mean square over 20
steps hardly is: for three seeds of the weights it was 0.7 to 1.1 of the plain run's in float32, 0.8 to 1.2 in bfloat16.

Both runs train as train_my_ddp.py does: flat buffers, gradients in float32, clipping, AdamW on float32 main parameters.
Rows hold two documents; float32 uses dropout, bfloat16 the Triton AdamW. The losses themselves are kept in
tests/golden/whole_model.json.
"""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder, ModelConfig
from model.dropout import DropoutKey, dropout
from model.kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.ops import REFERENCE, Ops, build_ops
from optimizer.adamw import AdamW, adamw_reference
from optimizer.clip import clip_factor
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import BucketGradients, DistContext, DistributedDataParallel
from tests.kernel_checks import DEVICE

GOLDEN = Path(__file__).parents[1] / "golden" / "whole_model.json"
STEPS, WIDTH, VOCAB_SIZE = 20, 4, 16
"""Triton's interpreter takes a tenth of a second for each token of the model."""
LEARNING_RATE, GRAD_CLIP = 1e-2, 1.0
CONSTANTS = AdamWConfig(adam_eps=1e-2)
"""With Adam's usual eps, a gradient of 1e-9 whose sign changes by rounding moves its weight by twice the learning rate:
deviations would be a lottery. With this eps they are not."""
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE, hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.1,
).resolve(max_seq_len=WIDTH)  # fmt: skip
CASES = {
    "float32, dropout": (torch.float32, replace(CONFIG, hidden_dropout=0.2)),
    "bfloat16": (torch.bfloat16, CONFIG),
}
"""Name -> dtype of the weights, model."""
FUSED = {"rms_norm": "triton", "rope": "triton", "swiglu": "triton", "cross_entropy": "triton", "attention": "sdpa"}


def batch(step: int) -> dict[str, Tensor]:
    """A row of two documents; the same four rows, repeated."""
    generator = torch.Generator().manual_seed(100 + step % 4)
    tokens = torch.randint(0, VOCAB_SIZE, (1, WIDTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # The last token of the first document has no label.
    labels[0, 2] = -100
    made = {"input_ids": tokens[:, :-1], "labels": labels, "document_ids": torch.tensor([[0, 0, 0, 1]]),
            "positions": torch.tensor([[0, 1, 2, 0]]), "row_ids": torch.tensor([step])}  # fmt: skip
    return {name: value.to(DEVICE) for name, value in made.items()}


def loss_of(model: Decoder, inputs: dict[str, Tensor]) -> Tensor:
    """Mean over the supervised tokens."""
    key = DropoutKey(7, inputs["row_ids"]) if model.config.hidden_dropout else None
    hidden = model(inputs["input_ids"], inputs["positions"], inputs["document_ids"], dropout_key=key)
    return model.loss_sum(hidden, inputs["labels"]) / (inputs["labels"] != -100).sum()


def train(config: ModelConfig, dtype: torch.dtype, ops: Ops, kernel: str, seed: int = 0) -> list[float]:
    """Losses of the steps, each before its update."""
    torch.set_num_threads(1)
    model = Decoder(config, ops=ops)
    model.initialize(seed)
    model.to(device=DEVICE, dtype=dtype).train()
    ddp = DistributedDataParallel(model, DistContext(0, 1, 0, 1, torch.device(DEVICE)), overlap_grad_reduce=False)
    optimizer = MixedPrecisionOptimizer(
        BucketGradients(ddp), [AdamW(CONSTANTS, kernel=kernel)], GRAD_CLIP, LossScaler(enabled=False)
    )
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step(LEARNING_RATE)
        ddp.zero_grad()
        losses.append(loss.item())
    ddp.close()
    return losses


def train_plain(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> list[float]:
    return train(config, dtype, REFERENCE, "torch", seed)


def train_fused(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> list[float]:
    loss_sum = functools.partial(linear_cross_entropy_sum, use_triton=True)
    # float32 weights are their own main parameters; the other step has more to do.
    kernel = "torch" if dtype == torch.float32 else "triton"
    return train(config, dtype, replace(build_ops(FUSED), loss_sum=loss_sum), kernel, seed)


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def exact_add_norm(
    h: Tensor, x: Tensor, weight: Tensor, eps: float, dropout_p: float, key: DropoutKey | None, site: int
) -> tuple[Tensor, Tensor]:
    h = h + dropout(x, dropout_p, key, site)
    return h, exact_norm(h, weight, eps)


def exact_rope(
    q_BHTD: Tensor, k_BKTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, ...]:
    assert not interleaved
    halves = (x.chunk(2, dim=-1) for x in (q_BHTD, k_BKTD))
    return tuple(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1) for a, b in halves)


def train_exact(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> list[float]:
    """The float64 run, from the weights with which a run in `dtype` begins; every op by its formula."""
    torch.set_num_threads(1)
    ops = replace(
        REFERENCE, rms_norm=exact_norm, add_rms_norm=exact_add_norm, rope=exact_rope,
        loss_sum=lambda hidden, weight, labels, **_: F.cross_entropy(
            (hidden @ weight.T).flatten(0, -2), labels.flatten(), reduction="sum"
        ),
    )  # fmt: skip
    model = Decoder(replace(config, residual_in_fp32=False), ops=ops)
    model.initialize(seed)
    model.to(device=DEVICE, dtype=dtype).double().train()
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        gradients = torch.autograd.grad(loss, parameters)
        factor = clip_factor(math.sqrt(sum(g.square().sum().item() for g in gradients)), GRAD_CLIP)
        with torch.no_grad():
            for parameter, gradient, state in zip(parameters, gradients, moments):
                decay = CONSTANTS.weight_decay if parameter.dim() >= 2 else 0.0
                adamw_reference(parameter, gradient * factor, *state, step + 1, LEARNING_RATE, decay, CONSTANTS)
        losses.append(loss.item())
    return losses


def deviation(losses: list[float], exact: list[float]) -> float:
    """Root mean square over the steps."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, exact, strict=True)) / len(exact))


def unit(exact: list[float]) -> float:
    """Unit in the last place of the largest loss, as a float32."""
    return torch.finfo(torch.float32).eps * 2.0 ** math.floor(math.log2(max(exact)))


@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_those_of_before(name: str):
    """Float64 to nine digits: no change of the model, the optimizer or dropout goes unnoticed. A run in 16 or 32 bits
    on another CPU rounds differently, and is then about as far from its former losses as those were from float64; twice
    the largest of 20 such steps is ten times the root mean square, rounded up."""
    golden, (dtype, config) = json.loads(GOLDEN.read_text())["losses"][name], CASES[name]
    assert train_exact(config, dtype) == pytest.approx(golden["float64"], rel=1e-9)
    for kind in ("plain", "fused"):
        allowed = max(2.0 * deviation(golden["plain"], golden["float64"]), unit(golden["float64"]))
        assert deviation(golden[kind], golden["float64"]) <= allowed
    apart = 10.0 * deviation(golden["plain"], golden["float64"])
    assert train_plain(config, dtype) == pytest.approx(golden["plain"], abs=apart)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_fused_run_is_as_close_to_float64_as_the_plain_one(name: str):
    dtype, config = CASES[name]
    exact, plain, fused = (run(config, dtype) for run in (train_exact, train_plain, train_fused))
    # The model learns: otherwise a step that did nothing would pass.
    assert sum(exact[-5:]) < 0.8 * sum(exact[:5])
    assert deviation(fused, exact) <= max(2.0 * deviation(plain, exact), unit(exact))
    golden = json.loads(GOLDEN.read_text())["losses"][name]
    assert fused == pytest.approx(golden["fused"], abs=10.0 * deviation(golden["plain"], golden["float64"]))
