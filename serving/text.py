"""Text of tokens as they come: whole characters only, and nothing of a text that ends the answer. Needs no torch.

    tokens -> decode of the last few -> whole characters -> wait for stop texts -> Released

Each new token is decoded together with a few before it: SentencePiece takes a blank away at the beginning of a text,
and a character's bytes may be spread over several tokens. The pieces together are what the tokenizer makes of all the
tokens at once, and the time for a token does not grow with the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from serving.requests import TokenScore
from tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_PART = 3
"""Bytes of a character that can wait for its last one. A decoder shows them as at most so many U+FFFD."""
_CONTEXTS = {20: 8, 60: 24}
"""Tokens that are decoded together before the window is cut back -> what is left of it then. The second is for broken
bytes, of which three can be one U+FFFD."""
_NEEDED_CONTEXT = 4
"""Characters that decide how the bytes behind them are read, if they may be broken: a character has at most as many
bytes."""
_LONGEST_RUN = 64
"""Byte pieces after which their characters are shown, though a later byte of the same run could be invalid."""


class Released(NamedTuple):
    """What may be shown."""

    text: str
    tokens: tuple[TokenScore, ...]
    """Tokens whose text ends in it, in order."""
    stopped: bool
    """Whether a stop text came. Nothing follows."""


@dataclass
class _Waiting:
    """A token that was not released, and where its text begins and ends, in characters of the answer."""

    token: TokenScore
    begin: int
    end: int


class TextStream:
    """The text of one answer.

    What may be the beginning of a stop text waits. The stop text that is complete first ends the answer, as if
    characters came one by one; of several that end at the same character, the longest one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = False,
    ):
        """
        Args:
            stop: texts that end the answer.
            include_stop: whether the one that ends it is part of it.
            skip_special_tokens: whether special tokens have no text.
        """
        self._tokenizer, self._stop, self._include_stop = tokenizer, stop, include_stop
        self._special = {
            token_id: "" if skip_special_tokens else text for text, token_id in tokenizer.special_ids.items()
        }
        self._run_ids = tokenizer.run_ids
        self._window: list[int] = []
        self._shown = 0
        """Characters of the window's text that are complete."""
        self._run: list[_Waiting] = []
        """The byte pieces at the window's end."""
        self._length, self._released = 0, 0
        """Characters that were complete, and that were released."""
        self._held = ""
        """The text between the two."""
        self._waiting: list[_Waiting] = []
        self._stopped = False

    def push(self, token: TokenScore) -> Released:
        """Add a token. After a stop text, nothing is added any more."""
        if self._stopped:
            return Released("", (), True)
        if token.id not in self._special:
            return self._release(self._decode(token))
        before, own = self._settle(), self._special[token.id]
        begin = self._length + len(before)
        self._waiting.append(_Waiting(token, begin, begin + len(own)))
        return self._release(before + own)

    def flush(self) -> Released:
        """The rest, at the end of the answer. Bytes that are no whole character become U+FFFD."""
        if self._stopped:
            return Released("", (), True)
        text, tokens, stopped = self._release(self._settle())
        if not stopped:
            text, self._held = text + self._held, ""
            tokens, self._waiting = (*tokens, *(one.token for one in self._waiting)), []
        return Released(text, tokens, stopped)

    def _decode(self, token: TokenScore) -> str:
        """Characters that an ordinary token completes."""
        # Until the character is complete, its first tokens end with it.
        waiting = _Waiting(token, self._length, self._length + 1)
        self._waiting.append(waiting)
        self._window.append(token.id)
        if token.id in self._run_ids:
            self._run.append(waiting)
            return self._shown_run()
        text = self._tokenizer.decode(self._window)
        new = text[self._shown :]
        num_left = min(len(new) - len(new.rstrip(_REPLACEMENT)), _LONGEST_PART)
        new = new[: len(new) - num_left]
        waiting.begin += self._end_run(new)
        if not num_left:
            waiting.end = self._length + len(new)
        self._shown += len(new)
        self._cut_back(text)
        return new

    def _cut_back(self, text: str) -> None:
        """Leave the window's last tokens, if it is long and they decide how its text, which is given, goes on."""
        for longest, context in _CONTEXTS.items():
            if len(self._window) <= longest:
                return
            window = self._window[-context:]
            shorter = self._tokenizer.decode(window)
            shown = len(shorter) - (len(text) - self._shown)
            # Behind a whole character, bytes are read anew. The first one may have lost a blank.
            needed = _NEEDED_CONTEXT if shorter[shown - 1 : shown] == _REPLACEMENT else 1
            if shown > needed and text.endswith(shorter[shown - needed :]):
                self._window, self._shown = window, shown
                return

    def _shown_run(self) -> str:
        """Characters of a run of byte pieces that can be shown before it ends: none, unless it is long. Then a new one
        begins behind an ordinary token, since a text's beginning may be decoded in another way."""
        # In a valid run, one of four places in sequence is the end of a character.
        if not _LONGEST_RUN <= len(self._run) <= _LONGEST_RUN + _LONGEST_PART:
            return ""
        new = self._tokenizer.decode(self._window)[self._shown :]
        before = self._tokenizer.encode("a")[-1:]
        if _REPLACEMENT in new or not self._run_ids.isdisjoint(before):
            return ""
        self._end_run(new)
        self._window, self._shown = before, len(self._tokenizer.decode(before))
        return new

    def _end_run(self, new: str) -> int:
        """Say where the text of each token of a run ends, and forget the run.

        Args:
            new: text that begins with the run's.
        Returns:
            The number of its characters.
        """
        is_valid = not new.startswith(_REPLACEMENT * len(self._run))
        ends = [n for n, char in enumerate(new, 1) for _ in range(len(char.encode()) if is_valid else 1)]
        # (A decoder may take the blank away that a text begins with.)
        length = max(ends[: len(self._run)], default=0)
        for waiting, end in zip(self._run, ends):
            waiting.begin, waiting.end = self._length + end - 1, self._length + end
        self._run = []
        return length

    def _settle(self) -> str:
        """The window's text that was not complete, and is final. The window is empty after it."""
        text = self._tokenizer.decode(self._window)[self._shown :]
        self._end_run(text)
        self._window, self._shown = [], 0
        return text

    def _release(self, new: str) -> Released:
        """What may be shown, given new characters."""
        self._length += len(new)
        text, num_searched = self._held + new, len(self._held)
        found = [
            (place + len(stop), -len(stop))
            for stop in self._stop
            if (place := text.find(stop, max(0, num_searched - len(stop) + 1))) >= 0
        ]
        if found:
            end, minus_length = min(found)
            end += 0 if self._include_stop else minus_length
            self._stopped, self._held = True, ""
            # A token that is partly in the answer is one of its tokens.
            released = [one.token for one in self._waiting if one.begin < self._released + end]
            self._waiting = []
        else:
            end = len(text) - self._num_held(text)
            self._held = text[end:]
            done = list(takewhile(lambda one: one.end <= self._released + end, self._waiting))
            released, self._waiting = [one.token for one in done], self._waiting[len(done) :]
        self._released += end
        return Released(text[:end], tuple(released), self._stopped)

    def _num_held(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop text."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yield pieces of text as the ids arrive; a character waits until its bytes are complete."""
    stream = TextStream(tokenizer)
    for token_id in ids:
        if text := stream.push(TokenScore(token_id)).text:
            yield text
    if rest := stream.flush().text:
        yield rest


def without_lead(pieces: Iterator[str], lead: str) -> Iterator[str]:
    """Pieces of an answer without its `Lead`."""
    left = Lead(lead)
    for piece in pieces:
        if text := left.push(piece):
            yield text
    if rest := left.flush():
        yield rest


class Lead:
    """Text that a model says before every answer, such as a line end, and that is left out. The template writes it
    itself once the answer is part of the history.

    Args:
        text: the lead.
    """

    def __init__(self, text: str):
        self._text = text
        self._begin = ""
        """The answer so far, as long as it may still become the lead."""
        self._is_over = not text

    def push(self, text: str) -> str:
        """What can be shown, given the answer's next text."""
        if self._is_over:
            return text
        self._begin += text
        if self._text.startswith(self._begin) and self._begin != self._text:
            return ""
        self._is_over = True
        return self._begin.removeprefix(self._text)

    def flush(self) -> str:
        """What is left at the answer's end: it was no lead."""
        rest = "" if self._is_over else self._begin
        self._is_over = True
        return rest
