"""Collectives on two levels, for several ranks on each of several machines: their sums, their bytes, and training."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import Decoder
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rules import new_rules
from parallel import Collectives, DistContext, ParallelConfig, PowerSGDConfig
from parallel.context import machine_groups
from parallel.data_parallel import BucketedEngine
from parallel.engine import EngineParts, StepPlan
from parallel.engines import open_engine
from parallel.gradients import square
from parallel.mesh import Mesh
from tasks.language_model import LanguageModelTask
from tests.dist.buckets import error, fingerprint, gradients_of, in_groups, new_buckets, new_powersgd, one_step
from tests.dist.group import run_ranks
from tests.dist.test_collectives import DTYPES, Counter, byte_cases, collective_cases, values
from tests.unit.test_engines import new_model

ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11}
POWERSGD = PowerSGDConfig(matrix_approximation_rank=64, min_compression_rate=0.0)
"""Of full rank: it keeps everything."""
ENGINES = {
    "plain": {}, "zero1": {"use_distributed_optimizer": True}, "bf16": {"use_bf16_compress_hook": True},
    "fp16": {"use_fp16_compress_hook": True}, "powersgd": {"use_powerSGD_hook": True},
    "bf16 zero1": {"use_bf16_compress_hook": True, "use_distributed_optimizer": True},
    "powersgd bf16": {"use_powerSGD_hook": True, "use_bf16_compress_hook": True},
}  # fmt: skip


def roundings(context: DistContext, collectives: Collectives) -> dict:
    """Whether the errors that ranks are told of make up for the difference from the exact sum."""
    results = {}
    for name in ("bfloat16", "float16"):
        addends = [values(rank, 64 * context.world_size, DTYPES[name]) for rank in range(context.world_size)]
        tensor, rounding = addends[context.rank].clone(), torch.zeros(64 * context.world_size)
        collectives.reduce_scatter(tensor, rounding)
        collectives.all_gather(tensor)
        told, exact = context.all_sum(rounding.double()), sum(addend.double() for addend in addends)
        results[name] = [torch.equal(exact + told, tensor.double()), (told != 0).float().mean().item()]
    return results


def powersgd_cases(context: DistContext, collectives: Collectives) -> dict:
    """At a low rank: sums and residuals together against the gradients; what the ranks hold is the same."""
    results = {}
    exact = {
        name: sum(gradients_of(rank, 0)[name].double() for rank in range(context.world_size))
        for name in gradients_of(0, 0)
    }
    for wire in (None, torch.bfloat16, torch.float16):
        for fixed in (False, True):
            buckets = new_buckets(context.world_size)
            hook = new_powersgd(
                buckets, collectives, wire_dtype=wire, matrix_approximation_rank=4, use_fixed_Q=fixed
            )
            sums = one_step(hook, buckets, gradients_of(context.rank, 0))
            saved = hook.saved_state()
            errors = [
                error(sums[name] + context.all_sum(saved[f"{name}/residual"].double()), exact[name])
                for name in hook.compressed_names()
            ]
            results[f"{wire}, fixed {fixed}"] = [max(errors), len(errors), fingerprint(list(sums.values()))]
    return results


def rows_of(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """A rank's share of eight rows, in two micro-batches."""
    rows = torch.randint(0, 32, (8, 9), generator=torch.Generator().manual_seed(0)).chunk(ranks)[rank]
    return [
        {"input_ids": part[:, :-1], "labels": part[:, 1:], "positions": torch.arange(8).expand(len(part), 8),
         "row_ids": torch.arange(len(part))}
        for part in (rows.chunk(2) if len(rows) > 1 else [rows])
    ]  # fmt: skip


def new_engine(context: DistContext, model: Decoder, machine_size: int, optimizer: str, flags: dict, sources: list):
    scaler = LossScaler(enabled=False)

    def new_optimizer(gradients):
        sources.append(gradients)
        rules = new_rules(optimizer, AdamWConfig(), MuonConfig(), LionConfig())
        return MixedPrecisionOptimizer(gradients, rules, 0.0, scaler)

    return open_engine(
        EngineParts(
            ParallelConfig(bucket_size=600, **flags), POWERSGD, context,
            Mesh(context.rank, data_size=context.world_size, machine_size=machine_size), model,
            to_device=lambda batch: batch, new_optimizer=new_optimizer, square=square,
            loss_scale=lambda: scaler.scale, is_fp16=False, seed=0,
        )
    )  # fmt: skip


