"""Muon against a singular value decomposition, and its step against the plain formula."""

import itertools
from collections.abc import Mapping

import pytest
import torch

import train_my_ddp
from model.roles import role_of
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.muon import LOWEST, MARGIN, UPDATE_RMS, orthogonalize, orthogonalize_reference, polynomials
from optimizer.param_groups import Role, is_hidden_matrix
from optimizer.rule import Rule
from optimizer.rules import new_rules
from parallel.buffer import SliceWithGrad
from parallel.gradients import PlainGradients
from tests.runs import records

NAME = "layers.0.mlp.up_proj.weight"
ADAMW, MUON = AdamWConfig(weight_decay=0.1), MuonConfig()


def rules(config: MuonConfig = MUON, roles: Mapping[str, Role] | None = None) -> list[Rule]:
    return new_rules("muon", ADAMW, config, LionConfig(), roles=roles)


def with_singular_values(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return (u * values) @ v.T


@pytest.mark.parametrize("iterations", LOWEST)
def test_each_polynomial_is_the_best_one_on_what_the_last_has_left(iterations: int):
    """No quintic is closer to 1 everywhere: the error of the best one reaches its maximum at four points, with
    alternating sign (Chebyshev)."""
    x = torch.linspace(LOWEST[iterations], MARGIN, 100_001, dtype=torch.float64)
    last_error = 1.0
    for a, b, c in polynomials(iterations):
        x = a * x + b * x**3 + c * x**5
        error = (x - 1.0).abs().max().item()
        assert error < last_error
        at_peak = (x - 1.0)[(x - 1.0).abs() > error * (1 - 1e-4)].sign()
        alternations = sum(a != b for a, b in itertools.pairwise(at_peak.tolist()))
        assert alternations == 3
        # The next polynomial covers the whole interval between the extremes, and a little more.
        x = torch.linspace(1 - error, (1 + error) * MARGIN, 100_001, dtype=torch.float64)
        last_error = error
    assert last_error < 0.13


def test_another_number_of_iterations_is_refused():
    with pytest.raises(ValueError, match="1 to 6 iterations, not 9"):
        polynomials(9)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7), (7, 1)])
@pytest.mark.parametrize("iterations", LOWEST)
def test_polynomials_act_on_singular_values_and_vectors_stay(shape: tuple[int, int], iterations: int):
    rank = min(shape)
    matrix = with_singular_values(*shape, torch.logspace(0, -2, rank, dtype=torch.float64))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for a, b, c in polynomials(iterations):
        values = a * values + b * values**3 + c * values**5
    result = orthogonalize(matrix.float() * 1e-4, iterations).double()
    assert torch.allclose(result, (u * values) @ vh, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_the_usual_five_iterations_come_close_to_the_definition(shape: tuple[int, int]):
    matrix = with_singular_values(*shape, torch.logspace(0, -1.5, min(shape), dtype=torch.float64))
    exact = orthogonalize_reference(matrix)
    assert torch.allclose(exact @ exact.T @ exact, exact)
    assert (orthogonalize(matrix.float(), 5).double() - exact).norm() / exact.norm() < 0.03
    narrow = orthogonalize(matrix.float(), 5, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and (narrow.double() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("iterations", LOWEST)
@pytest.mark.parametrize("count", [1, 7, 32])
def test_rounding_to_bfloat16_lifts_no_singular_value_out_of_the_interval(count: int, iterations: int):
    """With every step rounded and no margin, values near the norm grew without bound."""
    matrix = with_singular_values(32, 32, torch.linspace(0.9, 1.0, 32, dtype=torch.float64)[:count], seed=count)
    x = orthogonalize(matrix, iterations, torch.bfloat16)
    assert torch.linalg.svdvals(x.double())[:count].max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (192, 96)])
def test_several_matrices_at_once_are_each_as_if_alone(shape: tuple[int, int], dtype: torch.dtype):
    """Includes a zero matrix, and one far larger than the others."""
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    matrices[1] = 0.0
    matrices[2] *= 1e6
    together = orthogonalize(matrices, 5, dtype)
    alone = torch.stack([orthogonalize(matrix, 5, dtype) for matrix in matrices])
    assert together.dtype == dtype and together[1].count_nonzero() == 0
    assert torch.allclose(together.float(), alone.float(), atol=8 * torch.finfo(dtype).eps)
    assert dtype == torch.float32 or torch.equal(together, alone)


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(4, 6), 5), torch.zeros(4, 6))


def one_slice(shape: tuple[int, ...], name: str = NAME, seed: int = 0) -> SliceWithGrad:
    generator = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(shape, generator=generator).flatten() for _ in range(2))
    return SliceWithGrad(name, 0, shape, param, grad, grad)


