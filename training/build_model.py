"""The model with its first weights."""

import dataclasses
import logging
from collections.abc import Sequence, Set
from math import prod
from pathlib import Path

import torch

from dataset.loader import Batch
from model import Decoder, hf, upcycle
from model.adapters import folder, lora, tokens
from model.adapters.config import AdapterConfig
from model.adapters.folder import Weights
from model.attend import document_starts, document_tails
from model.config import ModelConfig, padded_vocab_size
from model.divided import outline_of_part
from model.families import family_named, family_of
from model.ops import CHOICES, build_ops, choose_ops, needs_of
from parallel.division import Division
from parallel.engines import ModelCutter
from runs.layout import CONFIG_NAME
from tasks.task import part_of_rows
from tokenizer import Tokenizer
from training.adapter import Adapter, first_weights, resumed_weights
from training.config import Config, RunConfig, SystemConfig
from training.data import require_tokenizer_of, warn_of_another_template

logger = logging.getLogger(__name__)

SHAPE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "norm", "embedding_norm", "mlp", "mlp_bias", "tie_word_embeddings", "normalized_head", "attention_bias",
    "qkv_bias", "qk_norm", "local_filter", "position_embedding", "rope_interleaved", "partial_rotary_factor",
    "num_local_experts", "moe_intermediate_size", "num_shared_experts", "dense_layers", "norm_topk_prob", "router_bias",
)  # fmt: skip
"""Model fields that the weights depend on: with another value they do not fit, or mean nothing. Others may change while
a model learns: its rope's base and scaling and its window when the context grows, the experts that each token is sent
to, the router's losses."""


def new_model(wanted: ModelConfig, given: Set[str]) -> ModelConfig:
    """Configuration of a model that begins with new weights: with the values that its family adds, if it names one.

    Args:
        given: names of the flags that were given.
    Raises:
        ValueError: one of them contradicts the family.
    """
    if not wanted.model_type:
        return wanted
    # Values of a size, or of a run that is begun again, are not among the flags.
    changed = {field.name for field in dataclasses.fields(ModelConfig) if getattr(wanted, field.name) != field.default}
    return family_named(wanted.model_type).new(wanted, given | changed)


def find_weights(
    run: RunConfig, adapter: AdapterConfig, given: Set[str], resumed_from: Path | None, tokenizer: Tokenizer,
    added: Sequence[str] = (),
) -> Weights | None:  # fmt: skip
    """The weights to begin with; None: new weights.

    Args:
        given: names of the flags that were given.
        resumed_from: folder of the model that a resumed run goes on with; None for a new run.
        tokenizer: the data's.
        added: tokens that the data's has besides those that the weights know.
    Raises:
        ValueError: the run needs weights and there are none, or they belong to another tokenizer.
    """
    if resumed_from is not None:
        source: Weights | None = resumed_weights(run, given, resumed_from)
    else:
        source = first_weights(run, adapter.adapter)
        if source is not None and source.adapter is not None and adapter.lora_r is not None and not adapter.adapter:
            raise ValueError(
                f"{run.init_from} holds an adapter already: leave out --lora_r to go on with it, or begin a new one on "
                f"both together, by python -m model.adapters.merge --adapter {source.adapter} --output FOLDER and "
                f"--init_from=FOLDER"
            )
    if source is not None:
        if added and source.adapter is not None:
            raise ValueError(
                f"--add_tokens: an adapter cannot be given more tokens: begin a new one, by python -m "
                f"model.adapters.merge --adapter {source.adapter} --output FOLDER and --init_from=FOLDER"
            )
        own = require_tokenizer_of(source, tokenizer, added)
        if resumed_from is None and run.task.teaches_chat:
            warn_of_another_template(source, own, tokenizer)
    if run.valid_only and source is None:
        raise ValueError(f"--valid_only: {Path(run.out_dir)} holds no checkpoint to validate")
    if run.task.needs_weights and source is None:
        raise ValueError(
            f"{Path(run.out_dir)} holds no checkpoint to go on from: give a model to begin with --init_from"
        )
    return source


