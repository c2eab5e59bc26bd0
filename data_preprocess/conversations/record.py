"""A record while it is read: its fields, and what stands beside the messages."""

from collections.abc import Mapping, Sequence

from data_preprocess.conversations.fields import SYSTEM, THOUGHT, TOOLS, Fields, is_nothing, is_switch
from data_preprocess.conversations.samples import Conversation
from data_preprocess.conversations.texts import text_in
from data_preprocess.conversations.tool_calls import loaded, tools_from
from tokenizer.chat_template import Message


class OpenRecord:
    """A record while it is read. Layouts take what they need from its fields; check_record looks at the rest."""

    def __init__(self, record: Mapping, roles: Mapping[str, str]):
        self.fields, self.roles = Fields(record), roles
        self.unread: list[str] = []
        """Names of fields within messages that are not read."""
        self._tools: tuple[dict, ...] = ()

    def has(self, names: Sequence[str]) -> bool:
        return all(name in self.fields for name in names)

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages, behind the system text that stands beside them."""
        text = self.fields.take_one(SYSTEM)
        if is_nothing(text):
            return messages
        text = text_in(text, '"system"')
        inside = [message.text for message in messages if message.role == "system"]
        if not inside:
            return [Message("system", text), *messages]
        if any(one.strip() != text.strip() for one in inside):
            raise ValueError('"system" says something else than the message of the system: keep one of them')
        return messages

    def add_tools(self, value: object, where: str) -> None:
        """Take a value that lists tools, if it does.

        Args:
            where: names it in the sentence.
        """
        if is_nothing(value) or is_nothing(loaded(value)):
            return
        tools = tools_from(value, where)
        if self._tools and tools != self._tools:
            raise ValueError(f"{where} say something else than the tools elsewhere in the record: keep one of them")
        self._tools = tools

    def tools(self) -> tuple[dict, ...]:
        """The tools that the record lists, wherever that is."""
        for name in TOOLS:
            self.add_tools(self.fields.take(name), f'"{name}"')
        return self._tools

    def reasoning(self) -> str:
        """What was thought before the answer, where it stands beside it."""
        return reasoning_in(self.fields)


def reasoning_in(fields: Fields, where: str = "") -> str:
    """What was thought, of a record or of a message; empty if nothing."""
    # Some say only whether the model was to think, not what.
    thought = fields.take_one([name for name in THOUGHT if not is_switch(fields.peek(name))], where)
    return "" if thought is None else text_in(thought, f"{where}what was thought")


def conversation_of(messages: list[Message], tools: tuple[dict, ...]) -> Conversation:
    """A conversation without what follows its last answer, from which nothing is learnt.

    Raises:
        ValueError: no answer, or none that is to be learnt.
    """
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise ValueError("it holds no answer")
    learnt = [number for number in answers if messages[number].learnt]
    if not learnt:
        raise ValueError("none of its answers is to be learnt")
    return Conversation(tuple(messages[: learnt[-1] + 1]), tools)
