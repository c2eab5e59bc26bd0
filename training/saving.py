"""A rank's share of a checkpoint. resume.py reads it back."""

from collections.abc import Sequence, Set
from dataclasses import replace

from torch import Tensor

from checkpoint.folder import TRAINER_STATE
from checkpoint.writing import CheckpointWriter
from model import hf
from model.adapters import folder
from model.generation_config import GENERATION_CONFIG
from model.hf_files import INDEX
from model.hf_saved import SavedFile, deal_out, saved_files
from parallel.engine import Engine
from training.adapter import Adapter
from training.build import Built
from training.data import stream_of
from utils.options import parse_size


def add_share(built: Built, writer: CheckpointWriter) -> None:
    """Add this rank's files. Collective, if the model is cut."""
    engine, is_first = built.engine, built.run_dir.place.is_first_of_store
    writer.add_named_state(engine.named_state(), engine.state_holders, engine.holders_of)
    local_state = engine.local_state()
    if local_state is not None:
        writer.add_hook_state(local_state)
    if built.adapter is None:
        _add_model(built, writer)
    else:
        _add_adapter(built, built.adapter, writer)
    if is_first:
        writer.add_json(GENERATION_CONFIG, built.export.generation.to_hf())
        writer.add_folder(built.export.save_tokenizer)
        writer.add_json(TRAINER_STATE, _trainer_state(built))


def _add_model(built: Built, writer: CheckpointWriter) -> None:
    export, engine = built.export, built.engine
    max_bytes, outlines = parse_size(built.config.run.max_shard_size), engine.outlines()
    if engine.is_cut:
        # No rank must hold much more than its part of the model.
        total = sum(outline.nbytes for outline in outlines.values())
        max_bytes = min(max_bytes, -(-total // len(writer.place.store)))
    config, family = replace(built.model.config, vocab_size=export.vocab_size), export.family(built.model.config)
    files, index = saved_files(built.model.config, outlines, family, export.vocab_size, max_bytes)
    add_weights(engine, files, writer)
    if not writer.place.is_first_of_store:
        return
    if index is not None:
        writer.add_json(INDEX, index)
    ids = export.generation.token_ids
    writer.add_json("config.json", hf.to_hf_config(config, built.dtype, **ids, family=family))


def add_weights(engine: Engine, files: Sequence[SavedFile], writer: CheckpointWriter) -> None:
    """Add a model's files: the first rank of a store writes them all, or all ranks of it a part each if the model is
    cut. Then it is collective."""
    place = writer.place
    mine = list(files) if place.is_first_of_store else []
    if engine.is_cut:
        mine = deal_out(files, len(place.store))[place.store.index(place.rank)]
    weights = _whole_weights(engine, {name for file in mine for name in file.parameters}, writer)
    for file in mine:
        parameters = {name: weights[name] for name in file.parameters}
        writer.add_tensors(
            file.name, parameters, {"format": "pt"}, file.convert, are_weights=True, are_copies=engine.is_cut
        )


def _whole_weights(engine: Engine, names: Set[str], writer: CheckpointWriter) -> dict[str, Tensor]:
    """Whole parameters: of a model that is cut, copies in host memory. Collective."""
    weights = engine.whole_weights(names)
    if not engine.is_cut:
        return dict(weights)
    return {name: writer.copy_now(f"whole {name}", whole) for name, whole in weights}


def _add_adapter(built: Built, adapter: Adapter, writer: CheckpointWriter) -> None:
    """Only what trains: the rest is the base, which its fingerprint names. It is small: one rank writes it."""
    is_first, engine = built.run_dir.place.is_first_of_store, built.engine
    # Of a model that is cut, this rank knows its part alone.
    model = folder.outlined(built.model.config, adapter.spec) if engine.is_cut else built.model
    saved = folder.saved_files(model, adapter.spec, adapter.base, adapter.fingerprint)
    names = saved.parameters.keys() if is_first else set()
    weights = _whole_weights(engine, names, writer)
    if is_first:
        writer.add_tensors(
            folder.TENSORS, weights, {"format": "pt"}, saved.convert, are_weights=True, are_copies=engine.is_cut
        )
        for name, content in saved.jsons.items():
            writer.add_json(name, content)


def _trainer_state(built: Built) -> dict:
    return {
        "step": built.progress.step,
        "samples_consumed": built.progress.samples_consumed,
        "tokens": built.progress.tokens,
        "validation_due": built.progress.validation_due,
        "stream": stream_of(built.config.run.seed, built.data),
        "optimizer": built.engine.scalar_state(),
        "world_size": built.context.world_size,
        "mesh": built.mesh.sizes(),
        "reference": built.reference,
    }
