"""Placeholders, which stand for people's texts while a chat template lays a conversation out."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from tokenizer.base import any_of
from tokenizer.messages import ROLES, Message
from tokenizer.template_features import REASONING_KEYS, Features

MARK = re.compile("\ufdd2([0-9]+)\ufdd3")
"""Pattern of a placeholder: a number between noncharacters, which Unicode reserves for a program's own use."""
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")


class Marked(NamedTuple):
    """Messages whose texts are placeholders."""

    messages: list[dict]
    texts: list[str]
    """Texts of the placeholders, by number."""
    written: list[str]
    """Texts as the template writes them: the same, or as JSON."""
    owners: list[int]
    """Number of each placeholder's message."""


class Placeholders:
    """Puts placeholders into the messages for one template."""

    def __init__(self, features: Features, sought: Collection[str], is_known: bool):
        """
        Args:
            sought: strings that the template looks for in texts, which stay outside of the placeholders.
            is_known: the template is our own, which leaves texts as they are.
        """
        self._features, self._is_known = features, is_known
        self._kept = any_of(sought) if sought else None

    def mark(self, messages: Sequence[Message], control: re.Pattern[str]) -> Marked:
        """Messages for the template, with placeholders as texts. Outer blanks stay outside of the placeholders, so that
        the template can strip them, and so do the strings that it looks for.

        Args:
            control: matches control tokens, which only the template may write.
        Raises:
            ValueError: a role is unknown, or something could be mistaken for text that the template writes.
        """
        marked = Marked([], [], [], [])
        for number, message in enumerate(messages):
            if message.role not in ROLES:
                raise ValueError(f'unknown role "{message.role}": it is none of {", ".join(ROLES)}')
            is_quoted = message.role == "tool" and self._features.quotes_results
            values = {"role": message.role, "content": self._of_text(message.text, number, marked, is_quoted)}
            if message.reasoning:
                key = self._features.reasoning_key or REASONING_KEYS[0]
                values[key] = self._of_text(message.reasoning, number, marked)
            if message.tool_calls:
                check_no_control(message.tool_calls, "a call of a tool", control)
                values["tool_calls"] = [self._call(call) for call in message.tool_calls]
            for key, value in (("name", message.name), ("tool_call_id", message.call_id)):
                if value:
                    check_no_control(value, f'a "{key}"', control)
                    values[key] = value
            marked.messages.append(values)
        return marked

    def _of_text(self, text: str, message: int, marked: Marked, is_quoted: bool = False) -> str:
        """A text with its parts replaced by placeholders, except for the parts that stay outside.

        Args:
            is_quoted: whether the template writes this text as JSON.
        """
        if _NONCHARACTERS.search(text):
            raise ValueError("it holds U+FDD0 to U+FDD3, which Unicode keeps for programs")
        written = ""
        only = self._kept and self._kept.fullmatch(text.strip())
        for part in self._kept.split(text) if self._kept and not only else [text]:
            # A known layout certainly strips nothing, and takes empty texts for texts.
            core = part if self._is_known else part.strip()
            if self._is_known or only or (core and not (self._kept and self._kept.fullmatch(part))):
                before, _, after = part.partition(core) if core else ("", "", "")
                written += f"{before}\ufdd2{len(marked.texts)}\ufdd3{after}"
                marked.texts.append(core)
                marked.written.append(json.dumps(core, ensure_ascii=False)[1:-1] if is_quoted else core)
                marked.owners.append(message)
            else:
                written += part
        return written

    def _call(self, call: dict) -> dict:
        """A call in the form that the template takes."""
        if not self._features.joins_arguments:
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def check_no_control(value: object, what: str, control: re.Pattern[str]) -> None:
    """Check that a value spells no control token.

    Args:
        what: name of the value in messages.
    Raises:
        ValueError: it does, or it holds characters of placeholders.
    """
    text = json.dumps(value, ensure_ascii=False)
    if found := control.search(text):
        raise ValueError(f"{what} spells the control token {found[0]}")
    if _NONCHARACTERS.search(text):
        raise ValueError(f"{what} holds U+FDD0 to U+FDD3, which Unicode keeps for programs")


def filled(text: str, texts: Sequence[str]) -> str:
    """A text in which placeholders are replaced by their texts."""
    return MARK.sub(lambda mark: texts[int(mark[1])], text)


def places_of(text: str, marked: Marked) -> list[list[re.Match]]:
    """Placeholders of each message, in the order of a text.

    Raises:
        ValueError: a placeholder occurs twice.
    """
    places: list[list[re.Match]] = [[] for _ in marked.messages]
    seen: set[str] = set()
    for mark in MARK.finditer(text):
        message = marked.owners[int(mark[1])]
        if mark[1] in seen:
            raise ValueError(f"the chat template repeats message {message}")
        seen.add(mark[1])
        places[message].append(mark)
    return places


def parts_of(text: str, marked: Marked) -> Iterator[tuple[str, bool]]:
    """Parts of a template's output, in order, as (text, whether the template itself wrote it)."""
    for index, part in enumerate(MARK.split(text)):
        is_layout = index % 2 == 0
        if text_of_part := part if is_layout else marked.written[int(part)]:
            yield text_of_part, is_layout
