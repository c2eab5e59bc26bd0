"""Conversations as a list of messages."""

from data_preprocess.conversations.fields import TALK, is_nothing
from data_preprocess.conversations.messages import read_messages
from data_preprocess.conversations.pairs import sample_of
from data_preprocess.conversations.record import OpenRecord
from data_preprocess.conversations.samples import Sample
from tokenizer.messages import Message


def talk(record: OpenRecord) -> tuple[Sample, str] | None:
    """Layout: ShareGPT's "conversations", OpenAI's "messages"."""
    name = record.fields.first(TALK)
    return sample_of(record, talk_in(record, name), name) if name else None


def talk_in(record: OpenRecord, name: str) -> list[Message]:
    """The messages of the field `name`."""
    if not is_nothing(record.fields.take("answer")):
        # For example, the bare result of a task in mathematics.
        record.unread.append("answer")
    return read_messages(record, record.fields.take(name), name)
