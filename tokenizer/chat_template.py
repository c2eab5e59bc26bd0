"""How a conversation becomes tokens, and which of them an assistant is to learn.

    <|im_start|> user <|im_sep|> text <|im_end|> <|im_start|> assistant <|im_sep|> text <|im_end|>
                                                                                   ^^^^^^^^^^^^^^^ supervised

This is the layout of the tokenizers trained here. Other models keep their own: what lays a conversation out is the
folder's chat template, a program in Jinja, run in a sandbox (jinja_template.py). So what is trained on is what
transformers, vLLM and others put before the model later. A folder without a template, but with the control tokens of
ChatML or Llama 3, gets the usual one of these.

**Text stays text.** The template is given placeholders instead of what people wrote. Its output is cut at them: control
tokens count in what the template wrote, and nowhere else, so no text can begin or end a message. Ids are those of
transformers' `apply_chat_template` for every conversation that spells no control token. What a template does to texts
(strip outer blanks, leave out old thoughts) happens to the placeholders as well; it also gets the texts themselves, and
if that comes to something else, the conversation is refused.

**What is learnt of an answer** begins where the prompt ends with which the model is asked for it
(`add_generation_prompt`), and ends with the first control token behind its text, by which the model learns to stop.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from tokenizer.base import Tokenizer, any_of
from tokenizer.jinja_template import JinjaTemplate
from tokenizer.messages import ROLES, Message, MessageSpan, Rendered
from tokenizer.placeholders import Marked, Placeholders, check_no_control, filled, parts_of
from tokenizer.regions import Region, RegionFinder
from tokenizer.template_features import REASONING_KEYS, Features
from tokenizer.template_habits import TALK, habits_of
from tokenizer.usual_layouts import JINJA, usual_layout

__all__ = ["JINJA", "ROLES", "ChatTemplate", "Message", "MessageSpan", "Rendered", "template_of"]


class _Piece(NamedTuple):
    text: str
    is_layout: bool
    """The template wrote it."""
    message: int
    is_header: bool
    is_learnt: bool


class ChatTemplate:
    """
    Args:
        tokenizer: has a chat template, or the control tokens of a usual layout.
    Raises:
        ValueError: it has not, or one by which no model could learn to stop.
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
        self._control = any_of([*tokenizer.special_ids, *self._habits.also])
        self._finder = RegionFinder(self._jinja, features, self._habits, self._control)
        self._compare_prompt()

    def _compare_prompt(self) -> None:
        """See whether what is trained on begins with the tokens that ask for it."""
        asked = self.prompt(TALK[:1])
        if not self._habits.opening and self.render(TALK).ids[: len(asked)] != asked:
            self.notes.append(
                "the prompt that asks for an answer becomes other tokens once the answer follows, as the tokenizer "
                "joins them: answers are learnt as they stand there"
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset([self.end_id, self._tokenizer.eod_id])

    def render(
        self,
        messages: Sequence[Message],
        is_supervised: Callable[[int], bool] = lambda number: True,
        tools: Sequence[dict] = (),
    ) -> Rendered:
        """Tokens of a conversation, as transformers' `apply_chat_template` gives them.

        Args:
            is_supervised: whether the answer that is the message of this number is to be learnt.
            tools: that the assistant may call.
        Raises:
            ValueError: an unknown role, or something that the template has no place for.
        """
        learnt = {n for n, message in enumerate(messages) if message.role == "assistant" and is_supervised(n)}
        goes_on = len(messages) - 1 in learnt and self._goes_on(messages[-1])
        if goes_on:
            messages = [*messages[:-1], goes_on]
        marked = self._placeholders.mark(messages, self._control)
        text = self._write(marked, tools, upto=len(messages) - 1 if goes_on else None)
        if goes_on:
            text += marked.messages[-1]["content"] + self._habits.end
        regions = self._finder.regions(text, messages, marked, learnt, tools)
        return self._encode(self._pieces(text, marked, regions, learnt))

    def _goes_on(self, answer: Message) -> Message | None:
        """The rest of an answer which the prompt that asks for it begins; None where it does not."""
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
        marked = self._placeholders.mark(messages, self._control)
        text = self._write(marked, tools, upto=len(messages))
        regions = self._finder.regions(text, messages, marked, set(), tools)
        return self._encode(self._pieces(text, marked, regions, set())).ids

    def _write(self, marked: Marked, tools: Sequence[dict], upto: int | None) -> str:
        """What the template writes of the placeholders; the same as of the texts themselves.

        Args:
            upto: number of the message that is asked for; None if none is.
        Raises:
            ValueError: it is not, or the tools leave no trace.
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
        """The text cut where what it is changes. What stands before a region is its header; what stands behind the last
        one belongs to it, but nobody learns it."""
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
    """The chat template of a tokenizer, which is looked at once.

    Raises:
        ValueError: see ChatTemplate.
    """
    return ChatTemplate(tokenizer)
