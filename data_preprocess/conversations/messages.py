"""Lists of messages, as ShareGPT, OpenAI and others write them."""

from dataclasses import replace

from data_preprocess.conversations.fields import TALK, Fields, check_message, is_learnt, is_nothing, quoted
from data_preprocess.conversations.record import OpenRecord, reasoning_in
from data_preprocess.conversations.roles import CALLS, role_of
from data_preprocess.conversations.texts import text_in
from data_preprocess.conversations.tool_calls import Call, Results, calls_from, loaded
from tokenizer.messages import Message

_PAIRS = (("human", "user", "input", "question", "prompt"), ("assistant", "gpt", "output", "answer", "response"))
"""Names of question and answer where a turn is one object with both."""


def read_messages(record: OpenRecord, values: object, name: str) -> list[Message]:
    """Messages of a list. Results of calls must come in the order of the calls.

    Args:
        name: name of the list in messages.
    Raises:
        ValueError: it is not a list of messages, or one of them is wrong.
    """
    values = loaded(values)
    if not isinstance(values, list) or not values:
        raise ValueError(f'"{name}" is not a list of messages')
    if all(isinstance(value, str) for value in values):
        raise ValueError(f'"{name}" is a list of texts that do not say whose they are: give each of them a "role"')
    messages: list[Message] = []
    results = Results()
    for number, value in enumerate(values):
        where = f"message {number}" if name in TALK else f'message {number} of "{name}"'
        if isinstance(value, dict) and (pair := _pair(record, value, where)):
            messages += pair
            continue
        message, calls, call_id, is_text_of_calls = _message(record, value, where)
        if message.role == "tool":
            tool, answered = results.origin_of(call_id, message.name, where)
            message = replace(message, name=tool, call_id=answered)
        elif is_text_of_calls and messages and messages[-1].role == "assistant":
            # The answer goes on with what it calls.
            results.also_called(calls)
            before = messages.pop()
            together = (*before.tool_calls, *message.tool_calls)
            message = replace(before, tool_calls=together, learnt=before.learnt and message.learnt)
        else:
            results.called(calls)
        messages.append(message)
    return [message for message in messages if message.role != "system" or message.text.strip()]


def _pair(record: OpenRecord, value: dict, where: str) -> list[Message] | None:
    """Messages of an object that holds a question, its answer, and perhaps a system text; None if it is one message."""
    if value.get("from") is not None or value.get("role") is not None:
        return None
    fields = Fields(value)
    question, answer = (fields.first(names) for names in _PAIRS)
    if not question or not answer:
        return None
    messages = []
    if not is_nothing(system := fields.take("system")):
        messages.append(Message("system", text_in(system, f'"system" of {where}')))
    messages.append(Message("user", text_in(fields.take(question), f'"{question}" of {where}')))
    text = text_in(fields.take(answer), f'"{answer}" of {where}')
    learnt = is_learnt(fields, where)
    record.unread += [f"{name} of messages" for name in check_message(fields, where)]
    return [*messages, Message("assistant", text, learnt=learnt is not False)]


def _message(record: OpenRecord, value: object, where: str) -> tuple[Message, list[Call], object, bool]:
    """A message, its calls, the id of the call that it answers, and whether its text was the call."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a message")
    fields = Fields(value)
    who = "from" if "from" in fields else "role"
    role = role_of(fields.take(who), where, record.roles)
    contents = ("value", "content", "text") if who == "from" else ("content", "value", "text")
    content = fields.take_one(contents, f"{where}: ")
    calls = _calls(fields, where)
    call_id = fields.take("tool_call_id")
    reasoning = reasoning_in(fields, f"{where}: ")
    if role == "system":
        record.add_tools(fields.take("tools"), f'the "tools" of {where}')
    learnt = is_learnt(fields, where)
    if isinstance(content, list):
        content = _joined(content, where)
    is_text_of_calls = role == CALLS
    if is_text_of_calls:
        calls, content, role = calls_from(content, where), "", "assistant"
    if calls and role != "assistant":
        raise ValueError(f"{where} of the {role} has calls of tools")
    if reasoning and role != "assistant":
        raise ValueError(f"{where} of the {role} has reasoning")
    if learnt and role != "assistant":
        raise ValueError(f"{where} of the {role} is to be learnt, but only answers can be")
    # An empty system text says nothing, a tool may return nothing, a call needs no words; an empty question or
    # answer is a mistake.
    may_be_empty = role in ("system", "tool") or bool(calls)
    if content is None:
        there = next((other for other in contents if other in fields), None)
        if there is None and not (role == "system" or calls):
            raise ValueError(f'{where} has no text: its "{contents[0]}" is missing')
        content = ""
    text = text_in(content, where, may_be_empty)
    name = fields.take("name") if role == "tool" else None
    record.unread += [f"{other} of messages" for other in check_message(fields, where)]
    name = "" if is_nothing(name) else text_in(name, f"the name of {where}")
    message = Message(role, text, reasoning, tuple(call.call for call in calls), name)
    if role == "assistant" and learnt is False:
        message = replace(message, learnt=False)
    return message, calls, call_id, is_text_of_calls


def _calls(fields: Fields, where: str) -> list[Call]:
    """Calls in `tool_calls`, or in the old `function_call`."""
    calls = [
        calls_from(value, f'"{name}" of {where}')
        for name in ("tool_calls", "function_call")
        if not is_nothing(value := fields.take(name)) and not is_nothing(loaded(value))
    ]
    if len(calls) > 1:
        raise ValueError(f'{where} has both "tool_calls" and "function_call": keep one of them')
    return calls[0] if calls else []


def _joined(parts: list, where: str) -> str:
    """Text of a message in parts (OpenAI). Pictures and sounds cannot be learnt here."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or part.get("text") is None:
            kind = quoted(part.get("type")) if isinstance(part, dict) else "no type"
            raise ValueError(f"{where} holds more than text: a part of {kind}")
        fields = Fields(part)
        texts.append(text_in(fields.take("text"), where, may_be_empty=True))
        if is_learnt(fields, where) is False:
            raise ValueError(f"a part of {where} is not to be learnt, but a message is learnt as a whole or not")
    return "".join(texts)