def choose_shape(
    wanted: ModelConfig, run: RunConfig, given: frozenset[str], weights: Path | None, is_resumed: bool, vocab_size: int,
    max_seq_len: int, has_adapter: bool = False, least_rows: int = 0,
) -> ModelConfig:  # fmt: skip
    """The model's final shape, which a family can hold.

    Args:
        wanted: the configuration's.
        given: names of the flags that were given.
        weights: folder of the weights to begin with.
        is_resumed: it is a checkpoint of this run.
        vocab_size: the tokenizer's.
        has_adapter: whether the weights stay frozen below an adapter.
        least_rows: rows of the vocabulary with those that the weights lack.
    Raises:
        ValueError: such a model cannot be built, or no checkpoint could hold it.
    """
    stored = hf.read_config(weights) if weights is not None else None
    if stored is not None and is_resumed:
        if family_named(stored.model_type).mismatches(stored):
            # Earlier versions saved as a llama what is a mistral now, since transformers 5 refuses such a llama.
            stored = dataclasses.replace(stored, model_type="")
        stored = dataclasses.replace(stored, vocab_size=stored.vocab_size + hf.count_padding(weights))
    elif stored is not None and upcycle.is_upcycled(stored, wanted):
        if has_adapter:
            raise ValueError(
                "--num_local_experts: the experts that a dense model is copied into must train, so that they differ: "
                "leave out the adapter"
            )
        stored = upcycle.sparse_config(stored, wanted)
    if stored is not None and stored.vocab_size < least_rows:
        stored = dataclasses.replace(stored, vocab_size=least_rows)
    shape = resolve_model(wanted, given, stored, vocab_size, max_seq_len, is_own=not run.init_from)
    # Asked before the training: otherwise the first save would fail.
    family_of(shape)
    return shape


def rows_for_others(config: Config, shape: ModelConfig, vocab_size: int) -> int:
    """Rows of the vocabulary in the run's checkpoints: all but its padding. Rows that came with weights from elsewhere,
    or that somebody asked for, are no padding.

    Args:
        vocab_size: the tokenizer's.
    """
    is_padded = not config.run.init_from and not config.model.vocab_size
    return vocab_size if is_padded else shape.vocab_size


def warn_of_length(weights: Path, max_seq_len: int) -> None:
    """Warn if samples are longer than those that the weights were trained with."""
    known = hf.read_config(weights).max_position_embeddings
    if max_seq_len > known:
        logger.warning(
            "max_seq_len %d is more than the %d positions that the weights were trained with: they have to learn the "
            "others first (--max_seq_len=%d leaves it at those)", max_seq_len, known, known,
        )  # fmt: skip


def resolve_model(
    wanted: ModelConfig, given: frozenset[str], stored: ModelConfig | None, tokenizer_vocab_size: int, max_seq_len: int,
    is_own: bool = False,
) -> ModelConfig:  # fmt: skip
    """The model's final shape: that of the weights, if there are any.

    Args:
        wanted: the configuration's.
        given: names that the command line or the YAML file set.
        stored: the shape of the weights to start from. residual_in_fp32, which no Hugging Face config holds, comes from
            `wanted`, and so do given options that are not SHAPE_FIELDS.
        is_own: the weights are a checkpoint of this run, which began with new ones. So the fields of `wanted` that were
            not given also describe them, unless somebody has changed the run's configuration since.
    Raises:
        ValueError: a field contradicts the weights, or the vocabulary is too small for the tokenizer.
    """
    if stored is not None:
        told = _told_fields(wanted, given, is_own)
        _check_family(wanted, given, stored, is_own)
        # What follows from other fields, such as the router's bias, is compared as it follows.
        experts = wanted.num_local_experts or stored.num_local_experts
        # How many are chosen is no part of the shape: there may be a single expert.
        asked_shape = dataclasses.replace(wanted, num_local_experts=experts, num_experts_per_tok=1)
        asked_shape = asked_shape.resolve(max_seq_len=max_seq_len)
        for name in SHAPE_FIELDS:
            asked, has = getattr(asked_shape, name), getattr(stored, name)
            if name in told and asked != has:
                raise ValueError(
                    f"--{name}={asked} does not fit the weights to start from, which have {has}: leave it out"
                    if name in given else
                    f"{name} is {asked} in the run's {CONFIG_NAME}, and {has} in its weights: restore that line, or "
                    f"begin a new run"
                )  # fmt: skip
        own = {"residual_in_fp32"} | (told - {*SHAPE_FIELDS, "model_type"})
        kept = {name: value for name, value in stored.__dict__.items() if name not in own}
        wanted = dataclasses.replace(wanted, **kept)
        if wanted.rope_scaling == "none" and "max_position_embeddings" not in given:
            # A model that is trained on longer samples is meant for them.
            longest = max(wanted.max_position_embeddings, max_seq_len)
            wanted = dataclasses.replace(wanted, max_position_embeddings=longest)
    resolved = wanted.resolve(padded_vocab_size(tokenizer_vocab_size), max_seq_len)
    if resolved.vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"the model's vocab_size {resolved.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}: "
            f"leave --vocab_size out, and start only from weights that know this tokenizer"
        )
    return resolved


