"""The engine in a thread of its own, and asyncio's way to it.

    asyncio                     inbox              engine's thread
    answer(...)     -- engine.submit, cancel -->   step, step, step ...
    take()          <-- pieces, once a step --     (never waits for a reader)
                       mailbox of each answer

What waits is bounded: so many choices may be open at once, whether they are computed or their readers are slow, and
each has at most the tokens of one context. An answer that nobody wants any more leaves the engine before its next step.

A server that follows a run replaces its model while it works. Requests keep the model with which they began: the old
engine and the new one take turns until the old one has nothing left to do.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from serving.catalog import Catalog
from serving.fields import Mistake
from serving.requests import EngineStats, Piece, Request

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Steps in a row that may fail before the engine counts as broken."""
_COUNTS = ("prompt_tokens", "cached_tokens", "new_tokens", "preemptions", "steps")
RETRY_AFTER_S = 2
"""Advice to clients that are sent away because too many others wait."""


class EngineLike(Protocol):
    """What a service needs of an engine; see serving/engine.py."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[Piece]: ...
    def stats(self) -> EngineStats: ...


@dataclass(eq=False)
class Generation:
    """A model in service."""

    engine: EngineLike
    catalog: Catalog
    fingerprint: str | None = None
    """What answers tell as their system_fingerprint."""
    leases: int = 0
    """Requests that began with this model and have not ended. Changed by asyncio's thread alone."""
    is_retired: bool = False
    failures: int = 0
    """Steps that failed since the last one that did not."""
    loss: Callable[[], str] = lambda: ""
    """What cannot go on after a step that failed, such as the device; empty: nothing was lost."""


@dataclass(eq=False)
class Answer:
    """The pieces of one or several requests that belong together, as they come."""

    generation: Generation
    requests: tuple[Request, ...]
    left: int
    """Choices that have not ended, in the engine's thread."""
    accepted: asyncio.Future
    is_cancelled: bool = False
    _mailbox: list[Piece] = field(default_factory=list)
    _has_mail: asyncio.Event = field(default_factory=asyncio.Event)
    _unfinished: int = 0

    def __post_init__(self) -> None:
        self._unfinished = self.left

    def deliver(self, pieces: Sequence[Piece]) -> None:
        """In asyncio's thread."""
        self._mailbox += pieces
        self._has_mail.set()

    async def take(self) -> list[Piece]:
        """All pieces that came since the last call, at least one; empty after the end."""
        if self._unfinished <= 0:
            return []
        await self._has_mail.wait()
        self._has_mail.clear()
        taken, self._mailbox = self._mailbox, []
        self._unfinished -= sum(piece.finish is not None for piece in taken)
        return taken