def own_gradients(rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's gradients by plain autograd."""
    model = new_model()
    task = LanguageModelTask(model, 0, torch.ones(32))
    for batch in rows_of(rank, ranks):
        (task(batch)[0] / 64).backward()
    return {name: parameter.grad.flatten() for name, parameter in model.named_parameters()}


def engine_cases(context: DistContext, collectives: Collectives) -> dict:
    """Squared norms of the error of this rank's slices and of the slices, and bounds of the error in 16 bits."""
    size, ranks, results = collectives.machine_size, context.world_size, {}
    grads = [own_gradients(rank, ranks) for rank in range(ranks)]
    machines = [
        {name: sum(grad[name] for grad in grads[first : first + size]) for name in grads[0]}
        for first in range(0, ranks, size)
    ]
    exact = {name: sum(grad[name].double() for grad in grads) for name in grads[0]}
    norm = {id(g): torch.cat([t.double() for t in g.values()]).norm().item() for g in [*grads, *machines, exact]}
    # A gradient, a machine's sum and the whole sum are rounded once each.
    roundings = sum(norm.values())
    for mode, flags in ENGINES.items():
        model, sources = new_model(), []
        engine = new_engine(context, model, size, "adamw", flags, sources)
        assert isinstance(engine, BucketedEngine)
        task, plan = LanguageModelTask(model, 0, torch.ones(32)), StepPlan(1, 1e-2, 64, lambda: None)
        engine.forward_backward(rows_of(context.rank, ranks), task, plan)
        engine.ddp.finish_grad_sync()
        off = of = 0.0
        for bucket, pieces in enumerate(sources[0].slices):
            for piece, grad in zip(pieces, sources[0].take(bucket)):
                wanted = exact[piece.name][piece.offset : piece.offset + len(grad)]
                off, of = off + (grad - wanted).square().sum().item(), of + wanted.square().sum().item()
        traffic = engine.traffic()
        results[mode] = {
            "off": off, "of": of, "roundings": roundings / norm[id(exact)],
            "sent": dict(traffic.sent), "by machine": dict(traffic.sent_by_machine), "told": engine.describe(),
        }  # fmt: skip
        engine.close()
    alone, start = DistContext(0, 1, 0, 1, context.device), flat(new_model())
    for optimizer in ("adamw", "muon"):
        wanted = stepped_weights(alone, 1, optimizer, {}, rows_of(0, 1))
        for mode, flags in ((optimizer, {}), (f"{optimizer} zero1", {"use_distributed_optimizer": True})):
            stepped = stepped_weights(context, size, optimizer, flags, rows_of(context.rank, ranks))
            results[mode] = [error(stepped - start, wanted - start), fingerprint([stepped])]
    # Where machines have three processes and one, the mesh has machines of one.
    uneven = replace(context, local_world_size=3 if context.rank < 3 else 1)
    engine = new_engine(uneven, new_model(), 1, "adamw", {}, [])
    traffic = engine.traffic()
    results["uneven"] = [dict(traffic.sent_by_machine), traffic.remark]
    engine.close()
    return results


def flat(model: Decoder) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def stepped_weights(context: DistContext, machine_size: int, optimizer: str, flags: dict, rows: list) -> Tensor:
    model = new_model()
    engine = new_engine(context, model, machine_size, optimizer, flags, [])
    task, plan = LanguageModelTask(model, 0, torch.ones(32)), StepPlan(1, 1e-2, 64, lambda: None)
    engine.forward_backward(rows, task, plan)
    engine.step(plan)
    engine.settle()
    engine.close()
    return flat(model)


def left_bytes(context: DistContext, collectives: Collectives) -> dict:
    """Counted and expected bytes that leave a machine."""
    results, tensor = {}, torch.ones(10 * context.world_size)
    share = (collectives.machines - 1) / collectives.machines
    for name, work, times in (
        ("scatter", collectives.reduce_scatter, 1), ("gather", collectives.all_gather, 1),
        ("all reduce", collectives.all_reduce, 2),
    ):  # fmt: skip
        with Counter(collectives) as counter:
            work(tensor)
        results[name] = [counter.total_by_machine, times * share * tensor.nbytes]
    return results


def cases(context: DistContext) -> dict:
    results = {}
    for (ranks, size), works in CASES.items():
        collectives = Collectives(context.grad_group, size) if ranks == context.world_size else None
        for work in works if collectives is not None else ():
            results[f"{work.__name__} {size}"] = work(context, collectives)
    return results


def by_torch(context: DistContext, collectives: Collectives) -> dict:
    """What runs on GPUs, with gloo in NCCL's place; gloo, too, has a reduce-scatter under that name."""
    size, results = collectives.machine_size, {}
    with_groups = Collectives(context.grad_group, size, machine_groups(context, size, 60.0))
    for adds in (False, True):
        for peers in with_groups._levels:
            peers.adds = adds
        results |= {f"{name} {adds}": case for name, case in collective_cases(context, with_groups).items()}
    return results


CASES = {
    (4, 2): (collective_cases, roundings, byte_cases, powersgd_cases, engine_cases),
    (8, 2): (collective_cases, roundings, left_bytes),
    (8, 4): (by_torch, left_bytes),
}
"""(Ranks, ranks of a machine) -> what they do."""


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, int, int], list[dict]]:
    """By kind of case, number of ranks and ranks of a machine: each rank's results."""
    results = run_ranks(8, in_groups, (4, 8), cases)
    return {
        (work.__name__, ranks, size): [each[str(ranks)][f"{work.__name__} {size}"] for each in results[:ranks]]
        for (ranks, size), works in CASES.items() for work in works
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, layout", [("collective_cases", (4, 2)), ("collective_cases", (8, 2)), ("by_torch", (8, 4))]
)
def test_sums_on_two_levels_against_float64(answers, kind: str, layout: tuple[int, int]):
    for rank, results in enumerate(answers[kind, *layout]):
        assert [rank, layout[0]] in results.values()
        for name, case in results.items():
            if not isinstance(case, dict):
                continue
            narrow = name.split()[0] in ("bfloat16", "float16")
            # 16 bits: float32 adds these numbers exactly. Machines' sums are rounded, and then their sum.
            most = 2.0 * (1 + 2.0**-8) if narrow else layout[0] - 1
            assert max(case["total"], case["shard"], case["all reduce"]) <= most, name
            assert not narrow or case["total"] <= 1.0, name
            assert case["others untouched"] and case["gather"] and case["max"], name


