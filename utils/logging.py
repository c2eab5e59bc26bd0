"""Console and log files of a run.

The first rank speaks on the console. A node's file holds the messages of chosen ranks and every rank's warnings. A
process shows a warning once, wherever it comes from; the number of repeats is told at the end
(`log_repeated_warnings`).
"""

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_MOST_TEXTS, _LONGEST_TEXT = 1000, 2000
"""Most warnings that are remembered, and most characters of one: others are shown each time."""
_SHOWN_REPEATS = 3


class _RankFilter(logging.Filter):
    """Lets pass warnings and worse, and with `info` all messages of this project; each record gets its rank. (At exit,
    torch reports caches that a run never used.)"""

    def __init__(self, rank: int, info: bool):
        super().__init__()
        self._rank, self._info = rank, info

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        is_torch = record.name == "torch" or record.name.startswith("torch.")
        return record.levelno >= logging.WARNING or (self._info and not is_torch)


class _Once(logging.Filter):
    """Lets a warning pass the first time, and counts the times that the same words come again."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}
        """Text -> number of times that it was held back."""
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        # Console and file each ask about the same record.
        if not hasattr(record, "is_repeat"):
            record.is_repeat = self._is_repeat(record.getMessage())
        return not record.is_repeat

    def _is_repeat(self, text: str) -> bool:
        with self._lock:
            if text in self.counts:
                self.counts[text] += 1
                return True
            if len(self.counts) < _MOST_TEXTS and len(text) <= _LONGEST_TEXT:
                self.counts[text] = 0
            return False


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"rank {record.rank}: {text}" if record.rank else text


class _Patient:
    """A handler that drops lines that cannot be written (a full disk, a closed pipe): a run must not end because of its
    log."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(_Patient, logging.StreamHandler):
    def __init__(self):
        super().__init__(sys.stdout)
        self.once = _Once()


class _LogFile(_Patient, logging.FileHandler):
    def __init__(self, path: Path):
        # The name of a file may hold bytes that are not UTF-8.
        super().__init__(path, encoding="utf-8", errors="backslashreplace")


def _console() -> _Console | None:
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, _Console)), None)


def setup_console(rank: int) -> None:
    """Send the root logger, and warnings of libraries, to standard output as plain lines. Ranks other than the first
    give their number."""
    handler = _Console()
    handler.setFormatter(_ConsoleFormatter("%(message)s"))
    handler.addFilter(_RankFilter(rank, info=rank == 0))
    handler.addFilter(handler.once)
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(_without_source_line)


def _without_source_line(record: logging.LogRecord) -> bool:
    """Keep place, category and text of a message from the module `warnings`, without its source line."""
    text = record.getMessage().rstrip("\n")
    before, _, last = text.rpartition("\n")
    record.msg, record.args = (before if before and last.startswith("  ") else text), ()
    return True


def add_log_file(path: Path, rank: int, info: bool = True) -> None:
    """Also write to `path`, with time and rank. The ranks of a node append to one file, a line at a time.

    Args:
        info: write all messages; False: only warnings and worse.
    """
    handler, console = _LogFile(path), _console()
    handler.setFormatter(logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s %(message)s"))
    handler.addFilter(_RankFilter(rank, info))
    if console is not None:
        handler.addFilter(console.once)
    logging.getLogger().addHandler(handler)


def log_repeated_warnings(say: Callable[[str], object]) -> None:
    """Call `say` with a line about each of the most repeated warnings, and forget the counts."""
    console = _console()
    if console is None:
        return
    counts = {text: count for text, count in console.once.counts.items() if count}
    console.once.counts.update(dict.fromkeys(counts, 0))
    most = sorted(counts, key=counts.get, reverse=True)
    for text in most[:_SHOWN_REPEATS]:
        line = " ".join(text.split())
        shown = line if len(line) <= 100 else f"{line[:97]}..."
        say(f"{counts[text]} more warning{'s' if counts[text] > 1 else ''} like: {shown}")
    if len(most) > _SHOWN_REPEATS:
        rest = sum(counts[text] for text in most[_SHOWN_REPEATS:])
        say(f"{rest} more repeat{'s' if rest > 1 else ''} of other warnings")


def clock(seconds: float) -> str:
    """1:05 or 2:01:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def log_traceback() -> None:
    """Write the traceback of the exception being handled to the log files only: the console shows its sentence."""
    record = logging.getLogger().makeRecord("train", logging.ERROR, __file__, 0, "", (), sys.exc_info())
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
