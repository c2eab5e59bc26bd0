"""The collectives against naive sums in float64, and the bytes that they and the hooks really send."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import (
    AllReduce,
    Collectives,
    CommHook,
    Compressed,
    DistContext,
    DistributedDataParallel,
    PowerSGD,
    PowerSGDConfig,
    ReduceScatter,
    Zero1,
)
from tests.dist.buckets import gradients_of, in_groups, new_buckets, put, reduce_all
from tests.dist.group import run_ranks

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (1, 5, 300, 64)
"""Elements of a shard; not in order, because memory is reused."""


def values(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """A rank's tensor. 16-bit ones hold whole numbers, which float32 adds exactly and 16 bits mostly do not."""
    generator = torch.Generator().manual_seed(1000 * size + rank)
    if dtype.itemsize >= 4:
        return torch.randn(size, generator=generator, dtype=dtype)
    digits = torch.randint(-(2**8), 2**8 + 1, (size,), generator=generator)
    return (digits * 2 ** torch.randint(0, 6, (size,), generator=generator)).to(dtype)


def ulps(found: Tensor, addends: list[Tensor]) -> float:
    """Largest error of a sum, in roundoffs of the addends' dtype of the sum of absolute values."""
    exact = sum(addend.double() for addend in addends)
    scale = sum(addend.double().abs() for addend in addends) * torch.finfo(addends[0].dtype).eps / 2
    return ((found.double() - exact).abs() / scale).max().item()


def collective_cases(context: DistContext, collectives: Collectives) -> dict:
    rank, ranks = context.rank, context.world_size
    results = {"place": [collectives.rank, collectives.world_size]}
    for (name, dtype), size in itertools.product(DTYPES.items(), SIZES):
        addends = [values(r, size * ranks, dtype) for r in range(ranks)]
        mine = slice(rank * size, (rank + 1) * size)
        shard_addends = [addend[mine] for addend in addends]
        # 16 bits: in float32, which is exact here, then rounded once.
        once = sum(addend.float() for addend in addends).to(dtype)
        often = addends[0].clone()
        for addend in addends[1:]:
            often += addend
        case = results[f"{name} {size}"] = {"once differs from often": not torch.equal(once, often)}

        tensor = addends[rank].clone()
        total = collectives.reduce_scatter(tensor)
        case["total dtype"] = str(total.dtype)
        case["total"] = ulps(total, shard_addends)
        case["shard"] = ulps(tensor[mine], shard_addends)
        case["shard once"] = torch.equal(tensor[mine], once[mine])
        case["total is in place"] = total.data_ptr() == tensor[mine].data_ptr()
        tensor[mine] = addends[rank][mine]
        case["others untouched"] = torch.equal(tensor, addends[rank])

        tensor = torch.full((size * ranks,), torch.nan, dtype=dtype)
        tensor[mine] = addends[rank][mine]
        collectives.all_gather(tensor)
        case["gather"] = torch.equal(tensor, torch.cat([collectives.shard(a, r) for r, a in enumerate(addends)]))

        tensor = addends[rank].clone()
        handle = collectives.all_reduce(tensor)
        if handle is not None:
            handle.wait()
        case["all reduce"] = ulps(tensor, addends)
        case["all reduce once"] = torch.equal(tensor, once)

        tensor = addends[rank] - 1000
        collectives.all_reduce_max(tensor)
        case["max"] = torch.equal(tensor, torch.stack(addends).amax(0) - 1000)
    scalar = torch.tensor(-float(rank) - 1)
    collectives.all_reduce_max(scalar)
    results["max of scalars"] = scalar.item()
    shards = [collectives.shard(torch.arange(4 * ranks), r).tolist() for r in range(ranks)]
    results["shards"] = [shards, collectives.shard(torch.arange(4 * ranks)).tolist()]
    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_collectives_against_naive_sums(answers: dict[int, list[dict]], world_size: int):
    once_matters = 0
    for rank, results in enumerate(answer["collectives"].copy() for answer in answers[world_size]):
        assert results.pop("place") == [rank, world_size]
        assert results.pop("max of scalars") == -1.0
        expected = torch.arange(4 * world_size).view(world_size, 4).tolist()
        assert results.pop("shards") == [expected, expected[rank]]
        assert len(results) == len(DTYPES) * len(SIZES)
        for name, case in results.items():
            narrow = name.split()[0] in ("bfloat16", "float16")
            # N numbers are added with N - 1 roundings, each at most half an ulp of the partial sum.
            most = world_size - 1 if not narrow else 1
            assert case["total"] <= most and case["shard"] <= most and case["all reduce"] <= most, name
            assert case["others untouched"] and case["gather"] and case["max"], name
            if narrow:
                assert case["total dtype"] == "torch.float32" and case["total"] == 0.0, name
                assert case["shard once"] and case["all reduce once"], name
                once_matters += case["once differs from often"]
            else:
                assert case["total dtype"] == f"torch.{name.split()[0]}" and case["total is in place"], name
    if world_size > 2:
        assert once_matters > 0, "the numbers must tell one rounding from several"


