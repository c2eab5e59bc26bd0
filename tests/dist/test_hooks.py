"""Compression hooks against float64 sums, the user's own hooks, and the callbacks after a bucket's reduction."""

import itertools
import threading

import pytest
import torch
from torch import Tensor

from parallel import (
    AllReduce,
    Collectives,
    Compressed,
    DistContext,
    DistributedDataParallel,
    Eager,
    PowerSGD,
    PowerSGDConfig,
    ReduceScatter,
)
from parallel.buffer import Bucket
from tests.dist.buckets import (
    Chain,
    error,
    fingerprint,
    gradients_of,
    in_groups,
    new_buckets,
    new_powersgd,
    one_step,
    put,
    reduce_all,
)
from tests.dist.group import run_ranks

WORLD_SIZES = (2, 3, 4)
WIRES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
INNER = {"AllReduce": AllReduce, "ReduceScatter": ReduceScatter}
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SUBNORMAL = {"bfloat16": 2.0**-133, "float16": 2.0**-24}
"""Smallest positive number of the format: below it, rounding is absolute."""
MAGNITUDES = {
    "ordinary": [1.0, 1.0, 1.0, 1.0], "one large": [1.0, 300.0, 1e-3, 1.0], "huge": [1e30, 1e30, 3e29, 1e27],
    "tiny": [1e-30, 1e-30, 2e-31, 1e-33], "apart": [1e30, 1e-30, 1e-5, 1e5], "nothing": [0.0, 0.0, 0.0, 0.0],
}  # fmt: skip


def compressed_sums(context: DistContext) -> dict:
    """Errors of the sums, in units of the formats' allowed roundings."""
    collectives, results = Collectives(context.grad_group), {}
    for (magnitude, factors), (wire, dtype), (inner, kind) in itertools.product(
        MAGNITUDES.items(), WIRES.items(), INNER.items()
    ):
        buckets = new_buckets(context.world_size)
        mine = {n: g * factors[context.rank] for n, g in gradients_of(context.rank, 0).items()}
        put(buckets, mine)
        reduce_all(Compressed(kind(collectives), dtype, collectives), buckets)
        found, worst = [], 0.0
        for bucket in buckets:
            alike = new_buckets(context.world_size)[bucket.index]
            addends = []
            for rank in range(context.world_size):
                alike.grad.zero_()
                put([alike], {n: g * factors[rank] for n, g in gradients_of(rank, 0).items()})
                addends.append(alike.grad.double())
            exact, size = sum(addends), sum(addend.abs() for addend in addends)
            largest = max(addend.abs().max().item() for addend in addends)
            step = SUBNORMAL[wire]
            if wire == "float16":
                # The largest value of any rank is scaled to at least 65504 / 4N, unless the scale is 2^100.
                step *= max(4 * context.world_size * largest / 65504, 2.0**-100)
            allowed = 1.01 * ROUNDOFF[wire] * (size + exact.abs()) + (context.world_size + 1) * step
            shard = collectives.shard if kind is ReduceScatter else (lambda tensor: tensor)
            errors = (bucket.grad.double() - exact).abs() / allowed
            worst = max(worst, shard(errors).max().nan_to_num(nan=9e9).item())
            found.append(shard(bucket.grad))
        results[f"{magnitude}, {wire}, {inner}"] = [worst, fingerprint(found)]
    return results


def edges(context: DistContext) -> dict:
    """Values of which N times the largest is almost float16's largest, for any power of two."""
    collectives, results = Collectives(context.grad_group), {}
    hook = Compressed(AllReduce(collectives), torch.float16, collectives)
    limit = 65504.0 / context.world_size
    for name, value in {
        "limit": limit, "below": limit * (1 - 2**-12), "above": limit * (1 + 2**-12), "scaled": limit * 2.0**-40
    }.items():  # fmt: skip
        bucket = new_buckets(context.world_size)[0]
        bucket.grad.fill_(value)
        reduce_all(hook, [bucket])
        results[name] = error(bucket.grad, torch.full_like(bucket.grad, value * context.world_size))
    return results


