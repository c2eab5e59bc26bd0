"""Pairs: two answers to one prompt, in fields of any layout."""

from collections.abc import Sequence
from dataclasses import replace

from data_preprocess.conversations.fields import REJECTED
from data_preprocess.conversations.messages import read_messages
from data_preprocess.conversations.record import OpenRecord, conversation_of
from data_preprocess.conversations.samples import Preference, Sample
from data_preprocess.conversations.texts import HH_BEGINS, dialogue_in, text_in
from tokenizer.messages import Message


def sample_of(record: OpenRecord, messages: list[Message], name: str) -> tuple[Sample, str]:
    """Sample of some messages: a conversation, or a preference if a worse last answer stands beside them (ms-swift).

    Args:
        name: the fields by which the layout was told.
    """
    messages, tools = record.with_system(messages), record.tools()
    if worse := record.fields.first(REJECTED):
        return _swift_preference(record, messages, worse), f"{name}, {worse}"
    return conversation_of(messages, tools), name


def pair_of(record: OpenRecord, prompt: list[Message], chosen: Message, rejected: Message) -> Preference:
    """Preference of a prompt and two answers.

    Raises:
        ValueError: no question, the same answer twice, or one that must not be learnt.
    """
    if not prompt or prompt[-1].role in ("assistant", "system"):
        raise ValueError("the prompt has no question that the answers follow")
    if said(chosen) == said(rejected):
        raise ValueError("the chosen and the rejected answer are the same")
    if not chosen.learnt or not rejected.learnt:
        raise ValueError("an answer is not to be learnt")
    return Preference(tuple(_learnt(prompt)), chosen, rejected, record.tools())


def answer_in(record: OpenRecord, value: object, name: str) -> tuple[Message, list[Message]]:
    """An answer and the messages before it. The value is a text, a dialogue, a message, or a list of messages that ends
    with the answer."""
    if turns := dialogue_in(value, "answer"):
        return turns[-1], turns[:-1]
    if isinstance(value, str):
        if value.startswith(HH_BEGINS):
            raise ValueError(f'"{name}" is a dialogue that does not end with an answer')
        return Message("assistant", text_in(value, f'"{name}"')), []
    messages = read_messages(record, [value] if isinstance(value, dict) else value, name)
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f'"{name}" does not end with an answer')
    return messages[-1], _learnt(messages[:-1])


def _swift_preference(record: OpenRecord, messages: list[Message], worse: str) -> Preference:
    rejected, before = answer_in(record, record.fields.take(worse), worse)
    chosen, prompt = messages[-1], _learnt(messages[:-1])
    if chosen.role != "assistant":
        raise ValueError(f'it has "{worse}", but its messages do not end with the better answer')
    if before and before != prompt:
        raise ValueError("the chosen and the rejected answer do not follow the same prompt")
    return pair_of(record, prompt, chosen, rejected)


def said(message: Message) -> tuple:
    """Content of a message, to compare it with another one."""
    return message.text, message.reasoning, message.tool_calls


def _learnt(messages: Sequence[Message]) -> list[Message]:
    """Messages of a preference's prompt without their flags, as nothing in it is learnt."""
    return [replace(message, learnt=True) for message in messages]
