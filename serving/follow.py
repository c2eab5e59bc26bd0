"""Following a run: each new checkpoint replaces the model in service, without dropping a request."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from checkpoint.folder import find_problem, list_checkpoints
from serving.service import Generation, Service

logger = logging.getLogger(__name__)


class Follower:
    """Looks for new checkpoints in a thread of its own.

    Args:
        directory: of the run's checkpoints.
        step: of the checkpoint in service.
        load: makes a model of a checkpoint and its step. It may raise ValueError or OSError.
        pause_s: between two looks.
    """

    def __init__(
        self, directory: Path, step: int, service: Service, load: Callable[[Path, int], Generation],
        pause_s: float = 2.0,
    ):  # fmt: skip
        self.step = step
        self._directory, self._service, self._load, self._pause_s = directory, service, load, pause_s
        self._skipped: set[str] = set()
        """Names of saves that could not be used."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the present look. (A model that is being loaded does not hold up the end of the process.)"""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            try:
                self.look()
            except Exception:
                # The server goes on with the model that it has.
                logger.exception("the run cannot be followed for the moment")

    def look(self) -> bool:
        """Take the newest checkpoint that is whole, if it is newer than the one in service; returns whether there was
        one. Broken ones are named once and skipped. While a model before the present one still works, there is no room
        for a third."""
        if self._service.has_old:
            return False
        for checkpoint in reversed(list_checkpoints(self._directory)):
            if checkpoint.step <= self.step:
                return False
            if not checkpoint.has_manifest or checkpoint.part.save_id in self._skipped:
                continue
            try:
                if problem := find_problem(checkpoint.path, weights_only=True):
                    raise ValueError(problem)
                generation = self._load(checkpoint.path, checkpoint.step)
            except (ValueError, OSError) as error:
                if checkpoint.path.exists():
                    self._skipped.add(checkpoint.part.save_id)
                    logger.warning("checkpoint %s is skipped: %s", checkpoint.path, error)
                continue
            self.step = checkpoint.step
            self._service.replace(generation)
            logger.info("new requests are answered by step %d", checkpoint.step)
            return True
        return False