def test_steps_equal_the_formula():
    """Computed with exact U V^T in float64; the gradients' singular values lie where the polynomials are exact to
    2%."""
    shape, lr, config = (12, 20), 0.02, MuonConfig(muon_momentum=0.9, muon_lr_ratio=1.5, muon_iterations=4)
    piece = one_slice(shape)
    optimizer = MixedPrecisionOptimizer(PlainGradients([[piece]]), rules(config), 0.0, LossScaler(enabled=False))
    weights, mean = piece.param.double().view(shape), torch.zeros(shape, dtype=torch.float64)
    start = weights.clone()
    for step in range(4):
        grad = with_singular_values(*shape, torch.linspace(1, 0.3, 12, dtype=torch.float64), seed=step)
        piece.grad.copy_(grad.flatten())
        assert optimizer.step(lr).grad_norm == pytest.approx(grad.norm().item(), rel=1e-5)
        mean = 0.9 * mean + 0.1 * grad
        update = orthogonalize_reference(0.9 * mean + 0.1 * grad)
        weights = weights * (1 - 1.5 * lr * 0.1) - 1.5 * lr * UPDATE_RMS * 20**0.5 * update
    moved = (weights - start).norm()
    assert (piece.param.double().view(shape) - weights).norm() / moved < 0.02
    # By root mean square, a step is as large as AdamW's at the same rate: 0.2 of it.
    assert update.square().mean().sqrt() * 20**0.5 == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_buckets_change_no_bit(dtype: torch.dtype):
    """Matrices that share a bucket may be multiplied together, and the user chooses the bucket's size."""
    shapes = [(64, 64)] * 3 + [(192, 64)] * 2 + [(64, 192)] * 2
    ends = []
    for per_bucket in (1, 2, len(shapes)):
        slices = [one_slice(shape, f"layers.{i}.mlp.up_proj.weight", seed=i) for i, shape in enumerate(shapes)]
        slices = [
            SliceWithGrad(piece.name, 0, piece.shape, piece.param.to(dtype), piece.grad, piece.grad)
            for piece in slices
        ]  # fmt: skip
        buckets = [slices[start : start + per_bucket] for start in range(0, len(slices), per_bucket)]
        MixedPrecisionOptimizer(
            PlainGradients(buckets), rules(), 0.0, LossScaler(enabled=False)).step(0.1
        )
        ends.append(torch.cat([piece.param for piece in slices]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_scaled_float16_gradients_do_not_vanish():
    """Values that underflow without the loss scale must still count."""
    gradients = torch.randn(48, generator=torch.Generator().manual_seed(3)) * 3e-8
    moved = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16)):
        grad = (gradients * scale).to(dtype)
        piece = SliceWithGrad(NAME, 0, (6, 8), torch.zeros(48, dtype=torch.float32), grad, grad)
        scaler = LossScaler(enabled=scale > 1.0, initial=scale)
        MixedPrecisionOptimizer(PlainGradients([[piece]]), rules(), 0.0, scaler).step(0.1)
        moved.append(piece.param)
    assert moved[0].norm() > 0.01 and (moved[1] - moved[0]).norm() < 2e-2 * moved[0].norm()


