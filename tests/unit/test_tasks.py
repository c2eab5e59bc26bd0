"""The registry of tasks: an entry for the command line and a class, and a forward pass apart from the loss."""

from typing import get_args

import pytest
import torch

from configs import sizes
from configurator import _FIELDS, _GROUPS
from model import Decoder, ModelConfig
from tasks.config import ONLY_WITH, TASK_TYPES, TaskName
from tasks.registry import TASKS
from tests.unit.test_dpo_losses import make_batch, random_sequences
from training.config import Config

SHAPE = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4).resolve(0, 32)


def test_each_task_has_an_entry_and_a_class():
    assert set(get_args(TaskName)) == set(TASK_TYPES) == set(TASKS)


@pytest.mark.parametrize("name", TASK_TYPES)
def test_an_entry_names_what_there_is(name: TaskName):
    task = TASK_TYPES[name]
    assert set(task.flags) <= set(_FIELDS)
    assert not task.options or task.options in _GROUPS
    for size in get_args(_FIELDS["size"][1])[1:]:
        assert set(sizes.values_of(size, name, has_weights=True)) <= set(_FIELDS)


@pytest.mark.parametrize("name", TASK_TYPES)
def test_a_flag_of_some_tasks_counts_only_for_them(name: TaskName):
    of_some = {flag for task in TASK_TYPES.values() for flag in task.flags}
    idle = [flag for rule in ONLY_WITH if not rule.counts({"task_type": name}) for flag in rule.names]
    assert sorted(idle) == sorted(of_some - set(TASK_TYPES[name].flags))


@pytest.mark.parametrize("name", TASK_TYPES)
def test_a_call_is_the_forward_pass_and_then_the_loss(name: TaskName):
    """They agree to the bit; a pipeline computes them on different ranks."""
    model = Decoder(SHAPE)
    model.initialize(0)
    options = getattr(Config(), TASK_TYPES[name].options) if TASK_TYPES[name].options else None
    task = TASKS[name].build(model, 0, torch.ones(64, dtype=torch.int64), options)
    batch = make_batch(random_sequences())
    batch["reference"] = torch.zeros(len(batch["sample_ids"]), 2)
    loss_sum, count, metrics = task(batch)
    hidden = task.hidden(batch)
    assert hidden.shape == (*batch["input_ids"].shape, 32)
    again, count_again, metrics_again = task.loss(hidden, batch)
    assert torch.equal(loss_sum, again) and int(count) == int(count_again) == task.count(batch)
    assert set(metrics) == set(metrics_again) == set(task.metric_names)
