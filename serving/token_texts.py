"""Texts of single tokens, for people who look at them."""

from collections.abc import Sequence
from typing import NamedTuple

from serving.requests import TokenScore
from serving.text import TextStream
from tokenizer import Tokenizer


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
        stream = TextStream(self._tokenizer)
        texts: list[str] = []
        waiting = ""
        for piece in [*(stream.push(TokenScore(one)) for one in ids), stream.flush()]:
            waiting += piece.text
            if piece.tokens:
                texts += [""] * (len(piece.tokens) - 1) + [waiting]
                waiting = ""
        if waiting and texts:
            texts[-1] += waiting
        return [ShownToken(one, text, one in self._control) for one, text in zip(ids, texts)]
