"""Records of many formats -> conversations and preferences.

A record is one object of JSON, JSON lines or Parquet; its format is told from its fields, so formats may be mixed:

    fields                                            format
    conversations: [{from, value}]                    ShareGPT, as in FastChat
    messages: [{role, content}]                       OpenAI
    instruction, input, output (history, system)      Alpaca
    type: pretrain, instruct, conversation,           gdGPT
          conver_has_api, ref_qa
    conversations, chosen, rejected                   preferences, the answers as {from, value} or text
    prompt, chosen, rejected                          preferences, as text or as messages

gdGPT's calls of an API become messages of their own: the assistant's thought and call, which it learns; then the API's
result as a message of a tool, which it does not.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizer.chat_template import Message

FIELDS = frozenset(
    "conversations conversation messages instruction input output history system type text instruct rounds api_desc "
    "reference prompt chosen rejected".split()
)
"""All that `parse_record` looks at, of any format: of a table with other columns, these alone are read."""

DEFAULT_ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "ask": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ans": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""What datasets call the roles -> what we call them."""


@dataclass(frozen=True)
class PlainText:
    """A text of which every token is learnt, as in pretraining."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """At least one answer; nothing follows the last one."""

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


def roles_with(user_name: str = "", assistant_name: str = "") -> dict[str, str]:
    """DEFAULT_ROLES and a dataset's own names."""
    own = {name: role for name, role in ((user_name, "user"), (assistant_name, "assistant")) if name}
    return {**DEFAULT_ROLES, **own}


def parse_record(record: object, roles: Mapping[str, str] = DEFAULT_ROLES) -> Sample:
    """What a record holds.

    Raises:
        ValueError: no known format, an unknown role, or something missing or empty; the sentence says what.
    """
    if not isinstance(record, dict):
        raise ValueError("no object with fields")
    fields = {name for name, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= fields:
        return _preference(record, fields, roles)
    kind = record.get("type")
    if isinstance(kind, str) and kind in _GDGPT and _GDGPT[kind][0] in fields:
        return _GDGPT[kind][1](record, roles)
    for name in ("conversations", "conversation"):
        if name in fields:
            return _conversation(_messages(record[name], name, roles))
    if "messages" in fields:
        return _conversation(_messages(record["messages"], "messages", roles))
    if {"instruction", "output"} <= fields:
        return _alpaca(record, roles)
    if isinstance(kind, str) and kind in _GDGPT:
        return _GDGPT[kind][1](record, roles)
    names = " ".join(", ".join(sorted(map(str, record))).split())
    raise ValueError(f"no known format: it has the fields {names[:200]}" if record else "it is empty")


def _text(value: object, where: str, may_be_empty: bool = False) -> str:
    if value is None:
        raise ValueError(f"{where} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{where} is no text")
    # Half a surrogate pair, which JSON can spell, is no text.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid Unicode") from None
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where} is empty")
    return value


def _role(name: object, where: str, roles: Mapping[str, str]) -> str:
    # A dataset's own names are told as they are written; the usual ones in any case.
    if isinstance(name, dict | list):
        raise ValueError(f"{where} has a role that is no text")
    role = roles.get(name) or roles.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{where} has the unknown role {json.dumps(name, ensure_ascii=False, default=str)[:100]}")
    return role