@pytest.mark.parametrize("cut", [48, 20], ids=["whole", "shards"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_float16_gradients_of_any_size_step_as_float32_ones(clip: float, cut: int):
    """After clipping, the momentum of smaller steps is large at the scale of the gradients: beyond float16. Shards of a
    matrix are stepped separately, with the whole matrix in the gradients' memory."""
    ends, scale = [], 2.0**14
    for dtype in (torch.float32, torch.float16):
        param, grad = torch.zeros(48), torch.zeros(48, dtype=dtype)
        shards = [
            SliceWithGrad(NAME, start, (6, 8), param[start:end], grad[start:end], grad)
            for start, end in ((0, cut), (cut, 48)) if start < end
        ]  # fmt: skip
        scaler = LossScaler(enabled=True, initial=scale)
        optimizer = MixedPrecisionOptimizer(PlainGradients([shards]), rules(), clip, scaler)
        for step in range(16):
            drawn = torch.randn(48, generator=torch.Generator().manual_seed(step)).clamp(-1.0, 1.0) * 3.0
            # Most of the momentum is in one place; then a gradient as large as float16 allows, everywhere.
            grad.copy_((drawn * scale if step == 15 else drawn + 3e4 * (torch.arange(48) == 7)).half())
            assert not optimizer.step(0.1).skipped
            # As after many good steps.
            scaler.scale *= 2.0 if step == 14 else 1.0
        ends.append(param)
    assert ends[0].norm() > 0.1 and (ends[1] - ends[0]).norm() < 1e-2 * ends[0].norm()


def test_only_matrices_of_blocks_are_muons():
    sorts = {
        NAME: (4, 6), "layers.1.input_layernorm.weight": (4,), "layers.0.self_attn.q_proj.bias": (4,),
        "embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "norm.weight": (4,),
    }  # fmt: skip
    slices = [one_slice(shape, name) for name, shape in sorts.items()]
    assert [is_hidden_matrix(piece) for piece in slices] == [True, False, False, False, False, False]
    optimizer = MixedPrecisionOptimizer(
        PlainGradients([slices]), rules(), 0.0, LossScaler(enabled=False)
    )
    states = {piece.name: set(tensors) for piece, tensors in optimizer.named_state()}
    assert states.pop(NAME) == {"main", "exp_avg"}
    assert all(state == {"main", "exp_avg", "exp_avg_sq"} for state in states.values())
    assert optimizer.scalar_state()["name"] == "muon"
    without = [one_slice(shape, name) for name, shape in sorts.items()]
    MixedPrecisionOptimizer(PlainGradients([without]), [AdamW(ADAMW)], 0.0, LossScaler(enabled=False)).step(1e-2)
    optimizer.step(1e-2)
    same = [torch.equal(a.param, b.param) for a, b in zip(slices, without)]
    assert same == [False, True, True, True, True, True]


def test_gradients_are_zero_after_a_step():
    pieces = [one_slice((4, 6), NAME), one_slice((8, 4), "embed_tokens.weight"), one_slice((4,), "norm.weight")]
    before = [piece.param.clone() for piece in pieces]
    optimizer = MixedPrecisionOptimizer(
        PlainGradients([pieces]), rules(), 0.0, LossScaler(enabled=False)
    )  # fmt: skip
    optimizer.step(0.1)
    assert not any(piece.grad.any() for piece in pieces)
    assert not any(torch.equal(piece.param, old) for piece, old in zip(pieces, before))


def train(flags: list[str], *more: str) -> int:
    return train_my_ddp.main([*flags, *more])


def test_a_run_goes_on_only_with_its_own_optimizer(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run, "--optimizer=muon") == 0
    assert "Muon for the matrices of the blocks" in capsys.readouterr().out
    assert train(tiny_run, "--resume", "--max_iters=6", "--optimizer=adamw") == 2
    assert "the run was trained with --optimizer=muon" in capsys.readouterr().out
    assert train(tiny_run, "--resume", "--max_iters=6") == 0
    assert [record["step"] for record in records(tiny_run, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_stepped_matrix_by_matrix(dtype: torch.dtype):
    """Gate and up of each expert apart, as if they were parameters; also cut into shards of any place."""
    experts, half, width = 3, 8, 12
    shapes = {"layers.0.mlp.experts.gate_up_proj": (experts, 2 * half, width),
              "layers.0.mlp.experts.down_proj": (experts, width, half)}  # fmt: skip
    roles = {name: role_of(name) for name in shapes}
    stacks = [one_slice(shape, name, seed=i) for i, (name, shape) in enumerate(shapes.items())]
    stacks = [SliceWithGrad(p.name, 0, p.shape, p.param.to(dtype), p.grad, p.grad) for p in stacks]
    # The second expert of the first stack has seen no token.
    stacks[0].grad.view(experts, -1)[1] = 0.0
    matrices = [
        SliceWithGrad(f"layers.0.{name}.{i}.weight", 0, shape, param.flatten(), grad.flatten(), grad.flatten())
        for name, stack, shape in (("gate_up", stacks[0], (half, width)), ("down", stacks[1], (width, half)))
        for i, (param, grad) in enumerate(zip(*(t.clone().view(-1, *shape) for t in (stack.param, stack.grad))))
    ]  # fmt: skip
    shards, flat = [], [piece.param.clone() for piece in stacks]
    grads = [piece.grad.clone() for piece in stacks]
    for piece, param, grad in zip(stacks, flat, grads):
        for start, end in ((0, 50), (50, 177), (177, len(param))):
            shards.append(SliceWithGrad(piece.name, start, piece.shape, param[start:end], grad[start:end], grad))
    for pieces, its_roles in ((stacks, roles), (matrices, None), (shards, roles)):
        optimizer = MixedPrecisionOptimizer(
            PlainGradients([pieces]), rules(roles=its_roles), 0.0, LossScaler(enabled=False)
        )
        optimizer.step(0.1)
    together = torch.cat([piece.param for piece in stacks]).float()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    assert torch.allclose(together, torch.cat([m.param for m in matrices]).float(), atol=tolerance)
    assert torch.equal(together, torch.cat(flat).float())
    before = one_slice(stacks[0].shape, stacks[0].name).param.to(dtype).view(experts, -1)
    assert torch.allclose(stacks[0].param.view(experts, -1)[1].float(), before[1].float() * 0.99, atol=1e-2)
