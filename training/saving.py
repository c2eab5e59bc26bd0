"""A rank's share of a checkpoint. resume.py reads it back."""

from dataclasses import replace

from checkpoint.folder import TRAINER_STATE
from checkpoint.writing import CheckpointWriter
from model import hf
from model.adapters import folder
from model.generation_config import GENERATION_CONFIG
from model.hf_files import INDEX
from model.hf_saved import saved_files
from training.adapter import Adapter
from training.build import Built
from training.data import order_of_samples
from utils.options import parse_size


def add_share(built: Built, writer: CheckpointWriter) -> None:
    engine = built.engine
    writer.add_named_state(engine.named_state(), sharded=engine.is_sharded)
    local_state = engine.local_state()
    if local_state is not None:
        writer.add_hook_state(local_state)
    if built.adapter is None:
        _add_model(built, writer)
    elif built.run_dir.place.is_first_of_store:
        _add_adapter(built, built.adapter, writer)
    if built.run_dir.place.is_first_of_store:
        writer.add_json(GENERATION_CONFIG, built.export.generation.to_hf())
        writer.add_folder(built.export.save_tokenizer)
        writer.add_json(TRAINER_STATE, _trainer_state(built))


def _add_model(built: Built, writer: CheckpointWriter) -> None:
    export, max_bytes = built.export, parse_size(built.config.run.max_shard_size)
    config, family = replace(built.model.config, vocab_size=export.vocab_size), export.family(built.model.config)
    outlines = built.engine.outlines()
    files, index = saved_files(built.model.config, outlines, family, export.vocab_size, max_bytes)
    place = built.run_dir.place
    mine = files if place.is_first_of_store else []
    whole = built.engine.whole_weights({name for file in mine for name in file.parameters})
    for file in mine:
        parameters = {name: whole[name] for name in file.parameters}
        writer.add_tensors(file.name, parameters, {"format": "pt"}, file.convert, are_weights=True)
    if not place.is_first_of_store:
        return
    if index is not None:
        writer.add_json(INDEX, index)
    ids = export.generation.token_ids
    writer.add_json("config.json", hf.to_hf_config(config, built.dtype, **ids, family=family))


def _add_adapter(built: Built, adapter: Adapter, writer: CheckpointWriter) -> None:
    """Only what trains: the rest is the base, which its fingerprint names."""
    saved = folder.saved_files(built.model, adapter.spec, adapter.base, adapter.fingerprint)
    writer.add_tensors(folder.TENSORS, saved.parameters, {"format": "pt"}, saved.convert, are_weights=True)
    for name, content in saved.jsons.items():
        writer.add_json(name, content)


def _trainer_state(built: Built) -> dict:
    return {
        "step": built.progress.step,
        "samples_consumed": built.progress.samples_consumed,
        "tokens": built.progress.tokens,
        "validation_due": built.progress.validation_due,
        "stream": order_of_samples(built.config.run.seed, built.data),
        "optimizer": built.engine.scalar_state(),
        "world_size": built.context.world_size,
        "reference": built.reference,
    }
