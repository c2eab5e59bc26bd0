"""Texts of records: they are checked, and cut into turns where one text holds a dialogue."""

import re

from tokenizer.messages import Message

HH_BEGINS = "\n\nHuman:"
_HH = re.compile(r"\n\n(Human|Assistant):")
_BELLE = re.compile(r"(?:^|\n)\s*(Human|Assistant):")


def text_in(value: object, where: str, may_be_empty: bool = False) -> str:
    """Text of a field.

    Args:
        where: name of the field in messages.
    Raises:
        ValueError: it is missing, not text, invalid, or empty.
    """
    if value is None:
        raise ValueError(f"{where} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{where} is not text")
    # JSON can spell half a surrogate pair, which is not text.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid Unicode") from None
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where} is empty")
    return value


def dialogue_in(text: object, ends_with: str) -> list[Message] | None:
    """Turns of a text such as HH's "\\n\\nHuman: ...\\n\\nAssistant: ..." or BELLE's "Human:...\\nAssistant:"; None if
    it is not a dialogue.

    Args:
        ends_with: "answer", or "question" for a text that ends after "Assistant:", where the answer is due.
    Raises:
        ValueError: a turn is empty.
    """
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return None
    separator, text = (_HH, text) if text.startswith(HH_BEGINS) else (_BELLE, text.lstrip())
    _, *parts = separator.split(text)
    names, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if names[-1] != "Assistant" or (ends_with == "question") != (not texts[-1]):
        return None
    if ends_with == "question":
        names, texts = names[:-1], texts[:-1]
    return [
        Message("user" if name == "Human" else "assistant", text_in(part, f"turn {number} of the dialogue"))
        for number, (name, part) in enumerate(zip(names, texts))
    ]
