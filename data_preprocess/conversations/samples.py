"""Samples: the content of a record, whatever its layout."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_preprocess.conversations.tool_calls import texts_of
from tokenizer.messages import Message


@dataclass(frozen=True)
class PlainText:
    """A text of which every token is learnt, as in pretraining."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages with at least one answer that is learnt; nothing follows the last such answer."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    """Tools that the assistant may call, as {"type": "function", "function": {"name": str, ...}}."""


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    """Both answers are the assistant's."""
    tools: tuple[dict, ...] = ()
    """As in Conversation."""


Sample = PlainText | Conversation | Preference


@dataclass(frozen=True)
class ReadRecord:
    """Sample of a record, and how its layout was told."""

    sample: Sample
    format: str
    """Names of the fields by which its layout was told."""
    unread: tuple[str, ...] = ()
    """Names of fields that are not read; of marks such as "split", with the value."""


def messages_of(sample: Conversation | Preference) -> Sequence[Message]:
    """Messages of a sample, both answers of a preference included."""
    return sample.messages if isinstance(sample, Conversation) else (*sample.prompt, sample.chosen, sample.rejected)


def texts_in(sample: Sample) -> list[str]:
    """All texts of a sample."""
    if isinstance(sample, PlainText):
        return [sample.text]
    texts = list(texts_of(sample.tools))
    for message in messages_of(sample):
        texts += [message.text, message.reasoning, *texts_of(message.tool_calls)]
    return texts
