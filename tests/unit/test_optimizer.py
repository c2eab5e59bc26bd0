"""AdamW, clipping, loss scaling and schedules against formulas in float64."""

import math

import pytest
import torch

from optimizer.adamw import AdamW, adamw_reference, adamw_step
from optimizer.clip import clip_factor
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.param_groups import is_matrix
from optimizer.rules import new_rules
from optimizer.schedule import learning_rate_at
from parallel.buffer import SliceWithGrad, sum_of_squares
from parallel.gradients import PlainGradients

CONFIG = AdamWConfig(beta1=0.9, beta2=0.95, adam_eps=1e-8, weight_decay=0.1)


def slices_of(dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32) -> list[SliceWithGrad]:
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(kind)

    return [
        SliceWithGrad(name, 0, shape, draw(math.prod(shape), dtype), grad, grad)
        for name, shape in (("w", (10, 100)), ("norm", (33,)), ("v", (7, 1)))
        for grad in [draw(math.prod(shape), grad_dtype)]
    ]


def test_fused_step_equals_the_formula_in_float64():
    generator = torch.Generator().manual_seed(1)
    param = torch.randn(513, generator=generator)
    exact = [param.double(), torch.zeros(513).double(), torch.zeros(513).double()]
    fused = [param.clone(), torch.zeros(513), torch.zeros(513)]
    for step in range(1, 20):
        grad = torch.randn(513, generator=generator)
        adamw_reference(exact[0], grad.double(), exact[1], exact[2], step, 1e-2, 0.1, CONFIG)
        adamw_step([fused[0]], [grad * 4], [fused[1]], [fused[2]], step, 1e-2, 0.1, 4.0, CONFIG)
    for a, b in zip(fused, exact):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


def test_optimizer_equals_torchs_adamw_with_clipping():
    slices = slices_of()
    ours = MixedPrecisionOptimizer(PlainGradients([slices]), [AdamW(CONFIG)], 1.0, LossScaler(enabled=False))
    theirs = [torch.nn.Parameter(s.param.clone()) for s in slices]
    decays = [p for p, s in zip(theirs, slices) if is_matrix(s)]
    others = [p for p, s in zip(theirs, slices) if not is_matrix(s)]
    reference = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95)
    )
    for step in range(5):
        for piece, parameter in zip(slices, theirs):
            grad = torch.randn(len(piece.grad), generator=torch.Generator().manual_seed(step))
            piece.grad.copy_(grad)
            parameter.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        assert ours.step(1e-2).grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for piece, parameter in zip(slices, theirs):
        assert torch.allclose(piece.param, parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_main_parameters_keep_what_low_precision_loses(dtype: torch.dtype, grad_dtype: torch.dtype):
    slices = slices_of(dtype, grad_dtype)
    optimizer = MixedPrecisionOptimizer(
        PlainGradients([slices]), [AdamW(CONFIG)], grad_clip=0.0, scaler=LossScaler(enabled=False)
    )
    before = slices[0].param.clone()
    for _ in range(50):
        optimizer.step(1e-6)
    # 50 steps of 1e-6 are below the resolution of most weights, yet the main parameters have moved.
    assert (slices[0].param == before).float().mean() > 0.5
    main = optimizer.named_state()[0][1]["main"]
    assert (main != before.float()).all()
    assert torch.equal(slices[0].param, main.to(dtype))


def test_norm_is_the_same_however_the_gradients_are_cut():
    """The original clipped by a shard's or a bucket's own norm."""
    grad = torch.randn(1_000_003, generator=torch.Generator().manual_seed(2)) * 1e-3
    whole = math.sqrt(sum_of_squares([grad]).item())
    assert whole == pytest.approx(grad.double().norm().item(), rel=1e-14)
    for cut in (1, 1000, 65_537, 500_000):
        pieces = math.sqrt(sum_of_squares(grad.split(cut)[:1] + (grad[cut:],)).item())
        assert pieces == pytest.approx(whole, rel=1e-14)
        assert torch.tensor(1 / pieces, dtype=torch.float32) == torch.tensor(1 / whole, dtype=torch.float32)


def test_clip_factor():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 0.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("fp16", [True, False])
def test_a_non_finite_step_leaves_all_state_as_it_was(bad: float, fp16: bool):
    slices = slices_of(torch.float16 if fp16 else torch.float32)
    scaler = LossScaler(enabled=fp16, initial=8.0)
    optimizer = MixedPrecisionOptimizer(PlainGradients([slices]), [AdamW(CONFIG)], 1.0, scaler)
    optimizer.step(1e-2)
    state = [t for _, tensors in optimizer.named_state() for t in tensors.values()]
    before = [t.clone() for t in [s.param for s in slices] + state]
    slices[1].grad[3] = bad
    result = optimizer.step(1e-2)
    after = [s.param for s in slices] + state
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert optimizer.num_steps == 1
    assert scaler.scale == (4.0 if fp16 else 1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("size", "clip", "steps"), [(1e20, 0.0, False), (1e20, 1.0, True), (3e38, 1.0, False)])
def test_a_step_that_float32_cannot_hold_is_skipped(size: float, clip: float, steps: bool, name: str):
    """The norm is finite, but squares of the gradients are not: a second moment that became infinite would stay so, and
    would stop its weight for ever."""
    grad = torch.full((24,), size)
    piece = SliceWithGrad("layers.0.mlp.up_proj.weight", 0, (4, 6), torch.ones(24), grad, grad)
    optimizer = MixedPrecisionOptimizer(
        PlainGradients([[piece]]), new_rules(name, CONFIG, MuonConfig(), LionConfig()), clip, LossScaler(enabled=False)
    )
    result = optimizer.step(1e-2)
    tensors = optimizer.named_state()[0][1]
    assert math.isfinite(result.grad_norm) and result.skipped != steps
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert (piece.param != 1.0).all() if steps else (piece.param == 1.0).all() and optimizer.num_steps == 0


def test_an_overlapped_step_that_float32_cannot_hold_is_an_error():
    slices = slices_of()
    optimizer = MixedPrecisionOptimizer(PlainGradients([slices]), [AdamW(CONFIG)], 0.0, LossScaler(enabled=False))
    slices[0].grad[0] = 1e20
    optimizer.begin_overlapped_step(1e-2)
    optimizer.step_bucket(0)
    with pytest.raises(FloatingPointError, match="resume from the last checkpoint"):
        optimizer.end_overlapped_step()


def test_weights_stay_in_the_range_of_float16():
    """An infinite weight would make all activations NaN. The main parameters go on."""
    grad = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float16)
    piece = SliceWithGrad("norm.weight", 0, (3,), torch.tensor([-65e3, 65e3, 1.0], dtype=torch.float16), grad, grad)
    optimizer = MixedPrecisionOptimizer(PlainGradients([[piece]]), [AdamW(CONFIG)], 0.0, LossScaler(enabled=False))
    optimizer.step(1e4)
    assert piece.param.tolist() == [-65504.0, 65504.0, -1e4]
    assert optimizer.named_state()[0][1]["main"].tolist() == pytest.approx([-75e3, 75e3, -9999.0], rel=1e-3)


