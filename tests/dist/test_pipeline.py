"""The pipeline's engine on groups of gloo processes, against one process that has the whole model.

A group is spawned once and works through all cases. Models are built, cut and filled as in a run.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.sft import padded, widened
from model import Decoder, ModelConfig
from model.adapters.lora import LoraSpec, base_name
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rules import new_rules
from parallel.config import ParallelConfig, PowerSGDConfig
from parallel.context import DistContext, destroy_context, init_context
from parallel.engine import Engine, EngineParts, StepPlan
from parallel.engines import model_cutter, open_engine
from parallel.gradients import square
from parallel.mesh import plan_mesh
from parallel.stages import plan_stages
from serving.generation import generate
from tasks.config import DPOConfig
from tasks.dpo import DPOTask
from tasks.language_model import LanguageModelTask
from tasks.task import Task
from tests.dist.group import run_ranks
from training.adapter import Adapter
from training.build_model import build_model, to_device
from training.config import SystemConfig

MICRO_BATCHES, LENGTH, VOCAB = 8, 16, 30
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=LENGTH,
).resolve()  # fmt: skip
TIED = replace(CONFIG, tie_word_embeddings=True)
DROPOUT = replace(CONFIG, hidden_dropout=0.2, residual_in_fp32=True)
EXPERTS = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    num_local_experts=4, moe_intermediate_size=8, num_shared_experts=1, router_bias_update_rate=0.01,
    router_aux_loss_coef=0.01, rope_interleaved=True, dense_layers="0", max_position_embeddings=LENGTH,
).resolve()  # fmt: skip
LR, STEPS = 1e-2, 3
ALONE = DistContext(0, 1, 0, 1, torch.device("cpu"))
CPU = torch.device("cpu")
TP2 = {"tensor_model_parallel_size": 2}
PP2, PP4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}


@dataclass(frozen=True)
class Case:
    parallel: dict = field(default_factory=dict)
    model: ModelConfig = CONFIG
    task: str = "pretrain"
    adapter: LoraSpec | None = None
    clip: float = 0.5
    system: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    dpo: DPOConfig = DPOConfig()
    powersgd: PowerSGDConfig = PowerSGDConfig(matrix_approximation_rank=2)
    like: dict = field(default_factory=dict)
    """Options of the run of several processes without a pipeline that is compared with; empty: one process."""
    micro_batches: int = MICRO_BATCHES
    """Those of a step over all data ranks; of one row each unless they are regrouped."""
    tolerance: float = 2e-6
    """Largest relative difference of the weights from one process's after all steps."""


