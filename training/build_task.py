"""What turns a batch into a loss."""

import torch

from configurator import Config
from model import Llama
from tasks.dpo import DPOLoss, DPOTask
from tasks.language_model import LanguageModelTask
from tokenizer import Tokenizer


def build_task(config: Config, model: Llama, tokenizer: Tokenizer, device: torch.device) -> LanguageModelTask | DPOTask:
    run, dpo = config.run, config.dpo
    if run.task_type == "dpo":
        loss = DPOLoss(dpo.dpo_loss_type, dpo.dpo_beta, dpo.dpo_label_smoothing)
        return DPOTask(model, run.seed, loss, dpo.reference_free)
    # The model may have more rows than the tokenizer has tokens.
    byte_lengths = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    byte_lengths[: tokenizer.vocab_size] = torch.tensor(tokenizer.token_byte_lengths())
    return LanguageModelTask(model, run.seed, byte_lengths.to(device))
