"""Records of many formats -> conversations and preferences.

A record is one object of JSON, JSON lines or Parquet; its format is told from its fields, so formats may be mixed:

    fields                                                  format
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

A system text, tools and what was thought before an answer are read wherever they stand. What becomes of every other
field is said in record_fields.py. gdGPT's calls of an API become messages of their own: the assistant's thought and
call, which it learns; then the API's result as a message of a tool, which it does not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data_preprocess.record_fields import (
    ANSWER,
    BELOW_QUESTION,
    FIELDS,
    OUTPUTS,
    PAIR,
    QUESTION,
    REJECTED,
    SYSTEM,
    TALK,
    THOUGHT,
    TOOLS,
    Fields,
    check_message,
    check_record,
    is_learnt,
    is_nothing,
    is_switch,
    quoted,
)
from data_preprocess.tool_calls import Call, Results, calls_from, loaded, texts_of, tools_from
from tokenizer.chat_template import Message

__all__ = ["FIELDS", "Conversation", "PlainText", "Preference", "Sample", "parse_record", "read_record", "roles_with"]

CALLS = "calls"
"""Role of a message whose text is a call, as JSON."""

DEFAULT_ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "ask": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ans": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "function_call": CALLS,
    "tool_call": CALLS,
}
"""What datasets call the roles -> what we call them."""

_KNOWN = (
    "messages; conversations; prompt and completion; instruction and output; question and answer; query and response; "
    "input and target; for DPO chosen and rejected"
)
_PAIRS = (("human", "user", "input", "question", "prompt"), ("assistant", "gpt", "output", "answer", "response"))
"""Names of question and answer where a turn is one object with both."""
_HH = re.compile(r"\n\n(Human|Assistant):")
_HH_BEGINS = "\n\nHuman:"
_BELLE = re.compile(r"(?:^|\n)\s*(Human|Assistant):")


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


def roles_with(user_name: str = "", assistant_name: str = "") -> dict[str, str]:
    """DEFAULT_ROLES and a dataset's own names."""
    own = {name: role for name, role in ((user_name, "user"), (assistant_name, "assistant")) if name}
    return {**DEFAULT_ROLES, **own}


def parse_record(record: object, roles: Mapping[str, str] = DEFAULT_ROLES) -> Sample:
    """The sample of a record, made of roles and texts alone.

    Raises:
        ValueError: as `read_record`, or it holds tools, calls or thoughts, which only a chat template can lay out.
    """
    sample = read_record(record, roles).sample
    if not isinstance(sample, PlainText):
        if sample.tools:
            raise ValueError('it has "tools", which are more than text')
        for message in _messages_of(sample):
            if message.tool_calls or message.reasoning:
                what = '"tool_calls"' if message.tool_calls else "reasoning"
                raise ValueError(f"a message of the {message.role} has {what} beside its text")
    return sample


def read_record(record: object, roles: Mapping[str, str] = DEFAULT_ROLES) -> ReadRecord:
    """What a record holds.

    Raises:
        ValueError: no known format, an unknown role, something missing or empty, or a field that changes what the
            record means and is not read; the sentence says what.
    """
    if not isinstance(record, dict):
        raise ValueError("no object with fields")
    reader = _Reader(record, roles)
    try:
        sample, name = reader.sample()
        unread = check_record(reader.fields, name, _texts_of(sample))
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    return ReadRecord(sample, name, tuple(dict.fromkeys([*unread, *reader.unread])))


def _messages_of(sample: Conversation | Preference) -> Sequence[Message]:
    return sample.messages if isinstance(sample, Conversation) else (*sample.prompt, sample.chosen, sample.rejected)


def _texts_of(sample: Sample) -> list[str]:
    """All that it says."""
    if isinstance(sample, PlainText):
        return [sample.text]
    texts = list(texts_of(sample.tools))
    for message in _messages_of(sample):
        texts += [message.text, message.reasoning, *texts_of(message.tool_calls)]
    return texts


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
        advice = ": say whose it is with --user_name or --assistant_name" if isinstance(name, str) and name else ""
        raise ValueError(f"{where} has the unknown role {quoted(name)}{advice}")
    return role


