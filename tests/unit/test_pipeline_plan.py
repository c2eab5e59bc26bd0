"""The plan of a pipeline: counted, measured, and kept."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from configurator import parse_config
from model import Decoder, ModelConfig
from model.unit_times import UnitTimes, measure_units
from parallel.stages import Stages
from training import pipeline
from training.pipeline import PipelinePlan, plan_pipeline

SHAPE = ModelConfig(vocab_size=96, hidden_size=32, num_hidden_layers=6, num_attention_heads=4).resolve(max_seq_len=16)
ALONE = SimpleNamespace(device=torch.device("cpu"), decide_on_main=lambda decide: decide())
PRETRAINING = SimpleNamespace(context_and_supervised_share=lambda: (16, 1.0))


def _plan(tmp_path, *flags: str) -> PipelinePlan | None:
    config, _ = parse_config([
        "--data_dir=x", "--train_batch_size=4", "--gradient_accumulation_steps=4", "--max_seq_len=16",
        "--pipeline_model_parallel_size=2", *flags,
    ])  # fmt: skip
    return plan_pipeline(
        config, SHAPE, PRETRAINING, 1, ALONE, torch.float32, tmp_path / "pipeline.json", lambda shape: Decoder(shape)
    )


def test_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert _plan(tmp_path) == PipelinePlan(Stages((4, 4), 2), 4)
    assert "(by the count of operations, ranks wait for 19 to 24% of a step)" in caplog.text
    assert "--pipeline_parts=4,4 --pipeline_micro_batches=4" in caplog.text
    assert _plan(tmp_path, "--pipeline_parts=2,6", "--pipeline_micro_batches=8").micro_batches == 8
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="16 rows of a step .*--pipeline_micro_batches=8 is the nearest"):
        _plan(tmp_path, "--pipeline_micro_batches=7")
    with pytest.raises(ValueError, match="must be 2 positive numbers"):
        _plan(tmp_path, "--pipeline_parts=4,5")


def test_measured_once(tmp_path, caplog, monkeypatch):
    """A head that takes as long as five blocks, and 10 s for each micro-batch, whatever its rows."""
    caplog.set_level(logging.INFO)
    calls = []

    def measure(model, sizes, length, head_share):
        calls.append((sizes, length, head_share, model.config.num_hidden_layers))
        head = [(50 + n, 100 + n) for n in sizes]
        return UnitTimes(sizes, [(0.0, 0.0)] * len(sizes), [(10 + n, 20 + n) for n in sizes], head)

    monkeypatch.setattr(pipeline, "measure_units", measure)
    flags = "--pipeline_parts=measured", "--pipeline_micro_batches=auto"
    plan = _plan(tmp_path, *flags)
    assert calls == [([1, 2, 4], 16, 1.0, 1)]
    # Both stages 5 blocks; four micro-batches, not more, as --train_batch_size allows four rows.
    assert plan == PipelinePlan(Stages((6, 2), 2), 4)
    assert "--pipeline_parts=6,2 --pipeline_micro_batches=4" in caplog.text and "measured" in caplog.text
    assert _plan(tmp_path, *flags) == plan and len(calls) == 1
    assert _plan(tmp_path, *flags, "--train_batch_size=8") and len(calls) == 2
    (tmp_path / "pipeline.json").write_text("{")
    assert _plan(tmp_path, *flags) == plan and len(calls) == 3
    assert json.loads((tmp_path / "pipeline.json").read_text())["pipeline_parts"] == "6,2"


def test_times_are_those_of_each_part():
    times = measure_units(Decoder(replace(SHAPE, num_hidden_layers=1)), [1, 4], 16, 0.5)
    assert times.sizes == [1, 4]
    assert all(min(its) > 0 for part in (times.embedding, times.block, times.head) for its in part)
    between = UnitTimes([1, 3], [(1, 1), (1, 3)], [(2, 4), (4, 8)], [(1, 1), (5, 5)]).of(2, [0.0, 1.0, 2.0, 3.0])
    assert between == [(1, 2), (3, 6), (6, 12), (3, 3)]
