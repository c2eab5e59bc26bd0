"""Samples: what a record comes to, whatever its layout."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_preprocess.conversations.tool_calls import texts_of
from tokenizer.chat_template import Message


@dataclass(frozen=True)
class PlainText:
    """A text of which every token is learnt, as in pretraining."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """At least one answer that is learnt; nothing follows the last one."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    """What the assistant may call, as {"type": "function", "function": {"name": str, ...}}."""


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    """Both the assistant's."""
    tools: tuple[dict, ...] = ()
    """As in Conversation."""


Sample = PlainText | Conversation | Preference


@dataclass(frozen=True)
class ReadRecord:
    """What a record holds, and how that was found out."""

    sample: Sample
    format: str
    """The fields by which its format was told."""
    unread: tuple[str, ...] = ()
    """Names of fields that say nothing here; of marks, such as "split", with the value."""


def messages_of(sample: Conversation | Preference) -> Sequence[Message]:
    return sample.messages if isinstance(sample, Conversation) else (*sample.prompt, sample.chosen, sample.rejected)


def texts_in(sample: Sample) -> list[str]:
    """All that a sample says."""
    if isinstance(sample, PlainText):
        return [sample.text]
    texts = list(texts_of(sample.tools))
    for message in messages_of(sample):
        texts += [message.text, message.reasoning, *texts_of(message.tool_calls)]
    return texts
