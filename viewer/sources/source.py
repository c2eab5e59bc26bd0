"""The runs on one machine, kept up to date by a thread."""

import logging
import posixpath
import threading
import time
from collections.abc import Callable, Sequence

from runs.layout import RESLOG_NAME
from utils.ssh import HostKeyRefused, LoginRefused, SSHTarget
from utils.text import plain
from viewer.sources.addresses import RunAddress
from viewer.sources.files import Files, is_of_one_file, why_unreadable
from viewer.sources.labels import in_order
from viewer.sources.local import LocalFiles
from viewer.sources.run import Run
from viewer.sources.ssh import Questions, RememberedAnswers, open_remote

logger = logging.getLogger(__name__)

_LOOK_ROUND_S = 5.0
"""Time between two looks for configurations, heartbeats and new runs."""
_LONGEST_WAIT_S = 30.0
"""Longest time between two attempts to connect."""


class RunSource:
    """The runs on one machine, kept up to date by one thread over one connection, which is renewed when it breaks.

    Args:
        target: None: this machine.
        paths: each a run, a file like reslog.jsonl, or a folder of runs.
        on_change: called from the thread when something is new; it must not block.
        questions: None: nobody is there to answer.
        interval_s: seconds between two looks at the files.
        ssh_config: used instead of ~/.ssh/config.
    """

    def __init__(
        self,
        target: SSHTarget | None,
        paths: Sequence[str],
        on_change: Callable[[], None],
        questions: Questions | None = None,
        interval_s: float = 1.0,
        ssh_config: str | None = None,
    ):
        self.target, self._paths, self._on_change = target, list(paths), on_change
        self._interval_s, self._ssh_config = interval_s, ssh_config
        self._answers = RememberedAnswers(questions) if questions else None
        self.runs: tuple[Run, ...] = ()
        self.problem = ""
        """Why there is no connection; empty if there is one."""
        self.loaded = threading.Event()
        """Set once everything that was there has been read, or cannot be."""
        self._stop, self._wake = threading.Event(), threading.Event()
        self._files: Files | None = None
        self._looked_round = 0.0
        self._known_paths: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._work, name=f"runs-{self.name}", daemon=True)

    @property
    def name(self) -> str:
        return self.target.host if self.target else "here"

    def start(self) -> None:
        self._thread.start()

    def add(self, path: str) -> None:
        self._paths.append(path)
        self.retry()

    def retry(self) -> None:
        """Look again at once."""
        self._wake.set()

    def stop(self) -> None:
        """Ask the thread to end. It ends within a second unless it waits for the network."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _work(self) -> None:
        wait_s = 1.0
        while not self._stop.is_set():
            try:
                if self._files is None:
                    self._files = self._open()
                self.problem = ""
                more = self._round(self._files)
                wait_s, pause_s = 1.0, 0.0 if more else self._interval_s
            except (HostKeyRefused, LoginRefused) as error:
                # Another attempt would end the same way, and too many of them lock an account.
                if self._answers:
                    self._answers.forget()
                self._lost(str(error))
                pause_s = None
            except Exception as error:
                # paramiko raises many kinds; and after a mistake of ours, the other hosts' runs can still be watched.
                of_network = isinstance(error, (OSError, EOFError)) or type(error).__module__.startswith("paramiko")
                if not of_network:
                    logger.exception("reading the runs of %s failed", self.name)
                pause_s, wait_s = wait_s, min(2 * wait_s, _LONGEST_WAIT_S)
                lost = of_network and self.target is not None and self._files is not None
                why = "the connection was lost" if lost else plain(error) or type(error).__name__
                self._lost(f"{why}; tried again in {pause_s:.0f} s")
            self._on_change()
            if pause_s is None or pause_s > 0:
                self._wake.wait(pause_s)
                self._wake.clear()
        if self._files is not None:
            self._files.close()

    def _open(self) -> Files:
        if self.target is None:
            return LocalFiles()
        return open_remote(self.target, self._answers, self._ssh_config)

    def _lost(self, problem: str) -> None:
        self.problem = problem
        for run in self.runs:
            run.health.problem = problem
        if self._files is not None:
            self._files.close()
            self._files = None
        self._looked_round = 0.0
        self.loaded.set()

    def _round(self, files: Files) -> bool:
        """Look at every run once, and return whether one has more to read at once."""
        looks_round = time.monotonic() - self._looked_round > _LOOK_ROUND_S or tuple(self._paths) != self._known_paths
        if looks_round:
            self._looked_round, self._known_paths = time.monotonic(), tuple(self._paths)
            self._find_runs(files)
        more = False
        for run in self.runs:
            try:
                more |= run.update(files)
                if looks_round:
                    run.look_round(files)
                run.health.problem = ""
            except OSError as error:
                if not is_of_one_file(error, files):
                    raise
                run.health.problem = why_unreadable(run.path, error)
            if self._stop.is_set():
                return False
        if not more:
            self.loaded.set()
        return more

    def _find_runs(self, files: Files) -> None:
        known = {run.path: run for run in self.runs}
        found: dict[str, None] = {}
        for path in self._paths:
            path = path.rstrip("/") or path
            if path.endswith(".jsonl") or self._holds_run(files, path):
                found[path] = None
                continue
            inside = [posixpath.join(path, name) for name in sorted(files.folders(path), key=in_order)]
            # A folder without runs may become a run.
            found |= dict.fromkeys([folder for folder in inside if self._holds_run(files, folder)] or [path])
        self.runs = tuple(known.get(path) or Run(self.target, path) for path in found)

    @staticmethod
    def _holds_run(files: Files, path: str) -> bool:
        try:
            return files.state(posixpath.join(path, RESLOG_NAME)) is not None
        except OSError as error:
            if not is_of_one_file(error, files):
                raise
            return False


def open_sources(addresses: Sequence[RunAddress], **options) -> list[RunSource]:
    """One RunSource for each machine, not started yet. The options are RunSource's."""
    paths: dict[SSHTarget | None, list[str]] = {}
    for address in addresses:
        paths.setdefault(address.target, []).append(address.path)
    return [RunSource(target, found, **options) for target, found in paths.items()]
