"""A conversation with a model: what was said, and the prompt for the next answer. Needs no torch."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from serving.arguments import require_utf8
from serving.requests import Piece, Request, Sampling
from serving.text import without_lead
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of
from utils.files import atomic_write

Ask = Callable[[Request], Iterator[Piece]]
"""Request for one choice -> pieces of it. Whoever closes it wants no more."""


def notes_on(tokenizer: Tokenizer, folder_stops: frozenset[int]) -> list[str]:
    """Remarks on talking to a model.

    Args:
        folder_stops: the tokens that its folder names as ends.
    Raises:
        ValueError: see template_of.
    """
    template = template_of(tokenizer)
    notes = list(template.notes)
    if template.end_id not in folder_stops:
        notes.append(
            "nothing in the folder says that the model was taught to end an answer: it may never have seen a "
            "conversation, for which --task_type=sft is there"
        )
    return notes


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        ask: see `Ask`.
        sampling: how answers are drawn; its max_new_tokens is a number.
        room: greatest length of prompt and answer together, in tokens.
        system: what the model is told first; empty: nothing.
    """

    tokenizer: Tokenizer
    ask: Ask
    sampling: Sampling
    room: int
    system: str = ""
    adapter: str | None = None
    """Name of the one that answers."""
    messages: list[Message] = field(default_factory=list)
    """Questions and answers, in turn."""

    def __post_init__(self) -> None:
        self._template = template_of(self.tokenizer)
        self.forgotten = 0
        """Number of the oldest messages that the model no longer sees."""
        self.was_cut = False
        """Whether the last answer ended because it reached its limit."""
        self._saved: Path | None = None
        self._attempts = self._asked = 0

    def speak_by(self, adapter: str | None, tokenizer: Tokenizer) -> None:
        """Go on with another adapter, by its tokenizer and chat template."""
        self.adapter, self.tokenizer, self._template = adapter, tokenizer, template_of(tokenizer)
        self.forgotten = 0

    def reset(self) -> None:
        """Forget the messages."""
        self.messages.clear()
        self.forgotten, self._saved = 0, None

    def answer(self, question: str) -> Iterator[str]:
        """Ask, and yield pieces of the answer. The part that the caller has taken joins the history.

        The oldest exchanges are left out of the prompt when the history becomes too long (`forgotten`).

        Raises:
            ValueError: the question alone is too long, or the model failed.
        """
        require_utf8("the question", question)
        self._attempts = 0
        return self._answer(Message("user", question), 0)

    def again(self) -> Iterator[str]:
        """Another answer to the last question, in place of the last one. It differs even with a seed.

        Raises:
            ValueError: nothing was asked yet; see also `answer`.
        """
        if not self.messages:
            raise ValueError("nothing was asked yet")
        self._attempts += 1
        return self._answer(self.messages[-2], 2)

    def _answer(self, question: Message, replaced: int) -> Iterator[str]:
        """Pieces of the answer to a question that takes the place of so many messages at the end."""
        before = len(self.messages) - replaced
        prompt_ids = self._prompt(question, before)
        self.messages[before:] = [question]
        said, self.was_cut = "", False
        try:
            for piece in without_lead(self._drawn(prompt_ids), self._template.lead):
                said += piece
                yield piece
        finally:
            self.messages.append(Message("assistant", said))

    def _drawn(self, prompt_ids: list[int]) -> Iterator[str]:
        seed = self.sampling.seed
        sampling = replace(
            self.sampling, stop_ids=self.sampling.stop_ids | self._template.stop_ids,
            seed=None if seed is None else seed + self._attempts,
        )  # fmt: skip
        self._asked += 1
        pieces = self.ask(Request(f"answer-{self._asked}", tuple(prompt_ids), sampling, adapter=self.adapter))
        try:
            for piece in pieces:
                if piece.finish == "error":
                    raise ValueError(piece.error)
                self.was_cut = piece.finish == "length"
                if piece.text:
                    yield piece.text
        finally:
            if close := getattr(pieces, "close", None):
                close()

    def _prompt(self, question: Message, before: int) -> list[int]:
        """Tokens that ask a question after as many of those messages as there is room for."""
        first = [Message("system", self.system)] if self.system else []
        assert self.sampling.max_new_tokens is not None
        room, forgotten = self.room - self.sampling.max_new_tokens, min(self.forgotten, before)
        while len(ids := self._template.prompt([*first, *self.messages[forgotten:before], question])) > room:
            if forgotten == before:
                raise ValueError(
                    f"the question{' with the system text' if self.system else ''} has {len(ids)} tokens, and with "
                    f"--max_new_tokens {self.sampling.max_new_tokens} there is room for {room}"
                )
            # A question and its answer.
            forgotten += 2
        self.forgotten = forgotten
        return ids

    def save(self, path: Path) -> int:
        """Write the conversation as a file that SFT reads: one record, {"messages": [...]}, on one line. Questions
        without an answer are left out, as no record may have an empty message. A file that this conversation was saved
        in before is replaced.

        Returns:
            The number of messages in it, with the system text.
        Raises:
            ValueError: there is nothing to save, or the file exists.
            OSError: the file cannot be written.
        """
        turns = zip(self.messages[::2], self.messages[1::2])
        said = [message for turn in turns if turn[1].text.strip() for message in turn]
        if not said:
            raise ValueError("nothing was said yet")
        if path.exists() and path != self._saved:
            raise ValueError(f"{path} exists: give another name")
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another")
        written = [*([Message("system", self.system)] if self.system else []), *said]
        record = {"messages": [{"role": one.role, "content": one.text} for one in written]}
        atomic_write(path, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._saved = path
        return len(written)
