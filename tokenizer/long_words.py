"""Cutting the longest words for the training of BPE.

The time of the library's trainer grows with the square of a word's length: 300,000 Chinese characters without a mark
between them, or a genome, take minutes. Words beyond LONGEST_WORD are cut, for the training only. Merges within the
parts are learnt as usual. Encoding takes n log n and cuts nothing.
"""

from collections.abc import Iterable, Iterator

import regex

LONGEST_WORD = 1000
"""Characters of the longest word that is not cut. Longer ones slow the training more and more; a smaller limit would
not make it faster."""
_STEP = LONGEST_WORD // 2
_ENDS_OF_RUNS = [
    regex.compile(ends, regex.V1).search
    for ends in (r"[^\p{L}\p{M}]", r"[\p{L}\p{N}]|[^\S\r\n]", r"\S")  # Of letters, of signs with line ends, of blanks.
]


class LongWords:
    """Cuts long words and counts them."""

    def __init__(self):
        self.count = 0
        self.longest = 0
        """Characters."""

    def __str__(self) -> str:
        return (
            f"words that are longer than {LONGEST_WORD:,} characters were cut into parts for the training, which would "
            f"be slow otherwise (that of --kind sp_bbpe is not): {self.count:,}, the longest of {self.longest:,}"
        )

    def cut(self, texts: Iterable[str], pattern: str) -> Iterator[str]:
        """Texts, in several parts where a word is too long.

        Args:
            pattern: its matches are the words, see `split_pattern.split_pattern`.
        """
        words = regex.compile(pattern, regex.V1).finditer
        for text in texts:
            if not may_have_long_word(text):
                yield text
                continue
            begin = 0
            for word in words(text):
                start, end = word.span()
                if end - start > LONGEST_WORD:
                    self.count += 1
                    self.longest = max(self.longest, end - start)
                    for cut in range(start + LONGEST_WORD, end, LONGEST_WORD):
                        yield text[begin:cut]
                        begin = cut
            yield text[begin:]


def may_have_long_word(text: str) -> bool:
    """Whether a text may have a word that is too long, which would fill one of the steps with characters of one kind.
    Most texts have another kind among the first few characters of each step, so that the check takes almost no time."""
    if len(text) <= LONGEST_WORD:
        return False
    for begin in range(0, len(text) - _STEP + 1, _STEP):
        if any(search(text, begin, begin + _STEP) is None for search in _ENDS_OF_RUNS):
            return True
    return False
