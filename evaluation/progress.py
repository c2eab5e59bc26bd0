"""What an evaluation that runs shows: how many answers there are, and how long the rest takes.

On a terminal, one line that changes; in a log, a line a minute.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO, TypeVar

from evaluation.asking import Answerer, Score, Scoring, Writing, Written

_TERMINAL_S, _LOG_S = 0.5, 60.0
"""Time between two lines."""
_Answer = TypeVar("_Answer")


class Progress:
    """An Answerer that shows how far another one is."""

    def __init__(self, answerer: Answerer, to: TextIO | None = None):
        self._answerer, self._to = answerer, to or sys.stderr
        self.tokenizer, self.context, self.can_write = answerer.tokenizer, answerer.context, answerer.can_write
        self._changes = self._to.isatty()

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        return self._shown(self._answerer.score(asked), len(asked), "scored")

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        return self._shown(self._answerer.write(asked), len(asked), "written")

    def _shown(self, answers: Iterator[_Answer], total: int, done: str) -> Iterator[_Answer]:
        began = told = time.monotonic()
        every = _TERMINAL_S if self._changes else _LOG_S
        try:
            for number, answer in enumerate(answers, 1):
                yield answer
                now = time.monotonic()
                if now - told >= every:
                    told = now
                    left = (now - began) / number * (total - number)
                    self._tell(f"{number:,} of {total:,} answers {done}, {duration(left)} left")
        finally:
            if self._changes and told != began:
                self._to.write("\r\x1b[K")
                self._to.flush()

    def _tell(self, text: str) -> None:
        self._to.write(f"\r\x1b[K{text}" if self._changes else f"{text}\n")
        self._to.flush()


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "7 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
