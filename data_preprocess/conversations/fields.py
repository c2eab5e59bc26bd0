"""Fields of records and of their messages, whatever the layout, and what becomes of each.

    kind      fields                                     what becomes of them
    said      questions, answers, what belongs before    read by the record's layout; one that it does not
                                                         read may only say again what is read
    refused   pictures, sounds, a template's arguments   refused, since nothing here can do what they ask
    flags     deleted, valid, label; weight, train,      a record that must not be learnt is refused; a message is kept,
              mask, loss                                 but not learnt
    marks     split, status, toxic, correct              not read, but named with their values, once a run
    others    id, source, category, score                not read, but named once a run

The names come from the formats of OpenAI's fine-tuning, TRL, LLaMA-Factory, axolotl, ms-swift, XTuner and gdGPT, and
from the data sets Alpaca, Dolly, BELLE, Firefly, HH-RLHF, UltraFeedback, UltraChat, OpenAssistant and WildChat.
"""

import json
from collections.abc import Iterable, Iterator, Mapping

SYSTEM = ("system", "system_prompt", "system_message")
QUESTION = ("instruction", "prompt", "question", "query", "input")
BELOW_QUESTION: Mapping[str, tuple[str, ...]] = {"instruction": ("input", "context"), "prompt": ("input",)}
"""Field of a question -> fields whose text follows it, on a line of its own."""
ANSWER = ("output", "completion", "response", "answer", "target")
THOUGHT = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "cot")
"""Thoughts before an answer; in some data sets only a switch, see is_switch."""
TALK = ("conversations", "conversation", "messages")
TOOLS = ("tools", "functions")
PAIR = ("chosen", "rejected")
REJECTED = ("rejected_response", "rejected_messages")
"""The worse answer, where the better one ends the conversation (ms-swift)."""
OUTPUTS = ("preferred_output", "non_preferred_output")
"""Answers of OpenAI's preferences; their "input" holds the messages and tools."""
GDGPT = ("type", "text", "instruct", "rounds", "api_desc", "reference")

BESIDE = (
    "history", "context", "contexts", "knowledge", "documents", "document", "article", "passage", "choices", "options",
)  # fmt: skip
"""Texts that belong to the question, or before it."""
_OF_MAGPIE = "knowledge"
"""In Magpie's records, which are conversations, it names the knowledge that an answer needs, and nobody is to see
it."""
SAID = frozenset((*SYSTEM, *QUESTION, *ANSWER, *THOUGHT, *TALK, *TOOLS, *REJECTED, *BESIDE))

_PICTURES = "pictures and sounds cannot be learnt here"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys("images image image_url videos video audios audio files attachments".split(), _PICTURES),
    "objects": "places in a picture cannot be learnt here",
    "chat_template_kwargs": "arguments of a chat template are not used here",
    "rejected_images": _PICTURES,
}
REFUSED_IN_MESSAGES: Mapping[str, str] = {
    **{name: why for name, why in REFUSED.items() if why == _PICTURES},
    "refusal": "write it as the text if it is to be learnt",
    "train_detail": "an answer is learnt as a whole",
    "training_detail": "an answer is learnt as a whole",
    "documents": "write them into the text",
}

LEARN_IF = (
    "weight", "loss", "loss_mask", "loss_weight", "train", "training", "trainable", "train_on_turn", "output_with_loss",
)  # fmt: skip
LEARN_UNLESS = ("mask", "masked", "ignore", "skip")
TAKE_IF = ("valid", "is_valid", "accepted", "review_result", "chosen")
TAKE_UNLESS = ("deleted", "is_deleted", "discarded", "rejected")
KTO = ("label", "kto_tag")
MARKS = frozenset(
    "split status toxic redacted flagged correct is_correct verified is_verified safe is_safe "
    "parallel_tool_calls tool_choice".split()
)

FIELDS = frozenset((
    *SAID, *PAIR, *OUTPUTS, *GDGPT, *REFUSED, *LEARN_IF, *LEARN_UNLESS, *TAKE_IF, *TAKE_UNLESS, *KTO, *MARKS,
))  # fmt: skip
"""Every field that is looked at in any layout. Of a table, only these columns are read."""

_LONGEST_MARK, _MOST_NAMES = 20, 40
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_SWITCHES = frozenset((*_FLAGS, *"on off none auto minimal low medium high enabled disabled".split()))


def is_nothing(value: object) -> bool:
    """Whether a field holds nothing. It may be there only because other records have it, as in the rows of a table."""
    return value is None or (isinstance(value, str | list | dict | tuple) and not value) or _is_blank(value)


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def flag(value: object) -> bool | None:
    """Value of a field that may say yes or no; None if it says neither."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def is_switch(value: object) -> bool:
    """Whether a field that may hold thoughts only switches them on or off, or says how many, as Nemotron's
    "reasoning": "on" does."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


