"""--activation_budget_gb: what parts of a model cost, the choice of what blocks keep, and runs with a limit."""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_my_ddp
from model import Decoder, ModelConfig
from model.activations import Activations, CPUMeter
from model.dropout import DropoutKey
from model.layer_losses import LayerLosses
from model.ops import REFERENCE, build_ops
from model.recompute import (
    KEEPS,
    BlockCosts,
    Costs,
    choose,
    costs_from,
    expected_peak,
    extra_microseconds,
    highest,
    least_peak,
)
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.runs import elsewhere, final_state, out_dir, same_bits

CONFIG = ModelConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=176,
).resolve(500, 64)  # fmt: skip
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
SPARSE = dataclasses.replace(
    CONFIG, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, dense_layers="0", qk_norm=True
)


def random_costs(generator: random.Random, blocks: int) -> Costs:
    kinds = []
    for _ in range(2):
        kept = sorted(generator.randrange(1, 40) for _ in KEEPS)
        times = sorted((generator.randrange(50) for _ in KEEPS), reverse=True)
        peak = kept[-1] + generator.randrange(20)
        kinds.append(BlockCosts(dict(zip(KEEPS, kept)), peak, dict(zip(KEEPS, times))))
    kind_of = [generator.randrange(2) for _ in range(blocks)]
    return Costs(kinds, kind_of, *(generator.randrange(30) for _ in range(5)), loss_microseconds=100)


def test_the_choice_is_the_best_of_all():
    generator = random.Random(0)
    for _ in range(40):
        costs = random_costs(generator, blocks=5)
        choices = list(itertools.product(KEEPS, repeat=5))
        peaks = sorted({expected_peak(costs, keeps) for keeps in choices})
        assert peaks[0] == least_peak(costs)
        for budget in (peaks[0], generator.choice(peaks), peaks[-1], peaks[-1] + 1000):
            best = min(extra_microseconds(costs, keeps) for keeps in choices if expected_peak(costs, keeps) <= budget)
            found = choose(costs, budget)
            assert found.peak == expected_peak(costs, found.keeps) <= budget
            assert extra_microseconds(costs, found.keeps) == best
        with pytest.raises(ValueError, match="activations need .* GB; give at least that"):
            choose(costs, peaks[0] - 1)


