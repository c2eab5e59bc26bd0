"""Chat templates: how a conversation becomes tokens, and which of them an assistant learns.

    <|im_start|> user <|im_sep|> text <|im_end|> <|im_start|> assistant <|im_sep|> text <|im_end|>
                                                                                   ^^^^^^^^^^^^^^^ supervised

This is the layout of the tokenizers trained here (usual_layouts.py). Other models keep their own: the folder's chat
template lays a conversation out. It is a program in Jinja, which runs in a sandbox (jinja_template.py). So a model is
trained on the same text that transformers, vLLM and others give it later. A folder without a template, but with the
control tokens of ChatML or Llama 3, gets the usual template of these.

**Text stays text.** The template gets placeholders in place of the texts that people wrote (placeholders.py), and its
output is cut at them. Control tokens count only in the text that the template itself wrote, so that no text can begin
or end a message. The ids are those of transformers' `apply_chat_template` for every conversation that spells no control
token. Whatever a template does to texts (strip outer blanks, leave out old thoughts) happens to the placeholders as
well. It is also given the texts themselves, and if the result differs, the conversation is refused.

**The learnt part of an answer** begins at the end of the prompt that asks the model for it (`add_generation_prompt`),
and ends with the first control token after its text, by which the model learns to stop (template_habits.py,
regions.py). That may be the token that begins the next message.

    messages -> placeholders.py -> jinja_template.py -> regions.py -> ids, supervised or not
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from tokenizer.base import Tokenizer, any_of
from tokenizer.jinja_template import JinjaTemplate
from tokenizer.known_layouts import name_of_layout
from tokenizer.messages import ROLES, Message, MessageSpan, Rendered
from tokenizer.placeholders import Marked, Placeholders, check_no_control, filled, parts_of
from tokenizer.regions import Region, RegionFinder
from tokenizer.template_features import REASONING_KEYS, Features
from tokenizer.template_habits import TALK, habits_of
from tokenizer.usual_layouts import JINJA, usual_layout

__all__ = ["JINJA", "ROLES", "ChatTemplate", "Message", "MessageSpan", "Rendered", "template_of"]


class _Piece(NamedTuple):
    """A stretch of the laid-out text."""

    text: str
    is_layout: bool
    """Whether the template itself wrote it."""
    message: int
    is_header: bool
    is_learnt: bool


class ChatTemplate:
    """Chat template of a tokenizer.

    Args:
        tokenizer: has a chat template, or the control tokens of a usual layout.
    Raises:
        ValueError: it has neither, or no model could learn to stop by its template.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        source = tokenizer.chat_template
        self._is_known = source in (None, JINJA)
        self.notes: list[str] = []
        """Sentences that a user should read before training."""
        if source is None:
            usual = usual_layout(tokenizer.special_ids)
            source = (f"{{{{ '{usual.first}' }}}}" if usual.first in tokenizer.special_ids else "") + usual.template
            self.notes.append(f"the tokenizer has no chat template: conversations are laid out as {usual.name} are")
        elif name := name_of_layout(source):
            self.notes.append(f"conversations are laid out as {name} are: such models have code for it, no template")
        self.source = source
        """The program."""
        tokens = {name: text for name, text in tokenizer.template_tokens.items() if name in source}
        self.key = json.dumps([source, tokens], sort_keys=True)
        """Equal for two templates that write the same."""
        self._jinja = JinjaTemplate(source, tokenizer.template_tokens)
        sought = [text for text in self._jinja.looks_for if not any_of(tokenizer.special_ids).search(text)]
        features = Features(self._jinja)
        self._placeholders = Placeholders(features, sought, self._is_known)
        control = any_of([*tokenizer.special_ids, *tokenizer.added_ids])
        self._habits = habits_of(
            self._jinja, tokenizer, lambda messages: self._placeholders.mark(messages, control), control
        )
        self.notes += self._habits.notes
        self.end_id = (tokenizer.special_ids | tokenizer.added_ids)[self._habits.end]
        """Token that ends an answer."""
        self.lead = self._habits.lead
        """Text that the model itself says before an answer, as the prompt ends before it; often empty."""
        self._stops = frozenset((tokenizer.special_ids | tokenizer.added_ids)[text] for text in self._habits.stops)
        self._control = any_of([*tokenizer.special_ids, *self._habits.also])
        self._finder = RegionFinder(self._jinja, features, self._habits, self._control)
        self._compare_prompt()

    def _compare_prompt(self) -> None:
        """Note it if the tokens that ask for an answer change once the answer follows."""
        asked = self.prompt(TALK[:1])
        if not self._habits.opening and self.render(TALK).ids[: len(asked)] != asked:
            self.notes.append(
                "the prompt that asks for an answer becomes other tokens once the answer follows, as the tokenizer "
                "joins them: answers are learnt as they stand there"
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._stops | {self.end_id, self._tokenizer.eod_id}

    def render(
        self,
        messages: Sequence[Message],
        is_supervised: Callable[[int], bool] = lambda number: True,
        tools: Sequence[dict] = (),
    ) -> Rendered:
        """Tokens of a conversation, as transformers' `apply_chat_template` gives them. If the template writes no end
        behind the last answer, the end of a document follows.

        Args:
            is_supervised: whether the answer in the message of this number is learnt.
            tools: tools that the assistant may call.
        Raises:
            ValueError: a role is unknown, or the template has no place for something.
        """
        learnt = {n for n, message in enumerate(messages) if message.role == "assistant" and is_supervised(n)}
        goes_on = len(messages) - 1 in learnt and self._goes_on(messages[-1])
        if goes_on:
            messages = [*messages[:-1], goes_on]
        marked = self._placeholders.mark(messages, self._control)
        text = self._write(marked, tools, upto=len(messages) - 1 if goes_on else None)
        if goes_on:
            text += marked.messages[-1]["content"] + self._habits.end
        elif self._habits.is_open and messages and messages[-1].role == "assistant":
            text += self._habits.end
        regions = self._finder.regions(text, messages, marked, learnt, tools)
        return self._encode(self._pieces(text, marked, regions, learnt))

    def _goes_on(self, answer: Message) -> Message | None:
        """Rest of an answer, if the prompt that asks for it already begins it; None otherwise."""
        tag = self._habits.opening.strip()
        if not tag or answer.tool_calls:
            return None
        if answer.reasoning:
            return Message(answer.role, f"{answer.reasoning}\n{tag.replace('<', '</', 1)}\n\n{answer.text}")
        text = answer.text.lstrip()
        return Message(answer.role, text.removeprefix(tag).lstrip("\n")) if text.startswith(tag) else None

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[int]:
        """Tokens after which the assistant's answer begins.

        Raises:
            ValueError: see render.
        """
        return self.beginnings(messages, tools)("")

    def beginnings(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> Callable[[str], list[int]]:
        """Function from the beginning of an answer to the tokens of the prompt and of this beginning. Control tokens
        that it spells stay text.

        Raises:
            ValueError: see render.
        """
        marked = self._placeholders.mark(messages, self._control)
        text = self._write(marked, tools, upto=len(messages))
        regions = self._finder.regions(text, messages, marked, set(), tools)
        pieces = list(self._pieces(text, marked, regions, set()))

        def tokens(begun: str) -> list[int]:
            added = [_Piece(begun, False, len(messages), False, False)] if begun else []
            return self._encode(iter([*pieces, *added])).ids

        return tokens

    def _write(self, marked: Marked, tools: Sequence[dict], upto: int | None) -> str:
        """Text that the template writes with the placeholders, checked against the one with the texts themselves.

        Args:
            upto: number of the message that is asked for; None if no message is.
        Raises:
            ValueError: the two differ, or the tools leave no trace.
        """
        if tools:
            check_no_control(tools, "a description of a tool", self._control)
        messages, asks = marked.messages[:upto], upto is not None
        text = self._jinja.render(messages, tools, asks)
        if tools and text == self._jinja.render(messages, (), asks):
            raise ValueError('the chat template has no place for tools ("tools" or "functions")')
        if not self._is_known:
            texts = ("content", *REASONING_KEYS)
            plain = [
                {k: filled(v, marked.texts) if k in texts else v for k, v in one.items()} for one in messages
            ]
            if self._jinja.render(plain, tools, asks) != filled(text, marked.written):
                raise ValueError("the chat template alters the texts of its messages by more than outer blanks")
        return text

    @staticmethod
    def _pieces(text: str, marked: Marked, regions: list[Region], learnt: set[int]) -> Iterator[_Piece]:
        """Pieces of the laid-out text. The text before a region is its header. The text after the last region belongs
        to that, but is not learnt."""
        position = 0
        for index, region in enumerate(regions):
            is_last = index + 1 == len(regions)
            stretches = [(position, region.begin, True, False), (*region[:2], False, region.message in learnt)]
            if is_last:
                stretches.append((region.end, len(text), False, False))
            for begin, end, is_header, is_learnt in stretches:
                for part, is_layout in parts_of(text[begin:end], marked):
                    yield _Piece(part, is_layout, region.message, is_header, is_learnt)
            position = region.end
        if not regions:
            yield _Piece(text, True, 0, True, False)

    def _encode(self, pieces: Iterator[_Piece]) -> Rendered:
        pieces = list(pieces)
        ids, counts = self._tokenizer.encode_pieces([(one.text, one.is_layout) for one in pieces], self._habits.also)
        supervised: list[bool] = []
        spans: list[MessageSpan] = []
        for piece, count in zip(pieces, counts):
            begin = len(supervised)
            supervised += [piece.is_learnt] * count
            if spans and (spans[-1].message, spans[-1].is_header) == (piece.message, piece.is_header):
                begin = spans.pop().begin
            if begin < len(supervised):
                spans.append(MessageSpan(piece.message, begin, len(supervised), piece.is_header))
        return Rendered(ids, supervised, spans)


@lru_cache(maxsize=4)
def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """Chat template of a tokenizer, which is examined only once.

    Raises:
        ValueError: see ChatTemplate.
    """
    return ChatTemplate(tokenizer)
