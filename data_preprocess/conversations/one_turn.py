"""One question and its answer, each in a field of its own, perhaps after a history."""

from collections.abc import Sequence
from dataclasses import replace

from data_preprocess.conversations.fields import ANSWER, BELOW_QUESTION, QUESTION, is_nothing
from data_preprocess.conversations.messages import read_messages
from data_preprocess.conversations.pairs import sample_of
from data_preprocess.conversations.record import OpenRecord
from data_preprocess.conversations.samples import Sample
from data_preprocess.conversations.texts import dialogue_in, text_in
from data_preprocess.conversations.tool_calls import loaded
from tokenizer.messages import Message


def one_turn(record: OpenRecord) -> tuple[Sample, str] | None:
    """Layout: Alpaca, Dolly, TRL's prompt and completion, question and answer ..."""
    question, answer = record.fields.first(QUESTION), record.fields.first(ANSWER)
    if not question or not answer or question == answer:
        return None
    return sample_of(record, _turn(record, question, answer), f"{question}, {answer}")


def _turn(record: OpenRecord, question: str, answer: str) -> list[Message]:
    prompt = prompt_in(record, question)
    value = record.fields.take(answer)
    thought = record.reasoning()
    if isinstance(value, list | dict):
        answers = read_messages(record, [value] if isinstance(value, dict) else value, answer)
        if answers[0].role != "assistant":
            raise ValueError(f'"{answer}" does not begin with an answer')
    else:
        answers = [Message("assistant", text_in(value, f'"{answer}"'))]
    if thought:
        if answers[0].reasoning or len(answers) > 1:
            raise ValueError(f'what was thought stands in "{answer}" and beside it: keep one of them')
        answers[0] = replace(answers[0], reasoning=thought)
    return [*prompt, *answers]


def prompt_in(record: OpenRecord, name: str) -> list[Message]:
    """Messages of the question in the field `name`, after the history. It is a text, a dialogue, or messages."""
    value, history = record.fields.take(name), history_in(record)
    if isinstance(value, list | dict):
        if history:
            raise ValueError(f'it has a "history" beside the messages of "{name}": put them together')
        return unlearnt(read_messages(record, [value] if isinstance(value, dict) else value, name))
    below = next((other for other in BELOW_QUESTION.get(name, ()) if not is_nothing(record.fields.peek(other))), None)
    if not below and (turns := dialogue_in(value, "question")):
        return [*history, *unlearnt(turns)]
    text = text_in(value, f'"{name}"')
    if below:
        more = text_in(record.fields.take(below), f'"{below}"')
        text = f"{text}\n{more}"
    return [*history, Message("user", text)]


def history_in(record: OpenRecord) -> list[Message]:
    """Messages of the earlier turns, in the field "history"."""
    history = loaded(record.fields.take("history"))
    if is_nothing(history):
        return []
    if not isinstance(history, list):
        raise ValueError('"history" is not a list')
    if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in history):
        return read_messages(record, history, "history")
    messages = []
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f'"history" {number} is not a pair of question and answer')
        messages.append(Message("user", text_in(turn[0], f"question {number} of the history")))
        messages.append(Message("assistant", text_in(turn[1], f"answer {number} of the history")))
    return messages


def unlearnt(messages: Sequence[Message]) -> list[Message]:
    """The same messages as a prompt, of which nothing is learnt."""
    return [replace(message, learnt=False) if message.role == "assistant" else message for message in messages]
