"""Bucketed DDP against the naive one, a single process and torch's, on groups of gloo processes."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model import Decoder, ModelConfig
from model.loss import cross_entropy_sum
from parallel import (
    BucketGradients,
    DistContext,
    DistributedDataParallel,
    NaiveDDP,
    Observer,
    PlainGradients,
    destroy_context,
    init_context,
)
from tests.dist.group import run_ranks

GLOBAL_BATCH = 8
CONFIG = ModelConfig(
    vocab_size=160, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
).resolve()  # fmt: skip
BUCKET_SIZES = {"each_parameter": 1, "small": 5_000, "one": 0}


def new_model(dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(CONFIG)
    model.initialize(0)
    return model.to(dtype)


def global_batch() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (GLOBAL_BATCH, 17), generator=torch.Generator().manual_seed(1))


def rank_rows(context: DistContext, micro_batch: int) -> list[torch.Tensor]:
    """This rank's micro-batches of the global batch, dealt as by the loader."""
    return list(global_batch().split(micro_batch))[context.rank :: context.world_size]


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    hidden = model(rows[:, :-1])
    core = model.module if not isinstance(model, Decoder) else model
    return cross_entropy_sum(core.logits(hidden), rows[:, 1:]) / (GLOBAL_BATCH * 16)


def accumulate(ddp: nn.Module, micro_batches: list[torch.Tensor]) -> None:
    """One step's gradients, synchronised with the last micro-batch."""
    for index, rows in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else ddp.no_sync():
            loss_of(ddp, rows).backward()
    if hasattr(ddp, "finish_grad_sync"):
        ddp.finish_grad_sync()


