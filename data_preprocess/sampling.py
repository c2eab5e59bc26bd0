"""Sample of one or several corpora, of bounded size and in a given mixture, for training a tokenizer.

No more is read than needed: each corpus is cut into small units, which are visited in a fixed random order. Each unit
gives a share of the text that is still missing.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat, zip_longest

from data_preprocess.readers import BadRecord, BadRecords, Corpus, Document, Unit, find_units, read_unit

_UNIT_BYTES = 4_000_000
_LEAST_FROM_A_UNIT = 256_000


@dataclass(frozen=True)
class Source:
    """A corpus, and its weight in the mixture."""

    name: str
    corpus: Corpus
    weight: float


def budgets(sources: list[Source], sample_bytes: int) -> list[int]:
    """Number of bytes that each source gives, by its weight."""
    total = sum(source.weight for source in sources)
    return [int(sample_bytes * source.weight / total) for source in sources]


def sample_texts(corpus: Corpus, budget: int, bad: BadRecords, seed: int = 0) -> Iterator[str]:
    """Texts of a corpus, about `budget` bytes, or all of them if it is smaller.

    Args:
        bad: receives the records that could not be read, and the files that were left out.
    Raises:
        ValueError: the directory does not exist, or holds nothing to read.
    """
    units, left_out = find_units(corpus, _UNIT_BYTES)
    bad.left_out |= {os.path.join(corpus.root, path): why for path, why in left_out.items()}
    random.Random(seed).shuffle(units)
    cut_short: list[tuple[Unit, int]] = []
    for index, unit in enumerate(units):
        share = max(budget // (len(units) - index), _LEAST_FROM_A_UNIT)
        for count, item in enumerate(read_unit(corpus, unit), 1):
            size = _size(item, bad)
            budget, share = budget - size, share - size
            if size:
                yield item.text
            if budget <= 0:
                return
            if share <= 0:
                cut_short.append((unit, count))
                break
    # Later units were smaller than their share: the rest comes from those that have more.
    for unit, count in cut_short:
        for item in islice(read_unit(corpus, unit), count, None):
            size = _size(item, bad)
            budget -= size
            if size:
                yield item.text
            if budget <= 0:
                return


def _size(item: Document | BadRecord, bad: BadRecords) -> int:
    """UTF-8 bytes of a document; 0 for a bad record, which is added to `bad`."""
    if isinstance(item, BadRecord):
        bad.add(item)
        return 0
    return len(item.text.encode("utf-8"))


def mixed_texts(sources: list[Source], sample_bytes: int, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """Texts of all sources in turns, as (name of the source, text)."""
    streams = [
        zip(repeat(source.name), sample_texts(source.corpus, budget, bad))
        for source, budget in zip(sources, budgets(sources, sample_bytes))
    ]
    for round_of_texts in zip_longest(*streams):
        yield from (named for named in round_of_texts if named is not None)
