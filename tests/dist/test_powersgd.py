"""PowerSGD against an independent, obvious implementation, and its promises about the remainder."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rules import new_rules
from parallel import BucketGradients, Collectives, DistContext, PowerSGD, PowerSGDConfig, naive_powersgd
from parallel.buffer import Bucket, sum_of_squares
from parallel.low_rank import gram_schmidt, orthonormalize
from tests.dist.buckets import (
    SHAPES,
    draw,
    error,
    fingerprint,
    gradients_of,
    in_groups,
    inner,
    new_buckets,
    new_powersgd,
    one_step,
    put,
    reduce_all,
    take,
)
from tests.dist.group import run_ranks

WORLD_SIZES = (2, 3, 4)
LLAMA = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=True,
).resolve()  # fmt: skip


class Reference:
    """PowerSGD as in the paper: all ranks in one process, in float64, one matrix after another.

    Gradients are summed, not averaged; a residual is the part of a rank's own matrix that its own part of the sum
    leaves out.
    """

    def __init__(self, config: PowerSGDConfig, num_ranks: int, random_q: Callable[..., Tensor]):
        self.config, self.random_q, self.iteration = config, random_q, 0
        self.residuals: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
        self.q: dict[str, Tensor] = {}

    def rank_of(self, name: str, shape: torch.Size) -> int:
        """Columns of the factors; 0 for parameters that are not compressed."""
        if len(shape) < 2 or any(word and word in name for word in self.config.powerSGD_exclude.split(",")):
            return 0
        m, n = shape[0], shape[1:].numel()
        rank = min(self.config.matrix_approximation_rank, m, n)
        return rank if m * n / ((m + n) * rank) >= self.config.min_compression_rate else 0

    def step(self, gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sums = {}
        for name, first in gradients[0].items():
            addends = [g[name].double() for g in gradients]
            rank = self.rank_of(name, first.shape)
            if rank and self.iteration >= self.config.start_powerSGD_iter:
                matrices = [addend.reshape(addend.shape[0], -1) for addend in addends]
                sums[name] = self.compress(name, rank, matrices).reshape(first.shape)
            else:
                sums[name] = sum(addends)
        self.iteration += 1
        return sums

    def compress(self, name: str, rank: int, matrices: list[Tensor]) -> Tensor:
        config = self.config
        if config.use_error_feedback:
            matrices = [m + residual.get(name, 0.0) for m, residual in zip(matrices, self.residuals)]
        if name not in self.q or not config.warm_start:
            drawn = 0 if config.warm_start else self.iteration
            self.q[name] = self.random_q(name, tuple(matrices[0].shape), rank, drawn).double()
        q = self.q[name]
        if config.use_fixed_Q:
            parts = [m @ q @ q.T for m in matrices]
        else:
            p = plain_gram_schmidt(sum(m @ q for m in matrices))
            parts = [p @ (p.T @ m) for m in matrices]
            if config.warm_start:
                self.q[name] = sum(m.T @ p for m in matrices)
        if config.use_error_feedback:
            for residual, m, part in zip(self.residuals, matrices, parts):
                residual[name] = m - part
        return sum(parts)


def plain_gram_schmidt(columns: Tensor) -> Tensor:
    basis: list[Tensor] = []
    for column in columns.T:
        for other in basis + basis:
            # Each one twice, because once is not orthogonal enough.
            column = column - other.dot(column) * other
        basis.append(column / column.norm())
    return torch.stack(basis, dim=1)


OPTIONS: dict[str, dict] = {
    "default": {}, "cold start": {"warm_start": False}, "no feedback": {"use_error_feedback": False},
    "cold, no feedback": {"warm_start": False, "use_error_feedback": False},
    "fixed Q": {"use_fixed_Q": True}, "fixed Q drawn anew": {"use_fixed_Q": True, "warm_start": False},
    "fixed Q, no feedback": {"use_fixed_Q": True, "use_error_feedback": False},
    "late": {"start_powerSGD_iter": 2}, "late, cold": {"start_powerSGD_iter": 2, "warm_start": False},
    "everything": {"min_compression_rate": 0.0}, "little": {"min_compression_rate": 2.2},
    "nothing": {"min_compression_rate": 100.0}, "exclude": {"powerSGD_exclude": "embed,up."},
    "one column": {"matrix_approximation_rank": 1},
    "more columns than sides": {"matrix_approximation_rank": 64, "min_compression_rate": 0.0},
    "clamped": {"matrix_approximation_rank": 11, "min_compression_rate": 0.0}, "seed": {"seed": 7},
}  # fmt: skip
MODES: dict[str, tuple[bool, dict]] = {
    "eager": (False, {}), "lazy": (True, {}), "in buffer": (True, {"grad_buffer_is_powerSGD_error": True}),
}  # fmt: skip


def new_hook(context: DistContext, options: dict, lazy: bool = True, **buckets: object):
    buckets = new_buckets(context.world_size, bucket_size=800, **buckets)
    return new_powersgd(buckets, Collectives(context.grad_group), lazy, **options), buckets


def like_reference(
    context: DistContext, options: dict, lazy: bool, dtype: torch.dtype, shapes: dict, steps: int = 4
) -> dict:
    """Largest relative errors over some steps."""
    hook, buckets = new_hook(context, options, lazy, dtype=dtype, shapes=shapes)
    powersgd, config = inner(hook), inner(hook).config
    reference = Reference(config, context.world_size, powersgd._random_q)
    compressed = [name for name, shape in shapes.items() if reference.rank_of(name, torch.Size(shape))]
    found = {"sum": 0.0, "residual": 0.0, "q": 0.0, "norm": 0.0}
    found["names"] = powersgd.compressed_names() != compressed[::-1]
    residuals = 0
    for step in range(steps):
        given = [gradients_of(rank, step, dtype, shapes) for rank in range(context.world_size)]
        expected = reference.step(given)
        # As in the optimizer: the norm first.
        for bucket in buckets:
            hook.release(bucket)
        put(buckets, given[context.rank])
        reduce_all(hook, buckets)
        if lazy:
            squares = [powersgd.sum_of_squares(bucket) for bucket in buckets]
            assert all(part.dtype == torch.float64 for part in squares)
            norm = torch.stack(squares).sum().sqrt()
            exact = torch.stack([e.norm() for e in expected.values()]).norm()
            found["norm"] = max(found["norm"], error(norm, exact))
        sums = take(hook, buckets)
        state = powersgd.saved_state()
        for name in shapes:
            found["sum"] = max(found["sum"], error(sums[name], expected[name]))
            if name in compressed and name in reference.q:
                own, theirs = state[f"{name}/q"].double(), reference.q[name]
                found["q"] = max(found["q"], error(own, theirs / theirs.norm(dim=0)))
            if name in compressed and config.use_error_feedback:
                residual = reference.residuals[context.rank].get(name, torch.zeros_like(state[f"{name}/residual"]))
                if step < config.start_powerSGD_iter and config.grad_buffer_is_powerSGD_error:
                    # The buffer holds the sum, until it is zeroed.
                    continue
                residuals += 1
                scale = max(expected[name].norm().item(), 1e-30)
                difference = (state[f"{name}/residual"].double() - residual).norm().item() / scale
                found["residual"] = max(found["residual"], difference if difference == difference else float("inf"))
    found["residuals"] = residuals
    found["compressed"] = len(compressed)
    return found


def against_reference(context: DistContext) -> dict:
    results = {}
    everything = enumerate(itertools.product(OPTIONS.items(), MODES.items()))
    for number, ((option, given), (mode, (lazy, more))) in everything:
        if context.world_size == 3 and number % len(MODES) != number // len(MODES) % len(MODES):
            # Each option in one mode, in turn: only two ranks test all combinations.
            continue
        options = {"matrix_approximation_rank": 4, "min_compression_rate": 1.5} | given | more
        if more and not options.get("use_error_feedback", True):
            continue
        dtype = torch.float32 if more else torch.float64
        found = like_reference(context, options, lazy, dtype, SHAPES)
        results[f"{option}, {mode}, {dtype}"] = found
    llama = {name: tuple(p.shape) for name, p in Decoder(LLAMA).named_parameters()}
    for mode, (lazy, more) in MODES.items():
        config = dict(matrix_approximation_rank=2, min_compression_rate=1.0, **more)
        results[f"llama, {mode}, torch.float32"] = like_reference(context, config, lazy, torch.float32, llama)
        for name, narrow in {"float32 factors": {}, "bf16 factors": {"orthogonalize_in_float32": False}}.items():
            config = dict(matrix_approximation_rank=4, min_compression_rate=1.5, **narrow, **more)
            results[f"{name}, {mode}, torch.bfloat16"] = like_reference(
                context, config, lazy, torch.bfloat16, SHAPES, steps=2
            )
    return results


def nothing_is_lost(context: DistContext) -> dict:
    """Over ranks: (input - residual) against the sum, at each step; over steps: all inputs against all sums."""
    results = {}
    wires = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    options = {
        "default": {}, "fixed Q": {"use_fixed_Q": True}, "one column": {"matrix_approximation_rank": 1},
        "late": {"start_powerSGD_iter": 2},
        "fixed Q drawn anew": {"use_fixed_Q": True, "warm_start": False}, "damped": {"orthogonalization_epsilon": 1e-2},
    }  # fmt: skip
    for (wire, wire_dtype), (option, given), (mode, (lazy, more)) in itertools.product(
        wires.items(), options.items(), MODES.items()
    ):
        if option != "default" and (mode != "lazy" or context.world_size > 2):
            continue
        config = dict(
            **({"matrix_approximation_rank": 4, "min_compression_rate": 1.5, "wire_dtype": wire_dtype} | given | more)
        )
        hook, buckets = new_hook(context, config, lazy)
        names = inner(hook).compressed_names()
        each_step, received, delivered = 0.0, 0.0, 0.0
        kept = torch.zeros_like(together(gradients_of(0, 0), names))
        for step in range(6):
            # The sizes differ widely between ranks and steps.
            mine = {n: g * 10.0 ** (context.rank + step % 3) for n, g in gradients_of(context.rank, step).items()}
            # In float32, as the hook adds them.
            given_now = together(mine, names) + kept
            sums = together(one_step(hook, buckets, mine), names).double()
            received, delivered = received + together(mine, names).double(), delivered + sums
            if step >= config.get("start_powerSGD_iter", 0):
                kept = together(inner(hook).saved_state(), names, "/residual")
                answer = context.all_sum(torch.stack([given_now.double() - kept.double(), given_now.double().abs()]))
                each_step = max(each_step, ((answer[0] - sums).norm() / answer[1].norm()).nan_to_num(nan=9e9).item())
        answer = context.all_sum(torch.stack([kept.double(), received]))
        results[f"{option}, {mode}, {wire}"] = [each_step, error(delivered + answer[0], answer[1]), len(names)]
    return results


def together(tensors: dict[str, Tensor], names: list[str], suffix: str = "") -> Tensor:
    return torch.cat([tensors[name + suffix].flatten() for name in names])


def full_rank(context: DistContext) -> dict:
    results = {}
    exact = [gradients_of(rank, 0) for rank in range(context.world_size)]
    for wire, (mode, (lazy, more)) in itertools.product((None, torch.bfloat16, torch.float16), MODES.items()):
        config = dict(matrix_approximation_rank=64, min_compression_rate=0.0, wire_dtype=wire, **more)
        hook, buckets = new_hook(context, config, lazy)
        sums = one_step(hook, buckets, exact[context.rank])
        errors = [error(sums[name], sum(each[name].double() for each in exact)) for name in SHAPES]
        names = inner(hook).compressed_names()
        results[f"{mode}, {wire}"] = [max(errors), len(names), fingerprint(list(sums.values()))]
    return results


def gradients_in(buckets: list[Bucket], hook: PowerSGD) -> BucketGradients:
    """What an optimizer takes, of buckets that belong to no DDP."""
    slices = [bucket.slices(0, len(bucket.grad)) for bucket in buckets]
    return BucketGradients(SimpleNamespace(buckets=buckets, hook=hook, sums=None, slices=lambda: slices))


def train(
    context: DistContext, bad_steps: dict[int, float], initial_scale: float | None, more: dict, skip: bool = True
) -> dict:
    """Some steps of the real optimizer. In bad steps (step -> value) a gradient of the last rank is not finite; with
    `skip` False they are left out. Without an initial scale the loss is not scaled."""
    options = {name: value for name, value in more.items() if name != "grad"}
    config = dict(matrix_approximation_rank=4, min_compression_rate=1.5, **options)
    buckets = new_buckets(context.world_size, grad_dtype=more.get("grad"), bucket_size=800)
    scaler = LossScaler(enabled=initial_scale is not None, initial=initial_scale or 1.0)
    hook = new_powersgd(buckets, Collectives(context.grad_group), loss_scale=lambda: scaler.scale, **config)
    optimizer = MixedPrecisionOptimizer(gradients_in(buckets, hook), [AdamW(AdamWConfig())], 1.0, scaler)
    traceless, norms, skipped = True, [], []
    for step in range(6):
        if step in bad_steps and not skip:
            continue
        # float16 buffers round the same at every scale.
        gradients = {name: g.half() * scaler.scale for name, g in gradients_of(context.rank, step).items()}
        if step in bad_steps and context.rank == context.world_size - 1:
            gradients["up.weight"][3, 5] = bad_steps[step]
        before = fingerprint([*hook.saved_state().values(), *(bucket.param for bucket in buckets)])
        put(buckets, gradients)
        reduce_all(hook, buckets)
        result = optimizer.step(1e-2)
        if result.skipped:
            skipped.append(step)
            now = fingerprint([*hook.saved_state().values(), *(bucket.param for bucket in buckets)])
            traceless &= now == before
        else:
            norms.append(result.grad_norm)
        # Also after a step that was skipped.
        assert "grad_buffer_is_powerSGD_error" in more or not any(bucket.grad.any() for bucket in buckets)
    weights = [bucket.param for bucket in buckets]
    return {
        "traceless": traceless, "norms": norms, "skipped": skipped, "weights": fingerprint(weights),
        "state": fingerprint(list(hook.saved_state().values())), "scale": scaler.scale,
        "finite": all(torch.isfinite(t).all().item() for t in [*weights, *hook.saved_state().values()]),
    }  # fmt: skip


def skipped_steps(context: DistContext) -> dict:
    results = {}
    for name, more in {
        "default": {}, "bf16 wire": {"wire_dtype": torch.bfloat16}, "fp16 wire": {"wire_dtype": torch.float16},
        "fixed Q": {"use_fixed_Q": True}, "late": {"start_powerSGD_iter": 2}, "fp16 buffers": {"grad": torch.float16},
    }.items():  # fmt: skip
        bad = {2: float("inf"), 3: float("nan")}
        results[name] = [
            train(context, bad, 1024.0, more), train(context, bad, None, more),
            train(context, bad, None, more, skip=False),
        ]  # fmt: skip
    # An infinity in the very first step.
    results["first"] = [train(context, {0: float("inf")}, scale, {}) for scale in (1024.0, None)]
    results["in buffer"] = [
        train(context, {2: float("nan")}, None, {"grad_buffer_is_powerSGD_error": True}),
        train(context, {}, None, {"grad_buffer_is_powerSGD_error": True}),
        train(context, {}, None, {}),
    ]
    return results


def vanished(context: DistContext) -> dict:
    """Gradients that are zero in the first steps, or have fewer columns than the factors: nothing gets stuck."""
    results = {}
    for wire, mode in ((None, "eager"), (torch.float16, "lazy"), (torch.bfloat16, "in buffer"), (None, "in buffer")):
        lazy, more = MODES[mode]
        config = dict(matrix_approximation_rank=4, min_compression_rate=1.5, wire_dtype=wire, **more)
        hook, buckets = new_hook(context, config, lazy)
        nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        silent = [one_step(hook, buckets, nothing) for _ in range(2)]
        norms = torch.cat([t.norm(dim=0) for name, t in inner(hook).saved_state().items() if name.endswith("/q")])
        # Then gradients of rank 1, the same on all ranks, then of full rank.
        thin = {name: draw(name, (shape[0], 1)) @ draw(f"{name} columns", (1, torch.Size(shape[1:]).numel()))
                for name, shape in SHAPES.items()}  # fmt: skip
        thin = {name: t.view(SHAPES[name]) for name, t in thin.items()}
        sums = one_step(hook, buckets, thin)
        lines = max(error(sums[name], thin[name] * context.world_size) for name in SHAPES)
        one_step(hook, buckets, nothing)
        after = one_step(hook, buckets, gradients_of(context.rank, 9))
        ranks = [torch.linalg.matrix_rank(after[name].view(after[name].shape[0], -1).nan_to_num(), rtol=1e-3).item()
                 for name in inner(hook).compressed_names()]  # fmt: skip
        results[f"{mode}, {wire}"] = [
            max(s.abs().max().item() for step in silent for s in step.values()) == 0.0,
            [norms.min().item(), norms.max().item()], lines, ranks,
        ]  # fmt: skip
    return results


def work_some(context: DistContext, options: dict, steps: int = 3, dtype: torch.dtype = torch.float32):
    hook, buckets = new_hook(context, options, dtype=dtype)
    for step in range(steps):
        one_step(hook, buckets, gradients_of(context.rank, step, dtype))
        for bucket in buckets:
            hook.release(bucket)
    return hook, buckets


def copied(hook: PowerSGD) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in hook.saved_state().items()}


def states(context: DistContext) -> dict:
    """Saved and loaded on the same group: equal to the bit."""
    results = {}
    for mode, more in {"own": {}, "in buffer": {"grad_buffer_is_powerSGD_error": True}}.items():
        config = dict(matrix_approximation_rank=4, min_compression_rate=1.5, **more)
        hook, buckets = work_some(context, config)
        saved = copied(hook)
        fresh, its_buckets = new_hook(context, config)
        fresh.iteration = hook.iteration
        fresh.take_q(saved)
        left = fresh.add_residuals(saved)
        same = fingerprint(list(saved.values())) == fingerprint(list(fresh.saved_state().values()))
        go_on = [
            fingerprint(list(one_step(h, b, gradients_of(context.rank, 3)).values()))
            for h, b in ((hook, buckets), (fresh, its_buckets))
        ]
        results[mode] = [same, left, go_on[0] == go_on[1], len(saved)]

        # With another number of columns, the common ones are loaded; parameters that are not compressed now are named.
        for columns in (2, 7):
            config = dict(matrix_approximation_rank=columns, min_compression_rate=0.0, powerSGD_exclude="embed", **more)
            other, _ = new_hook(context, config)
            random = {name: t.clone() for name, t in other.saved_state().items()}
            other.take_q(saved)
            left = other.add_residuals(saved)
            common, now = min(columns, 4), other.saved_state()
            taken = all(
                torch.equal(now[f"{name}/q"][:, :common], saved[f"{name}/q"][:, :common])
                and torch.equal(now[f"{name}/q"][:, common:], random[f"{name}/q"][:, common:])
                and torch.equal(now[f"{name}/residual"], saved[f"{name}/residual"])
                for name in hook.compressed_names() if name in other.compressed_names()
            )  # fmt: skip
            results[f"{mode}, {columns} columns"] = [taken, left, hook.compressed_names()]
    return results


def other_world_sizes(context: DistContext) -> dict:
    """States of some ranks loaded by this group's, dealt as train_my_ddp.py does: sums of residuals before and
    after."""
    results = {}
    for before in (1, 2, 4, 5):
        for mode, more in {"own": {}, "in buffer": {"grad_buffer_is_powerSGD_error": True}}.items():
            config = dict(matrix_approximation_rank=4, min_compression_rate=1.5, **more)
            hook, buckets = new_hook(context, config)
            names = [f"{name}/residual" for name in hook.compressed_names()]
            files = [
                {name: draw(f"{rank} {name}", tuple(hook.saved_state()[name].shape)) for name in names}
                for rank in range(before)
            ]
            for file in files[context.rank :: context.world_size]:
                assert hook.add_residuals(file) == []
            after = context.all_sum(together(hook.saved_state(), names).double())
            kept = error(after, sum(together(file, names).double() for file in files))
            # The next step begins with them.
            zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
            sums = one_step(hook, buckets, zero)
            left = context.all_sum(together(hook.saved_state(), names).double())
            told = error(together(sums, hook.compressed_names()).double() + left, after)
            results[f"{before}, {mode}"] = [kept, told, len(names)]
    return results


def against_the_naive_step(context: DistContext) -> float:
    """Largest error of the hook's sums and residuals over some steps, matrix by matrix."""
    shapes = SHAPES | {"experts": (3, 24, 20)}
    hook, buckets = new_hook(context, dict(matrix_approximation_rank=3, min_compression_rate=1.5), shapes=shapes)
    names = hook.compressed_names()
    assert "experts" in names and len(names) >= 5
    as_matrices = {name: (-1, *hook.saved_state()[f"{name}/residual"].shape[-2:]) for name in names}
    residuals = {name: list(torch.zeros(shapes[name]).view(as_matrices[name])) for name in names}
    qs = {name: list(hook.saved_state()[f"{name}/q"].clone().view(len(residuals[name]), as_matrices[name][2], -1))
          for name in names}  # fmt: skip
    errors = []
    for step in range(4):
        gradients = gradients_of(context.rank, step, shapes=shapes)
        sums = one_step(hook, buckets, gradients)
        for name in names:
            state = hook.saved_state()[f"{name}/residual"].view(as_matrices[name])
            for i, matrix in enumerate(gradients[name].reshape(as_matrices[name])):
                naive, residuals[name][i], qs[name][i] = naive_powersgd(
                    matrix, residuals[name][i], qs[name][i], context.grad_group
                )
                errors.append(error(sums[name].reshape(as_matrices[name])[i], naive))
                errors.append(error(state[i], residuals[name][i]))
    return max(errors)


