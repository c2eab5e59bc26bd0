"""Conversations and preferences, read from records of many layouts.

A record is an object with fields, from any kind of file. Its layout is told by its fields, so layouts may be mixed:

    fields                                                  layout
    conversations: [{from, value}]                          ShareGPT, as in FastChat; also pairs [{human, assistant}]
    messages: [{role, content}]                             OpenAI
    instruction, input, output (history, system)            Alpaca; Dolly has context and response
    prompt, completion (or response)                        TRL, as texts or as messages
    question, answer (or response); query, response         one turn; also input and target
    type: pretrain, instruct, conversation,                 gdGPT
          conver_has_api, ref_qa
    conversations, chosen, rejected                         preferences, the answers as {from, value} or text
    prompt (instruction, question), chosen, rejected        preferences, as text or as messages
    chosen, rejected                                        whole conversations, as messages or as HH's dialogues
    messages, rejected_response                             ms-swift's preferences: the better answer ends the messages
    input, preferred_output, non_preferred_output           OpenAI's preferences

A system text, tools and the thoughts before an answer are read wherever they stand. fields.py says what becomes of
every other field. Layouts are tried in the order of layouts.py.

    record -> layouts.py -> a layout -> messages.py, texts.py -> samples.py
"""

from collections.abc import Mapping

from data_preprocess.conversations.fields import FIELDS, PAIR, check_record
from data_preprocess.conversations.layouts import LAYOUTS
from data_preprocess.conversations.record import OpenRecord
from data_preprocess.conversations.roles import DEFAULT_ROLES, roles_with
from data_preprocess.conversations.samples import (
    Conversation,
    PlainText,
    Preference,
    ReadRecord,
    Sample,
    messages_of,
    texts_in,
)

__all__ = [
    "FIELDS",
    "Conversation",
    "PlainText",
    "Preference",
    "ReadRecord",
    "Sample",
    "parse_record",
    "read_record",
    "roles_with",
]

_KNOWN = (
    "messages; conversations; prompt and completion; instruction and output; question and answer; query and response; "
    "input and target; for DPO chosen and rejected"
)


def parse_record(record: object, roles: Mapping[str, str] = DEFAULT_ROLES) -> Sample:
    """Sample of a record, made of roles and texts alone.

    Raises:
        ValueError: see `read_record`; or it holds tools, calls or thoughts, which only a chat template can lay out.
    """
    sample = read_record(record, roles).sample
    if not isinstance(sample, PlainText):
        if sample.tools:
            raise ValueError('it has "tools", which are more than text')
        for message in messages_of(sample):
            if message.tool_calls or message.reasoning:
                what = '"tool_calls"' if message.tool_calls else "reasoning"
                raise ValueError(f"a message of the {message.role} has {what} beside its text")
    return sample


def read_record(record: object, roles: Mapping[str, str] = DEFAULT_ROLES) -> ReadRecord:
    """Sample of a record, its layout, and its fields that are not read.

    Raises:
        ValueError: an unknown layout or role, something missing or empty, or an unread field that changes what the
            record means; the sentence says which.
    """
    if not isinstance(record, dict):
        raise ValueError("not an object with fields")
    opened = OpenRecord(record, roles)
    try:
        sample, name = _sample(opened)
        unread = check_record(opened.fields, name, texts_in(sample))
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    return ReadRecord(sample, name, tuple(dict.fromkeys([*unread, *opened.unread])))


def _sample(record: OpenRecord) -> tuple[Sample, str]:
    """Sample of a record, and the fields by which its layout was told."""
    for layout in LAYOUTS:
        if found := layout(record):
            return found
    names = record.fields.names()
    if not names:
        raise ValueError("it is empty")
    if all(record.fields.is_null(name) for name in PAIR):
        raise ValueError('"chosen" and "rejected" are null')
    said = " ".join(", ".join(names).split())[:200]
    raise ValueError(f"no known format: it has the fields {said}; known are {_KNOWN}")
