"""Windows by which each token of a long document is scored once, as lm-eval's rolling log-likelihood does.

    [begin] a b c d     A model with 4 positions scores "a b c d" after the begin,
            d | e f g h     then each next 4 tokens after the one before them;
              h | i j       the last window is as long as the others, so it sees more of
          f g h | i j       what it does not score.
"""

from collections.abc import Iterator, Sequence

from evaluation.asking import Scoring


def windows(ids: Sequence[int], begin: Sequence[int], context: int) -> Iterator[Scoring]:
    """Questions whose answers add up to a document's log-probability.

    Args:
        begin: tokens that stand before a document: at least one, and fewer than `context`.
        context: positions of the model.
    """
    first = min(context - len(begin) + 1, len(ids))
    if first:
        yield Scoring(tuple(begin), tuple(ids[:first]))
    for start in range(first, len(ids), context):
        end = min(start + context, len(ids))
        yield Scoring(tuple(ids[max(0, end - context - 1) : start]), tuple(ids[start:end]))