def cases(context: DistContext) -> dict:
    work = (
        against_the_naive_step, against_reference, nothing_is_lost, full_rank, skipped_steps, vanished, states,
        other_world_sizes,
    )  # fmt: skip
    chosen = work if context.world_size < 4 else (nothing_is_lost, full_rank, other_world_sizes)
    return {each.__name__: each(context) for each in chosen}


@pytest.fixture(scope="module")
def answers() -> dict[int, list[dict]]:
    ranks = run_ranks(max(WORLD_SIZES), in_groups, WORLD_SIZES, cases)
    return {size: [results[str(size)] for results in ranks[:size]] for size in WORLD_SIZES}


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_hook_is_the_naive_step(answers: dict[int, list[dict]], world_size: int):
    assert max(answer["against_the_naive_step"] for answer in answers[world_size]) < 2e-5


TOLERANCES = {"torch.float64": 1e-9, "torch.float32": 2e-5, "torch.bfloat16": 4e-2}


@pytest.mark.parametrize("world_size", [2, 3])
def test_against_the_reference(answers: dict[int, list[dict]], world_size: int):
    """Sums, residuals and Q over several steps, in every option."""
    compressed = set()
    for results in (answer["against_reference"] for answer in answers[world_size]):
        assert len(results) == (57 if world_size == 2 else 25)
        for name, found in results.items():
            tolerance = TOLERANCES[name.split(", ")[-1]]
            if name.startswith("bf16 factors"):
                tolerance *= 3
            assert max(found["sum"], found["residual"]) <= tolerance, (name, found)
            # A random Q was normalised in float32.
            assert found["q"] <= max(tolerance, 1e-7), (name, found)
            # The norm is computed from factors in float32.
            assert found["norm"] <= max(tolerance, 2e-6), (name, found)
            assert not found["names"], name
            if found["compressed"] and "no feedback" not in name:
                assert found["residuals"] > 0, name
            compressed.add(found["compressed"])
    assert {0, 2, 4, 6} <= compressed, "the options must choose different parameters"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_is_left_out_is_kept(answers: dict[int, list[dict]], world_size: int):
    """Over ranks, the sum of (input - residual) is the decompressed sum, to float32 rounding, with any wire dtype."""
    for results in (answer["nothing_is_lost"] for answer in answers[world_size]):
        assert len(results) == (24 if world_size == 2 else 9)
        for name, (each_step, _, compressed) in results.items():
            assert compressed >= 4 and each_step <= 1e-6, (name, each_step)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_everything_arrives_in_the_end(answers: dict[int, list[dict]], world_size: int):
    """Everything delivered, plus what is still kept, equals everything given."""
    for results in (answer["nothing_is_lost"] for answer in answers[world_size]):
        for name, (_, over_all, _) in results.items():
            # Steps before start_iter have no residual to absorb the wire's rounding.
            rounded = name.startswith("late") and not name.endswith("float32")
            assert over_all <= (1e-2 if rounded else 2e-6), (name, over_all)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_full_rank_is_no_compression(answers: dict[int, list[dict]], world_size: int):
    ranks = [answer["full_rank"] for answer in answers[world_size]]
    for name in ranks[0]:
        tolerance = 4e-2 if "bfloat16" in name else 4e-3 if "float16" in name else 2e-6
        for results in ranks:
            assert results[name][1] == 6 and results[name][0] <= tolerance, (name, results[name])
        assert len({results[name][2] for results in ranks}) == 1, f"{name}: ranks hold different sums"


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_skipped_step_leaves_no_trace(answers: dict[int, list[dict]], world_size: int):
    for results in (answer["skipped_steps"] for answer in answers[world_size]):
        trajectories = {name: runs for name, runs in results.items() if name not in ("first", "in buffer")}
        assert len(trajectories) == 6
        for name, runs in trajectories.items():
            scaled, unscaled, without = runs
            assert all(run["skipped"] == [2, 3] and run["traceless"] and run["finite"] for run in runs[:2]), name
            assert (scaled["scale"], unscaled["scale"], without["skipped"]) == (256.0, 1.0, []), name
            for run in (scaled, unscaled):
                # Powers of two give the same bits. (The norm of the factors is summed in another order.)
                assert run["norms"] == pytest.approx(without["norms"], rel=1e-12), name
                assert (run["weights"], run["state"]) == (without["weights"], without["state"]), name
        for run in results["first"]:
            assert run["skipped"] == [0] and run["traceless"] and run["finite"]
        assert results["first"][0]["weights"] == results["first"][1]["weights"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_residual_in_the_gradient_buffer_survives_a_skipped_step_or_is_dropped(
    answers: dict[int, list[dict]], world_size: int
):
    for results in (answer["skipped_steps"]["in buffer"] for answer in answers[world_size]):
        skipping, smooth, apart = results
        assert skipping["skipped"] == [2] and skipping["finite"] and len(skipping["norms"]) == 5
        # If nothing is skipped, the place of the residual makes no difference.
        assert smooth["norms"] == pytest.approx(apart["norms"], rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_vanished_comes_back(answers: dict[int, list[dict]], world_size: int):
    for results in (answer["vanished"] for answer in answers[world_size]):
        assert len(results) == 4
        for name, (silent, norms, lines, ranks) in results.items():
            assert silent, f"{name}: something came out of nothing"
            assert norms == pytest.approx([1.0, 1.0], abs=1e-5), name
            assert lines <= (2e-2 if "bfloat16" in name else 2e-3 if "float16" in name else 1e-5), (name, lines)
            assert ranks == [4] * 4, (name, ranks)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_saved_state_goes_on_bit_by_bit(answers: dict[int, list[dict]], world_size: int):
    for results in (answer["states"] for answer in answers[world_size]):
        for mode in ("own", "in buffer"):
            assert results[mode] == [True, [], True, 8]
            for columns in (2, 7):
                taken, left, names = results[f"{mode}, {columns} columns"]
                assert taken and len(names) == 4
                assert left == ["embed.weight"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_another_world_size_keeps_the_sum_of_residuals(answers: dict[int, list[dict]], world_size: int):
    for results in (answer["other_world_sizes"] for answer in answers[world_size]):
        assert len(results) == 8
        for name, (kept, told, tensors) in results.items():
            assert tensors == 4 and kept <= 1e-6 and told <= 1e-6, (name, kept, told)


# -- without ranks ---------------------------------------------------------------------------------------------------


HALF = torch.float16


def alone(
    options: dict, lazy: bool = True, grad: torch.dtype = torch.float32, shapes: dict = SHAPES, **more: object
) -> PowerSGD:
    return new_powersgd(new_buckets(1, grad, grad, shapes=shapes), Collectives(None), lazy, **options, **more)


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="at least 1"):
        alone(dict(matrix_approximation_rank=0))
    with pytest.raises(ValueError, match="does not go with Eager"):
        alone(dict(grad_buffer_is_powerSGD_error=True), lazy=False)
    with pytest.raises(ValueError, match="error feedback"):
        alone(dict(grad_buffer_is_powerSGD_error=True, use_error_feedback=False))
    with pytest.raises(ValueError, match="does not go with float16"):
        alone(dict(grad_buffer_is_powerSGD_error=True), grad=HALF)
    with pytest.raises(ValueError, match="leave out --no-orthogonalize_in_float32"):
        alone(dict(orthogonalize_in_float32=False), grad=HALF)


@pytest.mark.parametrize(
    ("more", "grad"),
    [(more, grad) for grad in (torch.float32, torch.bfloat16, HALF)
     for more in ({}, {"use_fixed_Q": True}, {"orthogonalize_in_float32": False},
                  {"grad_buffer_is_powerSGD_error": True})[: 2 if grad == HALF else 4]],
    ids=str,
)  # fmt: skip
def test_a_stack_is_compressed_matrix_by_matrix(more: dict, grad: torch.dtype):
    """As if its matrices were parameters; one of them has no gradient at first, like an expert without tokens."""
    together, apart = {"experts": (4, 24, 20)}, {f"expert {i}": (24, 20) for i in range(4)}
    options = dict(matrix_approximation_rank=3, min_compression_rate=1.5, **more)
    stack, single = (alone(options, grad=grad, shapes=shapes) for shapes in (together, apart))
    by_name = {matrix.slot.parameter.name: matrix for state in single._states for matrix in state.matrices}
    for i, q in enumerate(stack.saved_state()["experts/q"]):
        by_name[f"expert {i}"].start_q.copy_(q)
        by_name[f"expert {i}"].random_q.copy_(q)
    assert stack.compression_ratio == pytest.approx(single.compression_ratio, rel=0.1)
    for step in range(4):
        given = gradients_of(0, step, grad, together)["experts"]
        if step < 2:
            given[2] = 0.0
        sums = one_step(stack, stack.buckets, {"experts": given})["experts"]
        each = one_step(single, single.buckets, {f"expert {i}": matrix for i, matrix in enumerate(given)})
        tolerance = 2e-5 if grad != torch.bfloat16 else 2e-2
        for i in range(4):
            assert error(sums[i], each[f"expert {i}"]) <= tolerance
            assert sums[i].any() == given[i].any()
        squares = [sum(hook.sum_of_squares(bucket) for bucket in hook.buckets) for hook in (stack, single)]
        assert squares[0].item() == pytest.approx(squares[1].item(), rel=1e-5 if grad != torch.bfloat16 else 2e-2)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    "more", [{}, {"use_fixed_Q": True}, {"wire_dtype": torch.bfloat16}, {"start_powerSGD_iter": 1}], ids=str
)
@pytest.mark.parametrize("largest", [6e-4, 100.0])
def test_float16_buffers_lose_nothing_beside_their_own_rounding(largest: float, more: dict, lazy: bool):
    """Against float64, with gradients that float16 cannot hold without the loss scale. (`largest`: with it.)"""
    scale = 2.0**16
    hook = alone(
        dict(matrix_approximation_rank=4, min_compression_rate=1.5, **more), lazy, loss_scale=lambda: scale, grad=HALF
    )
    powersgd = inner(hook)
    reference = Reference(powersgd.config, 1, powersgd._random_q)
    for step in range(3):
        given = {name: (g * largest / 8).half() for name, g in gradients_of(0, step).items()}
        exact = reference.step([{name: g.double() / scale for name, g in given.items()}])
        sums = one_step(hook, powersgd.buckets, given)
        tolerance = 1e-2 if "wire_dtype" in more else 1e-3 if not lazy else 2e-5
        for name in powersgd.compressed_names():
            assert sums[name].dtype == (torch.float32 if lazy else HALF)
            # What is taken is unscaled; what is in a bucket is in the bucket's units.
            assert error(sums[name].double() / (1.0 if lazy else scale), exact[name]) <= tolerance
            if name in reference.residuals[0]:
                residual = powersgd.saved_state()[f"{name}/residual"]
                assert error(residual, reference.residuals[0][name]) <= tolerance


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_sum_beyond_float16_never_reaches_the_weights(name: str):
    """The remainder of some steps comes at once: finite, and more than float16 holds at the loss scale."""
    scaler = LossScaler(enabled=True)
    hook = alone(
        dict(matrix_approximation_rank=1, min_compression_rate=0.0), loss_scale=lambda: scaler.scale, grad=HALF
    )
    rules = new_rules(name, AdamWConfig(), MuonConfig(), LionConfig())
    optimizer = MixedPrecisionOptimizer(gradients_in(hook.buckets, hook), rules, 1.0, scaler)
    given, largest, take = {name: (g.sign() * 6e4).half() for name, g in gradients_of(0, 0).items()}, [], hook.take

    def observed(bucket: Bucket) -> Tensor:
        taken = take(bucket)
        largest.append(taken.abs().max().item() * scaler.scale)
        return taken

    hook.take = observed
    for _ in range(6):
        put(hook.buckets, given)
        reduce_all(hook, hook.buckets)
        assert not optimizer.step(1e-2).skipped
    assert max(largest) > 65504
    tensors = [bucket.param for bucket in hook.buckets] + list(hook.saved_state().values())
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("grad", [torch.float32, HALF])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_does_not_stay_in_the_state(value: float, grad: torch.dtype, lazy: bool):
    """Even if nobody checks before the sum is decompressed."""
    hook = alone(dict(matrix_approximation_rank=4, min_compression_rate=1.5), lazy, grad=grad)
    powersgd = inner(hook)
    one_step(hook, powersgd.buckets, {name: g.to(grad) for name, g in gradients_of(0, 0).items()})
    before = fingerprint(list(powersgd.saved_state().values()))
    for bucket in powersgd.buckets:
        hook.release(bucket)
    put(powersgd.buckets, {name: (g * value).to(grad) for name, g in gradients_of(0, 1).items()})
    reduce_all(hook, powersgd.buckets)
    assert all(not torch.isfinite(inner(hook).sum_of_squares(bucket)) for bucket in powersgd.buckets)
    assert lazy or not any(torch.isfinite(bucket.grad).all() for bucket in powersgd.buckets)
    assert fingerprint(list(powersgd.saved_state().values())) == before


def test_sum_of_squares_is_that_of_the_sum():
    """Includes steps before compression starts, a loss scale, and sums too large for float32's squares."""
    for size, scale, start in itertools.product((1e-22, 1.0, 1e18), (1.0, 1024.0), (0, 1)):
        config = dict(matrix_approximation_rank=4, min_compression_rate=1.5, start_powerSGD_iter=start)
        hook = alone(config, loss_scale=lambda scale=scale: scale)
        put(hook.buckets, {name: g * size * scale for name, g in gradients_of(0, 0).items()})
        reduce_all(hook, hook.buckets)
        found = [inner(hook).sum_of_squares(bucket).item() for bucket in hook.buckets]
        sums = take(hook, hook.buckets)
        for bucket, value in zip(hook.buckets, found):
            exact = sum_of_squares(sums[slot.parameter.name].view(-1) for slot in bucket.slots).item()
            assert value == pytest.approx(exact, rel=1e-5), (size, scale, start)


def test_the_relative_error_is_estimated_when_asked():
    """On one rank it is the norm of the residual over that of the input."""
    hook, silent = (alone(dict(matrix_approximation_rank=4, min_compression_rate=1.5)) for _ in range(2))
    one_step(hook, hook.buckets, gradients_of(0, 0))
    assert hook.relative_error == {}
    hook.measure = True
    before = copied(hook)
    sums = one_step(hook, hook.buckets, gradients_of(0, 1))
    assert sorted(hook.relative_error) == sorted(hook.compressed_names())
    for name, value in hook.relative_error.items():
        given = before[f"{name}/residual"] + gradients_of(0, 1)[name].view(before[f"{name}/residual"].shape)
        exact = (hook.saved_state()[f"{name}/residual"].norm() / given.norm()).item()
        assert 0.1 < exact < 0.95 and value == pytest.approx(exact, rel=0.2)
    # Measuring changes nothing.
    for step in range(2):
        expected = one_step(silent, silent.buckets, gradients_of(0, step))
    assert fingerprint(list(expected.values())) == fingerprint(list(sums.values()))
    hook.measure = False
    one_step(hook, hook.buckets, gradients_of(0, 2))
    assert hook.relative_error == {}


def test_random_q_is_a_function_of_seed_iteration_and_name():
    hooks = [alone(dict(seed=seed)) for seed in (0, 0, 1)]
    draws = [hook._random_q(name, (5, 9), 3, iteration) for hook in hooks for name in "ab" for iteration in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(draws[:4], draws[4:8]))
    different = draws[4:]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))
    assert all(torch.allclose(q.norm(dim=0), torch.ones(3)) for q in draws)
    fixed = alone(dict(use_fixed_Q=True))._random_q("a", (5, 9), 3, 0)
    assert torch.allclose(fixed.T @ fixed, torch.eye(3), atol=1e-6)


