"""Expert parallelism on groups of gloo processes, against one process that has all experts."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig
from parallel.config import ParallelConfig
from parallel.context import DistContext, destroy_context, init_context
from parallel.division import Division, Outline
from parallel.mesh import Mesh, plan_mesh
from parallel.torch_engines import expert
from parallel.torch_engines.cutting import Cutter
from tasks.language_model import LanguageModelTask
from tests.conftest import SEQ_LEN
from tests.dist.group import run_ranks
from tests.dist.test_experts_runs import BIASED as BIASED_FLAGS
from tests.dist.test_parallel_runs import GATHER, MUON, POWERSGD, ZERO1, Plan
from tests.runs import final_state, losses, records, relative_difference, same_bits
from training.build_model import build_model
from training.config import SystemConfig

ROWS, LENGTH, VOCAB = 8, 12, 30
MIXTRAL = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1,
    router_z_loss_coef=0.01, initializer_range=0.2, max_position_embeddings=LENGTH,
).resolve()  # fmt: skip
QWEN = replace(MIXTRAL, num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=3, moe_intermediate_size=8,
               norm_topk_prob=False, qk_norm=True, dense_layers="0")  # fmt: skip
BIASED = replace(MIXTRAL, num_shared_experts=2, router_bias=True, router_bias_update_rate=0.01, rope_interleaved=True)


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    experts: int = 2
    """Ranks that share the experts."""
    kernel: str = "sorted"
    keeps: str = "all"
    is_compiled: bool = False
    idle: bool = False
    """Whether no token goes to the experts of the last rank."""


CASES = {
    "mixtral": Case(MIXTRAL),
    "reference": Case(MIXTRAL, kernel="reference"),
    "recomputed": Case(MIXTRAL, keeps="nothing"),
    "matmuls kept": Case(QWEN, keeps="matmuls"),
    "compiled": Case(QWEN, is_compiled=True),
    "idle": Case(BIASED, idle=True),
    "all on four": Case(QWEN, 4),
    "two copies": Case(QWEN),
    "idle on four": Case(BIASED, 4, idle=True, keeps="nothing"),
}
ON_FOUR = ("all on four", "two copies", "idle on four")


def rows() -> list[dict[str, Tensor]]:
    """The global batch, in micro-batches of one row."""
    tokens = torch.randint(0, VOCAB, (ROWS, 1, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return [
        {"input_ids": t[:, :-1], "labels": t[:, 1:], "positions": torch.arange(LENGTH)[None],
         "row_ids": torch.tensor([n])}
        for n, t in enumerate(tokens)
    ]  # fmt: skip


def new_model(case: Case, cutter: Cutter | None) -> Decoder:
    system = SystemConfig(
        experts_kernel=case.kernel, gradient_checkpointing=case.keeps != "all",
        checkpoint_keeps=case.keeps if case.keeps != "all" else "nothing",
    )  # fmt: skip
    model = build_model(case.model, system, 0, torch.device("cpu"), torch.float32, None, cutter=cutter)
    for name, parameter in model.named_parameters():
        if name.endswith("selection_bias") and case.idle:
            parameter[-(len(parameter) // case.experts) :] = -10.0
    if case.is_compiled:
        model.compile_blocks(backend="eager")
    return model.train()


def work(model: Decoder, batches: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Run forward and backward passes; returns the loss with what the routers have counted, and hidden states."""
    task, factor = LanguageModelTask(model, 0, torch.ones(VOCAB)), 1 / (ROWS * LENGTH)
    figures, hidden = [], []
    for batch in batches:
        losses = task.layer_losses(batch, factor)
        loss_sum = task(batch, losses)[0]
        (loss_sum * factor).backward()
        figures.append(torch.cat([loss_sum.detach().double()[None], losses.sums.flatten()]))
        with torch.no_grad():
            hidden.append(model(batch["input_ids"]))
    return torch.stack(figures).sum(0), hidden