def test_a_deep_model_of_many_kinds_is_chosen_for_quickly_and_well():
    generator = random.Random(1)
    kinds = [
        BlockCosts(
            dict(zip(KEEPS, sorted(generator.randrange(10**8, 10**9) for _ in KEEPS))), 10**9,
            dict(zip(KEEPS, sorted((generator.randrange(10**5) for _ in KEEPS), reverse=True))),
        )
        for _ in range(5)
    ]  # fmt: skip
    costs = Costs(kinds, [index % 5 for index in range(60)], 0, 0, 0, 0)
    least, most = least_peak(costs), expected_peak(costs, ["all"] * 60)
    extras = [choose(costs, least + (most - least) * share // 4).extra for share in range(5)]
    assert extras == sorted(extras, reverse=True) and extras[-1] == 0


def test_ranks_agree_on_the_highest_costs():
    one, two = (random_costs(random.Random(3), 4) for _ in range(2))
    higher = dataclasses.replace(two, loss_peak=10**6, kinds=[dataclasses.replace(two.kinds[0], peak=10**7),
                                                              two.kinds[1]])  # fmt: skip
    assert highest([one, higher]) == highest([higher, one]) == dataclasses.replace(higher, kinds=higher.kinds)
    assert costs_from(json.loads(json.dumps(dataclasses.asdict(one)))) == one


def test_allocations_are_counted_between_marks():
    with CPUMeter() as meter:
        x = torch.empty(1000)
        y = x.neg()
        meter.mark()
        del x
        y = y.view(10, 100).t()
        meter.mark()
    assert [(span.net, span.peak) for span in meter.spans] == [(8000, 8000), (-4000, 0)]


def built(
    config: ModelConfig, dtype: torch.dtype, dropout: float = 0.0, frozen: bool = False, attention: str = "sdpa",
    rows: int = 8,
) -> tuple[Decoder, Callable, Callable, list]:
    """(model, its forward pass, its loss, the experts' counts of each pass)."""
    model = Decoder(
        dataclasses.replace(config, hidden_dropout=dropout), ops=build_ops({**REFERENCE.names, "attention": attention})
    )
    model.initialize(3)
    model.to(dtype).train()
    if frozen:
        model.requires_grad_(False)
        for block in model.layers:
            block.self_attn.q_proj.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(500, (rows, 64), generator=generator) for _ in range(2))
    documents = torch.arange(64).expand(rows, -1) // 24
    key = DropoutKey(7, torch.arange(rows)) if dropout else None
    counted: list = []

    def hidden() -> torch.Tensor:
        losses = None
        if config.num_local_experts:
            losses = LayerLosses(torch.full((rows,), 64.0), torch.ones(()))
            counted.append(losses)
        return model(ids, None, documents, dropout_key=key, losses=losses)

    return model, hidden, lambda hidden: model.loss_sum(hidden, labels), counted


CASES = {
    "float32": (CONFIG, torch.float32, 0.0, False), "bfloat16, dropout": (CONFIG, torch.bfloat16, 0.2, False),
    "experts": (SPARSE, torch.float32, 0.0, False), "tied": (TIED, torch.float32, 0.0, False),
    "tied, bfloat16": (TIED, torch.bfloat16, 0.0, False),
    "frozen": (CONFIG, torch.float32, 0.0, True),
}  # fmt: skip
MIXED = ("nothing", "matmuls", "all"), ("all", "nothing", "matmuls")


@pytest.mark.parametrize("case", CASES)
def test_the_expected_peak_is_not_exceeded(case: str):
    """The parts' costs against whole passes."""
    model, hidden, loss, _ = built(*CASES[case])
    measure = Activations(model, hidden, loss, torch.float32)
    costs = measure.costs()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(costs.kinds) == (2 if case == "experts" else 1)
    for keeps in (["nothing"] * 3, ["matmuls"] * 3, ["all"] * 3, ["nothing", "nothing", "all"], *MIXED):
        model.set_recompute(keeps)
        peak, expected = measure.peak(), expected_peak(costs, keeps)
        # Two blocks' outputs may count twice.
        assert peak <= expected <= peak + 4 * 8 * 64 * 64 * 4, keeps


def saved_bytes(run: Callable[[], torch.Tensor], weights: list[torch.Tensor]) -> int:
    """Bytes that autograd saves, by its hooks: memory that tensors share once, weights not."""
    seen = {weight.untyped_storage().data_ptr(): 0 for weight in weights}

    def pack(x: torch.Tensor) -> torch.Tensor:
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        end = run()
    # As long as they are saved, no two of them lie at the same place.
    del end
    return sum(seen.values())


@pytest.mark.parametrize(("dtype", "dropout", "frozen"), [case[1:] for case in CASES.values() if case[0] is CONFIG])
def test_what_a_block_keeps_is_what_autograd_saves(dtype: torch.dtype, dropout: float, frozen: bool):
    """Bytes that a block more lets autograd's hooks see, counted in whole models."""
    saved = []
    for blocks in (2, 3):
        config = dataclasses.replace(CONFIG, num_hidden_layers=blocks)
        model, hidden, loss, _ = built(config, dtype, dropout, frozen)
        saved.append(saved_bytes(hidden, list(model.parameters())))
    kept = Activations(model, hidden, loss, torch.float32).costs().kinds[0].kept
    # A part that is measured by itself begins and ends with a scalar, and Python's numbers are tensors for autograd.
    assert 0 <= kept["all"] - (saved[1] - saved[0]) <= 64


@pytest.mark.parametrize("case", CASES)
def test_what_blocks_keep_changes_no_bit(case: str):
    results = []
    for keeps in (("all",) * 3, *MIXED):
        model, hidden, loss, counted = built(*CASES[case], "blocked")
        model.set_recompute(keeps)
        value = loss(hidden())
        value.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": value.detach(), **gradients})
        if counted:
            results[-1]["counts"] = counted[0].sums
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_compiled_blocks_are_measured_and_keep_what_they_shall():
    torch._dynamo.reset()
    model, hidden, loss, _ = built(CONFIG, torch.float32)
    model.compile_blocks(backend="aot_eager")
    measure = Activations(model, hidden, loss, torch.float32)
    costs = measure.costs()
    model.set_recompute(MIXED[0])
    assert measure.peak() <= expected_peak(costs, MIXED[0])
    kept = costs.kinds[0].kept
    assert kept["nothing"] < kept["matmuls"] <= kept["all"]


@pytest.fixture
def flags(data_dir: Path, tmp_path: Path) -> list[str]:
    return [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", f"--max_seq_len={SEQ_LEN}", "--dtype=float32",
        "--device=cpu", "--train_batch_size=4", "--gradient_accumulation_steps=2", "--valid_iters=2",
        "--valid_interval=0", "--num_threads=1", "--lr_schedule=constant", "--sample_texts=0", *TINY_MODEL,
    ]  # fmt: skip


def stored(run: list[str]) -> dict:
    return json.loads((out_dir(run) / "activations.json").read_text())


def test_a_run_chooses_once_and_goes_on_with_it(flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture):
    with_limit = [*flags, "--activation_budget_gb=0.001"]
    assert train_my_ddp.main([*with_limit, "--max_iters=1"]) == 2
    problem = "".join(capfd.readouterr())
    least = float(problem.partition("activations need ")[2].partition(" GB")[0])
    assert train_my_ddp.main([*flags, f"--activation_budget_gb={least}", "--max_iters=1"]) == 0
    first, log = stored(flags), (out_dir(flags) / "train.log").read_text()
    assert "measured now" in log and first["peak"] <= least * 1e9
    assert train_my_ddp.main([*flags, "--resume", "--max_iters=2"]) == 0
    assert stored(flags) == first and "as the run has chosen before" in (out_dir(flags) / "train.log").read_text()
    assert train_my_ddp.main([*flags, "--resume", "--max_iters=3", "--activation_budget_gb=100"]) == 0
    assert set(stored(flags)["keeps"]) == {"all"}
    assert "the run has changed in activation_budget_gb" in (out_dir(flags) / "train.log").read_text()
    other = elsewhere(flags, tmp_path / "plain")
    assert train_my_ddp.main([*other, "--max_iters=3"]) == 0
    assert same_bits(final_state(flags, 3), final_state(other, 3))


def test_the_limit_decides_alone(flags: list[str], capfd: pytest.CaptureFixture):
    assert train_my_ddp.main([*flags, "--activation_budget_gb=1", "--gradient_checkpointing"]) == 2
    assert "--activation_budget_gb decides what each block recomputes" in "".join(capfd.readouterr())