def test_without_a_group_every_sum_is_over_this_rank():
    collectives = Collectives(None)
    for dtype in DTYPES.values():
        tensor = values(0, 12, dtype)
        before = tensor.clone()
        assert collectives.all_reduce(tensor) is None
        collectives.all_reduce_max(tensor)
        collectives.all_gather(tensor)
        total = collectives.reduce_scatter(tensor)
        assert torch.equal(tensor, before) and torch.equal(total, before.to(total.dtype))
        assert total.itemsize >= 4
        assert torch.equal(collectives.shard(tensor), tensor)


class Counter:
    """Counts the bytes that this rank hands to torch.distributed while the context lasts."""

    def __init__(self, collectives: Collectives):
        self.sent, self.ring, self.left = 0, 0, 0
        self._collectives = collectives
        self._originals = {name: getattr(dist, name) for name in ("isend", "all_reduce")}

    def __enter__(self) -> "Counter":
        size, rank = self._collectives.machine_size, self._collectives.rank

        def isend(tensor: Tensor, *args, group_dst: int, **kwargs):
            self.sent += tensor.nbytes
            self.left += tensor.nbytes if group_dst // size != rank // size else 0
            return self._originals["isend"](tensor, *args, group_dst=group_dst, **kwargs)

        def all_reduce(tensor: Tensor, *args, **kwargs):
            self.ring += tensor.numel() * tensor.itemsize
            return self._originals["all_reduce"](tensor, *args, **kwargs)

        dist.isend, dist.all_reduce = isend, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    @property
    def total(self) -> float:
        """Bytes of torch's all-reduce count as its ring sends them."""
        return self.sent + self._sent_in_ring

    @property
    def total_by_machine(self) -> float:
        """Bytes that go to other machines from this one, whose ranks all send as many; a ring leaves it once."""
        return self.left * self._collectives.machine_size + self._sent_in_ring

    @property
    def _sent_in_ring(self) -> float:
        return 2 * (self._collectives.world_size - 1) / self._collectives.world_size * self.ring


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 30), nn.Linear(30, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def byte_cases(context: DistContext, collectives: Collectives) -> dict:
    """Counted and stated bytes of a rank, those of torch's all-reduce, counted and stated bytes of a machine."""
    results = {}

    def measure(name: str, hook: CommHook, buckets: list) -> None:
        put(buckets, gradients_of(context.rank, 0))
        with Counter(collectives) as counter:
            reduce_all(hook, buckets)
        stated = [sum(hook.bytes_sent(b, by_machine=by_machine) for b in buckets) for by_machine in (False, True)]
        results[name] = [counter.total, stated[0], counter.ring, counter.total_by_machine, stated[1]]

    for grad_dtype in (torch.float32, torch.bfloat16):
        for plain in (AllReduce, ReduceScatter):
            buckets = new_buckets(context.world_size, grad_dtype)
            measure(f"{plain.__name__}, {grad_dtype}", plain(collectives), buckets)
            for wire in (torch.bfloat16, torch.float16):
                hook = Compressed(plain(collectives), wire, collectives)
                measure(f"Compressed {plain.__name__} to {wire}, {grad_dtype}", hook, buckets)
    for wire, fixed, rate in itertools.product(
        (None, torch.bfloat16, torch.float16), (False, True), (0.0, 2.0)
    ):
        config = PowerSGDConfig(matrix_approximation_rank=4, use_fixed_Q=fixed, min_compression_rate=rate)
        buckets = new_buckets(context.world_size)
        measure(f"PowerSGD {wire}, {fixed}, {rate}", PowerSGD(buckets, collectives, config, wire), buckets)

    ddp = DistributedDataParallel(TwoLayers(), context, bucket_size=100, collectives=collectives)
    ddp.use_hook(ReduceScatter(ddp.collectives))
    with Counter(collectives) as counter:
        ddp(torch.ones(2, 20)).sum().backward()
        ddp.finish_grad_sync()
    results["DDP"] = [counter.total, ddp.bytes_sent(), counter.ring, counter.total_by_machine, ddp.bytes_sent(True)]
    zero1 = Zero1(ddp)
    for name, work, sent in (
        ("Zero1", zero1.gather_all, zero1.bytes_sent),
        ("updates", partial(zero1.gather_updates, 0, ddp.buckets[0].grad),
         partial(zero1.bytes_of_updates, ddp.buckets[0])),
    ):  # fmt: skip
        with Counter(collectives) as counter:
            work()
        results[name] = [counter.total, sent(), counter.ring, counter.total_by_machine, sent(by_machine=True)]
    results["elements"] = len(ddp.flat_buffers.param_data)
    ddp.close()
    return results


def cases(context: DistContext) -> dict:
    collectives = Collectives(context.grad_group)
    return {"collectives": collective_cases(context, collectives), "bytes": byte_cases(context, collectives)}


@pytest.fixture(scope="module")
def answers() -> dict[int, list[dict]]:
    ranks = run_ranks(4, in_groups, (2, 3, 4), cases)
    return {size: [results[str(size)] for results in ranks[:size]] for size in (2, 3, 4)}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_hooks_state_the_bytes_that_they_send(answers: dict[int, list[dict]], world_size: int):
    share = (world_size - 1) / world_size
    elements = sum(len(bucket.grad) for bucket in new_buckets(world_size))
    for results in (answer["bytes"].copy() for answer in answers[world_size]):
        zero1_bytes = share * results.pop("elements") * 4
        assert len(results) == 27
        for name, (counted, stated, _, by_machine, stated_by_machine) in results.items():
            assert stated > 0 and counted == pytest.approx(stated, rel=1e-12), name
            assert by_machine == counted and stated_by_machine == stated, f"{name}: each rank is a machine"
        assert results["Zero1"][1] == pytest.approx(zero1_bytes) and results["DDP"][1] == pytest.approx(zero1_bytes)
        # the formulas of comm_hooks.py, on this layout
        for name, expected in {
            "AllReduce, torch.float32": 2 * share * elements * 4,
            "AllReduce, torch.bfloat16": 2 * share * elements * 2,
            "ReduceScatter, torch.float32": share * elements * 4,
            "Compressed AllReduce to torch.bfloat16, torch.float32": 2 * share * elements * 2,
            "Compressed ReduceScatter to torch.bfloat16, torch.float32": share * elements * 2,
        }.items():
            assert results[name][1] == pytest.approx(expected), name


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_only_wide_sums_take_torchs_all_reduce(answers: dict[int, list[dict]], world_size: int):
    """gloo adds 16-bit numbers with a rounding at each rank."""
    for results in (answer["bytes"] for answer in answers[world_size]):
        narrow = [name for name in results if name.startswith(("Compressed", "PowerSGD torch", "AllReduce, torch.b"))]
        assert len(narrow) == 17
        for name in narrow:
            # float16: the buckets' largest values, 4 bytes each
            assert results[name][2] <= (100 if "torch.float16" in name else 0), name