def with_singular_values(m: int, values: list[float], seed: int = 0) -> Tensor:
    rank = len(values)
    left, _ = torch.linalg.qr(draw(f"{seed} left", (m, rank)).double())
    right, _ = torch.linalg.qr(draw(f"{seed} right", (rank, rank)).double())
    return (left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T).float()


def outside(vectors: Tensor, basis: Tensor) -> float:
    """Share of `vectors` that is outside the span of `basis`."""
    q, _ = torch.linalg.qr(basis.double())
    vectors = vectors.double()
    return ((vectors - q @ (q.T @ vectors)).norm() / vectors.norm()).item()


def stretch(basis: Tensor) -> Tensor:
    """Singular values: 1 if columns are orthonormal. Above 1, P P^T M would overshoot."""
    return torch.linalg.svdvals(basis.double())


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize(("m", "rank"), [(1, 1), (5, 5), (40, 4), (300, 32)])
def test_orthonormalize(m: int, rank: int, size: float):
    columns = draw(f"{m} {rank}", (m, rank)) * size
    # The matrices of a batch do not affect each other.
    basis, other = columns.clone(), draw("other", (7, min(rank, 3)))
    orthonormalize([basis, other], 0.0)
    assert (stretch(basis) - 1).abs().max() <= 1e-5 and (stretch(other) - 1).abs().max() <= 1e-5
    assert outside(columns / size, basis) <= 1e-6 * (1 if m > rank else 100)
    # Column k is in the span of the first k: the first ones keep their directions.
    assert torch.allclose(basis[:, 0], (columns[:, 0].double() / columns[:, 0].double().norm()).float(), atol=1e-6)


