"""The reference of DPO: log-probabilities of every pair under the model that the run began with."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from checkpoint.choosing import resolve_checkpoint_dir
from checkpoint.folder import read_trainer_state
from parallel import DistContext
from tasks.dpo import DPOTask
from tasks.reference import ReferenceCache, compute_reference, weights_fingerprint
from training.build_model import load_weights, to_device
from training.config import RunConfig
from training.data import Data
from training.run_dir import RunDir


def prepare_reference(
    run: RunConfig,
    batch_size: int,
    context: DistContext,
    run_dir: RunDir,
    data: Data,
    task: DPOTask,
    weights: Path,
    dtype: torch.dtype,
    stop_requested: Callable[[], bool],
) -> str:
    """Read the log-probabilities under the reference model into both sets, or compute missing ones.

    Call this before a resumed run's own weights are loaded, as it may load those that the run began with.

    Args:
        batch_size: pairs in a batch.
        weights: folder of the weights that the model was built from.
        stop_requested: whether this rank was asked to stop.
    Returns:
        fingerprint of the reference model, for the checkpoints.
    Raises:
        ValueError: they are gone, and the model that the run began with was not given.
        StopRequested: a rank was asked to stop.
    """
    model, is_resumed = task.model, run_dir.resumed_from is not None
    # Looked up once, as this verifies its files.
    first_model = cache(partial(_first_model, run.init_from, weights, is_resumed))

    def fingerprint() -> str:
        return context.decide_on_main(lambda: weights_fingerprint(first_model(), model.config, dtype))

    saved = read_trainer_state(run_dir.resumed_from).get("reference") if is_resumed else None
    reference = saved or fingerprint()
    has_weights = not is_resumed
    for split, dataset in (("train", data.train), ("valid", data.valid)):
        if dataset is None or (run.valid_only and split == "train"):
            continue
        kept = ReferenceCache(dataset, split, reference, run_dir.path)
        dataset.reference = kept.read_on_main(context.is_main, context.all_sum)
        if dataset.reference is not None:
            continue
        if not has_weights:
            # In a resumed run whose log-probabilities are gone, the model that it began with is needed again.
            if fingerprint() != reference:
                raise ValueError(
                    f"the log-probabilities of the reference model are gone, and {first_model()} is not the model "
                    f"that the run began with: give that with --init_from"
                )
            load_weights(model, first_model(), run.seed)
            has_weights = True
        dataset.reference = compute_reference(
            task, kept, batch_size, context.rank, context.world_size, context.all_sum,
            lambda batch: to_device(batch, model, context.device), lambda: run_dir.heartbeat.beat("reference", 0),
            stop_requested,
        )  # fmt: skip
    return reference


def _first_model(init_from: str, weights: Path, is_resumed: bool) -> Path:
    """Folder of the model that the run began with."""
    if not is_resumed:
        return weights
    if not init_from:
        raise ValueError("the log-probabilities of the reference model are missing: give the model with --init_from")
    return resolve_checkpoint_dir(Path(init_from))