def infinities(context: DistContext) -> dict:
    """One element of one rank is not finite: its effect on all ranks."""
    collectives, results = Collectives(context.grad_group), {}
    for value, (wire, dtype), (inner, kind) in itertools.product(
        (float("inf"), float("-inf"), float("nan")), WIRES.items(), INNER.items()
    ):
        buckets = new_buckets(context.world_size)
        put(buckets, gradients_of(context.rank, 0))
        place = len(buckets[1].grad) - 70
        if context.rank == context.world_size - 1:
            buckets[1].grad[place] = value
        owner = place // (len(buckets[1].grad) // context.world_size)
        reduce_all(Compressed(kind(collectives), dtype, collectives), buckets)
        results[f"{value}, {wire}, {inner}"] = [
            not torch.isfinite(buckets[1].grad[place]).item(),
            kind is AllReduce or owner == context.rank,
            all(torch.isfinite(bucket.grad).all().item() for bucket in buckets if bucket.index != 1),
        ]
    return results


def round_powersgd(context: DistContext) -> dict:
    """bf16 around an eager PowerSGD: full rank against the sum; low rank against all sums, after many steps."""
    collectives, results = Collectives(context.grad_group), {}
    for wire, dtype in [("bfloat16", torch.bfloat16)]:
        buckets = new_buckets(context.world_size)
        config = PowerSGDConfig(matrix_approximation_rank=64, min_compression_rate=0.0)
        hook = Compressed(Eager(PowerSGD(buckets, collectives, config)), dtype, collectives)
        sums = one_step(hook, buckets, gradients_of(context.rank, 0))
        exact = total([gradients_of(rank, 0) for rank in range(context.world_size)])
        errors = [error(sums[name], exact[name]) for name in exact]
        results[f"{wire} full"] = [max(errors), fingerprint(list(sums.values()))]

        buckets = new_buckets(context.world_size)
        inner = PowerSGD(buckets, collectives, PowerSGDConfig(matrix_approximation_rank=4))
        hook, delivered, given = Compressed(Eager(inner), dtype, collectives), [], []
        for step in range(24):
            size = 2.0 ** (4 - step % 8)
            mine = {name: g * size for name, g in gradients_of(context.rank, step).items()}
            delivered.append(one_step(hook, buckets, mine))
            given += [{n: g * size for n, g in gradients_of(r, step).items()} for r in range(context.world_size)]
        errors = {name: error(total(delivered)[name], total(given)[name]) for name in inner.compressed_names()}
        results[f"{wire} low"] = [max(errors.values()), len(errors)]
    return results


def total(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(g[name].double() for g in gradients) for name in gradients[0]}


