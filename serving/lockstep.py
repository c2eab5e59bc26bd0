"""Text from a model of which several ranks hold parts: all compute the same tokens, one after the other.

    rank 0      asks: prompt, length, ends | forward | draws a token | forward | ...
    others      follow                     | forward | take it       | forward | ...

Rank 0 alone knows what is asked for, and draws. The others compute what it needs of them until it says that it is done.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Ask = Callable[[Any], Any]
"""Returns rank 0's value, which must fit JSON, on every rank. Collective."""

_ENDED = -1
"""Instead of a token: whoever has asked wants no more."""


class Request(NamedTuple):
    """What is asked of `generate`."""

    ids: list[int]
    max_new_tokens: int
    stop_ids: list[int]


class Lockstep:
    """Lets all ranks generate what the first one asks for.

    Args:
        generate: yields the tokens for a request; it passes each through the function that it is given, which returns
            the one to take.
        of_first: see `Ask`.
    """

    def __init__(self, generate: Callable[[Request, Callable[[int], int]], Iterator[int]], of_first: Ask):
        self._generate, self._of_first = generate, of_first
        self._wants_more = True

    def ask(self, request: Request) -> Iterator[int]:
        """Tokens for a request; on rank 0, while the others `follow`."""
        self._of_first(list(request))
        self._wants_more = True
        tokens, is_done = self._generate(request, self._agree), False
        try:
            for token_id in tokens:  # noqa: UP028 (yield from would end it together with this one)
                yield token_id
            is_done = True
        except _EndedError:
            is_done = True
        finally:
            if not is_done:
                # The others are in the middle of the next token.
                self._wants_more = False
                _run_out(tokens)

    def follow(self) -> None:
        """Do this rank's part of all that rank 0 asks for, until it ends."""
        while (request := self._of_first(None)) is not None:
            _run_out(self._generate(Request(*request), self._agree))

    def end(self) -> None:
        """Let the others go; on rank 0."""
        self._of_first(None)

    def _agree(self, token_id: int) -> int:
        taken = self._of_first(token_id if self._wants_more else _ENDED)
        if taken == _ENDED:
            raise _EndedError
        return taken


class _EndedError(Exception):
    """Rank 0 wants no more tokens."""


def _run_out(tokens: Iterator[int]) -> None:
    try:
        for _ in tokens:
            pass
    except _EndedError:
        pass
