"""Texts whose log-probabilities after a prompt are wanted, as many of them as possible by one computation.

    prompt P, continuations "b c", "b d", "e"      to compute: P b    row P gives b, e; row b gives c, d

A token's probability comes from the row of the token before it, so a continuation's last token is never computed, and
choices of one token cost one row together. Nothing here needs torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.requests import TokenScore


@dataclass(eq=False)
class Continuation:
    """A continuation that is asked for."""

    ids: tuple[int, ...]
    start: int
    """Tokens before it: those of the prompt."""
    found: list[TokenScore] = field(default_factory=list)
    """Its first tokens, as far as they are known."""

    def rows(self, first: int, end: int) -> range:
        """Those of the text's tokens from `first` up to `end` whose scores give its next tokens. What was computed
        before, and again after blocks were taken away, is left out."""
        begin = self.start - 1 + len(self.found)
        if first > begin:
            return range(0)
        return range(begin, min(end, self.start - 1 + len(self.ids)))


def texts_of(continuations: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """What has to be computed after the prompt, and the numbers of the continuations that each of these gives. The
    longest come first; whatever one of them begins with needs no computation of its own."""
    texts: list[tuple[tuple[int, ...], list[int]]] = []
    by_length = sorted(range(len(continuations)), key=lambda number: -len(continuations[number]))
    for number in by_length:
        needed = continuations[number][:-1]
        for text, numbers in texts:
            if text[: len(needed)] == needed:
                numbers.append(number)
                break
        else:
            texts.append((needed, [number]))
    return texts
