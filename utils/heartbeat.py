"""Signs of life, one file a rank, written by the training thread only: another thread's beat would hide a hang."""

import logging
import os
import time
from pathlib import Path

from utils.files import atomic_write_json

logger = logging.getLogger(__name__)

PHASES = ("start", "reference", "compile", "step", "validate", "save", "end")


class Heartbeat:
    def __init__(self, directory: Path, rank: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._warned = False
        self._path, self._rank = directory / f"rank-{rank}.json", rank

    def beat(self, phase: str, step: int) -> None:
        """Record that this rank is alive: {rank, pid, phase, step, time (seconds since 1970)}. A failure to write is
        warned of, once."""
        assert phase in PHASES
        record = {"rank": self._rank, "pid": os.getpid(), "phase": phase, "step": step, "time": time.time()}
        try:
            atomic_write_json(self._path, record, durable=False)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("heartbeats cannot be written any more: %s", error)
