"""Messages of a conversation, and what they are as tokens."""

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    role: str
    """One of ROLES."""
    text: str
    reasoning: str = ""
    """What an assistant thought before it answered, where the data keeps it apart from the text."""
    tool_calls: tuple[dict, ...] = ()
    """What an assistant asks of tools, as {"type": "function", "function": {"name": str, "arguments": dict}}."""
    name: str = ""
    """Of the tool that answers, or of the speaker."""
    call_id: str = ""
    """Of the call that a tool answers, where the data has ids: few templates write them."""
    learnt: bool = True
    """Of an assistant's message: whether the record wants it learnt. Others never are."""


@dataclass(frozen=True)
class MessageSpan:
    """What a stretch of tokens is."""

    message: int
    """Number of the message."""
    begin: int
    end: int
    """Tokens [begin, end)."""
    is_header: bool
    """What the template wrote before the text, or the text with the token that ends it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    supervised: list[bool]
    """For each token, whether the model is to learn to say it."""
    spans: list[MessageSpan]
    """Headers and texts in their order, without gaps."""
