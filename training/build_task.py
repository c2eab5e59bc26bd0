"""The task of the run, which turns a batch into a loss."""

import torch

from model import Decoder
from tasks.registry import TASKS
from tasks.task import Task
from tokenizer import Tokenizer
from training.config import Config


def build_task(config: Config, model: Decoder, tokenizer: Tokenizer, device: torch.device) -> Task:
    """The run's task. Its options may be any group of the configuration."""
    # The model may have more rows than the tokenizer has tokens.
    byte_lengths = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    byte_lengths[: tokenizer.vocab_size] = torch.tensor(tokenizer.token_byte_lengths())
    group = config.run.task.options
    options = getattr(config, group) if group else None
    return TASKS[config.run.task_type].build(model, config.run.seed, byte_lengths.to(device), options)