class Service:
    """An engine for asyncio.

    Args:
        generation: the model to begin with.
        most_open: choices that may be open at once.
        step_timeout_s: a step that runs longer may hang.
    """

    def __init__(self, generation: Generation, most_open: int, step_timeout_s: float = 600.0):
        self.most_open, self._step_timeout_s = most_open, step_timeout_s
        self.open = 0
        """Choices whose requests have not ended."""
        self.is_ending = False
        self.broken = ""
        """A sentence if the engine cannot go on."""
        self.lost = asyncio.Event()
        """Set if the whole process must be started again, with the other ranks if there are some."""
        self._current = generation
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        # These belong to the engine's thread.
        self._generations = [generation]
        self._answers: dict[str, Answer] = {}
        self._is_closed = False
        self._step_began: float | None = None
        self._stats = [generation.engine.stats()]
        self._past = dict.fromkeys(_COUNTS, 0)

    # -- asyncio's side

    @property
    def current(self) -> Generation:
        """The model that new requests get."""
        return self._current

    @property
    def problem(self) -> str:
        """A sentence if new requests would not be answered; empty: all is well."""
        if sentence := self._why_broken():
            return sentence
        began = self._step_began
        if began is not None and (seconds := time.monotonic() - began) > self._step_timeout_s:
            return f"a step of the engine has been running for {seconds:.0f} s: it may hang"
        return "the server is ending" if self.is_ending else ""

    def _why_broken(self) -> str:
        if self.broken or self._loop is None or self._is_closed or self._thread.is_alive():
            return self.broken
        return "the engine's thread has ended; the server must be started again"

    def start(self) -> None:
        """Begin to work, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def end(self) -> None:
        """Refuse what is new from now on."""
        self.is_ending = True
        self._notice_end()

    async def ended(self) -> None:
        """Wait until nothing is open any more, after `end`."""
        await self._ended.wait()

    def close(self, patience_s: float = 10.0) -> None:
        """Stop the thread, whatever it has to do."""
        self._inbox.put(self._close)
        self._thread.join(patience_s)

    @contextmanager
    def lease(self) -> Iterator[Generation]:
        """The current model, which stays until the end of the context.

        Raises:
            Mistake: the service ends, or the engine is broken.
        """
        if self.is_ending:
            raise Mistake("the server is ending: try again later, or elsewhere", code="ending", status=503)
        if sentence := self._why_broken():
            raise Mistake(sentence, code="engine_failed", status=503)
        generation = self._current
        generation.leases += 1
        try:
            yield generation
        finally:
            generation.leases -= 1
            # The thread may wait for this to let the model go.
            self._inbox.put(_nothing)

    @asynccontextmanager
    async def answer(self, generation: Generation, requests: Sequence[Request]) -> AsyncIterator[Answer]:
        """Pieces that the engine makes for some requests. Leaving the context cancels what has not ended.

        Args:
            generation: a lease of it is held.
        Raises:
            Mistake: the engine can never serve one of them, or too many others wait.
        """
        weight = sum(max(request.n, request.sampling.num_beams) for request in requests)
        if self.open + weight > self.most_open:
            self._refuse(weight)
        self.open += weight
        answer = Answer(generation, tuple(requests), sum(request.n for request in requests),
                        asyncio.get_running_loop().create_future())  # fmt: skip
        self._inbox.put(lambda: self._submit(answer))
        try:
            await answer.accepted
            yield answer
        finally:
            answer.is_cancelled = True
            self._inbox.put(lambda: self._cancel(answer))
            self.open -= weight
            self._notice_end()

    def _refuse(self, weight: int) -> None:
        if weight > self.most_open:
            raise Mistake(f"a request for {weight} texts at once is more than the {self.most_open} that this server "
                          f"takes (--max_running and --max_queue): ask for fewer", "n")  # fmt: skip
        raise Mistake("too many requests wait already: try again in a moment", code="queue_full", status=429,
                      headers={"Retry-After": str(RETRY_AFTER_S)})  # fmt: skip

    def replace(self, generation: Generation) -> None:
        """Give new requests another model. The old one leaves when its requests have ended. Callable from any thread.
        """
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._replace, generation)

    def _replace(self, generation: Generation) -> None:
        self._inbox.put(lambda: self._generations.append(generation))
        self._current.is_retired, self._current = True, generation
        self._inbox.put(_nothing)

    @property
    def has_old(self) -> bool:
        """Whether a model that was replaced still works."""
        return any(generation is not self._current for generation in list(self._generations))

    def stats(self) -> EngineStats:
        """State of the engines together, as of the last step."""
        each = self._stats
        both = {name: sum(getattr(stats, name) for stats in each) for name in EngineStats._fields}
        return EngineStats(**{name: value + self._past.get(name, 0) for name, value in both.items()})

    def _notice_end(self) -> None:
        if self.is_ending and not self.open:
            self._ended.set()

    # -- the engine's thread

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._work()
            except Exception:
                # The thread on which all depend must not vanish without a word.
                logger.exception("the engine's thread failed")
                for generation in self._generations:
                    self._fail(generation, "the engine failed: the server's log says more")
                self._break("the engine failed; the server must be started again")
                self._generations = []

    def _work(self) -> None:
        has_work = any(generation.engine.has_work for generation in self._generations)
        self._take_orders(waits=not has_work)
        for generation in list(self._generations):
            if not self._is_closed and generation.engine.has_work:
                self._step(generation)
        self._let_go()

    def _take_orders(self, waits: bool) -> None:
        """Do what asyncio's side has asked for.

        Args:
            waits: there is nothing else to do.
        """
        if waits:
            self._inbox.get()()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _step(self, generation: Generation) -> None:
        self._step_began = time.monotonic()
        try:
            pieces = generation.engine.step()
        except Exception as error:
            # Whatever it is, those who wait must hear of it, and others may still be served.
            logger.exception("a step of the engine failed")
            self._fail(generation, f"the engine failed ({type(error).__name__}): the server's log says more")
            generation.failures += 1
            if generation.failures >= _MOST_FAILURES or generation.engine.has_work:
                # It would fail again and again.
                self._break(f"the engine failed ({type(error).__name__}); the server must be started again")
                self._generations.remove(generation)
        else:
            generation.failures = 0
            self._post(pieces)
        finally:
            self._step_began = None
        if lost := generation.loss():
            self._lose(generation, f"{lost} cannot go on; the server must be started again")

    def _lose(self, generation: Generation, sentence: str) -> None:
        """Give up an engine that can compute nothing more in this process."""
        logger.error(sentence)
        self._break(sentence)
        self._fail(generation, sentence)
        self._generations = [one for one in self._generations if one is not generation]
        self._tell(self.lost.set)

    def _fail(self, generation: Generation, sentence: str) -> None:
        """Give up all requests of an engine, and tell those who wait."""
        for answer in {id(answer): answer for answer in self._answers.values()}.values():
            if answer.generation is generation:
                self._drop(answer)
                # A choice that has ended gets a second end, which nobody reads.
                ends = [Piece(request.id, choice, finish="error", error=sentence)
                        for request in answer.requests for choice in range(request.n)]  # fmt: skip
                self._tell(_deliver, [(answer, ends)])

    def _break(self, sentence: str) -> None:
        self.broken = sentence

    def _post(self, pieces: Sequence[Piece]) -> None:
        """Put pieces into the mailboxes, with one call for all."""
        parcels: dict[int, tuple[Answer, list[Piece]]] = {}
        for piece in pieces:
            answer = self._answers.get(piece.request)
            if answer is None:
                continue
            parcels.setdefault(id(answer), (answer, []))[1].append(piece)
            if piece.finish is not None:
                answer.left -= 1
                if not answer.left:
                    self._forget(answer)
        if parcels:
            self._tell(_deliver, list(parcels.values()))
        self._stats = [generation.engine.stats() for generation in self._generations]

    def _submit(self, answer: Answer) -> None:
        if answer.is_cancelled:
            return
        if answer.generation not in self._generations:
            self._tell(_settle, answer, Mistake(self.broken, code="engine_failed", status=503))
            return
        try:
            for request in answer.requests:
                answer.generation.engine.submit(request)
                self._answers[request.id] = answer
        except ValueError as error:
            self._drop(answer)
            self._tell(_settle, answer, error if isinstance(error, Mistake) else Mistake(str(error)))
            return
        except Exception as error:
            # A fault of ours must not end the thread on which all others depend.
            logger.exception("the engine did not take a request")
            self._drop(answer)
            self._tell(_settle, answer, error)
            return
        self._tell(_settle, answer, None)

    def _cancel(self, answer: Answer) -> None:
        if any(request.id in self._answers for request in answer.requests):
            self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        """Take an answer's requests out of the engine."""
        for request in answer.requests:
            if request.id in self._answers:
                try:
                    answer.generation.engine.cancel(request.id)
                except Exception:
                    # As for a step.
                    logger.exception("the engine did not let go of a request")
        self._forget(answer)
        self._stats = [generation.engine.stats() for generation in self._generations]

    def _forget(self, answer: Answer) -> None:
        for request in answer.requests:
            self._answers.pop(request.id, None)

    def _let_go(self) -> None:
        """Drop models that were replaced and have nothing left to do, with their memory."""
        for generation in [one for one in self._generations if one.is_retired and not one.leases]:
            if not generation.engine.has_work:
                last = generation.engine.stats()
                self._past = {name: count + getattr(last, name) for name, count in self._past.items()}
                self._generations.remove(generation)
                self._stats = [one.engine.stats() for one in self._generations]

    def _close(self) -> None:
        self._is_closed = True

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in asyncio's thread."""
        assert self._loop is not None
        # At the very end, nobody listens any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _nothing() -> None:
    """Wakes the engine's thread."""


def _deliver(parcels: Sequence[tuple[Answer, list[Piece]]]) -> None:
    for answer, pieces in parcels:
        answer.deliver(pieces)


def _settle(answer: Answer, error: Exception | None) -> None:
    if answer.accepted.done():
        return
    if error is None:
        answer.accepted.set_result(None)
    else:
        answer.accepted.set_exception(error)
