"""Prompts of a command: those of its flags, and those of a file. Needs no torch.

    prompts.jsonl    a record a line: {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}, ...]}
    any other file   a prompt a line, without blank lines; - is standard input

Other fields of a record, such as an id, come back with its answer.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from serving.arguments import require_utf8
from tokenizer.messages import ROLES, Message
from utils.paths import absent
from utils.small_files import parse_json


class Prompt(NamedTuple):
    """What one text is to continue, or answer."""

    where: str
    """Its place, for messages."""
    text: str
    """Text to continue; with `messages`, the last one's."""
    messages: tuple[Message, ...] = ()
    """Conversation to answer, if it is one."""
    fields: dict[str, object] = {}
    """The record that it comes from."""


def prompts_of(texts: Sequence[str], file: str | None, talks: bool, system: str) -> list[Prompt]:
    """Prompts of the flags, then those of the file.

    Args:
        texts: of the flags.
        file: path, or - for standard input.
        talks: whether each text is a question.
        system: what the model is told before each conversation that does not begin with such a message itself.
    Raises:
        ValueError: there is none, or one cannot be used.
        OSError: the file cannot be read.
    """
    if not all(texts) or not texts and file is None:
        raise ValueError("--prompt is missing: give the model some text to continue, or talk to it with --chat")
    found = [Prompt("--prompt", text, fields={"prompt": text}) for text in texts]
    if file is not None:
        found += _read_records(Path(file)) if file.endswith(".jsonl") else _read_lines(file)
    if not found:
        raise ValueError(f"there is no prompt in {file}")
    return [_as_talk(prompt, talks, system) for prompt in found]


def _as_talk(prompt: Prompt, talks: bool, system: str) -> Prompt:
    require_utf8(prompt.where, "".join([prompt.text, *(message.text for message in prompt.messages)]))
    messages = prompt.messages or ((Message("user", prompt.text),) if talks else ())
    if system and messages and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return prompt._replace(messages=messages)


def _read_lines(file: str) -> Iterator[Prompt]:
    for where, line in _lines_of(file):
        yield Prompt(where, line, fields={"prompt": line})


def _read_records(path: Path) -> Iterator[Prompt]:
    for where, line in _lines_of(str(path)):
        try:
            record = parse_json(line.encode("utf-8", "surrogateescape"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f'{where} must be a record such as {{"prompt": "..."}}')
        text, messages = record.get("prompt"), record.get("messages")
        if isinstance(messages, list) and messages:
            parsed = tuple(_message_of(where, message) for message in messages)
            if parsed[-1].role == "assistant":
                raise ValueError(f"{where} ends with an answer: end it with a question")
            yield Prompt(where, parsed[-1].text, parsed, record)
        elif isinstance(text, str) and text:
            yield Prompt(where, text, fields=record)
        else:
            raise ValueError(f'{where} has neither a "prompt" with a text nor "messages"')


def _message_of(where: str, message: object) -> Message:
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if role in ROLES and isinstance(content, str):
            return Message(role, content)
    raise ValueError(
        f'{where}: a message must be {{"role": "user", "content": "..."}}, its role one of {", ".join(ROLES)}'
    )


def _lines_of(file: str) -> Iterator[tuple[str, str]]:
    """(place, line) of those that are not blank."""
    name = "standard input" if file == "-" else file
    if file != "-" and not Path(file).exists():
        raise ValueError(absent(file))
    with (nullcontext(sys.stdin) if file == "-" else
          open(file, encoding="utf-8-sig", errors="surrogateescape")) as lines:  # fmt: skip
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name}, line {number}", line.rstrip("\r\n")