def _check_family(wanted: ModelConfig, given: Set[str], stored: ModelConfig, is_own: bool) -> None:
    """See that the weights are of the family that is asked for, if one is.

    Raises:
        ValueError: they are of another one.
    """
    asked, has = wanted.model_type, stored.model_type
    if not asked or asked == has:
        return
    family = family_named(asked)
    if is_own and family.names_tokenizer and not family.mismatches(dataclasses.replace(stored, model_type=asked)):
        # Such a model is saved as another family if its tokenizer is not that family's own.
        return
    raise ValueError(
        f"--model_type={asked} does not fit the weights to start from, which are of family {has}: leave it out"
        if given & {"model_type"} else
        f"model_type is {asked} in the run's {CONFIG_NAME}, and {has} in its weights: restore that line, or begin a "
        f"new run"
    )  # fmt: skip


def _told_fields(wanted: ModelConfig, given: Set[str], is_own: bool) -> set[str]:
    """Names of the fields that have a value of their own, given now or saved with the run, rather than leave it to the
    weights or the tokenizer."""
    told = set()
    for item in dataclasses.fields(ModelConfig):
        name, asked = item.name, getattr(wanted, item.name)
        # In a run that began with weights from elsewhere, fields that nobody gave have their defaults.
        if name in given or is_own or asked != item.default:
            is_left_open = asked == 0 and item.default == 0 and not isinstance(asked, bool)
            is_left_open &= not name.endswith("_dropout")
            told |= {name} - ({name} if is_left_open else set())
    return told


def build_model(
    shape: ModelConfig, system: SystemConfig, seed: int, device: torch.device, dtype: torch.dtype, weights: Path | None,
    adapter: Adapter | None = None, in_4bit: bool = False, new_rows: range = range(0),
    cutter: ModelCutter | None = None,
) -> Decoder:  # fmt: skip
    """The model on its device, in its dtype.

    Args:
        seed: key of new weights.
        weights: folder of the model that this one begins with. In a resumed run, main parameters later replace the
            trained weights; frozen ones come from here alone.
        adapter: what is trained instead of the weights; None: they train themselves.
        in_4bit: keep the blocks' matrices in 4 bits; only with an adapter, and weights.
        new_rows: tokens that the weights do not know.
        cutter: lets this rank keep its part of the model alone; under FSDP trained parameters are then in float32.
            Collective.
    Raises:
        ValueError: the weights do not have this shape, or a kernel that was asked for is not available.
    """
    options = _options(shape, system, device, dtype)
    if cutter is not None:
        if in_4bit:
            raise ValueError("--load_in_4bit: a model in 4 bits is not cut over processes: give --data_parallel=auto")
        # Each rank reads its own part, and may be the only one whose files are damaged.
        cutter.together(lambda: _check_weights(shape, weights, new_rows))
        model = outline_of_part(shape, options, device, dtype, None if adapter is None else adapter.spec, cutter)
        cutter.together(lambda: _fill(model, seed, dtype, weights, adapter, new_rows))
    else:
        _check_weights(shape, weights, new_rows)
        model = _whole_model(shape, options, device, dtype, seed, weights, adapter, in_4bit, new_rows)
    if system.compile:
        model.compile_blocks()
    return model