def whole_gradients(model: Decoder, cutter: Cutter, context: DistContext) -> dict[str, Tensor]:
    """Sums over the ranks that have a part of each."""
    summed, held = {}, cutter.regions(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        memory, gradient = parameter.data, parameter.grad
        parameter.data = gradient
        shape, regions = held(parameter)
        parameter.data = memory
        whole = torch.zeros(shape)
        for part, place in regions:
            whole[place] = part
        summed[name] = context.all_sum(whole)
    return summed


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    flat = [torch.cat([tensors[name].double().flatten() for name in theirs]) for tensors in (ours, theirs)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def compare(names: list[str]) -> dict:
    """Each case: differences from one process."""
    context, results = init_context("cpu"), {}
    for name in names:
        case = CASES[name]
        config = ParallelConfig(expert_model_parallel_size=case.experts)
        mesh = plan_mesh(config, context)
        cutter = Cutter(config, context, mesh, torch.float32)
        model = new_model(case, cutter)
        assert model.layers[-1].mlp.experts.down_proj.shape[0] == case.model.num_local_experts // case.experts
        figures, hidden = work(model, rows()[mesh.data_rank :: mesh.data_size])
        figures, gradients = context.all_sum(figures), whole_gradients(model, cutter, context)
        alone = new_model(replace(case, is_compiled=False), None)
        expected, states = work(alone, rows())
        theirs = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
        ours = dict(enumerate(hidden))
        results[name] = {
            "figures": ((figures - expected).abs() / expected.abs().clamp(min=1e-3)).max().item(),
            "hidden": difference(ours, dict(enumerate(states[mesh.data_rank :: mesh.data_size]))),
            "gradients": difference(gradients, theirs),
            "worst gradient": max(difference({n: gradients[n]}, {n: theirs[n]}) for n in theirs if theirs[n].any()),
            "idle": [n for n in theirs if n.endswith("experts.down_proj") and not gradients[n][-1].any()],
        }  # fmt: skip
    destroy_context(context)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_step_as_of_one_process(world_size: int):
    names = [name for name in CASES if (name in ON_FOUR) == (world_size == 4)]
    for results in run_ranks(world_size, compare, names):
        for name, found in results.items():
            # An idle rank's experts have gradients, of zero.
            assert len(found.pop("idle")) == 2 * CASES[name].idle, (name, found)
            assert max(found.values()) <= 1e-6, (name, found)


@pytest.mark.parametrize(
    "num_experts, data_size, size, expected",
    [
        (6, 4, 4, "6 experts cannot be shared evenly by 4 ranks: --expert_model_parallel_size=2 is the nearest"),
        (3, 2, 2, "3 experts cannot be shared evenly by 2 ranks: leave it out"),
        (12, 8, 8, "--expert_model_parallel_size=4 is the nearest possible"),
        (0, 2, 2, "--expert_model_parallel_size=2: the model has no experts: leave it out"),
    ],
)
def test_refusals(num_experts: int, data_size: int, size: int, expected: str):
    outlines = {"experts": Outline((num_experts, 4, 4), is_stack=True)} if num_experts else {"matrix": Outline((4, 4))}
    with pytest.raises(ValueError, match=expected):
        expert.check(Division(outlines, Mesh(0, data_size=data_size, expert_size=size)))
    expert.check(Division(outlines, Mesh(0, data_size=data_size)))


STEPS = 4
TWO, FOUR = "--expert_model_parallel_size=2", "--expert_model_parallel_size=4"
WAYS: dict[str, tuple[int, list[str]]] = {
    "ep4": (4, [FOUR, "--gradient_checkpointing"]),
    "copies": (4, [TWO, ZERO1, GATHER]),
    "muon": (4, [TWO, MUON, ZERO1]),
    "tensor": (4, [TWO, "--tensor_model_parallel_size=2", "--sequence_parallel"]),
    "context": (4, [TWO, "--context_parallel_size=2"]),
}
"""Name -> ranks, flags."""


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = Plan([
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
        f"--max_iters={STEPS}", "--learning_rate=1e-3", "--num_threads=1", "--sample_tokens=4", "--valid_iters=2",
        "--save_interval=2", "--keep_last=9", "--bucket_size=10000", "--dist_timeout=60", *BIASED_FLAGS,
    ], tmp_path_factory.mktemp("runs"))  # fmt: skip
    plan.add("one", 1, [])
    plan.add("one muon", 1, [MUON])
    for name, (ranks, flags) in WAYS.items():
        plan.add(name, ranks, flags)
    copies = plan.jobs["copies"]["flags"]
    plan.resume("copies again", copies, 4, WAYS["copies"][1], keep=2)
    plan.add("powersgd", 4, [TWO, *POWERSGD])
    plan.resume("powersgd again", plan.jobs["powersgd"]["flags"], 4, [TWO, *POWERSGD], keep=2)
    plan.run()
    return plan


@pytest.mark.parametrize("name", WAYS)
def test_one_trajectory(runs: Plan, name: str):
    run, alone = runs[name], runs["one muon" if name == "muon" else "one"]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert relative_difference(final_state(run, STEPS), final_state(alone, STEPS)) < 1e-3
    # What the routers have counted is counted once.
    for key in ("balance_loss", "z_loss", "load_highest"):
        ours, theirs = ([record[key] for record in records(its, "experts")] for its in (run, alone))
        assert ours == pytest.approx(theirs, rel=1e-5), key


@pytest.mark.parametrize("name", ["copies", "powersgd"])
def test_the_same_bits_after_a_resume(runs: Plan, name: str):
    assert same_bits(final_state(runs[name], STEPS), final_state(runs[f"{name} again"], STEPS))