def test_without_eps_a_weight_that_never_had_a_gradient_would_become_nan():
    with pytest.raises(ValueError, match="adam_eps must be at least 1.2e-38"):
        AdamWConfig(adam_eps=0.0).check()


def test_loss_scale_cancels_out():
    plain, scaled = slices_of(), slices_of()
    for piece in scaled:
        piece.grad.mul_(1024.0)
    scaler = LossScaler(enabled=True, initial=1024.0)
    a = MixedPrecisionOptimizer(PlainGradients([plain]), [AdamW(CONFIG)], 1.0, LossScaler(enabled=False)).step(1e-2)
    b = MixedPrecisionOptimizer(PlainGradients([scaled]), [AdamW(CONFIG)], 1.0, scaler).step(1e-2)
    assert a.grad_norm == b.grad_norm
    assert all(torch.equal(p.param, q.param) for p, q in zip(plain, scaled))


def test_loss_scale_grows_and_shrinks():
    scaler = LossScaler(enabled=True, initial=4.0, growth_interval=3)
    for _ in range(3):
        scaler.update(overflowed=False)
    assert scaler.scale == 8.0
    scaler.update(overflowed=True)
    again = LossScaler(enabled=True)
    again.load_state_dict(scaler.state_dict())
    assert (again.scale, again.good_steps) == (4.0, 0)


def test_cosine_follows_the_original():
    rates = [learning_rate_at(step, 1000, 1.0, "cosine", warmup_ratio=0.1) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and max(rates) == 1.0
    assert rates[500] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.5)))
    assert rates[900:] == [0.1] * 100
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))


def test_wsd_and_constant():
    wsd = [learning_rate_at(s, 100, 1.0, "wsd", warmup_ratio=0.1, min_ratio=0.0, decay_ratio=0.2) for s in range(100)]
    assert wsd[9:81] == [1.0] * 72
    assert wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)
    assert {learning_rate_at(s, 100, 1.0, "constant", warmup_ratio=0.0) for s in range(100)} == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("max_iters", [1, 2, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_schedules_stay_in_range_for_short_runs(schedule: str, max_iters: int, warmup: float):
    for step in range(max_iters):
        assert 0.0 < learning_rate_at(step, max_iters, 1.0, schedule, warmup) <= 1.0
