"""Placeholders: they stand for what people wrote while a chat template lays a conversation out."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from tokenizer.base import any_of
from tokenizer.messages import ROLES, Message
from tokenizer.template_features import REASONING_KEYS, Features

MARK = re.compile("\ufdd2([0-9]+)\ufdd3")
"""A placeholder: noncharacters, which Unicode keeps for a program's own use, round a number."""
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")


class Marked(NamedTuple):
    """Messages whose texts are placeholders."""

    messages: list[dict]
    texts: list[str]
    """Of the placeholders, by number."""
    written: list[str]
    """What the template writes of them: the same, or as JSON."""
    owners: list[int]
    """For each the number of its message."""


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
        """The messages for the template. Outer blanks stay outside of the placeholders, for it to strip, and so do the
        strings that it looks for.

        Args:
            control: matches control tokens, which only the template may write.
        Raises:
            ValueError: an unknown role, or something that cannot be told from what the template writes.
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
        """A text's placeholders, with what stays outside of them.

        Args:
            is_quoted: the template writes this text as JSON.
        """
        if _NONCHARACTERS.search(text):
            raise ValueError("it holds U+FDD0 to U+FDD3, which Unicode keeps for programs")
        written = ""
        only = self._kept and self._kept.fullmatch(text.strip())
        for part in self._kept.split(text) if self._kept and not only else [text]:
            # Of a known layout it is certain that nothing is stripped, and that empty texts are texts.
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
        """As the template takes it."""
        if not self._features.joins_arguments:
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def check_no_control(value: object, what: str, control: re.Pattern[str]) -> None:
    """
    Raises:
        ValueError: a value spells a control token, or what placeholders are made of; `what` names it in the sentence.
    """
    text = json.dumps(value, ensure_ascii=False)
    if found := control.search(text):
        raise ValueError(f"{what} spells the control token {found[0]}")
    if _NONCHARACTERS.search(text):
        raise ValueError(f"{what} holds U+FDD0 to U+FDD3, which Unicode keeps for programs")


def filled(text: str, texts: Sequence[str]) -> str:
    """A text with the placeholders' own texts put in."""
    return MARK.sub(lambda mark: texts[int(mark[1])], text)


def places_of(text: str, marked: Marked) -> list[list[re.Match]]:
    """For each message, its placeholders in their order in a text.

    Raises:
        ValueError: one is there twice.
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
    """The parts of what a template wrote, in their order: (text, whether the template itself wrote it)."""
    for index, part in enumerate(MARK.split(text)):
        is_layout = index % 2 == 0
        if text_of_part := part if is_layout else marked.written[int(part)]:
            yield text_of_part, is_layout
