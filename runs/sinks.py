"""Other places for a run's results: TensorBoard and Weights & Biases, beside `reslog.jsonl`.

Neither may hold up or end a run, whatever it does: records go through a queue to a thread of their own, and the first
failure of a sink is a warning and the end of that sink.

Steps that a launch lost are superseded there, too. TensorBoard learns this at the start (`purge_step`). Weights &
Biases cannot take steps back: each launch makes a run of its own there, all in one group, and first sends the records
of earlier launches that stand. So the newest run of a group is the whole curve.
"""

import importlib.util
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from runs.layout import RunPaths
from runs.reslog import number, read_reslog

logger = logging.getLogger(__name__)

_MOST_QUEUED = 10_000
"""Most records in the queue; a sink that is further behind loses some."""
_PATIENCE_S = 20.0
"""Seconds that a sink may take to finish at the end of a run."""
LONGEST_CLOSE_S = 2 * _PATIENCE_S
"""Most seconds that `Sinks.close` takes: for room in the queue, and for the sinks to finish."""


class Sink(Protocol):
    """A place for results."""

    def write(self, record: dict) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars of each record as `name/metric` (train/loss), in RUN/tensorboard."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(RunPaths(run_dir).tensorboard_dir), purge_step=step + 1, flush_secs=10)

    def write(self, record: dict) -> None:
        for metric, value in scalars(record).items():
            self._writer.add_scalar(f"{record['name']}/{metric}", value, record["step"], record["time"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same scalars in a run of `project`; its files lie in RUN/wandb.

    Args:
        mode: "online" or "offline".
        settings: the run's configuration.
        standing: the records of earlier launches that stand.
    """

    def __init__(self, run_dir: Path, project: str, mode: str, attempt: int, settings: dict, standing: list[dict]):
        import wandb

        name = run_dir.resolve().name
        self._run = wandb.init(
            project=project, group=name, name=f"{name}, launch {attempt}" if attempt > 1 else name, mode=mode,
            dir=str(run_dir), config=settings, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for record in standing:
            self.write(record)

    def write(self, record: dict) -> None:
        found = {f"{record['name']}/{metric}": value for metric, value in scalars(record).items()}
        if found:
            self._run.log({"step": record["step"], **found})

    def close(self) -> None:
        self._run.finish()


def check_sinks(tensorboard: bool, wandb_project: str) -> None:
    """Check that the packages of the wanted sinks are installed.

    Raises:
        ValueError: one is missing.
    """
    needed = {"tensorboard": ("--tensorboard", tensorboard), "wandb": ("--wandb_project", wandb_project)}
    for package, (flag, wanted) in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag} needs the package {package}: pip install -r requirements-loggers.txt")


def open_sinks(
    run_dir: Path, step: int, tensorboard: bool, wandb_project: str, wandb_mode: str, settings: dict[str, object]
) -> "Sinks | None":
    """The sinks of a launch that begins after `step`; None if only its log is wanted. The log must not hold its start
    record yet."""
    makers: dict[str, Callable[[], Sink]] = {}
    if tensorboard:
        makers["TensorBoard"] = lambda: TensorBoard(run_dir, step)
    if wandb_project:
        log = RunPaths(run_dir).reslog
        earlier = read_reslog(log) if log.exists() else []
        attempt = 1 + sum(record["name"] == "start" for record in earlier)
        standing = [record for record in earlier if record.get("step", 0) <= step]
        makers["Weights & Biases"] = lambda: WeightsAndBiases(
            run_dir, wandb_project, wandb_mode, attempt, settings, standing
        )
    return Sinks(makers) if makers else None


def scalars(record: dict) -> dict[str, float]:
    """The metrics of a record; none if it has no step."""
    if record.get("step") is None or record["name"] in ("start", "sample"):
        return {}
    found = {metric: number(value) for metric, value in record.items() if metric not in ("name", "time", "step")}
    return {metric: value for metric, value in found.items() if value is not None}


def _make_into(sinks: dict[str, Sink], name: str, make: Callable[[], Sink]) -> None:
    sinks[name] = make()


class Sinks:
    """A thread that makes sinks and feeds them.

    Args:
        makers: name of a sink -> makes it; called in the thread, as it may wait for a network.
    """

    def __init__(self, makers: dict[str, Callable[[], Sink]]):
        self._makers = makers
        self._queue: queue.Queue[dict | None] = queue.Queue(_MOST_QUEUED)
        self._warned_full = False
        self._thread = threading.Thread(target=self._work, name="result-sinks", daemon=True)
        self._thread.start()

    def put(self, record: dict) -> None:
        """Hand over a record; never blocks."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            if not self._warned_full:
                self._warned_full = True
                logger.warning("%s cannot keep up: some of its records are lost", " and ".join(self._makers))

    def close(self) -> None:
        """Let the sinks finish, within some seconds."""
        try:
            self._queue.put(None, timeout=_PATIENCE_S)
        except queue.Full:
            pass
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            logger.warning("%s did not finish in time: its last records may be missing", " and ".join(self._makers))

    def _work(self) -> None:
        sinks: dict[str, Sink] = {}
        for name, make in self._makers.items():
            self._attempt(sinks, name, partial(_make_into, sinks, name, make))
        while (record := self._queue.get()) is not None:
            for name in list(sinks):
                self._attempt(sinks, name, partial(sinks[name].write, record))
        for name in list(sinks):
            self._attempt(sinks, name, sinks[name].close)

    def _attempt(self, sinks: dict[str, Sink], name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            # Foreign code over a network: it can fail in any way, and the run must not.
            sinks.pop(name, None)
            logger.warning(
                "results go to %s no more, the run and its reslog.jsonl go on: %s: %s",
                name, type(error).__name__, error,
            )  # fmt: skip