@pytest.mark.parametrize("layout", [(4, 2), (8, 2)])
def test_all_roundings_are_told(answers, layout: tuple[int, int]):
    for results in answers["roundings", *layout]:
        for name, (makes_up, share) in results.items():
            assert makes_up and share > 0.1, name


@pytest.mark.parametrize("layout", [(8, 2), (8, 4)])
def test_sums_of_a_machine_leave_it_once(answers, layout: tuple[int, int]):
    for results in answers["left_bytes", *layout]:
        for name, (counted, expected) in results.items():
            assert counted == pytest.approx(expected), name


def test_a_machine_sends_to_others_what_the_formulas_say(answers):
    ranks, machines = 4, 2
    elements = sum(len(bucket.grad) for bucket in new_buckets(ranks))
    for results in answers["byte_cases", 4, 2]:
        of_ddp = results.pop("elements")
        assert len(results) == 27
        for name, (counted, stated, ring, by_machine, stated_by_machine) in results.items():
            assert counted == pytest.approx(stated, rel=1e-12) and counted > 0, name
            assert by_machine == pytest.approx(stated_by_machine, rel=1e-12) and by_machine > 0, name
            assert ring <= (100 if "torch.float16" in name else 0), f"{name}: only the scale has one level"
        share = (machines - 1) / machines
        for name, expected in {
            "AllReduce, torch.float32": 2 * share * elements * 4,
            "ReduceScatter, torch.float32": share * elements * 4,
            "Compressed AllReduce to torch.bfloat16, torch.float32": 2 * share * elements * 2,
            "Compressed ReduceScatter to torch.bfloat16, torch.float32": share * elements * 2,
            "Zero1": share * of_ddp * 4,
        }.items():
            assert results[name][4] == pytest.approx(expected), name


def test_residuals_absorb_the_roundings_of_both_levels(answers):
    ranks = answers["powersgd_cases", 4, 2]
    for name in ranks[0]:
        assert len({results[name][2] for results in ranks}) == 1, f"{name}: ranks hold different sums"
        for results in ranks:
            off, compressed, _ = results[name]
            assert compressed == 4 and off <= 1e-6, (name, off)


def test_gradients_of_every_mode_are_those_of_one_process(answers):
    ranks = answers["engine_cases", 4, 2]
    for mode in ENGINES:
        results = [each[mode] for each in ranks]
        off, of = (sum(result[key] for result in results) for key in ("off", "of"))
        narrow = next((name for name in ROUNDOFF if name in mode), None)
        most = 1e-6 if narrow is None else 1.01 * ROUNDOFF[narrow] * results[0]["roundings"]
        assert (off / of) ** 0.5 <= most, (mode, (off / of) ** 0.5, most)


def test_a_step_of_every_optimizer_is_that_of_one_process(answers):
    ranks = answers["engine_cases", 4, 2]
    for mode in ("adamw", "adamw zero1", "muon", "muon zero1"):
        # AdamW's first step divides gradients by their size, Muon's makes all directions equally long.
        assert all(results[mode][0] <= 1e-4 for results in ranks), (mode, ranks[0][mode][0])
        assert len({results[mode][1] for results in ranks}) == 1, mode
    for optimizer in ("adamw", "muon"):
        assert ranks[0][optimizer][1] == ranks[0][f"{optimizer} zero1"][1], "ZeRO-1 has the bits of plain sums"


def test_an_engine_says_what_leaves_a_machine(answers):
    for results in answers["engine_cases", 4, 2]:
        for mode in ENGINES:
            told = results[mode]
            assert ", summed first on each of 2 machines" in told["told"]
            assert set(told["by machine"]) == set(told["sent"])
            for purpose, sent in told["sent"].items():
                # (M - 1) / M to (N - 1) / N; only the 4 bytes of float16's scale have one level.
                expected = pytest.approx(1 / 2 / (3 / 4) * sent, rel=1e-2 if mode == "fp16" else 1e-9)
                assert told["by machine"][purpose] == expected, (mode, purpose)
        leaving, remark = results["uneven"]
        assert leaving == {} and "machines have different numbers of processes" in remark
