"""A conversation with a model. Needs no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serving.arguments import require_utf8
from serving.text import stream_text, without_lead
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of


@dataclass
class Chat:
    """A conversation with a model: its messages, and how the next answer is drawn.

    Args:
        sample: `generate` with all arguments but the prompt, max_new_tokens and stop_ids.
        room: greatest length of prompt and answer together, in tokens.
    """

    tokenizer: Tokenizer
    sample: Callable[[list[int], int, frozenset[int]], Iterator[int]]
    max_new_tokens: int
    room: int
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = template_of(self.tokenizer)
        self.was_cut = False
        """Whether the last answer ended because it reached its limit."""
        self.reset()

    def speak_by(self, tokenizer: Tokenizer) -> None:
        """Go on by another tokenizer and its chat template."""
        self.tokenizer, self._template = tokenizer, template_of(tokenizer)

    def reset(self) -> None:
        """Forget the messages."""
        self.messages[:] = [Message("system", self.system)] if self.system else []

    def notes(self, folder_stops: frozenset[int]) -> list[str]:
        """Remarks on talking to this model.

        Args:
            folder_stops: the tokens that its folder names as ends.
        """
        notes = list(self._template.notes)
        if self._template.end_id not in folder_stops:
            notes.append(
                "nothing in the folder says that the model was taught to end an answer: it may never have seen a "
                "conversation, for which --task_type=sft is there"
            )
        return notes

    def answer(self, question: str) -> Iterator[str]:
        """Ask, and yield pieces of the answer. The part that the caller has taken joins the history.

        The oldest exchanges are forgotten when the history becomes too long.

        Raises:
            ValueError: the question alone is too long.
        """
        prompt_ids = self._ask(question)
        said, self.was_cut = "", False
        try:
            for piece in without_lead(stream_text(self.tokenizer, self._sampled(prompt_ids)), self._template.lead):
                said += piece
                yield piece
        finally:
            self.messages.append(Message("assistant", said))

    def _sampled(self, prompt_ids: list[int]) -> Iterator[int]:
        count = 0
        for token_id in self.sample(prompt_ids, self.max_new_tokens, self._template.stop_ids):
            count += 1
            yield token_id
        self.was_cut = count >= self.max_new_tokens

    def _ask(self, question: str) -> list[int]:
        """Add a question to the history, and return the prompt."""
        require_utf8("the question", question)
        first, room = (1 if self.system else 0), self.room - self.max_new_tokens
        asked = Message("user", question)
        alone = len(self._template.prompt([*self.messages[:first], asked]))
        if alone > room:
            raise ValueError(
                f"the question{' with the system text' if self.system else ''} has {alone} tokens, and with "
                f"--max_new_tokens {self.max_new_tokens} there is room for {room}"
            )
        self.messages.append(asked)
        while len(ids := self._template.prompt(self.messages)) > room:
            # Drop a question and its answer.
            del self.messages[first : first + 2]
        return ids
