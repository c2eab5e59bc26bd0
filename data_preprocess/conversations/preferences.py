"""Layouts of preferences whose answers have fields of their own."""

from data_preprocess.conversations.fields import OUTPUTS, PAIR, QUESTION, TALK, TOOLS, Fields, check_record
from data_preprocess.conversations.messages import read_messages
from data_preprocess.conversations.one_turn import prompt_in
from data_preprocess.conversations.pairs import answer_in, pair_of, said
from data_preprocess.conversations.record import OpenRecord
from data_preprocess.conversations.samples import Sample
from data_preprocess.conversations.talk import talk_in


def chosen_and_rejected(record: OpenRecord) -> tuple[Sample, str] | None:
    """Layout: both answers in fields of their own; the prompt in a field, too, or before each answer."""
    if not record.has(PAIR):
        return None
    talk, question = record.fields.first(TALK), record.fields.first(QUESTION)
    chosen, chosen_prompt = answer_in(record, record.fields.take("chosen"), "chosen")
    rejected, rejected_prompt = answer_in(record, record.fields.take("rejected"), "rejected")
    if chosen_prompt != rejected_prompt:
        raise ValueError("the chosen and the rejected answer do not follow the same prompt")
    name = "chosen, rejected"
    if chosen_prompt:
        # Both answers as whole conversations that begin alike.
        prompt = chosen_prompt
    elif talk:
        prompt, name = talk_in(record, talk), f"{talk}, {name}"
        if len(prompt) > 1 and said(prompt[-1]) == said(chosen):
            prompt.pop()
    elif question:
        prompt, name = prompt_in(record, question), f"{question}, {name}"
    else:
        raise ValueError(
            'it has no "prompt": the question is read from "prompt", "conversations", "messages", "instruction", '
            '"question" or "query", or from "chosen" and "rejected" if both are whole conversations'
        )
    return pair_of(record, record.with_system(prompt), chosen, rejected), name


def half_a_pair(record: OpenRecord) -> None:
    """Layout: one answer of a pair without the other, which is refused.

    Raises:
        ValueError: the record has this layout; the sentence says which answer is missing.
    """
    fields = record.fields
    for one, other in (PAIR, PAIR[::-1], OUTPUTS, OUTPUTS[::-1]):
        if isinstance(fields.peek(one), str | list | dict) and other not in fields:
            raise ValueError(f'"{other}" is {"null" if fields.is_null(other) else "missing"}, beside "{one}"')


def openai_preference(record: OpenRecord) -> tuple[Sample, str] | None:
    """Layout: OpenAI's preferences, with the messages in "input"."""
    if not record.has(OUTPUTS):
        return None
    given = record.fields.take("input")
    if not isinstance(given, dict):
        raise ValueError('"input" is not an object with "messages"')
    inner = Fields(given)
    prompt = read_messages(record, inner.take("messages"), "messages")
    for name in TOOLS:
        record.add_tools(inner.take(name), f'"{name}"')
    (chosen, before), (rejected, also_before) = (answer_in(record, record.fields.take(name), name) for name in OUTPUTS)
    if before or also_before:
        raise ValueError("an answer of several messages is not understood here")
    record.unread += [f"{name} of input" for name in check_record(inner, "messages", [])]
    return pair_of(record, record.with_system(prompt), chosen, rejected), ", ".join(("input", *OUTPUTS))