def quoted(value: object) -> str:
    """Text of any value for a message: one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 100 else f"{text[:100]}..."


class Fields:
    """Fields of a record or of a message, which remember that they were read."""

    def __init__(self, values: Mapping):
        self._values, self._read = values, set()

    def __contains__(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        return name in self._values and self._values.get(name) is None

    def names(self) -> list[str]:
        """Names of all fields as text, sorted."""
        return sorted(map(str, self._values))

    def peek(self, name: str) -> object:
        """Value of a field, which stays unread."""
        return self._values.get(name)

    def take(self, name: str) -> object:
        """Value of a field, which counts as read from now on; None if it is not there."""
        self._read.add(name)
        return self._values.get(name)

    def first(self, names: Iterable[str]) -> str | None:
        """Name of the first field that says something, or else of the first that is there."""
        there = [name for name in names if name in self]
        return next((name for name in there if not is_nothing(self._values.get(name))), there[0] if there else None)

    def take_one(self, names: Iterable[str], where: str = "") -> object:
        """Value of something that has several names; None if no field says anything.

        Raises:
            ValueError: two fields say different things.
        """
        said = {name: value for name in names if not is_nothing(value := self.take(name))}
        if any(value != next(iter(said.values())) for value in said.values()):
            raise ValueError(f"{where}{' and '.join(map(_named, said))} say different things: keep one of them")
        return next(iter(said.values()), None)

    def unread(self) -> Iterator[tuple[str, object]]:
        for name, value in self._values.items():
            if name not in self._read:
                yield name, value


def _named(name: str) -> str:
    return f'"{name}"'


def check_record(fields: Fields, format: str, texts: list[str]) -> list[str]:
    """Look at the fields of a record that its layout did not read.

    Args:
        format: names of the fields that it read.
        texts: all texts that it read.
    Returns:
        Names of the unread fields; of marks, with their values.
    Raises:
        ValueError: one of them changes what the record means.
    """
    names = []
    for name, value in fields.unread():
        if name not in FIELDS:
            names.append(_shown(name))
            continue
        if is_nothing(value):
            continue
        if name in REFUSED:
            raise ValueError(f'it has "{name}": {REFUSED[name]}')
        _check_flags(name, value)
        if name in MARKS or (name in THOUGHT and is_switch(value)):
            names.append(f"{name}={quoted(value)}" if len(quoted(value)) <= _LONGEST_MARK else name)
        elif name in SAID and not (name == _OF_MAGPIE and format in TALK) and not _is_said(value, texts):
            raise ValueError(
                f'"{name}" is not read beside {format}, and says something else: put it where it belongs, or drop it'
            )
        elif name not in SAID or name == _OF_MAGPIE:
            names.append(name)
    return names[:_MOST_NAMES]


def _check_flags(name: str, value: object) -> None:
    says = flag(value)
    # Words are class names, such as the answers of a quiz.
    if name in KTO and (name == "kto_tag" or (says is not None and str(value).strip().lower() not in ("yes", "no"))):
        raise ValueError(f'"{name}" tells good answers from bad ones (KTO), which is not a task here')
    if (name in LEARN_IF or name in TAKE_IF) and says is False:
        raise ValueError(f'"{name}" is {quoted(value)}: it is not to be learnt')
    if (name in LEARN_UNLESS or name in TAKE_UNLESS) and says is True:
        raise ValueError(f'"{name}" is {quoted(value)}: it is not to be learnt')
    is_mask = isinstance(value, list | dict) and name in (*LEARN_IF, *LEARN_UNLESS)
    if says is None and (
        is_mask or "weight" in name or (name == "mask" and str(value).lower() not in ("user", "human"))
    ):
        raise ValueError(f'"{name}" is {quoted(value)}: only yes and no, or 1 and 0, are understood')


def _shown(name: object) -> str:
    """Name that the author of a record made up, shortened for a message."""
    return " ".join(str(name).split())[:60]


def _is_said(value: object, texts: list[str]) -> bool:
    return all(any(text.strip() in other for other in texts) for text in _texts_in(value))


def _texts_in(value: object, depth: int = 0) -> Iterator[str]:
    """All texts of a value, except for the names of roles and kinds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        if depth > 8:
            raise ValueError("it is too deeply nested")
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in inner:
            if key not in ("role", "from", "type", "name"):
                yield from _texts_in(one, depth + 1)
    elif value is not None:
        yield quoted(value)


def is_learnt(fields: Fields, where: str) -> bool | None:
    """Whether a message is learnt, by its own flags; None if it has none.

    Raises:
        ValueError: a weight other than 0 and 1, or flags that contradict each other.
    """
    says = set()
    for name in (*LEARN_IF, *LEARN_UNLESS):
        value = fields.take(name)
        if value is None:
            continue
        said = flag(value)
        if said is None and (isinstance(value, list | dict) or "weight" in name or "mask" in name):
            raise ValueError(f'{where} has the "{name}" {quoted(value)}: only yes and no, or 1 and 0, are understood')
        if said is not None:
            says.add(said == (name in LEARN_IF))
    if len(says) > 1:
        raise ValueError(f"{where} says both that it is learnt and that it is not")
    return says.pop() if says else None


def check_message(fields: Fields, where: str) -> list[str]:
    """Look at the fields of a message that were not read, and return their names.

    Raises:
        ValueError: one of them changes what the message means.
    """
    names = []
    for name, value in fields.unread():
        if name in REFUSED_IN_MESSAGES and not is_nothing(value):
            raise ValueError(f'{where} has "{name}": {REFUSED_IN_MESSAGES[name]}')
        if (name in TAKE_UNLESS and flag(value) is True) or (name in TAKE_IF and flag(value) is False):
            raise ValueError(f'{where} is not to be learnt: "{name}" is {quoted(value)}')
        if name == "channel" and value not in (None, "", "final"):
            raise ValueError(f'{where} is of the "channel" {quoted(value)}, which is not understood here')
        if name == "prefix" and flag(value):
            raise ValueError(f'{where} is a "prefix": only whole messages are understood')
        names.append(_shown(name))
    return names[:_MOST_NAMES]