def _message(value: object, where: str, roles: Mapping[str, str]) -> Message:
    """{from, value} or {role, content}."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no message")
    # Parquet gives every message all fields that one of them has.
    who, what = ("from", "value") if value.get("from") is not None else ("role", "content")
    role = _role(value.get(who), where, roles)
    content = value.get(what)
    if isinstance(content, list):
        # OpenAI's parts; pictures and sounds cannot be learnt here.
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if None in parts:
            raise ValueError(f"{where} holds more than text")
        content = "".join(_text(part, where, may_be_empty=True) for part in parts)
    if content is None and value.get("tool_calls"):
        raise ValueError(f"{where} has no text (tool_calls are not read)")
    # An empty system text says nothing; an empty question or answer is a mistake.
    if content is None and role == "system":
        content = ""
    return Message(role, _text(content, where, may_be_empty=role == "system"))


def _messages(values: object, name: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(values, list) or not values:
        raise ValueError(f'"{name}" is no list of messages')
    messages = [_message(value, f"message {number}", roles) for number, value in enumerate(values)]
    return [message for message in messages if message.role != "system" or message.text.strip()]


def _conversation(messages: list[Message]) -> Conversation:
    """Without what follows the last answer: nothing is learnt from it."""
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise ValueError("it holds no answer")
    return Conversation(tuple(messages[: answers[-1] + 1]))


def _alpaca(record: dict, roles: Mapping[str, str]) -> Conversation:
    messages = []
    if record.get("system"):
        messages.append(Message("system", _text(record["system"], '"system"')))
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError('"history" is no list')
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f'"history" {number} is no pair of question and answer')
        messages.append(Message("user", _text(turn[0], f"question {number} of the history")))
        messages.append(Message("assistant", _text(turn[1], f"answer {number} of the history")))
    instruction = _text(record["instruction"], '"instruction"')
    more = _text(record.get("input") or "", '"input"', may_be_empty=True)
    question = f"{instruction}\n{more}" if more.strip() else instruction
    return _conversation(
        [*messages, Message("user", question), Message("assistant", _text(record["output"], '"output"'))]
    )


def _gdgpt_pretrain(record: dict, roles: Mapping[str, str]) -> PlainText:
    return PlainText(_text(record.get("text"), '"text"'))


def _gdgpt_instruct(record: dict, roles: Mapping[str, str]) -> Conversation:
    return _alpaca({**record, "instruction": record.get("instruct"), "output": record.get("output")}, roles)


def _gdgpt_rounds(record: dict, roles: Mapping[str, str], context: str = "") -> Conversation:
    """["ask", text], ["ans", text] and ["ans-api", {actions, ans}]; several asks may follow one another."""
    messages = [Message("system", _text(record.get(context), f'"{context}"'))] if context else []
    rounds = record.get("rounds")
    if not isinstance(rounds, list):
        raise ValueError('"rounds" is no list')
    for number, turn in enumerate(rounds):
        where = f"round {number}"
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{where} is no pair")
        if turn[0] == "ans-api":
            messages += _gdgpt_calls(turn[1], where)
        else:
            messages.append(Message(_role(turn[0], where, roles), _text(turn[1], where)))
    return _conversation(messages)


def _gdgpt_calls(answer: object, where: str) -> list[Message]:
    if not isinstance(answer, dict) or not isinstance(answer.get("actions"), list):
        raise ValueError(f'{where} has no "actions"')
    messages = []
    for number, action in enumerate(answer["actions"]):
        place = f"action {number} of {where}"
        if not isinstance(action, dict):
            raise ValueError(f"{place} is no object")
        thought = _text(action.get("inner_thought", ""), f"the thought of {place}", may_be_empty=True)
        call = _text(action.get("api_name"), f"the API of {place}")
        argument = _text(action.get("api_param", ""), f"the argument of {place}", may_be_empty=True)
        messages.append(Message("assistant", "\n".join(part for part in (thought, f"{call}({argument})") if part)))
        messages.append(Message("tool", _text(action.get("api_res", ""), f"the result of {place}", may_be_empty=True)))
    return [*messages, Message("assistant", _text(answer.get("ans"), f"the answer of {where}"))]


_GDGPT = {
    "pretrain": ("text", _gdgpt_pretrain),
    "instruct": ("instruct", _gdgpt_instruct),
    "conversation": ("rounds", _gdgpt_rounds),
    "conver_has_api": ("rounds", lambda record, roles: _gdgpt_rounds(record, roles, "api_desc")),
    "ref_qa": ("rounds", lambda record, roles: _gdgpt_rounds(record, roles, "reference")),
}
"""Type -> the field without which a record is of another format, and what reads it."""


def _preference(record: dict, fields: set[str], roles: Mapping[str, str]) -> Preference:
    chosen, chosen_prompt = _answer(record["chosen"], '"chosen"', roles)
    rejected, rejected_prompt = _answer(record["rejected"], '"rejected"', roles)
    if "conversations" in fields:
        prompt = _messages(record["conversations"], "conversations", roles)
    elif "prompt" in fields and isinstance(record["prompt"], str):
        prompt = [Message("user", _text(record["prompt"], '"prompt"'))]
    elif "prompt" in fields:
        prompt = _messages(record["prompt"], "prompt", roles)
    else:
        # Both answers as whole conversations that begin alike.
        prompt = chosen_prompt
    if (chosen_prompt or rejected_prompt) and not chosen_prompt == rejected_prompt == prompt:
        raise ValueError("the chosen and the rejected answer do not follow the same prompt")
    if not prompt or prompt[-1].role == "assistant":
        raise ValueError("the prompt has no question that the answers follow")
    if chosen == rejected:
        raise ValueError("the chosen and the rejected answer are the same")
    return Preference(tuple(prompt), chosen, rejected)


def _answer(value: object, where: str, roles: Mapping[str, str]) -> tuple[Message, list[Message]]:
    """(an answer, messages before it): from a text, a message, or a list of messages that ends with it."""
    if isinstance(value, str):
        return Message("assistant", _text(value, where)), []
    if isinstance(value, dict):
        value = [value]
    messages = _messages(value, where.strip('"'), roles)
    if messages[-1].role != "assistant":
        raise ValueError(f"{where} does not end with an answer")
    return messages[-1], messages[:-1]
