"""Documents made from numbered records, or the records as they are."""

import json
from collections.abc import Iterator

from data_preprocess.readers import limits
from data_preprocess.readers.corpus import TextFields
from data_preprocess.readers.items import DAMAGE, BadRecord, Document, Item, Record, Unreadable, one_line, place


def documents_of(
    path: str, counts: str, records: Iterator[tuple[int, object]], fields: TextFields | None
) -> Iterator[Item]:
    """The texts of numbered records (empty ones are passed over), or the records if they are wanted whole.

    Args:
        path: path of the file, relative to the data directory.
        counts: what the numbers count, see Document.
        records: each an object, the bytes of a line of JSON, or Unreadable.
        fields: None if records are wanted whole.
    """
    last = None
    while True:
        try:
            number, record = next(records)
        except StopIteration:
            return
        except DAMAGE as error:
            after = f"{path} after {counts} {last}" if last is not None else path
            yield BadRecord(after, f"damaged, what follows is lost ({one_line(error)})")
            return
        last = number
        if isinstance(record, Unreadable):
            yield BadRecord(place(path, counts, number), record.why)
            continue
        try:
            if isinstance(record, bytes):
                record = json.loads(record)
        except (ValueError, RecursionError) as error:
            is_foreign = isinstance(error, UnicodeDecodeError)
            why = "not UTF-8: convert it, for example with iconv" if is_foreign else one_line(error)
            yield BadRecord(place(path, counts, number), f"not a JSON line ({why})")
            continue
        if fields is None:
            yield Record(record, path, counts, number)
            continue
        try:
            text = fields.text_of(record)
        except ValueError as error:
            yield BadRecord(place(path, counts, number), one_line(error))
            continue
        if text:
            yield from in_parts(text, path, counts, number)


def in_parts(text: str, path: str, counts: str, record: int) -> Iterator[Document]:
    """A document in parts of at most LONGEST_PART characters."""
    while len(text) > limits.LONGEST_PART:
        end = cut_of(text)
        yield Document(text[:end], path, counts, record, continued=True)
        text = text[end:]
    yield Document(text, path, counts, record)


def cut_of(text: str) -> int:
    """Where a text longer than LONGEST_PART is cut: in its second half after a line whose next character is not blank,
    since no token of byte-level BPE crosses such a place; otherwise at the limit."""
    end = limits.LONGEST_PART
    while (end := text.rfind("\n", limits.LONGEST_PART // 2, end) + 1) > 0:
        if not text[end].isspace():
            return end
        end -= 1
    return limits.LONGEST_PART
