"""Console and `train.log`: the first rank speaks on the console, every rank's warnings go to the file."""

import logging
import sys
from pathlib import Path


class _RankFilter(logging.Filter):
    """Everything from rank 0, only warnings and worse from the others; each record learns its rank."""

    def __init__(self, rank: int):
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        return self._rank == 0 or record.levelno >= logging.WARNING


class _Patient:
    """A handler that loses lines where they cannot be written (a full disk, a closed pipe): a run must not end for want
    of its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(_Patient, logging.StreamHandler):
    pass


class _LogFile(_Patient, logging.FileHandler):
    pass


def setup_console(rank: int) -> None:
    """Send the root logger to standard output."""
    handler = _Console(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_RankFilter(rank))
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def add_log_file(path: Path, rank: int) -> None:
    """Also write to `path`, with time and rank. Ranks append to one file, a line at a time."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s %(message)s"))
    handler.addFilter(_RankFilter(rank))
    logging.getLogger().addHandler(handler)


def clock(seconds: float) -> str:
    """1:05 or 2:01:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def log_traceback() -> None:
    """Write the traceback of the exception being handled to the log files only: the console has its sentence."""
    record = logging.getLogger().makeRecord("train", logging.ERROR, __file__, 0, "", (), sys.exc_info())
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
