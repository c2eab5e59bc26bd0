"""The run directory, and the checkpoint in it that the run goes on from."""

import logging
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoint.choosing import Chosen
from checkpoint.fetching import CheckpointFiles
from checkpoint.opening import lock_run, open_run, prepare_run
from checkpoint.retention import Retention, delete_leftovers
from checkpoint.saving import CheckpointSaver
from checkpoint.stores import StorePlace, find_place
from parallel import DistContext
from parallel.launched import launch_token, launched_node
from runs.heartbeat import Heartbeat, write_stacks_on_signal
from runs.layout import RunPaths
from training.config import RunConfig, parse_log_ranks
from utils.logging import add_log_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDir:
    """The run directory as this rank sees it."""

    path: Path
    place: StorePlace
    heartbeat: Heartbeat
    saver: CheckpointSaver
    chosen: Chosen | None
    """Checkpoint to resume from."""
    resume_files: CheckpointFiles | None
    """Files of that checkpoint."""
    resumed_from: Path | None
    """Folder on this node that holds its model."""

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.path)


def open_run_dir(run: RunConfig, context: DistContext, resources: ExitStack) -> RunDir:
    """Create the run directory on each file system of the nodes, and find the checkpoint to resume from.

    Args:
        resources: gets what must be released at the end: the lock, and the thread that saves.
    Raises:
        ValueError: the directory cannot be used, or holds no such checkpoint.
    """
    path = Path(run.out_dir)
    paths = RunPaths(path)
    place, ckpt_dir = find_place(path, context.rank, context.world_size, context.gather), paths.ckpt_dir

    def open_store() -> None:
        if place.is_first_of_store:
            prepare_run(path)
            resources.enter_context(lock_run(path))
            delete_leftovers(ckpt_dir)

    context.gather_from(open_store)
    _open_log(path, run.log_ranks, context, place)
    heartbeat = Heartbeat(paths.heartbeat_dir, context.rank, context.world_size, launch_token())
    write_stacks_on_signal(paths.heartbeat_dir, context.rank)
    heartbeat.beat("start", 0)
    chosen, remarks = open_run(path, run.resume, run.resume_from, place, context.gather)
    for remark in remarks if context.is_main else ():
        logger.warning(remark)
    saver = CheckpointSaver(
        ckpt_dir, place, context.decide_on_main(lambda: secrets.token_hex(4)), context.device,
        Retention(run.keep_last, run.keep_best, run.keep_every), run.async_save, context.gather,
    )  # fmt: skip
    # Released before the lock: nobody else may use the directory while a save is in flight.
    resources.callback(saver.close)
    files = resumed_from = None
    if chosen is not None and context.is_main and not paths.config.exists():
        logger.warning("%s is missing: what this command leaves out takes its default", paths.config)
    if chosen is not None:
        send_file = partial(context.send_file, between=lambda: heartbeat.beat("start", 0))
        files = CheckpointFiles(ckpt_dir, chosen, place, context.gather, send_file)
        resumed_from = files.bring_model()
    return RunDir(path, place, heartbeat, saver, chosen, files, resumed_from)


def _open_log(path: Path, log_ranks: str, context: DistContext, place: StorePlace) -> None:
    """Open the log of this node. Of the nodes that share this run directory, the first one's has the plain name."""
    nodes, chosen = context.gather(launched_node()), parse_log_ranks(log_ranks)
    file = RunPaths(path).log_of_node(nodes[context.rank], nodes[place.store[0]])
    add_log_file(file, context.rank, info=chosen is None or context.rank in chosen)