ALL_LINEAR = LoraSpec(r=3, alpha=6.0, targets=("all-linear",), dropout=0.1)
ON_TWO = {
    "1f1b": Case(PP2 | {"bucket_size": 700}),
    "gpipe": Case(PP2 | {"pipeline_schedule": "gpipe", "pipeline_parts": "1,4"}),
    "interleaved": Case(PP2 | {"pipeline_schedule": "interleaved", "pipeline_parts": "1,1,2,1"}, TIED),
    "tied": Case(PP2 | {"use_distributed_optimizer": True}, TIED),
    "dropout": Case(PP2, DROPOUT, system={"gradient_checkpointing": True}),
    "experts": Case(PP2 | {"pipeline_parts": "2,3"}, EXPERTS),
    "lora": Case(PP2, adapter=ALL_LINEAR),
    "lora of the tied": Case(PP2 | {"pipeline_parts": "1,4"}, TIED,
                             adapter=LoraSpec(3, 6.0, 0.0, ("q_proj",), (), token_ids=(28, 29))),
    "sft": Case(PP2, task="sft"),
    "dpo": Case(PP2, task="dpo"),
    "kto": Case(PP2, task="dpo", dpo=DPOConfig(dpo_loss_type="kto_pair")),
    "overlapped": Case(PP2 | {"overlap_optim_step": True, "use_distributed_optimizer": True,
                              "overlap_param_gather": True, "bucket_size": 700}, clip=0.0),
    "zero bubble": Case(PP2 | {"pipeline_schedule": "zero_bubble", "bucket_size": 700}),
    "zero bubble of the tied": Case(PP2 | {"pipeline_schedule": "zero_bubble", "pipeline_parts": "1,1,2,1"}, TIED),
    "zbv": Case(PP2 | {"pipeline_schedule": "zbv", "bucket_size": 700}, TIED),
    "zbv of experts": Case(PP2 | {"pipeline_schedule": "zbv"}, EXPERTS),
    "zbv of lora": Case(PP2 | {"pipeline_schedule": "zbv"}, adapter=ALL_LINEAR),
    "zbv in bf16": Case(PP2 | {"pipeline_schedule": "zbv"}, DROPOUT, dtype=torch.bfloat16, tolerance=5e-3),
    "zbv, overlapped": Case(PP2 | {"pipeline_schedule": "zbv", "overlap_optim_step": True, "bucket_size": 700},
                            clip=0.0),
    "sft in 4": Case(PP2, task="sft", micro_batches=4),
    "kto in 2": Case(PP2 | {"pipeline_schedule": "zero_bubble"}, task="dpo",
                     dpo=DPOConfig(dpo_loss_type="kto_pair"), micro_batches=2),
    "bf16": Case(PP2, dtype=torch.bfloat16, tolerance=5e-3),
    "fp16": Case(PP2, DROPOUT, dtype=torch.float16, tolerance=5e-3),
}  # fmt: skip
ON_FOUR = {
    "pp4": Case(PP4 | {"pipeline_parts": "1,2,1,1"}, TIED),
    "dp2 x pp2": Case(PP2 | {"use_distributed_optimizer": True, "bucket_size": 700}, TIED),
    "interleaved dp2 x pp2": Case(PP2 | {"pipeline_schedule": "interleaved"}),
    "zbv dp2 x pp2": Case(PP2 | {"pipeline_schedule": "zbv", "use_distributed_optimizer": True, "bucket_size": 700},
                          TIED),
    "zero bubble pp4": Case(PP4 | {"pipeline_schedule": "zero_bubble"}),
    "powersgd": Case(PP2 | {"use_powerSGD_hook": True, "bucket_size": 700}, like={"use_powerSGD_hook": True}),
    "powersgd zero1": Case(PP2 | {"use_powerSGD_hook": True, "use_distributed_optimizer": True}, TIED,
                           like={"use_powerSGD_hook": True}, tolerance=2e-5),
    "dpo": Case(PP2, task="dpo", dpo=DPOConfig(dpo_loss_type="kto_pair")),
    "tp2 x pp2 in sequence": Case(TP2 | PP2 | {"sequence_parallel": True, "pipeline_parts": "2,3"}, TIED),
    "cp2 x pp2": Case(PP2 | {"context_parallel_size": 2}, task="sft"),
}  # fmt: skip


def new_model(case: Case, context: DistContext, config: ParallelConfig):
    mesh, stages, cutter = plan_mesh(config, context), None, None
    if config.pipeline_model_parallel_size > 1:
        stages = plan_stages(config, [0.0, *[1.0] * case.model.num_hidden_layers, 1.0])
        cutter = model_cutter(config, context, mesh, case.dtype, stages)
    adapter = Adapter(case.adapter, None, Path(), "", True) if case.adapter is not None else None
    model = build_model(case.model, SystemConfig(**case.system), 0, CPU, case.dtype, None, adapter, cutter=cutter)
    if case.adapter is not None:
        # Without weights to stand on, a whole model and a part would begin differently; and zeros get no gradients.
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(crc32(base_name(name).encode()))
            values = torch.randn(model.filling.held(parameter).shape, generator=generator) * 0.1
            model.filling.put(parameter, values + 1.0 if parameter.dim() == 1 else values)
    return model.train(), mesh, stages, cutter


def open_case(case: Case, context: DistContext, parallel: dict | None = None) -> tuple[Engine, Decoder]:
    config = ParallelConfig(**(case.parallel if parallel is None else parallel))
    config.check()
    model, mesh, stages, cutter = new_model(case, context, config)
    scaler = LossScaler(enabled=case.dtype == torch.float16, initial=2.0**10)
    rules = new_rules("adamw", AdamWConfig(weight_decay=0.1), MuonConfig(), LionConfig(), roles=model.roles())
    engine = open_engine(
        EngineParts(
            config, case.powersgd, context, mesh, model, lambda batch: to_device(batch, model, CPU),
            lambda gradients: MixedPrecisionOptimizer(gradients, rules, case.clip, scaler), square,
            lambda: scaler.scale, scaler.enabled, 0,
            division=cutter.division if cutter is not None else None,
            groups=cutter.groups if cutter is not None else None, stages=stages,
            widen=lambda batch: widened(batch, LENGTH), compute_dtype=case.dtype,
            micro_batches=case.micro_batches // mesh.data_size,
            rebalance=model.rebalance if model.config.router_bias_update_rate else None,
        )
    )  # fmt: skip
    return engine, model


