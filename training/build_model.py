"""The model with its first weights."""

import logging
from pathlib import Path

import torch

from checkpoint.choosing import resolve_checkpoint_dir
from configurator import Config, flatten, resolve_model
from dataset.loader import Batch
from model import Llama, hf
from model.attend import document_starts
from model.ops import CHOICES, build_ops, choose_ops
from parallel import DistContext
from tokenizer import Tokenizer
from training.data import require_tokenizer_of, warn_of_another_template

logger = logging.getLogger(__name__)


def find_weights(config: Config, resumed_from: Path | None, tokenizer: Tokenizer) -> Path | None:
    """Folder of the weights to begin with; None: new ones.

    Args:
        resumed_from: folder of the model that the run goes on with, if it does.
        tokenizer: the data's.
    Raises:
        ValueError: there must be weights and are none, or they go with another tokenizer.
    """
    run, source = config.run, resumed_from
    if source is None and run.init_from:
        source = resolve_checkpoint_dir(Path(run.init_from))
    if source is not None:
        own = require_tokenizer_of(source, tokenizer)
        if resumed_from is None and run.task_type != "pretrain":
            warn_of_another_template(source, own, tokenizer)
    if run.valid_only and source is None:
        raise ValueError(f"--valid_only: {Path(run.out_dir)} holds no checkpoint to validate")
    if run.task_type == "dpo" and source is None:
        raise ValueError(
            f"{Path(run.out_dir)} holds no checkpoint to go on from: give a model to begin with --init_from"
        )
    return source


def build_model(
    config: Config,
    given: frozenset[str],
    context: DistContext,
    vocab_size: int,
    dtype: torch.dtype,
    weights: Path | None,
) -> Llama:
    """The model on its device, in its dtype, the same on all ranks.

    Args:
        given: names of the flags that were given.
        vocab_size: the tokenizer's.
        weights: folder of the model that this one begins with. A resumed run's main parameters replace what is
            trained; what is frozen is here alone.
    Raises:
        ValueError: a model that cannot be, or another one on another rank.
    """
    system, device = config.system, context.device
    stored = hf.read_config(weights) if weights is not None else None
    model_config = resolve_model(
        config.model, given, stored, vocab_size, config.data.max_seq_len, is_own=not config.run.init_from
    )
    decisive = {name: value for name, value in flatten(config).items() if not name.endswith(("_dir", "_file"))}
    context.require_same(
        [decisive, str(dtype), model_config.__dict__],
        "the ranks have different settings or choose different dtypes: start all with the same flags",
    )
    is_begun_by_another = stored is not None and config.run.init_from and context.is_main
    if is_begun_by_another and config.data.max_seq_len > stored.max_position_embeddings:
        logger.warning(
            "max_seq_len %d is more than the %d positions that the weights were trained with: they have to learn the "
            "others first (--max_seq_len=%d leaves it at those)",
            config.data.max_seq_len, stored.max_position_embeddings, stored.max_position_embeddings,
        )  # fmt: skip
    overrides = {op: getattr(system, f"{op}_kernel") for op in CHOICES}
    ops = build_ops(choose_ops(system.kernels, overrides, device, dtype))
    if weights is not None:
        hf.check_weights(model_config, weights)
    model = Llama(model_config, system.gradient_checkpointing, system.checkpoint_keeps, ops)
    if weights is None:
        model.initialize(config.run.seed)
    else:
        hf.load_weights(model, weights)
    model.to(device=device, dtype=dtype)
    if system.compile:
        model.compile_blocks()
    return model


def to_device(batch: Batch, model: Llama, device: torch.device) -> Batch:
    """A batch where the model is, with what the model wants to know of it."""
    if model.wants_document_starts and "document_ids" in batch:
        # Here, where nothing has to wait for how many there are.
        batch = batch | {"document_starts": document_starts(batch["document_ids"])}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