@pytest.mark.parametrize(("smallest", "least"), [(1e-3, 0.99), (1e-4, 0.99), (1e-5, 0.9), (1e-6, 0.5)])
def test_orthonormalize_ill_conditioned_columns(smallest: float, least: float):
    columns = with_singular_values(200, torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), 8).tolist())
    basis = columns.clone()
    orthonormalize([basis], 0.0)
    found = stretch(basis)
    assert found.max() <= 1 + 1e-5 and found.min() >= least
    assert outside(columns, basis) <= 1e-6


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize(("m", "rank", "true_rank"), [(64, 4, 1), (300, 32, 5), (3000, 60, 4), (12000, 48, 7)])
def test_orthonormalize_dependent_columns(m: int, rank: int, true_rank: int, epsilon: float):
    """Never longer than 1 in any direction: otherwise the residual would grow from step to step."""
    for seed in range(4):
        basis, generator = draw(f"{seed} basis", (m, true_rank)), torch.Generator().manual_seed(seed)
        pick = torch.randint(0, true_rank, (rank,), generator=generator)
        times = torch.randint(-3, 4, (true_rank, rank), generator=generator).float()
        for name, columns in {
            "product": (basis @ draw("inner", (true_rank, 100))) @ draw("outer", (100, rank)),
            "repeated": basis[:, pick], "multiples": basis[:, pick] * times[0], "whole numbers": basis @ times,
        }.items():  # fmt: skip
            found = columns.clone()
            orthonormalize([found], epsilon)
            assert torch.isfinite(found).all(), name
            assert stretch(found).max() <= 1 + 1e-4, (name, seed, stretch(found).max().item())
            # No part of the columns is left out.
            kept = found.double() @ (found.double().T @ columns.double())
            assert (kept - columns).norm() <= max(1e-4, 2 * epsilon) * columns.norm(), (name, seed)


