"""gdGPT's records, told by their "type".

A call of an API becomes two messages: the assistant's thought and call, which is learnt, and the API's result as a
message of a tool, which is not.
"""

from data_preprocess.conversations.fields import quoted
from data_preprocess.conversations.one_turn import history_in
from data_preprocess.conversations.record import OpenRecord, conversation_of
from data_preprocess.conversations.roles import CALLS, role_of
from data_preprocess.conversations.samples import PlainText, Sample
from data_preprocess.conversations.texts import text_in
from tokenizer.messages import Message

_KINDS = {
    "pretrain": ("text", ""),
    "instruct": ("instruct", ""),
    "conversation": ("rounds", ""),
    "conver_has_api": ("rounds", "api_desc"),
    "ref_qa": ("rounds", "reference"),
}
"""Type -> the field that the layout cannot do without, and the field that becomes the system text."""


def gdgpt(record: OpenRecord) -> tuple[Sample, str] | None:
    """Layout: a known type with the field that it needs. The type alone is not enough: other data sets use these
    words."""
    kind = _kind(record)
    return _read(record, kind) if kind and _KINDS[kind][0] in record.fields else None


def gdgpt_without_its_field(record: OpenRecord) -> tuple[Sample, str] | None:
    """Layout: a known type without its field, if no other layout fits. Reading it fails and says what is missing."""
    kind = _kind(record)
    return _read(record, kind) if kind else None


def _kind(record: OpenRecord) -> str | None:
    kind = record.fields.peek("type")
    return kind if isinstance(kind, str) and kind in _KINDS else None


def _read(record: OpenRecord, kind: str) -> tuple[Sample, str]:
    record.fields.take("type")
    name, context = _KINDS[kind]
    if kind == "pretrain":
        return PlainText(text_in(record.fields.take("text"), '"text"')), "type=pretrain, text"
    if kind == "instruct":
        text, more = text_in(record.fields.take(name), f'"{name}"'), record.fields.take("input")
        more = "" if more is None else text_in(more, '"input"', may_be_empty=True)
        question = Message("user", f"{text}\n{more}" if more.strip() else text)
        answer = Message("assistant", text_in(record.fields.take("output"), '"output"'))
        messages = [*history_in(record), question, answer]
    else:
        messages = _rounds(record, context)
    return conversation_of(record.with_system(messages), record.tools()), f"type={kind}, {name}"


def _rounds(record: OpenRecord, context: str) -> list[Message]:
    """Messages of rounds: ["ask", text], ["ans", text] and ["ans-api", {actions, ans}]. Questions may follow one
    another."""
    messages = [Message("system", text_in(record.fields.take(context), f'"{context}"'))] if context else []
    rounds = record.fields.take("rounds")
    if not isinstance(rounds, list):
        raise ValueError('"rounds" is not a list')
    for number, turn in enumerate(rounds):
        where = f"round {number}"
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{where} is not a pair")
        if turn[0] == "ans-api":
            messages += _calls(turn[1], where)
            continue
        role = role_of(turn[0], where, record.roles)
        if role == CALLS:
            raise ValueError(f"{where} has the role {quoted(turn[0])}, which gdGPT has not")
        messages.append(Message(role, text_in(turn[1], where)))
    return messages


def _calls(answer: object, where: str) -> list[Message]:
    if not isinstance(answer, dict) or not isinstance(answer.get("actions"), list):
        raise ValueError(f'{where} has no "actions"')
    messages = []
    for number, action in enumerate(answer["actions"]):
        place = f"action {number} of {where}"
        if not isinstance(action, dict):
            raise ValueError(f"{place} is not an object")
        thought = text_in(action.get("inner_thought", ""), f"the thought of {place}", may_be_empty=True)
        call = text_in(action.get("api_name"), f"the API of {place}")
        argument = text_in(action.get("api_param", ""), f"the argument of {place}", may_be_empty=True)
        result = text_in(action.get("api_res", ""), f"the result of {place}", may_be_empty=True)
        messages.append(Message("assistant", "\n".join(part for part in (thought, f"{call}({argument})") if part)))
        messages.append(Message("tool", result))
    return [*messages, Message("assistant", text_in(answer.get("ans"), f"the answer of {where}"))]
