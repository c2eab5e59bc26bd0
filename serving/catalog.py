"""Names under which a server offers its model and the adapters, and what each name means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from serving.fields import Mistake
from serving.token_texts import TokenTexts
from tokenizer import Tokenizer
from tokenizer.chat_template import ChatTemplate, Message
from utils.small_files import shown


@dataclass(frozen=True)
class Offer:
    """A model that a request can name."""

    name: str
    adapter: str | None
    """Name of the adapter in the engine; None: none."""
    parent: str | None
    """Name of the model that the adapter is for."""
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """Tokens that end a text, by the folder."""
    context: int
    """Most tokens of prompt and answer together."""
    template: ChatTemplate | None
    no_template: str = ""
    """Why there is none."""
    step: int | None = None
    """Step of the run's checkpoint."""
    created: int = 0
    """Seconds since 1970."""
    recommended: Mapping[str, float] = field(default_factory=dict)
    """How the folder wants its texts drawn: temperature, top_p ... A hint for clients; requests that say nothing are
    drawn as OpenAI's API documents."""

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    @cached_property
    def longest(self) -> int:
        """Characters of text beyond which no prompt fits the context, also if the tokenizer joins characters first."""
        return 4 * self.context * max(self.tokenizer.token_byte_lengths())

    @property
    def notes(self) -> list[str]:
        """Sentences that a user should read before talking to it."""
        if self.template is None:
            return [self.no_template]
        notes = list(self.template.notes)
        if self.template.end_id not in self.stop_ids:
            notes.append(
                "nothing in the folder says that the model was taught to end an answer: it may never have seen a "
                "conversation"
            )
        return notes

    def conversation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Prompt that asks for an answer.

        Raises:
            Mistake: the model's folder says nothing about conversations, or its template refuses this one.
        """
        if self.template is None:
            raise Mistake(f"the model {self.name} cannot chat, but continue texts (/v1/completions): "
                          f"{self.no_template}", "messages")  # fmt: skip
        self.require_short(sum(len(message.text) for message in messages), "messages")
        try:
            return tuple(self.template.prompt(messages))
        except ValueError as error:
            raise Mistake(f"messages cannot be laid out: {error}", "messages") from None

    def text(self, text: str, with_begin: bool = True, field: str = "prompt") -> tuple[int, ...]:
        """Tokens of a text. Control tokens that it spells stay text.

        Args:
            with_begin: the tokenizer's own beginning of texts comes first.
            field: name of the request's field in messages.
        """
        self.require_short(len(text), field)
        return (*(self.tokenizer.begin_ids if with_begin else ()), *self.tokenizer.encode(text))

    def require_short(self, characters: int, field: str) -> None:
        """Check a text's length before it is made into tokens, which takes long.

        Raises:
            Mistake: it cannot fit the model's context.
        """
        if characters > self.longest:
            raise Mistake(
                f"{field} has {characters:,} characters, and the model has room for {self.context} tokens: shorten it",
                field, "context_length_exceeded",
            )  # fmt: skip

    def require_ids(self, ids: Sequence[int], field: str) -> None:
        """
        Raises:
            Mistake: an id is none of the tokenizer's.
        """
        beyond = next((one for one in ids if not 0 <= one < self.tokenizer.vocab_size), None)
        if beyond is not None:
            raise Mistake(f"{field} holds {shown(beyond)}, and the model's tokens have the ids 0 to "
                          f"{self.tokenizer.vocab_size - 1}", field, "invalid_value")  # fmt: skip


class Catalog:
    """Models that can be named, the one that is meant without a name first."""

    def __init__(self, offers: Sequence[Offer]):
        self.offers = tuple(offers)
        self._by_name = {offer.name: offer for offer in offers}

    def find(self, name: str | None) -> Offer:
        """
        Raises:
            Mistake: there is no such model.
        """
        if name is None:
            return self.offers[0]
        if name not in self._by_name:
            known = ", ".join(self._by_name)
            raise Mistake(
                f"there is no model of this name: choose one of {known}", "model", "model_not_found", status=404
            )
        return self._by_name[name]
