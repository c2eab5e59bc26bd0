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
        load: makes a model of a checkpoint. It may raise ValueError or OSError.
        pause_s: between two looks.
    """

    def __init__(
        self, directory: Path, step: int, service: Service, load: Callable[[Path], Generation],
        pause_s: float = 2.0,
    ):  # fmt: skip
        self.step = step
        self._directory, self._service, self._load, self._pause_s = directory, service, load, pause_s
        self._skipped: set[str] = set()
        """Names of saves that cannot be used."""
        self._told = ""
        """The last complaint, which is not repeated."""
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
            except OSError as error:
                # A disk or a network that is away may come back.
                self._complain(f"the run cannot be followed for the moment: {error}")

    def look(self) -> bool:
        """Take the newest checkpoint that is whole, if it is newer than the one in service; returns whether there was
        one. Those that cannot be used are named once and skipped. While a model before the present one still works,
        there is no room for a third.

        Raises:
            OSError: the checkpoints cannot be read.
        """
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
                generation = self._load(checkpoint.path)
            except OSError as error:
                self._complain(f"checkpoint {checkpoint.path} cannot be read: {error}")
                continue
            except Exception as error:
                # Too little memory, for example. The server goes on with the model that it has.
                if checkpoint.path.exists():
                    self._skipped.add(checkpoint.part.save_id)
                    what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    self._complain(f"checkpoint {checkpoint.path} is skipped: {what}")
                continue
            self.step = checkpoint.step
            self._service.replace(generation)
            logger.info("new requests are answered by step %d", checkpoint.step)
            return True
        return False

    def _complain(self, sentence: str) -> None:
        if sentence != self._told:
            logger.warning(sentence)
        self._told = sentence