@pytest.mark.parametrize("make_basis", [orthonormalize, gram_schmidt])
def test_zero_columns_stay_zero(make_basis: Callable):
    for dtype in (torch.float32, torch.bfloat16):
        nothing = torch.zeros(9, 3, dtype=dtype)
        make_basis([nothing], 0.0)
        assert (nothing == 0).all()
        some = draw("some", (9, 3)).to(dtype)
        some[:, 1] = 0
        make_basis([some], 0.0)
        assert (some[:, 1] == 0).all()
        assert torch.allclose(some[:, [0, 2]].float().norm(dim=0), torch.ones(2), atol=1e-2)


@pytest.mark.parametrize(("m", "rank", "true_rank", "exponent"), [
    (65_536, 128, 1, 0), (64, 64, 63, 20), (3000, 60, 59, 0), *((3000, 60, rank, 20) for rank in (0, 1, 59, 60)),
    *((5, 5, rank, 20) for rank in (0, 1, 4, 5)),
])  # fmt: skip
def test_orthonormalize_columns_of_any_rank_and_size(m: int, rank: int, true_rank: int, exponent: int):
    """In the first case, rounding of the Gram matrix made the factorisation fail, and the basis 5 million times too
    long, but finite."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(m, true_rank, generator=generator) @ torch.randn(true_rank, rank, generator=generator)
    columns = columns * torch.logspace(-exponent, exponent, rank)
    basis = columns.clone()
    orthonormalize([basis], 0.0)
    values = torch.linalg.eigvalsh((basis.T @ basis).double())
    assert values.max() <= 1 + 1e-5 and (values > 0.5).sum() >= true_rank
    # Each column is kept, even the small ones.
    unit = columns.double() / columns.double().norm(dim=0).clamp(min=1e-300)
    unit = unit.float()[:, :: 1 + rank // 8]
    assert ((basis @ (basis.T @ unit)) - unit).norm(dim=0).max() <= 1e-4


def test_what_is_not_finite_stays_so():
    for value, make_basis in itertools.product((float("inf"), float("nan")), (orthonormalize, gram_schmidt)):
        factor = draw("factor", (9, 3))
        factor[2, 1] = value
        other = draw("other", (9, 3))
        make_basis([factor, other], 0.0)
        assert not torch.isfinite(factor).all() and torch.isfinite(other).all()


def test_epsilon_dampens_dependent_columns():
    columns = with_singular_values(100, [1.0, 1.0, 1e-3])
    free, damped = columns.clone(), columns.clone()
    orthonormalize([free], 0.0)
    orthonormalize([damped], 1e-4)
    assert stretch(free).min() > 0.99 and stretch(damped).min() < 0.5
    assert stretch(damped).max() <= 1 and stretch(damped)[1] > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_schmidt(dtype: torch.dtype):
    for m, rank in ((1, 1), (12, 12), (40, 4), (300, 16)):
        columns = draw(f"{m} {rank}", (m, rank)).to(dtype)
        basis = columns.clone()
        gram_schmidt([basis], 0.0)
        assert basis.dtype == dtype and torch.isfinite(basis).all()
        if m > rank:
            allowed = 0.05 if dtype == torch.bfloat16 else 1e-5
            assert (stretch(basis) - 1).abs().max() <= allowed
            assert outside(columns, basis) <= allowed


@pytest.mark.parametrize(("m", "rank", "true_rank"), [(500, 128, 1), (5000, 4, 1), (500, 16, 15), (128, 32, 16)])
def test_gram_schmidt_of_dependent_columns_does_not_make_the_residual_grow(m: int, rank: int, true_rank: int):
    """An eigenvalue t of P P^T leaves a share 1 - t of a residual's part there: above 2, more than all of it."""
    columns = {
        "equal": draw("line", (m, 1)).repeat(1, rank), "nearly": draw("line", (m, 1)) + 0.01 * draw("rest", (m, rank)),
        "product": draw("left", (m, true_rank)) @ draw("right", (true_rank, rank)),
    }  # fmt: skip
    for name, given in columns.items():
        basis = given.bfloat16()
        gram_schmidt([basis], 0.0)
        assert stretch(basis).max().square() <= 1.9, name
