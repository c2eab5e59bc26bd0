"""Messages of a conversation, and their tokens."""

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """A message of a conversation."""

    role: str
    """One of ROLES."""
    text: str
    reasoning: str = ""
    """Thoughts of an assistant before its answer, where the data keep them apart from the text."""
    tool_calls: tuple[dict, ...] = ()
    """Calls of tools by an assistant, as {"type": "function", "function": {"name": str, "arguments": dict}}."""
    name: str = ""
    """Name of the tool that answers, or of the speaker."""
    call_id: str = ""
    """Id of the call that a tool answers, where the data have ids. Few templates write them."""
    learnt: bool = True
    """Whether the record wants an assistant's message learnt. Other messages never are."""


@dataclass(frozen=True)
class MessageSpan:
    """Tokens of a message's header, or of its text."""

    message: int
    """Number of the message."""
    begin: int
    end: int
    """Tokens [begin, end)."""
    is_header: bool
    """Whether these are the tokens before the text; otherwise, the text and the token that ends it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    supervised: list[bool]
    """Whether the model learns to say each token."""
    spans: list[MessageSpan]
    """Headers and texts, in order and without gaps."""
