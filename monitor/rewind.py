"""--resume_from=best under the monitor: followed once, so that later training is not lost.

It has been followed once ranks have begun their steps, as later checkpoints are set aside right before. The first node
remembers this in the run directory, for the launches, monitors and machines that come after this one.
"""

import logging
from collections.abc import Iterable
from typing import Protocol

from monitor.command import TrainCommand
from monitor.node import NodeReport
from runs import layout

logger = logging.getLogger("monitor")

_NOTE = "went-back"


class _Node(Protocol):
    name: str

    def recall(self, name: str) -> dict | None: ...
    def remember(self, name: str, value: dict) -> None: ...
    def poll(self, log_from: int) -> NodeReport: ...


class Rewind:
    """Follows --resume_from for the launches of one monitor.

    Args:
        first: node of rank 0.
        run_dir: the run directory as the node names it.
    """

    def __init__(self, first: _Node, command: TrainCommand, run_dir: object):
        self._first, self._run_dir = first, run_dir
        self._flag, self._flags = command.flag("resume_from"), list(command.flags)
        self._begun: dict | None = None
        self._is_told = False

    @property
    def _is_asked_for(self) -> bool:
        return self._flag not in (None, "last")

    def flags_for(self, launch: str, resume: bool) -> list[str]:
        """Flags to add to a training that is launched now.

        Args:
            launch: name of the launch; on node N it is LAUNCH-N.
            resume: whether there is a checkpoint.
        Raises:
            OSError: the launch cannot be remembered, so it must not begin.
        """
        if not self._is_asked_for:
            return []
        note = self._first.recall(_NOTE)
        if note is not None and self._is_done(note):
            self._tell(note, resume)
            return ["--resume_from=last"] if resume else []
        self._begun = {"flags": self._flags, "launch": launch, "done": False}
        self._first.remember(_NOTE, self._begun)
        return []

    def _is_done(self, note: dict) -> bool:
        """Whether the flag has been followed, as far as one knows. An unreadable note means yes, which loses
        nothing."""
        if not {"flags", "launch", "done"} <= set(note):
            return True
        if note["flags"] != self._flags:
            return False
        if note["done"] is not False:
            return True
        # The launch may have begun its steps while nobody watched.
        beats = self._first.poll(0).heartbeats
        return _has_begun(beat for beat in beats if str(beat.get("launch")).startswith(f"{note['launch']}-"))

    def _tell(self, note: dict, resume: bool) -> None:
        if not resume or self._is_told:
            return
        self._is_told = True
        by = f", by launch {str(note['launch']).partition('-')[0]}" if note.get("launch") else ""
        logger.info(
            "--resume_from=%s was followed once%s: going on from the newest checkpoint; to go back again, delete "
            "%s/%s/%s.json on %s", self._flag, by, self._run_dir, layout.MONITOR_DIR, _NOTE, self._first.name,
        )  # fmt: skip

    def take_over(self, launch: str) -> None:
        """Watch a job that was launched before, by this command or by another."""
        self._begun = None
        if not self._is_asked_for:
            return
        note = self._first.recall(_NOTE)
        if note is not None and note.get("launch") == launch and note.get("done") is False:
            self._begun = note
        elif note is None or note.get("flags", self._flags) != self._flags:
            logger.warning("--resume_from=%s takes effect with the next launch", self._flag)

    def see(self, heartbeats: list[dict]) -> None:
        """Look at the heartbeats of the launch that is watched, and remember when the flag has been followed."""
        if self._begun is None or not _has_begun(heartbeats):
            return
        try:
            self._first.remember(_NOTE, self._begun | {"done": True})
            self._begun = None
        except (OSError, ValueError):
            # The next look tries again; until then, the ranks' own heartbeats show it.
            return


def _has_begun(heartbeats: Iterable[dict]) -> bool:
    """Whether a rank has passed the phases before the first step."""
    return any(beat["phase"] not in ("start", "reference") for beat in heartbeats)
