"""Texts of single tokens, for people who look at them."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizer import Tokenizer

_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 8
"""Most tokens in which the bytes of one character are looked for. There are at most 4, besides bytes that belong to
none."""


class ShownToken(NamedTuple):
    """A token of a prompt, as people see it."""

    id: int
    text: str
    """The characters that end in it; of a control token, its name."""
    is_control: bool


class TokenTexts:
    """Texts of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._control = frozenset(tokenizer.special_ids.values())
        self._known: dict[int, str] = {}
        # Some tokenizers drop a blank in front of the first token.
        self._before = tokenizer.encode("a")[-1:]
        self._start = len(tokenizer.decode(self._before))

    def alone(self, token_id: int) -> str:
        """Text of a token by itself, with U+FFFD for bytes that are no whole character; of a control token, its name.
        """
        found = self._known.get(token_id)
        if found is None:
            found = self._tokenizer.decode([*self._before, token_id])[self._start :]
            self._known[token_id] = found
        return found

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def shown(self, ids: Sequence[int]) -> list[ShownToken]:
        """Tokens whose texts, joined, are the text of all. A character of several tokens stands with the last one."""
        found: list[ShownToken] = []
        begin, end = 0, 0
        before = ""
        for number, token_id in enumerate(ids):
            whole = self._tokenizer.decode(ids[begin : number + 1])
            if whole.endswith(_BROKEN) and number - end < _LONGEST_CHARACTER and number + 1 < len(ids):
                text = ""
            else:
                text = whole[len(before) :]
                # The tokens since the last whole character stay in front of the next one, for the sake of blanks.
                begin, end = end, number + 1
                before = self._tokenizer.decode(ids[begin:end])
            found.append(ShownToken(token_id, text, token_id in self._control))
        return found
