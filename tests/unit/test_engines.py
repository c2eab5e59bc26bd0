"""Every engine alone against torch's own AdamW."""

import pytest
import torch

from model import Decoder, ModelConfig
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel.config import ParallelConfig, PowerSGDConfig
from parallel.context import DistContext, destroy_context
from parallel.engine import Engine, EngineParts, StepPlan
from parallel.engines import ENGINES, model_cutter, open_engine
from parallel.gradients import square
from parallel.mesh import Mesh
from tasks.language_model import LanguageModelTask

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=8,
).resolve()  # fmt: skip
LR, CLIP, ADAMW = 1e-2, 0.5, AdamWConfig(weight_decay=0.0)
OF_ONE_RANK = sorted(set(ENGINES) - {"pipeline"})
"""(tests/dist/test_pipeline.py has the stages of a pipeline on several ranks.)"""
ALONE, ONE = DistContext(0, 1, 0, 1, torch.device("cpu")), Mesh(0)


def new_model() -> Decoder:
    model = Decoder(CONFIG)
    model.initialize(0)
    return model.train()


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches of two rows."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, 32, (2, 2, 9), generator=generator)
    positions = torch.arange(8).expand(2, 8)
    return [
        {"input_ids": r[:, :-1], "labels": r[:, 1:], "positions": positions, "row_ids": torch.arange(2)} for r in rows
    ]


@pytest.fixture(autouse=True)
def _leave_group():
    """FSDP makes a group for a single process, too."""
    yield
    destroy_context(ALONE)


def open_alone(name: str, model: Decoder, mesh: Mesh = ONE) -> Engine:
    scaler = LossScaler(enabled=False)
    config = ParallelConfig(data_parallel="fsdp") if name == "fsdp" else ParallelConfig(ddp_impl=name)
    cutter = model_cutter(config, ALONE, ONE, torch.float32)
    if cutter is not None:
        cutter.cut(model)
    return open_engine(
        EngineParts(
            config,
            PowerSGDConfig(),
            ALONE,
            mesh,
            model,
            to_device=lambda batch: batch,
            new_optimizer=lambda gradients: MixedPrecisionOptimizer(gradients, [AdamW(ADAMW)], CLIP, scaler),
            square=square,
            loss_scale=lambda: scaler.scale,
            is_fp16=False,
            seed=0,
            division=cutter.division if cutter is not None else None,
            groups=cutter.groups if cutter is not None else None,
        )
    )


@pytest.mark.parametrize("name", OF_ONE_RANK)
def test_an_engine_takes_the_steps_of_torchs_own_loop(name: str):
    ours, theirs = new_model(), new_model()
    engine, task, plain = open_alone(name, ours), LanguageModelTask(ours, 0, torch.ones(32)), LanguageModelTask(
        theirs, 0, torch.ones(32)
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs.parameters(), LR, (ADAMW.beta1, ADAMW.beta2), ADAMW.adam_eps, weight_decay=0.0)
    told = []
    for step in range(3):
        plan = StepPlan(step + 1, LR, 32, lambda: told.append("update"))
        sums = engine.forward_backward(batches(step), task, plan)
        result = engine.step(plan)
        loss = sum(plain(batch)[0] for batch in batches(step)) / 32
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad()
        assert sums.loss.item() / 32 == pytest.approx(loss.item(), rel=1e-6)
        assert not result.skipped and result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    engine.settle()
    whole = dict(engine.whole_weights({*engine.outlines()}))
    for weight_name, other in theirs.named_parameters():
        assert torch.allclose(whole[weight_name], other, rtol=1e-4, atol=1e-6)
    assert told and engine.describe() and engine.traffic() is None
    assert {piece.name for piece, _ in engine.named_state()} == {name for name, _ in ours.named_parameters()}
    engine.close()


@pytest.mark.parametrize("name", OF_ONE_RANK)
def test_a_dropped_step_leaves_all_but_the_gradients(name: str):
    model = new_model()
    engine, task = open_alone(name, model), LanguageModelTask(model, 0, torch.ones(32))
    before = [p.detach().clone() for p in model.parameters()]
    plan = StepPlan(1, LR, 32, lambda: None, shall_drop=lambda done, total: (done, total) == (1, 2))
    assert engine.forward_backward(batches(0), task, plan) is None
    assert all(map(torch.equal, before, model.parameters()))
    assert all((tensors["exp_avg"] == 0).all() for _, tensors in engine.named_state())
    engine.close()


def test_only_one_of_the_ranks_with_the_same_rows_counts_them():
    model = new_model()
    engine, task = open_alone("naive", model, Mesh(1, tensor_size=2)), LanguageModelTask(model, 0, torch.ones(32))
    sums = engine.forward_backward(batches(0), task, StepPlan(1, LR, 32, lambda: None))
    assert sums.loss == 0.0 and all(value == 0.0 for value in sums.metrics.values())
    assert all(p.grad.abs().sum() > 0.0 for p in model.parameters())
    assert [float(figure) for figure in engine.evaluate(batches(0)[0], task)[:2]] == [0.0, 0.0]


def test_a_gradient_outside_its_buffer_is_an_error():
    """Otherwise it would be lost at every step from here on."""
    model = new_model()
    engine, task = open_alone("bucketed", model), LanguageModelTask(model, 0, torch.ones(32))
    model.zero_grad()
    plan = StepPlan(1, LR, 32, lambda: None)
    engine.forward_backward(batches(0), task, plan)
    with pytest.raises(RuntimeError, match="is not in its buffer, as after the model"):
        engine.step(plan)
    engine.close()
