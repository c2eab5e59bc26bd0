"""How a conversation becomes tokens, and which of them an assistant is to learn.

    <|im_start|> user <|im_sep|> text <|im_end|> <|im_start|> assistant <|im_sep|> text <|im_end|>
                                                                                   ^^^^^^^^^^^^^^^ supervised

Control tokens are placed by id, so no text can begin or end a message; each stretch of text between them is encoded by
itself. An answer is supervised together with the <|im_end|> after it, by which the model learns to stop; no header is.

Tokenizers of other models keep their own layout, if it is one of these: ChatML, with a line end after the role and
after the message; Llama 3, with a token that begins the conversation, its header tokens and an empty line. Texts are
taken as they are; Llama 3's own template strips blanks from both ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizer.base import MESSAGE_END, MESSAGE_SEPARATOR, MESSAGE_START, Tokenizer

ROLES = ("system", "user", "assistant", "tool")

JINJA = (
    "{% for message in messages %}"
    f"{{{{ '{MESSAGE_START}' + message['role'] + '{MESSAGE_SEPARATOR}' + message['content'] + '{MESSAGE_END}' }}}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{{{{ '{MESSAGE_START}assistant{MESSAGE_SEPARATOR}' }}}}"
    "{% endif %}"
)
"""The layout of the tokenizers trained here, for transformers' `apply_chat_template`."""


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


@dataclass(frozen=True)
class Span:
    """What a stretch of tokens is."""

    message: int
    """Number of the message."""
    begin: int
    end: int
    """Tokens [begin, end)."""
    is_header: bool
    """Control tokens and the role, or the text with the token that ends it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    supervised: list[bool]
    """For each token, whether the model is to learn to say it."""
    spans: list[Span]
    """Headers and texts in their order, without gaps."""


@dataclass(frozen=True)
class _Layout:
    """What stands round the role and the text of a message."""

    start: str
    separator: str
    """Control token after the role; "" for none."""
    after_role: str
    """Plain text."""
    end: str
    after_message: str
    """Plain text."""
    first: str = ""
    """Control token that begins a conversation, if the tokenizer has it; "" for none."""

    @property
    def control_tokens(self) -> list[str]:
        return [token for token in (self.start, self.separator, self.end) if token]


_LAYOUTS = (
    _Layout(MESSAGE_START, MESSAGE_SEPARATOR, "", MESSAGE_END, ""),
    _Layout(MESSAGE_START, "", "\n", MESSAGE_END, "\n"),
    _Layout("<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", first="<|begin_of_text|>"),
)


class ChatTemplate:
    """
    Args:
        tokenizer: has the control tokens of a layout.
    Raises:
        ValueError: it has not.
    """

    def __init__(self, tokenizer: Tokenizer):
        special, encode = tokenizer.special_ids, tokenizer.encode
        layout = next((one for one in _LAYOUTS if special.keys() >= set(one.control_tokens)), None)
        if layout is None:
            raise ValueError(
                f"the tokenizer has no control tokens for conversations, such as {MESSAGE_START} and {MESSAGE_END}: "
                f"use one that was trained with `python -m tokenizer.train_tokenizer`"
            )
        self._tokenizer, self.end_id = tokenizer, special[layout.end]
        self._headers: dict[str, list[int]] = {}
        for role in ROLES:
            if layout.separator:
                rest = [*encode(role), special[layout.separator], *encode(layout.after_role)]
            else:
                rest = encode(role + layout.after_role)
            self._headers[role] = [special[layout.start], *rest]
        self._after_message = encode(layout.after_message)
        self._first = [special[layout.first]] if layout.first in special else []

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset([self.end_id, self._tokenizer.eod_id])

    def encode(self, messages: Sequence[Message]) -> list[list[int]]:
        """Tokens of each message's text."""
        return self._tokenizer.encode_batch([message.text for message in messages], num_threads=1)

    def sizes(self, messages: Sequence[Message], texts: Sequence[list[int]]) -> list[int]:
        """Tokens that each message adds to a conversation; `size_of_none` are there without any."""
        return [len(self._header(m.role, follows=True)) + len(text) + 1 for m, text in zip(messages, texts)]

    @property
    def size_of_none(self) -> int:
        """What the sum of `sizes` is to be corrected by: the first message follows nothing."""
        return len(self._first) - len(self._after_message)

    def render(
        self,
        messages: Sequence[Message],
        is_supervised: Callable[[int], bool] = lambda number: True,
        texts: Sequence[list[int]] | None = None,
    ) -> Rendered:
        """Tokens of a conversation.

        Args:
            is_supervised: whether the answer that is the message of this number is to be learnt.
            texts: the messages' texts, if they are encoded already.
        Raises:
            ValueError: an unknown role.
        """
        texts = self.encode(messages) if texts is None else texts
        ids: list[int] = []
        supervised: list[bool] = []
        spans: list[Span] = []
        for number, (message, text) in enumerate(zip(messages, texts)):
            header = self._header(message.role, follows=number > 0)
            learnt = message.role == "assistant" and is_supervised(number)
            begin = len(ids)
            ids += [*header, *text, self.end_id]
            middle = begin + len(header)
            supervised += [False] * len(header) + [learnt] * (len(ids) - middle)
            spans += [Span(number, begin, middle, True), Span(number, middle, len(ids), False)]
        return Rendered(ids, supervised, spans)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after which the assistant's answer begins."""
        return self.render(messages).ids + self._header("assistant", follows=bool(messages))

    def _header(self, role: str, follows: bool) -> list[int]:
        if role not in self._headers:
            raise ValueError(f'unknown role "{role}": it is none of {", ".join(ROLES)}')
        return (self._after_message if follows else self._first) + self._headers[role]
