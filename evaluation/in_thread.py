"""An evaluation in a thread of its own, whose questions another thread answers.

    thread       task -> score(...)                           -> the task's figures -> next task
    its owner               answers by forward passes on all ranks        takes the figures

So a run stays in charge while an evaluation reads data or scores programs: it beats its heart, looks for requests to
stop, and can leave an evaluation behind that hangs. The collectives all come from one thread. Needs no torch.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple

from evaluation.asking import Answerer, Score, Scoring, Writing, Written
from evaluation.task import Outcome
from tokenizer import Tokenizer

_LOOK_S = 0.2
"""Time between looks whether the evaluation was left."""


class Asked(NamedTuple):
    """Requests of the thread."""

    kind: Literal["score", "write"]
    requests: Sequence[Any]
    answers: SimpleQueue
    """Takes (place, answer) for each of them."""


class Done(NamedTuple):
    """The thread has ended."""

    error: BaseException | None


class EvaluationThread:
    """The thread, and the Answerer that it sees.

    Args:
        work: yields outcomes, and asks the Answerer that it is given.
        tokenizer, context, can_write: see Answerer.
    """

    def __init__(
        self, work: Callable[[Answerer], Iterator[Outcome]], tokenizer: Tokenizer, context: int, can_write: bool
    ):
        self.tokenizer, self.context, self.can_write = tokenizer, context, can_write
        self._events: SimpleQueue[Asked | Outcome | Done] = SimpleQueue()
        self._work, self._is_left = work, False
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def next_event(self, patience_s: float) -> Asked | Outcome | Done | None:
        """What the thread wants next; None: nothing yet."""
        try:
            return self._events.get(timeout=patience_s)
        except Empty:
            return None

    def leave(self, patience_s: float) -> None:
        """Let the thread end at its next question, and wait for that; not for long, as it may hang."""
        self._is_left = True
        self._thread.join(patience_s)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def score(self, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        return self._ask("score", asked)

    def write(self, asked: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
        return self._ask("write", asked)

    def _ask(self, kind: Literal["score", "write"], asked: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        answers: SimpleQueue = SimpleQueue()
        if asked:
            self._events.put(Asked(kind, list(asked), answers))
        num_left = len(asked)
        while num_left:
            self._require_owner()
            with suppress(Empty):
                yield answers.get(timeout=_LOOK_S)
                num_left -= 1

    def _require_owner(self) -> None:
        if self._is_left:
            raise InterruptedError("nobody answers any more")

    def _run(self) -> None:
        error = None
        try:
            for outcome in self._work(self):
                self._require_owner()
                self._events.put(outcome)
        except BaseException as caught:
            # Foreign code, which may even try to leave the process.
            error = caught
        self._events.put(Done(error))
