"""Many small buckets, every hook, randomly late ranks: no hang, and the same weights as without delays."""

import itertools
import random
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import (
    AllReduce,
    BucketGradients,
    CommHook,
    Compressed,
    DistContext,
    DistributedDataParallel,
    PowerSGD,
    PowerSGDConfig,
    ReduceScatter,
    Zero1,
    destroy_context,
    init_context,
)
from parallel.buffer import Bucket
from tests.dist.buckets import Chain, fingerprint
from tests.dist.group import run_ranks

HANG_S = 20.0
"""A collective that takes longer is a hang: gloo raises."""
MODES = ("all_reduce", "zero1", "bf16", "fp16", "powersgd", "powersgd bf16", "powersgd zero1", "step", "step zero1")


class Delays:
    """Sleeps for 0 to 2 ms, most often not at all, in a different sequence on every rank."""

    def __init__(self, seed: str):
        self.random, self.total = random.Random(seed), 0.0

    def __call__(self, *_: object) -> None:
        if self.random.random() < 0.4:
            delay = self.random.uniform(0.0, 0.002)
            self.total += delay
            time.sleep(delay)


def train(context: DistContext, mode: str, steps: int, delay: Callable) -> list:
    """Returns bits of the weights, and their norm."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Chain(2), context, bucket_size=1)
    zero1 = Zero1(ddp, overlap_gather=True) if "zero1" in mode else None
    inner: CommHook = (ReduceScatter if zero1 else AllReduce)(ddp.collectives)
    if mode in ("bf16", "fp16"):
        inner = Compressed(inner, torch.bfloat16 if mode == "bf16" else torch.float16, ddp.collectives)
    if "powersgd" in mode:
        wire = torch.bfloat16 if "bf16" in mode else None
        config = PowerSGDConfig(matrix_approximation_rank=2, min_compression_rate=1.0)
        inner = PowerSGD(ddp.buckets, ddp.collectives, config, wire)

    class Late(CommHook):
        """A hook that is delayed before and after."""

        takes_in_place, knows_norm, keeps_scale = inner.takes_in_place, inner.knows_norm, inner.keeps_scale
        settle, sum_of_squares = inner.settle, inner.sum_of_squares
        take, release = inner.take, inner.release

        def reduce(self, bucket: Bucket):
            delay()
            handle = inner.reduce(bucket)
            delay()
            return handle

    ddp.use_hook(Late())
    gather = ddp.collectives.all_gather
    ddp.collectives.all_gather = lambda tensor: [delay(), gather(tensor), None][-1]
    for parameter in ddp.parameters():
        parameter.register_hook(delay)
    optimizer = MixedPrecisionOptimizer(
        BucketGradients(ddp, zero1), [AdamW(AdamWConfig())], 0.0 if "step" in mode else 0.05, LossScaler(enabled=False)
    )  # fmt: skip

    def step_bucket(bucket: Bucket) -> None:
        delay()
        optimizer.step_bucket(bucket.index)

    if "step" in mode:
        ddp.register_after_reduction(step_bucket)
    inputs = torch.linspace(-1.0, 1.0, 2 * 8 * 4).view(4, 2, 8)[context.rank]
    for step in range(steps):
        if "step" in mode:
            optimizer.begin_overlapped_step(1e-2)
        output = ddp(inputs)
        output.register_hook(delay)
        (output - 0.5 * (-1) ** step).square().sum().backward()
        ddp.finish_grad_sync()
        if "step" in mode:
            optimizer.end_overlapped_step()
            if zero1:
                zero1.start_gathers()
        else:
            optimizer.step(1e-2, zero1.gather if zero1 else None)
    if zero1:
        zero1.wait()
    ddp.close()
    weights = [p.detach() for p in ddp.parameters()]
    return [fingerprint(weights), torch.cat([w.double().flatten() for w in weights]).norm().item()]


def hunt(world_sizes: tuple[int, ...], steps: int) -> dict:
    """Each mode with and without delays, in groups of the first 2, 3, ... ranks."""
    everyone, results = init_context("cpu", timeout_s=10 * HANG_S), {}
    groups = {n: [dist.new_group(range(n), timeout=timedelta(seconds=HANG_S)) for _ in range(2)] for n in world_sizes}
    for size in world_sizes:
        # The smaller groups' work takes longer than a collective may.
        everyone.barrier()
        context = DistContext(everyone.rank, size, everyone.rank, size, everyone.device, *groups[size])
        for mode in MODES if everyone.rank < size else ():
            late, clock = Delays(f"{size} {mode} {everyone.rank}"), time.perf_counter()
            delayed = train(context, mode, steps, late)
            middle = time.perf_counter()
            # With 4 ranks on 2 cores everybody is late anyway.
            compare = size == 2 or mode in ("zero1", "powersgd bf16", "step zero1")
            undelayed = train(context, mode, steps, lambda *_: None) if compare else None
            results[f"{size} {mode}"] = [delayed, undelayed, late.total, middle - clock, time.perf_counter() - middle]
    destroy_context(everyone)
    return results


@pytest.mark.parametrize(
    "steps", [pytest.param(8, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)]
)
def test_no_mismatch_and_no_hang(steps: int):
    sizes = (2, 4)
    ranks = run_ranks(4, hunt, sizes, steps)
    assert [len(results) for results in ranks] == [18, 18, 9, 9]
    for size, mode in itertools.product(sizes, MODES):
        runs = [results[f"{size} {mode}"] for results in ranks[:size]]
        for delayed, undelayed, total, *_ in runs:
            # Often late, and each rank at its own times.
            assert 0.0015 * steps < total
            assert delayed == runs[0][0], (size, mode)
            assert undelayed in (None, delayed), (size, mode)
        assert len({total for _, _, total, *_ in runs}) == size
    # The modes did different things.
    assert len({ranks[0][f"2 {mode}"][0][0] for mode in MODES}) >= 5
    for exact in (("all_reduce", "zero1"), ("powersgd", "powersgd zero1"), ("step", "step zero1")):
        assert len({ranks[0][f"2 {mode}"][0][0] for mode in exact}) == 1, exact


def misordered() -> str:
    """Symptom of a mismatch: rank 1 waits for a bucket that rank 0 never reduces."""
    context = init_context("cpu", timeout_s=3.0)
    ddp = DistributedDataParallel(Chain(2), context, bucket_size=1)

    def hook(_state: object, bucket: Bucket):
        if context.rank == 1 or bucket.index != 1:
            return ddp.collectives.all_reduce(bucket.grad)

    ddp.register_comm_hook(None, hook)
    ddp(torch.ones(2, 8)).sum().backward()
    try:
        ddp.finish_grad_sync()
    except RuntimeError:
        return "an error"
    return "done"


@pytest.mark.slow
def test_a_hang_would_be_an_error():
    start = time.perf_counter()
    assert "an error" in run_ranks(2, misordered)
    assert time.perf_counter() - start < 60