def after_reduction(context: DistContext) -> dict:
    """A function as a hook, and callbacks after the reduction."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Chain(4), context, bucket_size=1)
    x = torch.linspace(-1, 1, 16).view(2, 8) * (context.rank + 1)

    def backward() -> list[Tensor]:
        ddp.zero_grad()
        ddp(x).sum().backward()
        ddp.finish_grad_sync()
        return [bucket.grad.clone() for bucket in ddp.buckets]

    expected, results, state = backward(), {"buckets": len(ddp.buckets)}, {"calls": []}

    def hook(state: dict, bucket: Bucket):
        state["calls"].append(bucket.index)
        return Collectives(context.grad_group).all_reduce(bucket.grad)

    ddp.register_comm_hook(state, hook)
    results["function"] = [
        state["calls"] == [] and all(map(torch.equal, backward(), expected)), state["calls"], ddp.bytes_sent()
    ]  # fmt: skip
    ddp.use_hook(AllReduce(ddp.collectives))

    seen, first = [], threading.Event()

    def callback(bucket: Bucket) -> None:
        seen.append([bucket.index, torch.equal(bucket.grad, expected[bucket.index])])
        first.set()

    ddp.register_after_reduction(callback)
    early = []
    # The last gradient of the backward pass waits until the first bucket's callback.
    handle = ddp.module.layers[0].weight.register_hook(lambda grad: early.append(first.wait(30.0)))
    results["values"] = all(map(torch.equal, backward(), expected))
    results["seen"], results["early"] = seen, early
    handle.remove()

    def failing(bucket: Bucket) -> None:
        if bucket.index == 2:
            raise OSError(f"step of bucket {bucket.index} failed")

    ddp.register_after_reduction(failing)
    try:
        backward()
    except OSError as problem:
        results["problem"] = str(problem)
    context.barrier()
    return results


def cases(context: DistContext) -> dict:
    work = (compressed_sums, edges, infinities, round_powersgd, after_reduction)
    return {each.__name__: each(context) for each in work}


@pytest.fixture(scope="module")
def answers() -> dict[int, list[dict]]:
    ranks = run_ranks(max(WORLD_SIZES), in_groups, WORLD_SIZES, cases)
    return {size: [results[str(size)] for results in ranks[:size]] for size in WORLD_SIZES}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_compressed_sums_are_as_exact_as_16_bits_allow(answers: dict[int, list[dict]], world_size: int):
    ranks = [results["compressed_sums"] for results in answers[world_size]]
    assert len(ranks[0]) == len(MAGNITUDES) * 4
    for name in ranks[0]:
        assert all(results[name][0] <= 1.0 for results in ranks), (name, [results[name][0] for results in ranks])
        if "AllReduce" in name:
            assert len({results[name][1] for results in ranks}) == 1, f"{name}: ranks hold different sums"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_float16_sums_do_not_overflow(answers: dict[int, list[dict]], world_size: int):
    for results in answers[world_size]:
        assert set(results["edges"]) == {"limit", "below", "above", "scaled"}
        assert max(results["edges"].values()) <= 2 * ROUNDOFF["float16"], results["edges"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_infinities_arrive(answers: dict[int, list[dict]], world_size: int):
    for results in answers[world_size]:
        assert len(results["infinities"]) == 12
        for name, (arrived, held, others_finite) in results["infinities"].items():
            assert arrived or not held, name
            assert others_finite, name
    for name in answers[world_size][0]["infinities"]:
        assert any(results["infinities"][name][1] for results in answers[world_size])


def test_what_cannot_be_wrapped_is_refused():
    """float16's scale would change the residual's units; a lazy hook leaves nothing to widen again."""
    collectives, buckets = Collectives(None), new_buckets(1)
    for lazy, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        with pytest.raises(ValueError, match="give it wire_dtype"):
            Compressed(new_powersgd(buckets, collectives, lazy, matrix_approximation_rank=4), dtype, collectives)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        Compressed(AllReduce(collectives), torch.float32, collectives)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bf16_round_an_eager_powersgd(answers: dict[int, list[dict]], world_size: int):
    wire = "bfloat16"
    ranks = [results["round_powersgd"] for results in answers[world_size]]
    assert len({results[f"{wire} full"][1] for results in ranks}) == 1
    for results in ranks:
        assert results[f"{wire} full"][0] <= 8 * ROUNDOFF[wire]
        low, compressed = results[f"{wire} low"]
        # 24 steps delivered what they were given, except for what is still under way.
        assert compressed == 4 and low <= 0.02, low


def test_a_function_is_a_hook(answers: dict[int, list[dict]]):
    for results in itertools.chain(*answers.values()):
        found = results["after_reduction"]
        assert found["function"] == [True, list(range(found["buckets"])), 0.0] and found["buckets"] == 8


def test_a_callback_follows_each_buckets_reduction(answers: dict[int, list[dict]]):
    """Once per bucket, in their order, with the sum in place, and while the backward pass goes on."""
    for results in itertools.chain(*answers.values()):
        found = results["after_reduction"]
        assert found["seen"] == [[index, True] for index in range(found["buckets"])]
        assert found["early"] == [True] and found["values"]


def test_an_error_in_a_callback_surfaces(answers: dict[int, list[dict]]):
    for results in itertools.chain(*answers.values()):
        assert results["after_reduction"]["problem"] == "step of bucket 2 failed"


@pytest.mark.parametrize("dtype", WIRES.values(), ids=WIRES)
def test_a_bucket_that_is_in_these_16_bits_goes_as_it_is(dtype: torch.dtype):
    """If scaled down to make room for a sum, small values of float16 would be lost."""
    collectives, bucket = Collectives(None), new_buckets(1, dtype)[0]
    hook = Compressed(AllReduce(collectives), dtype, collectives)
    bucket.grad[:4] = torch.tensor([65504.0, 2.0**-24, 3 * 2.0**-24, 0.0])
    before = bucket.grad.clone()
    reduce_all(hook, [bucket])
    assert torch.equal(bucket.grad, before) and hook.bytes_sent(bucket) == 0.0


def test_gradients_travel_in_16_bits_or_not_compressed():
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        Compressed(AllReduce(Collectives(None)), torch.float32, Collectives(None))