def new_task(case: Case, model: Decoder) -> Task:
    if case.task == "dpo":
        return DPOTask(model, 0, case.dpo)
    return LanguageModelTask(model, 0, torch.ones(VOCAB))


def rows(case: Case, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a global batch; of SFT and DPO with rows of several lengths."""
    draws = np.random.default_rng(step)
    return [_micro_batch(case, draws, step * MICRO_BATCHES + n) for n in range(MICRO_BATCHES)]


def _micro_batch(case: Case, draws: np.random.Generator, number: int) -> dict[str, Tensor]:
    row_ids = torch.tensor([number])
    if case.task == "pretrain":
        tokens = torch.from_numpy(draws.integers(0, VOCAB, (1, LENGTH + 1)))
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "positions": torch.arange(LENGTH)[None],
                "row_ids": row_ids}  # fmt: skip
    sequences = []
    for length in draws.integers(4, LENGTH + 1, 2 if case.task == "dpo" else 1):
        supervised = np.ones(length, np.uint8)
        supervised[:2] = 0
        sequences.append([(draws.integers(0, VOCAB, length), supervised)])
    batch = padded(sequences, LENGTH, 0) | {"row_ids": row_ids, "sample_ids": row_ids}
    del batch["document_ids"]
    if case.task == "dpo":
        batch["reference"] = torch.from_numpy(draws.normal(-10.0, 3.0, (1, 2))).float()
    return batch


def plan_of(case: Case, task: Task, step: int) -> StepPlan:
    return StepPlan(step, LR, sum(task.count(batch) for batch in rows(case, step)), lambda: None)


def take_step(case: Case, engine: Engine, task: Task, step: int) -> tuple[float, float]:
    """Loss of the global batch, and norm of its gradient."""
    mesh, plan = engine.mesh, plan_of(case, task, step)
    sums = engine.forward_backward(rows(case, step)[mesh.data_rank :: mesh.data_size], task, plan)
    result = engine.step(plan)
    assert not result.skipped
    return engine._parts.context.all_sum(sums.loss.clone()).item() / plan.count, result.grad_norm


def validate(case: Case, engine: Engine, model: Decoder, task: Task) -> list[float]:
    """Loss and count of each validation batch, whose shapes differ, as all ranks together have them."""
    model.eval()
    found = []
    with torch.no_grad():
        for batch in (rows(case, 7)[0], rows(case, 7)[1], {**rows(case, 8)[0]}):
            loss, count, metrics = engine.evaluate(batch, task)
            every = engine._parts.context.all_sum(
                torch.tensor([float(loss), float(count), *map(float, metrics.values())], dtype=torch.float64)
            )
            found += (every / engine.mesh.data_size).tolist()
    engine.end_forward()
    model.train()
    return found


def gradient_error(case: Case, context: DistContext) -> float:
    """Relative error of one step's gradients, which are taken before the optimizer sees them, against float64."""
    engine, model = open_case(case, context)
    task = new_task(case, model)
    plan = plan_of(case, task, 1)
    engine.forward_backward(rows(case, 1)[engine.mesh.data_rank :: engine.mesh.data_size], task, plan)
    engine.ddp.finish_grad_sync()
    exact = exact_gradients(case, plan.count)
    error, norm = torch.zeros(2, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = torch.cat([exact[name][place].flatten() for _, place in model.filling.held(parameter).parts])
            error += (parameter.grad.double().flatten() - own).square().sum()
            norm += own.square().sum()
    error, norm = context.all_sum(torch.stack([error, norm])).tolist()
    engine.close()
    return (error / norm) ** 0.5


def exact_gradients(case: Case, count: int) -> dict[str, Tensor]:
    """Gradients of the first step by one backward pass; in float64, where the task can."""
    model = new_model(replace(case, system={}), ALONE, ParallelConfig())[0]
    model = model if case.task == "dpo" else model.double()
    task, total = new_task(case, model), torch.zeros((), dtype=torch.float64)
    if task.uses_prepass:
        task.take_prepass(sum(task.prepass(batch) for batch in rows(case, 1)))
    for batch in rows(case, 1):
        losses = task.layer_losses(batch, 1 / count)
        total = total + task(batch, losses)[0] / count
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    flat = [torch.cat([tensors[name].double().flatten() for name in theirs]) for tensors in (ours, theirs)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def go_on(case: Case, engine: Engine, model: Decoder) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Figures of all steps and of a validation, all weights, and a text."""
    task = new_task(case, model)
    figures = [value for step in range(1, STEPS + 1) for value in take_step(case, engine, task, step)]
    engine.settle()
    engine.check_replicas(STEPS)
    figures += validate(case, engine, model, task)
    model.eval()
    text = list(generate(model, [1, 2, 3], 6, frozenset(), temperature=0.0, dtype=case.dtype, device=CPU))
    names = set(engine.outlines())
    return figures, {name: value.clone() for name, value in engine.whole_weights(names)}, text


def work_through(cases: dict[str, Case]) -> dict:
    """Each case: relative errors of gradients, figures and weights; and the text, beside one process's."""
    context = init_context("cpu")
    results = {}
    for name, case in cases.items():
        errors: dict = {}
        is_exact = case.dtype == torch.float32 and not case.like and not case.parallel.get("use_distributed_optimizer")
        if is_exact:
            errors["gradient"] = gradient_error(case, context)
        engine, model = open_case(case, context)
        figures, weights, text = go_on(case, engine, model)
        errors["described"], errors["waited"] = engine.describe(), engine.communication_s()
        engine.close()
        if case.like:
            other, its_model = open_case(case, context, case.like)
        else:
            other, its_model = open_case(case, ALONE, {})
        expected, theirs, its_text = go_on(case, other, its_model)
        errors["weights"] = relative_difference(weights, theirs)
        errors["figures"] = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(figures, expected, strict=True))
        errors["texts"] = [text, its_text]
        other.close()
        results[name] = errors
    destroy_context(context)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_equality_matrix(world_size: int):
    cases = ON_TWO if world_size == 2 else ON_FOUR
    for results in run_ranks(world_size, work_through, cases):
        for name, errors in results.items():
            tolerance = cases[name].tolerance
            assert errors.get("gradient", 0.0) <= 1e-6, (name, errors)
            assert errors["weights"] <= tolerance and errors["figures"] <= 5 * tolerance, (name, errors)
            assert errors["texts"][0] == errors["texts"][1], (name, errors)
            assert errors["described"].startswith("pipeline of") and errors["waited"] > 0.0


def details() -> dict:
    """What happens beside the usual step, on two stages and two data ranks."""
    context, found = init_context("cpu"), {}
    # An overflow in one stage alone: all skip the step, and keep their state.
    case = Case(PP2, dtype=torch.float16)
    engine, model = open_case(case, context)
    task = new_task(case, model)
    take_step(case, engine, task, 1)
    before = {name: value.clone() for name, value in engine.whole_weights(set(engine.outlines()))}
    plan = plan_of(case, task, 2)
    engine.forward_backward(rows(case, 2)[engine.mesh.data_rank :: 2], task, plan)
    if context.rank == 3:
        next(model.parameters()).grad.view(-1)[0] = torch.inf
    skipped = engine.step(plan).skipped
    after = dict(engine.whole_weights(set(engine.outlines())))
    found["skipped"] = [skipped, relative_difference(after, before)]
    engine.close()

    # A stage's buckets are on their way before its last gradient has come.
    case = Case(PP2 | {"bucket_size": 700})
    engine, model = open_case(case, context)
    take_step(case, engine, new_task(case, model), 1)
    found["before launch"] = engine.ddp.observer.last_sync.arrived_before_launch
    found["trained"] = len(list(model.parameters()))
    engine.close()

    # Log-probabilities are known on all stages, validation's sums on the last one alone.
    case = Case(PP2, task="dpo")
    engine, model = open_case(case, context)
    task, batch = new_task(case, model), rows(case, 3)[0]
    model.eval()
    with torch.no_grad():
        found["log_probs"] = task.log_probs(batch).tolist()
        found["alone"] = new_task(case, new_model(case, ALONE, ParallelConfig())[0].eval()).log_probs(batch).tolist()
        loss, count, _ = engine.evaluate(batch, task)
    found["validated"] = [float(loss), int(count)]
    engine.close()
    destroy_context(context)
    return found


def test_details():
    for rank, found in enumerate(run_ranks(4, details)):
        assert found["skipped"] == [True, 0.0]
        launched = found["before launch"]
        assert len(launched) > 1 and launched[0] < found["trained"] / 2 and launched == sorted(launched)
        assert found["log_probs"] == found["alone"]
        assert (found["validated"] == [0.0, 0]) == (rank < 2)