def without_values(shape: ModelConfig, system: SystemConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A model on its device, in its dtype, whose weights are anything."""
    return hf.outline_in(shape, device, dtype, *_options(shape, system, device, dtype))


def _options(shape: ModelConfig, system: SystemConfig, device: torch.device, dtype: torch.dtype) -> tuple:
    """Arguments of Decoder beside its shape.

    Raises:
        ValueError: a kernel that was asked for is not available.
    """
    overrides = {op: getattr(system, f"{op}_kernel") for op in CHOICES}
    chosen = choose_ops(system.kernels, overrides, device, dtype, needs_of(shape))
    if not shape.num_local_experts:
        # The start names the operations that the model has.
        del chosen["experts"]
    return system.gradient_checkpointing, system.checkpoint_keeps, build_ops(chosen)


def _check_weights(shape: ModelConfig, weights: Path | None, new_rows: range) -> None:
    """See that the weights have the model's shape, before memory is allocated. Raises ValueError: see build_model."""
    if weights is not None:
        stored, known = hf.read_config(weights), _known_shape(shape, weights, new_rows)
        hf.check_weights(stored if upcycle.is_upcycled(stored, shape) else known, weights)


def _known_shape(shape: ModelConfig, weights: Path | None, new_rows: range) -> ModelConfig:
    """The model's shape without the rows that the weights lack."""
    if weights is None or not new_rows:
        return shape
    return dataclasses.replace(shape, vocab_size=hf.read_config(weights).vocab_size)


def _whole_model(
    shape: ModelConfig, options: tuple, device: torch.device, dtype: torch.dtype, seed: int, weights: Path | None,
    adapter: Adapter | None, in_4bit: bool, new_rows: range,
) -> Decoder:  # fmt: skip
    """A model that is whole on this rank, with its values."""
    known = _known_shape(shape, weights, new_rows)
    if in_4bit:
        model = hf.outline_in_4bit(known, device, dtype, *options)
    elif weights is None or upcycle.is_upcycled(hf.read_config(weights), known):
        model = Decoder(known, *options)
    else:
        model = hf.outline_in(known, device, dtype, *options)
    if weights is None:
        model.initialize(seed)
    else:
        load_weights(model, weights, seed)
    if new_rows:
        tokens.grow(model, new_rows.start, len(new_rows))
    if adapter is not None:
        lora.attach(model, adapter.spec, seed)
        if adapter.loaded_from is not None:
            folder.load(model, adapter.loaded_from)
    return model.to(device=device, dtype=dtype)


def _fill(
    model: Decoder, seed: int, dtype: torch.dtype, weights: Path | None, adapter: Adapter | None, new_rows: range
) -> None:
    """Give a model its first values, parameter by parameter; see build_model."""
    if weights is None:
        model.initialize(seed)
    else:
        stored = hf.read_config(weights)
        load_weights(model, weights, seed, stored.vocab_size if new_rows else None)
        if new_rows:
            known = hf.StoredWeights(weights, stored)
            tokens.begin(model, new_rows.start, len(new_rows), known.read_one, dtype)
    if adapter is not None:
        lora.begin(model, seed)
        if adapter.loaded_from is not None:
            folder.load(model, adapter.loaded_from, folder.outlined(model.config, adapter.spec))


def whole_sizes(model: Decoder, division: Division | None) -> dict[str, int]:
    """Name -> number of elements of each parameter of the whole model.

    Args:
        division: what each rank holds; None: all of it.
    """
    if division is None:
        return {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {name: prod(outline.shape) for name, outline in division.outlines.items()}


def load_weights(model: Decoder, weights: Path, seed: int, vocab_size: int | None = None) -> None:
    """Set a model's weights by those of a folder, which may be a dense one's for a model with experts.

    Args:
        seed: key of the weights that a dense model does not have.
        vocab_size: rows of the vocabulary in the folder; None: as many as in the model.
    Raises:
        ValueError, OSError: as hf.load_weights.
    """
    if upcycle.is_upcycled(hf.read_config(weights), model.config):
        logger.info(
            "%d experts begin as copies of each dense feed-forward layer of %s", model.config.num_local_experts, weights
        )
        upcycle.load_upcycled(model, weights, seed)
    else:
        hf.load_weights(model, weights, vocab_size)


def to_device(batch: Batch, model: Decoder, device: torch.device) -> Batch:
    """A batch on the model's device, with the document starts that some kernels want; of its rows the part that this
    process works on."""
    share = model.row_share
    if share is not None:
        batch = part_of_rows(batch, share)
    if model.wants_document_starts and "document_ids" in batch:
        # Found before the copy: on a GPU, their number would have to be waited for.
        ids = batch["document_ids"]
        starts = document_starts(ids) if share is None else document_tails(ids, share.chunks, 2 * share.count)
        batch = batch | {"document_starts": starts}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