def flat_grads(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def single_process_grads(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = new_model(dtype)
    loss_of(model, global_batch()).backward()
    return flat_grads(model)


def matrix(micro_batch: int) -> dict:
    """Gradients of every layout on this group: compared with one process, and bit by bit with the naive ones."""
    context = init_context("cpu")
    exact = single_process_grads(torch.float64)
    micro_batches = rank_rows(context, micro_batch)
    naive = NaiveDDP(new_model(), context)
    accumulate(naive, micro_batches)
    expected = flat_grads(naive)
    results = {"naive": [relative_error(expected, exact), True, None]}
    for (name, size), overlap in itertools.product(BUCKET_SIZES.items(), (True, False)):
        ddp = DistributedDataParallel(new_model(), context, bucket_size=size, overlap_grad_reduce=overlap)
        for _ in range(2):
            # The second pass shows that nothing is left over from the first.
            ddp.zero_grad()
            accumulate(ddp, micro_batches)
        grads = flat_grads(ddp)
        launched = ddp.observer.last_sync.arrived_before_launch
        results[f"{name}, overlap {overlap}"] = [
            relative_error(grads, exact), torch.equal(grads, expected), [launched[0], len(launched)]
        ]  # fmt: skip
        ddp.close()
    torch_ddp = nn.parallel.DistributedDataParallel(new_model())
    for index, rows in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else torch_ddp.no_sync():
            # torch averages over the ranks.
            (loss_of(torch_ddp, rows) * context.world_size).backward()
    grads = flat_grads(torch_ddp)
    results["torch"] = [relative_error(grads, exact), torch.equal(grads, expected), None]
    destroy_context(context)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_equivalence_matrix(world_size: int, micro_batch: int):
    """One step's gradients: relative error of the norm <= 1e-6 against one process (in float64)."""
    for results in run_ranks(world_size, matrix, micro_batch):
        assert set(results) >= {"naive", "torch", "small, overlap True", "one, overlap False"}
        for name, (error, same_bits_as_naive, launches) in results.items():
            assert error <= 1e-6, name
            if world_size == 2 and name != "torch":
                # Two addends: there is no order of additions in which to differ.
                assert same_bits_as_naive, name
            if launches and "overlap True" in name and "one" not in name:
                parameters = len(list(new_model().parameters()))
                assert launches[0] < parameters / 2, "the first bucket must leave before half of the backward pass"
            if launches and "overlap False" in name:
                assert launches[0] == len(list(new_model().parameters()))


def trajectories() -> dict:
    """Losses of several steps with the real optimizer, for every layout, one micro-batch per rank."""
    from optimizer.adamw import AdamW
    from optimizer.config import AdamWConfig
    from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer

    context = init_context("cpu")

    def train(ddp: nn.Module) -> list:
        optimizer = MixedPrecisionOptimizer(
            PlainGradients(ddp.slices()) if isinstance(ddp, NaiveDDP) else BucketGradients(ddp),
            [AdamW(AdamWConfig())], 0.1, LossScaler(enabled=False),
        )  # fmt: skip
        norms = []
        for _ in range(5):
            accumulate(ddp, rank_rows(context, GLOBAL_BATCH // context.world_size))
            norms.append(optimizer.step(1e-2).grad_norm)
        return norms + [p.double().sum().item() for p in ddp.parameters()]

    results = {"naive": train(NaiveDDP(new_model(), context))}
    for (name, size), overlap in itertools.product(BUCKET_SIZES.items(), (True, False)):
        results[f"{name}, {overlap}"] = train(
            DistributedDataParallel(new_model(), context, bucket_size=size, overlap_grad_reduce=overlap)
        )
    destroy_context(context)
    return results


def test_trajectories_are_bit_identical_on_two_ranks():
    for results in run_ranks(2, trajectories):
        assert len(results) == 7
        for name, trajectory in results.items():
            # The global norm is summed in another order: equal except for float64's last bits.
            assert trajectory[:5] == pytest.approx(results["naive"][:5], rel=1e-13), name
            assert trajectory[5:] == results["naive"][5:], name


def compiled_blocks() -> list:
    context = init_context("cpu")
    micro_batches = rank_rows(context, 4)
    naive = NaiveDDP(new_model(), context)
    accumulate(naive, micro_batches)
    model = new_model()
    model.compile_blocks(backend="aot_eager")
    ddp = DistributedDataParallel(model, context, bucket_size=5_000)
    accumulate(ddp, micro_batches)
    answer = [relative_error(flat_grads(ddp), flat_grads(naive)), ddp.observer.last_sync.arrived_before_launch]
    ddp.close()
    destroy_context(context)
    return answer


@pytest.mark.slow
def test_compiled_blocks_keep_the_overlap():
    """A graph of the whole model would deliver all gradients at the very end."""
    for error, arrived in run_ranks(2, compiled_blocks):
        assert error <= 1e-6
        assert arrived[0] < len(list(new_model().parameters())) / 2
        assert arrived == sorted(arrived) and len(set(arrived)) > 2


class ThreeLayers(nn.Module):
    def __init__(self, reverse_use: bool = False, skip_last: bool = False):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.reverse_use, self.skip_last = reverse_use, skip_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = [self.first, self.second, self.third]
        for layer in layers[::-1] if self.reverse_use else layers[: 2 if self.skip_last else 3]:
            x = layer(x)
        return x


def behaviours() -> dict:
    """Single cases that need a group, run in it one after another."""
    import logging

    context = init_context("cpu")
    results = {}
    x = torch.full((2, 8), float(context.rank + 1))

    ddp = DistributedDataParallel(ThreeLayers(skip_last=True), context, bucket_size=1)
    ddp(x).sum().backward()
    try:
        ddp.finish_grad_sync()
    except RuntimeError as error:
        results["unused"] = str(error)
    for handle in ddp._handles:
        handle.wait()

    ddp = DistributedDataParallel(ThreeLayers(), context, bucket_size=1)
    try:
        ddp(x).sum().backward()
        ddp(x).sum().backward()
    except RuntimeError as error:
        results["twice"] = str(error)
    ddp.finish_grad_sync()

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("parallel.observer").addHandler(handler)
    ddp = DistributedDataParallel(ThreeLayers(reverse_use=True), context, bucket_size=1)
    for _ in range(3):
        ddp(x).sum().backward()
        ddp.finish_grad_sync()
    results["order"] = records

    observer = Observer(context, check_for_nan=True)
    ddp = DistributedDataParallel(ThreeLayers(), context, bucket_size=1, observer=observer)
    (ddp(x).sum() * (float("nan") if context.rank == 1 else 1.0)).backward()
    ddp.finish_grad_sync()
    results["nan"] = ddp.observer.nonfinite_parameters
    ddp.zero_grad()
    ddp(x).sum().backward()
    ddp.finish_grad_sync()
    results["no nan"] = ddp.observer.nonfinite_parameters

    seen = []

    def doubling_hook(state: list, bucket):
        state.append(bucket.index)
        work = dist.all_reduce(bucket.grad, group=context.grad_group, async_op=True)

        class Handle:
            def wait(self) -> None:
                work.wait()
                bucket.grad.mul_(2.0)

        return Handle()

    torch.manual_seed(3)
    model = ThreeLayers()
    plain = DistributedDataParallel(model, context, bucket_size=1)
    plain(x).sum().backward()
    plain.finish_grad_sync()
    expected = 2 * plain.flat_buffers.grad_data
    plain.zero_grad()
    plain.register_comm_hook(seen, doubling_hook)
    plain(x).sum().backward()
    plain.finish_grad_sync()
    results["hook"] = [seen, torch.equal(plain.flat_buffers.grad_data, expected)]

    def failing_hook(_state: object, bucket):
        raise OSError(f"bucket {bucket.index} lost")

    plain.register_comm_hook(None, failing_hook)
    plain(x).sum().backward()
    try:
        plain.finish_grad_sync()
    except OSError as error:
        results["hook error"] = str(error)

    torch.manual_seed(context.rank)
    different = DistributedDataParallel(ThreeLayers(), context)
    results["same weights"] = different.flat_buffers.param_data.double().sum().item()

    bf16 = DistributedDataParallel(new_model(torch.bfloat16), context, grad_dtype=torch.bfloat16, bucket_size=5_000)
    accumulate(bf16, rank_rows(context, 4))
    results["bf16 gradients"] = [str(bf16.flat_buffers.grad_data.dtype),
                                 relative_error(flat_grads(bf16), single_process_grads())]  # fmt: skip
    fp32 = DistributedDataParallel(new_model(torch.bfloat16), context, bucket_size=5_000)
    accumulate(fp32, rank_rows(context, 4))
    results["bf16 weights"] = [str(fp32.flat_buffers.grad_data.dtype),
                               relative_error(flat_grads(fp32), single_process_grads())]  # fmt: skip

    results["agree"] = context.gather({"rank": context.rank, "text": "é" * context.rank})
    for name, decide in (("decide", lambda: 7), ("refuse", lambda: int("x"))):
        try:
            results[name] = context.decide_on_main(decide)
        except ValueError as error:
            results[name] = str(error)
    results["from all"] = context.gather_from(lambda: context.rank * 10)
    try:
        context.gather_from(lambda: int("x") if context.rank == 1 else 0)
    except ValueError as error:
        results["one refuses"] = str(error)
    try:
        context.require_same(context.rank, "they differ")
    except ValueError as error:
        results["differ"] = str(error)
    destroy_context(context)
    return results


@pytest.fixture(scope="module")
def behaviour() -> list[dict]:
    return run_ranks(2, behaviours)


def test_parameters_without_gradient_are_named(behaviour: list[dict]):
    for results in behaviour:
        assert "third.weight" in results["unused"] and "third.bias" in results["unused"]


def test_a_second_synchronised_backward_pass_is_refused(behaviour: list[dict]):
    for results in behaviour:
        assert "no_sync()" in results["twice"]


def test_unplanned_arrival_order_is_warned_once(behaviour: list[dict]):
    for results in behaviour:
        assert len(results["order"]) == 1 and "another order" in results["order"][0]


def test_nan_check_names_parameters_on_the_rank_that_made_them(behaviour: list[dict]):
    assert behaviour[0]["nan"] == []
    assert set(behaviour[1]["nan"]) == {f"{layer}.{kind}" for layer in ("first", "second", "third")
                                        for kind in ("weight", "bias")}  # fmt: skip
    assert behaviour[0]["no nan"] == behaviour[1]["no nan"] == []


def test_a_hook_replaces_the_all_reduce(behaviour: list[dict]):
    for results in behaviour:
        assert results["hook"] == [[0, 1, 2, 3, 4, 5], True]


def test_an_error_in_a_hook_surfaces(behaviour: list[dict]):
    for results in behaviour:
        assert results["hook error"] == "bucket 0 lost"


def test_ranks_start_from_the_first_ones_weights(behaviour: list[dict]):
    assert behaviour[0]["same weights"] == behaviour[1]["same weights"]


def test_gradients_of_bf16_weights(behaviour: list[dict]):
    """Accumulated and sent in float32 by default."""
    for results in behaviour:
        assert results["bf16 gradients"][0] == "torch.bfloat16" and results["bf16 gradients"][1] < 0.03
        assert results["bf16 weights"][0] == "torch.float32" and results["bf16 weights"][1] < 0.03


def test_ranks_agree_without_pickle(behaviour: list[dict]):
    for results in behaviour:
        assert results["agree"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]
        assert results["decide"] == 7
        assert "invalid literal" in results["refuse"]
        assert results["from all"] == [0, 10]
        assert "invalid literal" in results["one refuses"]
        assert results["differ"] == "they differ"
