"""A sample of one or several corpora, of a bounded size and in a wanted mixture, for training a tokenizer.

Only as much is read as is needed: each corpus is cut into small units, which are visited in a random order that is
always the same; from each a share of what is still missing is taken.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from data_preprocess.readers import BadRecord, BadRecords, Corpus, find_units, read_unit

_UNIT_BYTES = 4_000_000
_LEAST_FROM_A_UNIT = 256_000


@dataclass(frozen=True)
class Source:
    """A corpus, and its part in the mixture."""

    name: str
    corpus: Corpus
    weight: float


def budgets(sources: list[Source], sample_bytes: int) -> list[int]:
    """How many bytes each source gives, by its weight."""
    total = sum(source.weight for source in sources)
    return [int(sample_bytes * source.weight / total) for source in sources]


def sample_texts(corpus: Corpus, budget: int, bad: BadRecords, seed: int = 0) -> Iterator[str]:
    """About `budget` bytes of a corpus, or all of it if it is smaller.

    Raises:
        ValueError: no such directory, or nothing to read.
    """
    units, _ = find_units(corpus, _UNIT_BYTES)
    random.Random(seed).shuffle(units)
    for index, unit in enumerate(units):
        share = max(budget // (len(units) - index), _LEAST_FROM_A_UNIT)
        for item in read_unit(corpus, unit):
            if isinstance(item, BadRecord):
                bad.add(item)
                continue
            size = len(item.text.encode("utf-8"))
            budget, share = budget - size, share - size
            yield item.text
            if share <= 0 or budget <= 0:
                break
        if budget <= 0:
            return


def mixed_texts(sources: list[Source], sample_bytes: int, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(name of the source, text) of all sources in turns."""
    streams = [
        ((source.name, text) for text in sample_texts(source.corpus, budget, bad))
        for source, budget in zip(sources, budgets(sources, sample_bytes))
    ]
    for round_of_texts in zip_longest(*streams):
        yield from (named for named in round_of_texts if named is not None)