def _dialogue(text: object, ends_with: str) -> list[Message] | None:
    """Turns of a text such as HH's "\\n\\nHuman: ...\\n\\nAssistant: ..." or BELLE's "Human:...\\nAssistant:"; None if
    it is none.

    Args:
        ends_with: "answer", or "question" for a text that stops where the answer is due, behind "Assistant:".
    Raises:
        ValueError: a turn says nothing.
    """
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return None
    separator, text = (_HH, text) if text.startswith(_HH_BEGINS) else (_BELLE, text.lstrip())
    _, *parts = separator.split(text)
    names, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if names[-1] != "Assistant" or (ends_with == "question") != (not texts[-1]):
        return None
    if ends_with == "question":
        names, texts = names[:-1], texts[:-1]
    return [
        Message("user" if name == "Human" else "assistant", _text(part, f"turn {number} of the dialogue"))
        for number, (name, part) in enumerate(zip(names, texts))
    ]


def _unlearnt(messages: Sequence[Message]) -> list[Message]:
    """Messages of a prompt: none is learnt."""
    return [replace(message, learnt=False) if message.role == "assistant" else message for message in messages]


class _Reader:
    """One record, while it is read."""

    def __init__(self, record: Mapping, roles: Mapping[str, str]):
        self.fields, self.roles = Fields(record), roles
        self.unread: list[str] = []
        self._tools: tuple[dict, ...] = ()

    def sample(self) -> tuple[Sample, str]:
        """What the record holds, and the fields by which that was told."""
        fields = self.fields
        talk = fields.first(TALK)
        question, answer = fields.first(QUESTION), fields.first(ANSWER)
        kind = fields.peek("type") if isinstance(fields.peek("type"), str) else None
        if all(name in fields for name in PAIR):
            return self._preference(talk, question)
        for one, other in (PAIR, PAIR[::-1], OUTPUTS, OUTPUTS[::-1]):
            if isinstance(fields.peek(one), str | list | dict) and other not in fields:
                raise ValueError(f'"{other}" is {"null" if fields.is_null(other) else "missing"}, beside "{one}"')
        if all(name in fields for name in OUTPUTS):
            return self._openai_preference()
        if kind in _GDGPT and _GDGPT[kind][0] in fields:
            return self._gdgpt(kind)
        if talk:
            messages, name = self._talk(talk), talk
        elif question and answer and question != answer:
            messages, name = self._one_turn(question, answer), f"{question}, {answer}"
        elif kind in _GDGPT:
            return self._gdgpt(kind)
        else:
            raise self._no_known_format()
        messages, tools = self._with_system(messages), self._all_tools()
        if worse := fields.first(REJECTED):
            return self._swift_preference(messages, tools, worse), f"{name}, {worse}"
        return self._conversation(messages, tools), name

    def _no_known_format(self) -> ValueError:
        names = self.fields.names()
        if not names:
            return ValueError("it is empty")
        if all(self.fields.is_null(name) for name in PAIR):
            return ValueError('"chosen" and "rejected" are null')
        said = " ".join(", ".join(names).split())[:200]
        return ValueError(f"no known format: it has the fields {said}; known are {_KNOWN}")

    def _conversation(self, messages: list[Message], tools: tuple[dict, ...]) -> Conversation:
        """Without what follows the last answer: nothing is learnt from it."""
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise ValueError("it holds no answer")
        learnt = [number for number in answers if messages[number].learnt]
        if not learnt:
            raise ValueError("none of its answers is to be learnt")
        return Conversation(tuple(messages[: learnt[-1] + 1]), tools)

    # What stands beside the messages.

    def _with_system(self, messages: list[Message]) -> list[Message]:
        text = self.fields.take_one(SYSTEM)
        if is_nothing(text):
            return messages
        text = _text(text, '"system"')
        inside = [message.text for message in messages if message.role == "system"]
        if not inside:
            return [Message("system", text), *messages]
        if any(one.strip() != text.strip() for one in inside):
            raise ValueError('"system" says something else than the message of the system: keep one of them')
        return messages

    def _add_tools(self, value: object, where: str) -> None:
        if is_nothing(value) or is_nothing(loaded(value)):
            return
        tools = tools_from(value, where)
        if self._tools and tools != self._tools:
            raise ValueError(f"{where} say something else than the tools elsewhere in the record: keep one of them")
        self._tools = tools

    def _all_tools(self) -> tuple[dict, ...]:
        for name in TOOLS:
            self._add_tools(self.fields.take(name), f'"{name}"')
        return self._tools

    # Messages.

    def _talk(self, name: str) -> list[Message]:
        if not is_nothing(self.fields.take("answer")):
            # Of a task in mathematics, say: the result alone.
            self.unread.append("answer")
        return self.messages(self.fields.take(name), name)

    def messages(self, values: object, name: str) -> list[Message]:
        """Messages of a list, results of calls in the calls' order."""
        values = loaded(values)
        if not isinstance(values, list) or not values:
            raise ValueError(f'"{name}" is no list of messages')
        if all(isinstance(value, str) for value in values):
            raise ValueError(f'"{name}" is a list of texts that do not say whose they are: give each of them a "role"')
        messages: list[Message] = []
        results = Results()
        for number, value in enumerate(values):
            where = f"message {number}" if name in TALK else f'message {number} of "{name}"'
            if isinstance(value, dict) and (pair := self._pair(value, where)):
                messages += pair
                continue
            message, calls, call_id, is_text_of_calls = self._message(value, where)
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

    def _pair(self, value: dict, where: str) -> list[Message] | None:
        """Question and answer in one object, with a system text perhaps; None if it is a message."""
        if value.get("from") is not None or value.get("role") is not None:
            return None
        fields = Fields(value)
        question, answer = (fields.first(names) for names in _PAIRS)
        if not question or not answer:
            return None
        messages = []
        if not is_nothing(system := fields.take("system")):
            messages.append(Message("system", _text(system, f'"system" of {where}')))
        messages.append(Message("user", _text(fields.take(question), f'"{question}" of {where}')))
        text = _text(fields.take(answer), f'"{answer}" of {where}')
        learnt = is_learnt(fields, where)
        self.unread += [f"{name} of messages" for name in check_message(fields, where)]
        return [*messages, Message("assistant", text, learnt=learnt is not False)]

    def _message(self, value: object, where: str) -> tuple[Message, list[Call], object, bool]:
        """A message, what it calls, the id of the call that it answers, and whether its text was the call."""
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no message")
        fields = Fields(value)
        who = "from" if "from" in fields else "role"
        role = _role(fields.take(who), where, self.roles)
        contents = ("value", "content", "text") if who == "from" else ("content", "value", "text")
        content = fields.take_one(contents, f"{where}: ")
        calls = self._calls(fields, where)
        call_id = fields.take("tool_call_id")
        reasoning = self._reasoning(fields, f"{where}: ")
        if role == "system":
            self._add_tools(fields.take("tools"), f'the "tools" of {where}')
        learnt = is_learnt(fields, where)
        if isinstance(content, list):
            content = self._joined(content, where)
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
        text = _text(content, where, may_be_empty)
        name = fields.take("name") if role == "tool" else None
        self.unread += [f"{other} of messages" for other in check_message(fields, where)]
        name = "" if is_nothing(name) else _text(name, f"the name of {where}")
        message = Message(role, text, reasoning, tuple(call.call for call in calls), name)
        if role == "assistant" and learnt is False:
            message = replace(message, learnt=False)
        return message, calls, call_id, is_text_of_calls

    def _calls(self, fields: Fields, where: str) -> list[Call]:
        """Of `tool_calls`, or of the old `function_call`."""
        calls = [
            calls_from(value, f'"{name}" of {where}')
            for name in ("tool_calls", "function_call")
            if not is_nothing(value := fields.take(name)) and not is_nothing(loaded(value))
        ]
        if len(calls) > 1:
            raise ValueError(f'{where} has both "tool_calls" and "function_call": keep one of them')
        return calls[0] if calls else []

    def _reasoning(self, fields: Fields, where: str = "") -> str:
        # Some say only whether the model was to think, not what.
        thought = fields.take_one([name for name in THOUGHT if not is_switch(fields.peek(name))], where)
        return "" if thought is None else _text(thought, f"{where}what was thought")

    def _joined(self, parts: list, where: str) -> str:
        """The text of OpenAI's parts; pictures and sounds cannot be learnt here."""
        texts = []
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or part.get("text") is None:
                kind = quoted(part.get("type")) if isinstance(part, dict) else "no type"
                raise ValueError(f"{where} holds more than text: a part of {kind}")
            fields = Fields(part)
            texts.append(_text(fields.take("text"), where, may_be_empty=True))
            if is_learnt(fields, where) is False:
                raise ValueError(f"a part of {where} is not to be learnt, but a message is learnt as a whole or not")
        return "".join(texts)

    # One question and its answer.

    def _one_turn(self, question: str, answer: str) -> list[Message]:
        prompt = self._prompt(question)
        value = self.fields.take(answer)
        thought = self._reasoning(self.fields)
        if isinstance(value, list | dict):
            answers = self.messages([value] if isinstance(value, dict) else value, answer)
            if answers[0].role != "assistant":
                raise ValueError(f'"{answer}" does not begin with an answer')
        else:
            answers = [Message("assistant", _text(value, f'"{answer}"'))]
        if thought:
            if answers[0].reasoning or len(answers) > 1:
                raise ValueError(f'what was thought stands in "{answer}" and beside it: keep one of them')
            answers[0] = replace(answers[0], reasoning=thought)
        return [*prompt, *answers]

    def _prompt(self, name: str) -> list[Message]:
        """Question in the field `name`, behind the history: a text, a dialogue, or messages."""
        value, history = self.fields.take(name), self._history()
        if isinstance(value, list | dict):
            if history:
                raise ValueError(f'it has a "history" beside the messages of "{name}": put them together')
            return _unlearnt(self.messages([value] if isinstance(value, dict) else value, name))
        below = next((other for other in BELOW_QUESTION.get(name, ()) if not is_nothing(self.fields.peek(other))), None)
        if not below and (turns := _dialogue(value, "question")):
            return [*history, *_unlearnt(turns)]
        text = _text(value, f'"{name}"')
        if below:
            more = _text(self.fields.take(below), f'"{below}"')
            text = f"{text}\n{more}"
        return [*history, Message("user", text)]

    def _history(self) -> list[Message]:
        history = loaded(self.fields.take("history"))
        if is_nothing(history):
            return []
        if not isinstance(history, list):
            raise ValueError('"history" is no list')
        if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in history):
            return self.messages(history, "history")
        messages = []
        for number, turn in enumerate(history):
            if not isinstance(turn, list) or len(turn) != 2:
                raise ValueError(f'"history" {number} is no pair of question and answer')
            messages.append(Message("user", _text(turn[0], f"question {number} of the history")))
            messages.append(Message("assistant", _text(turn[1], f"answer {number} of the history")))
        return messages

    # gdGPT.

    def _gdgpt(self, kind: str) -> tuple[Sample, str]:
        self.fields.take("type")
        name, context = _GDGPT[kind]
        if kind == "pretrain":
            return PlainText(_text(self.fields.take("text"), '"text"')), "type=pretrain, text"
        if kind == "instruct":
            text, more = _text(self.fields.take(name), f'"{name}"'), self.fields.take("input")
            more = "" if more is None else _text(more, '"input"', may_be_empty=True)
            question = Message("user", f"{text}\n{more}" if more.strip() else text)
            answer = Message("assistant", _text(self.fields.take("output"), '"output"'))
            messages = [*self._history(), question, answer]
        else:
            messages = self._rounds(context)
        return self._conversation(self._with_system(messages), self._all_tools()), f"type={kind}, {name}"

    def _rounds(self, context: str) -> list[Message]:
        """["ask", text], ["ans", text] and ["ans-api", {actions, ans}]; several asks may follow one another."""
        messages = [Message("system", _text(self.fields.take(context), f'"{context}"'))] if context else []
        rounds = self.fields.take("rounds")
        if not isinstance(rounds, list):
            raise ValueError('"rounds" is no list')
        for number, turn in enumerate(rounds):
            where = f"round {number}"
            if not isinstance(turn, list) or len(turn) != 2:
                raise ValueError(f"{where} is no pair")
            if turn[0] == "ans-api":
                messages += _gdgpt_calls(turn[1], where)
                continue
            role = _role(turn[0], where, self.roles)
            if role == CALLS:
                raise ValueError(f"{where} has the role {quoted(turn[0])}, which gdGPT has not")
            messages.append(Message(role, _text(turn[1], where)))
        return messages

    # Preferences.

    def _preference(self, talk: str | None, question: str | None) -> tuple[Preference, str]:
        chosen, chosen_prompt = self._answer(self.fields.take("chosen"), "chosen")
        rejected, rejected_prompt = self._answer(self.fields.take("rejected"), "rejected")
        if chosen_prompt != rejected_prompt:
            raise ValueError("the chosen and the rejected answer do not follow the same prompt")
        name = "chosen, rejected"
        if chosen_prompt:
            # Both answers as whole conversations that begin alike.
            prompt = chosen_prompt
        elif talk:
            prompt, name = self._talk(talk), f"{talk}, {name}"
            if len(prompt) > 1 and _said(prompt[-1]) == _said(chosen):
                prompt.pop()
        elif question:
            prompt, name = self._prompt(question), f"{question}, {name}"
        else:
            raise ValueError(
                'it has no "prompt": the question is read from "prompt", "conversations", "messages", "instruction", '
                '"question" or "query", or from "chosen" and "rejected" if both are whole conversations'
            )
        return self._pair_of(self._with_system(prompt), chosen, rejected), name

    def _pair_of(self, prompt: list[Message], chosen: Message, rejected: Message) -> Preference:
        if not prompt or prompt[-1].role in ("assistant", "system"):
            raise ValueError("the prompt has no question that the answers follow")
        if _said(chosen) == _said(rejected):
            raise ValueError("the chosen and the rejected answer are the same")
        if not chosen.learnt or not rejected.learnt:
            raise ValueError("an answer is not to be learnt")
        return Preference(tuple(_learnt(prompt)), chosen, rejected, self._all_tools())

    def _answer(self, value: object, name: str) -> tuple[Message, list[Message]]:
        """(an answer, messages before it): from a text, a dialogue, a message, or a list of messages that ends with
        it."""
        if turns := _dialogue(value, "answer"):
            return turns[-1], turns[:-1]
        if isinstance(value, str):
            if value.startswith(_HH_BEGINS):
                raise ValueError(f'"{name}" is a dialogue that does not end with an answer')
            return Message("assistant", _text(value, f'"{name}"')), []
        messages = self.messages([value] if isinstance(value, dict) else value, name)
        if not messages or messages[-1].role != "assistant":
            raise ValueError(f'"{name}" does not end with an answer')
        return messages[-1], _learnt(messages[:-1])

    def _swift_preference(self, messages: list[Message], tools: tuple[dict, ...], worse: str) -> Preference:
        rejected, before = self._answer(self.fields.take(worse), worse)
        chosen, prompt = messages[-1], _learnt(messages[:-1])
        if chosen.role != "assistant":
            raise ValueError(f'it has "{worse}", but its messages do not end with the better answer')
        if before and before != prompt:
            raise ValueError("the chosen and the rejected answer do not follow the same prompt")
        return self._pair_of(prompt, chosen, rejected)

    def _openai_preference(self) -> tuple[Preference, str]:
        given = self.fields.take("input")
        if not isinstance(given, dict):
            raise ValueError('"input" is no object with "messages"')
        inner = Fields(given)
        prompt = self.messages(inner.take("messages"), "messages")
        for name in TOOLS:
            self._add_tools(inner.take(name), f'"{name}"')
        (chosen, before), (rejected, also_before) = (self._answer(self.fields.take(name), name) for name in OUTPUTS)
        if before or also_before:
            raise ValueError("an answer of several messages is not understood here")
        self.unread += [f"{name} of input" for name in check_record(inner, "messages", [])]
        return self._pair_of(self._with_system(prompt), chosen, rejected), ", ".join(("input", *OUTPUTS))


def _said(message: Message) -> tuple:
    return message.text, message.reasoning, message.tool_calls


def _learnt(messages: Sequence[Message]) -> list[Message]:
    """Messages of a preference's prompt, in which nothing is learnt whatever they say."""
    return [replace(message, learnt=True) for message in messages]


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
    "pretrain": ("text", ""),
    "instruct": ("instruct", ""),
    "conversation": ("rounds", ""),
    "conver_has_api": ("rounds", "api_desc"),
    "ref_qa": ("rounds", "reference"),
}
"""Type -> the field without which a record is of another format, and the one that becomes the system text."""
