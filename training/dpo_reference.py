"""The reference of DPO: log-probabilities of every pair under the model that the run began with."""

from collections.abc import Callable
from functools import cache, partial

import torch

from checkpoint.folder import read_trainer_state
from model.adapters.config import AdapterConfig
from model.adapters.folder import Weights
from parallel import DistContext
from parallel.mesh import Mesh
from tasks.dpo import DPOTask
from tasks.reference import ReferenceCache, compute_reference, weights_fingerprint
from training.adapter import first_weights
from training.build_model import load_weights, to_device
from training.config import RunConfig
from training.data import Data
from training.run_dir import RunDir


def prepare_reference(
    run: RunConfig,
    adapter: AdapterConfig,
    batch_size: int,
    context: DistContext,
    mesh: Mesh,
    run_dir: RunDir,
    data: Data,
    task: DPOTask,
    weights: Weights,
    dtype: torch.dtype,
    stop_requested: Callable[[], bool],
    forward_is_collective: bool = False,
) -> str:
    """Read the log-probabilities under the reference model into both sets, or compute missing ones.

    Call this before a resumed run's own weights are loaded, as it may load those that the run began with. A model with
    an adapter must hold these already, if they can be had.

    Args:
        batch_size: pairs in a batch.
        weights: those that the model was built from; of a resumed run, its checkpoint's.
        stop_requested: whether this rank was asked to stop.
        forward_is_collective: see Engine.
    Returns:
        fingerprint of the reference model, for the checkpoints.
    Raises:
        ValueError: they are gone, and the model that the run began with was not given.
        StopRequested: a rank was asked to stop.
    """
    model, is_resumed = task.model, run_dir.resumed_from is not None
    # Looked up once, as this verifies its files.
    first_model = cache(partial(_first_model, run, adapter, weights, is_resumed))

    def fingerprint() -> str:
        return context.decide_on_main(
            lambda: weights_fingerprint(first_model().base, model.config, dtype, first_model().adapter,
                                        adapter.load_in_4bit)
        )  # fmt: skip

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
                    f"the log-probabilities of the reference model are gone, and {first_model().told} is not the model "
                    f"that the run began with: give that with --init_from"
                )
            if weights.adapter is None:
                # Each rank may read other files, or rows, and the others would wait for one that has stopped.
                context.gather_from(lambda: load_weights(model, first_model().base, run.seed))
            has_weights = True
        dataset.reference = compute_reference(
            task, kept, batch_size, mesh.data_rank, mesh.data_size, context.all_sum,
            lambda batch: to_device(batch, model, context.device), lambda: run_dir.heartbeat.beat("reference", 0),
            stop_requested, forward_is_collective, mesh.counts,
        )  # fmt: skip
    return reference


def _first_model(run: RunConfig, adapter: AdapterConfig, weights: Weights, is_resumed: bool) -> Weights:
    """The model that the run began with."""
    if not is_resumed:
        return weights
    first = first_weights(run, adapter.adapter)
    if first is None:
        raise ValueError("the log-probabilities of the reference model are missing: give the model with --init_from")
    # The base of an adapter may have moved since; it is known to be the same.
    return Weights(weights.base, first.adapter) if weights.adapter is not None else first
