"""Restores a checkpoint's state into a built run."""

import logging
from pathlib import Path

from checkpoint.folder import read_trainer_state
from checkpoint.named import LazyTensors, holds_named_state, load_named_state
from checkpoint.retention import delete_leftovers
from dataset.mixture import MixtureDataset
from parallel import hook_states
from parallel.comm_hooks import SavedStates
from parallel.context import DistContext
from parallel.division import Division
from parallel.engine import Engine
from parallel.mesh import Mesh
from training.config import Config
from training.data import Data, order_of_samples
from training.progress import Progress
from training.run_dir import RunDir

logger = logging.getLogger(__name__)


def load_checkpoint(
    config: Config,
    context: DistContext,
    run_dir: RunDir,
    data: Data,
    engine: Engine,
    division: Division | None = None,
) -> tuple[Progress, list[int] | None]:
    """Restore optimizer and position; weights come from the float32 main parameters.

    Args:
        division: what each rank holds of a model that is cut; None: all of it.
    Returns:
        the run's position, and the first and last position of the samples that are left out on request.
    Raises:
        ValueError: a setting that determines the run's course was changed.
    """
    state = read_trainer_state(run_dir.resumed_from)
    is_new_order = _check_same_run(config, data, state, run_dir.resumed_from)
    saved_by = hook_states.mesh_of(state, run_dir.chosen.world_size)
    run_dir.resume_files.bring_state(
        lambda folders: holds_named_state(folders, engine.named_state()),
        all_hooks=not hook_states.is_by_rank(saved_by, engine.mesh),
    )
    load_named_state(run_dir.resume_files.directories, engine.named_state())
    engine.take_state(state["optimizer"])
    _take_local_states(run_dir, engine, division, saved_by, state["step"], context.is_main)
    samples, left_out = 0 if is_new_order else state["samples_consumed"], None
    if config.data.resume_at_sample > samples:
        left_out = [samples, config.data.resume_at_sample - 1]
        samples = config.data.resume_at_sample
    context.barrier()
    if run_dir.place.is_first_of_store:
        delete_leftovers(run_dir.paths.ckpt_dir)
    # (Older checkpoints have no "validation_due".)
    return Progress(state["step"], samples, state["tokens"], state.get("validation_due", False)), left_out


def _check_same_run(config: Config, data: Data, state: dict, path: Path) -> bool:
    """Refuse settings that do not fit the state in `path`. Returns whether the samples come in a new order, as
    requested."""
    order = order_of_samples(config.run.seed, data)
    # A mixture goes on from any data in every source, see MixtureDataset.arrange.
    if isinstance(data.train, MixtureDataset):
        del order["data"]
    changed = [name for name, value in order.items() if state["stream"][name] != value]
    if changed and not (config.data.restart_data or config.run.valid_only):
        raise ValueError(
            f"{' and '.join(changed)} differ from the run's own, so its order of samples cannot go on: "
            f"restore them, or add --restart_data to begin a new pass over the data"
        )
    trained_with = state["optimizer"].get("name", "adamw")
    if trained_with != config.optimizer.optimizer:
        raise ValueError(
            f"the run was trained with --optimizer={trained_with}, whose state {config.optimizer.optimizer} cannot "
            f"go on from: give that optimizer, or begin a new run with --init_from={path}"
        )
    return bool(changed)


def _take_local_states(
    run_dir: RunDir, engine: Engine, division: Division | None, saved_by: Mesh, step: int, is_main: bool
) -> None:
    """Restore the state of the ranks' communication: what each rank's comm hook remembered.

    Args:
        saved_by: the mesh that has saved it.
    """
    files = run_dir.resume_files
    lost = files.lost_hook_states() if engine.local_state() is not None else []
    if lost and is_main:
        logger.warning("the memory of the comm hooks of ranks %s was found on no node: it is lost", lost)
    if hook_states.is_by_rank(saved_by, engine.mesh):
        states: SavedStates = ((LazyTensors(file), is_mine) for file, is_mine in files.hook_states())
    else:
        found = {rank: LazyTensors(file) for rank, file in files.all_hook_states().items()}
        if found and not hook_states.fits(saved_by, engine.mesh):
            if is_main:
                logger.warning(
                    "the memory of the comm hook in %s is dropped: matrices were cut into %d parts and experts shared "
                    "by %d ranks", run_dir.chosen.name, saved_by.tensor_size, saved_by.expert_size,
                )  # fmt: skip
            found = {}
        states = hook_states.by_parameter(found, saved_by, engine.mesh, division) if found else []
    for sentence in engine.take_local_states(states, step, run_dir.chosen.name):
        logger.warning(sentence)
