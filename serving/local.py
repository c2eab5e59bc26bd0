"""The engine in the process of a command, asked by one user, who may press Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

from serving.requests import Piece, Request


class Asked(Protocol):
    """What answers requests, one forward pass after the other; see serving/engine.py."""

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def step(self) -> list[Piece]: ...


class BrokenOff(KeyboardInterrupt):
    """A second Ctrl-C, within a forward pass: nobody knows what the engine holds, so it can answer nothing more."""

    def __init__(self) -> None:
        super().__init__("a second Ctrl-C has broken off a forward pass, after which the model cannot go on: start it "
                         "again")  # fmt: skip


def pieces_of(engine: Asked, requests: Iterable[Request], most: int | None = None) -> Iterator[Piece]:
    """Pieces of all answers as they come. If the caller leaves early, the rest is cancelled.

    Args:
        most: requests that the engine has at once; the next ones are taken as others end. None: all.
    Raises:
        ValueError: a request can never be served.
        KeyboardInterrupt: Ctrl-C, between two forward passes: within one, it would leave the cache half written, and
            other ranks waiting. A second one is obeyed at once: `BrokenOff`.
    """
    coming, is_between_steps = iter(requests), True
    left: dict[str, int] = {}  # Choices of each request that have not ended.

    def submit() -> None:
        for request in islice(coming, None if most is None else most - len(left)):
            engine.submit(request)
            left[request.id] = len(request.continuations) or request.n

    def note(piece: Piece) -> None:
        if piece.finish and piece.request in left:
            left[piece.request] -= 1
            if not left[piece.request]:
                del left[piece.request]

    def step() -> list[Piece]:
        nonlocal is_between_steps
        is_between_steps = False
        try:
            pieces = engine.step()
        except KeyboardInterrupt:
            raise BrokenOff from None
        is_between_steps = True
        return pieces

    with _interruptions() as is_interrupted:
        try:
            submit()
            while engine.has_work:
                pieces = step()
                for piece in pieces:
                    note(piece)
                yield from pieces
                if is_interrupted():
                    raise KeyboardInterrupt
                submit()
        finally:
            # After a step that failed, nobody knows what the engine holds.
            if is_between_steps:
                for request_id in left:
                    engine.cancel(request_id)
                while engine.has_work:
                    step()


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Lets Ctrl-C set a flag, the first time. Elsewhere than in the main thread, Python does not allow it."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
