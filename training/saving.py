"""A rank's share of a checkpoint. resume.py reads it back."""

from checkpoint.folder import MODEL_FILE, TRAINER_STATE
from checkpoint.writing import CheckpointWriter
from model import hf
from model.generation_config import GENERATION_CONFIG
from training.build import Built
from training.data import order_of_samples


def add_share(built: Built, writer: CheckpointWriter) -> None:
    engine = built.engine
    writer.add_named_state(engine.named_state(), sharded=engine.is_sharded)
    local_state = engine.local_state()
    if local_state is not None:
        writer.add_hook_state(local_state)
    if built.run_dir.place.is_first_of_store:
        export = built.export
        config, family = built.model.config, export.family(built.model.config)
        writer.add_tensors(MODEL_FILE, hf.named_weights(built.model, family), {"format": "pt"})
        ids = export.generation.token_ids
        writer.add_json("config.json", hf.to_hf_config(config, built.dtype, **ids, family=family))
        writer.add_json(GENERATION_CONFIG, export.generation.to_hf())
        writer.add_folder(export.save_tokenizer)
        writer.add_json(TRAINER_STATE, _trainer_state(built))


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
