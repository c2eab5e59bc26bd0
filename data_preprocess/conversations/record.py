"""A record while it is read: its fields, and the system text, tools and thoughts beside its messages."""

from collections.abc import Mapping, Sequence

from data_preprocess.conversations.fields import SYSTEM, THOUGHT, TOOLS, Fields, is_nothing, is_switch
from data_preprocess.conversations.samples import Conversation
from data_preprocess.conversations.texts import text_in
from data_preprocess.conversations.tool_calls import loaded, tools_from
from tokenizer.messages import Message


class OpenRecord:
    """A record while it is read. Layouts take fields from it; afterwards, check_record looks at the fields left
    over."""

    def __init__(self, record: Mapping, roles: Mapping[str, str]):
        self.fields, self.roles = Fields(record), roles
        self.unread: list[str] = []
        """Names of fields within messages that are not read."""
        self._tools: tuple[dict, ...] = ()

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these fields are there and not null."""
        return all(name in self.fields for name in names)

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages, after the system text that stands beside them, if there is one."""
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
        """Add the tools that a value lists.

        Args:
            where: name of the value in messages.
        Raises:
            ValueError: they are not tools, or others than elsewhere in the record.
        """
        if is_nothing(value) or is_nothing(loaded(value)):
            return
        tools = tools_from(value, where)
        if self._tools and tools != self._tools:
            raise ValueError(f"{where} say something else than the tools elsewhere in the record: keep one of them")
        self._tools = tools

    def tools(self) -> tuple[dict, ...]:
        """Tools that the record lists, wherever they stand."""
        for name in TOOLS:
            self.add_tools(self.fields.take(name), f'"{name}"')
        return self._tools

    def reasoning(self) -> str:
        """Thoughts before the answer, in a field beside it."""
        return reasoning_in(self.fields)


def reasoning_in(fields: Fields, where: str = "") -> str:
    """Thoughts in a field of a record or of a message; empty if there are none."""
    # Some fields only say whether the model was to think.
    thought = fields.take_one([name for name in THOUGHT if not is_switch(fields.peek(name))], where)
    return "" if thought is None else text_in(thought, f"{where}what was thought")


def conversation_of(messages: list[Message], tools: tuple[dict, ...]) -> Conversation:
    """Conversation up to its last learnt answer, since nothing is learnt from the messages after it.

    Raises:
        ValueError: there is no answer, or none that is to be learnt.
    """
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise ValueError("it holds no answer")
    learnt = [number for number in answers if messages[number].learnt]
    if not learnt:
        raise ValueError("none of its answers is to be learnt")
    return Conversation(tuple(messages[: learnt[-1] + 1]), tools)
