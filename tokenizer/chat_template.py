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
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from tokenizer.base import MESSAGE_END, MESSAGE_SEPARATOR, MESSAGE_START, Tokenizer, any_of
from tokenizer.jinja_template import DAY, JinjaTemplate

ROLES = ("system", "user", "assistant", "tool")

JINJA = (
    "{% for message in messages %}"
    f"{{{{ '{MESSAGE_START}' + message['role'] + '{MESSAGE_SEPARATOR}' + message['content'] + '{MESSAGE_END}' }}}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{{{{ '{MESSAGE_START}assistant{MESSAGE_SEPARATOR}' }}}}"
    "{% endif %}"
)
"""The layout of the tokenizers trained here, for transformers' `apply_chat_template` and for us."""
_CHATML = (
    "{% for message in messages %}"
    f"{{{{ '{MESSAGE_START}' + message['role'] + '\\n' + message['content'] + '{MESSAGE_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{MESSAGE_START}assistant\\n' }}}}{{% endif %}}"
)
_LLAMA3_FIRST = "<|begin_of_text|>"
_LLAMA3 = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


class _Usual(NamedTuple):
    """A layout that is known by its control tokens."""

    name: str
    tokens: tuple[str, ...]
    template: str
    first: str = ""
    """Control token that begins a conversation, if the tokenizer has it."""


_USUAL = (
    _Usual("zero2all's", (MESSAGE_START, MESSAGE_SEPARATOR, MESSAGE_END), JINJA),
    _Usual("ChatML's", (MESSAGE_START, MESSAGE_END), _CHATML),
    _Usual("Llama 3's", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), _LLAMA3, _LLAMA3_FIRST),
)


@dataclass(frozen=True)
class Message:
    role: str
    """One of ROLES."""
    text: str
    reasoning: str = ""
    """What an assistant thought before it answered, where the data keeps it apart from the text."""
    tool_calls: tuple[dict, ...] = ()
    """What an assistant asks of tools, as {"type": "function", "function": {"name": str, "arguments": dict}}."""
    name: str = ""
    """Of the tool that answers, or of the speaker."""
    call_id: str = ""
    """Of the call that a tool answers, where the data has ids: few templates write them."""
    learnt: bool = True
    """Of an assistant's message: whether the record wants it learnt. Others never are."""


_TALK = (Message("user", "What?"), Message("assistant", "That."))
"""To see what a template makes of one."""


@dataclass(frozen=True)
class MessageSpan:
    """What a stretch of tokens is."""

    message: int
    """Number of the message."""
    begin: int
    end: int
    """Tokens [begin, end)."""
    is_header: bool
    """What the template wrote before the text, or the text with the token that ends it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: list[int]
    supervised: list[bool]
    """For each token, whether the model is to learn to say it."""
    spans: list[MessageSpan]
    """Headers and texts in their order, without gaps."""


_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""What templates call the thoughts that stand apart from an answer's text."""
_MARK = re.compile("\ufdd2([0-9]+)\ufdd3")
"""A placeholder: noncharacters, which Unicode keeps for a program's own use, round a number."""
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")


class _Marked(NamedTuple):
    """Messages whose texts are placeholders."""

    messages: list[dict]
    texts: list[str]
    """Of the placeholders, by number."""
    written: list[str]
    """What the template writes of them: the same, or as JSON."""
    owners: list[int]
    """For each the number of its message."""


class _Region(NamedTuple):
    """Where a message's text stands in what the template wrote."""

    begin: int
    end: int
    message: int


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
            usual = self._usual()
            source = (f"{{{{ '{usual.first}' }}}}" if usual.first in tokenizer.special_ids else "") + usual.template
            self.notes.append(f"the tokenizer has no chat template: conversations are laid out as {usual.name} are")
        self.source = source
        """The program."""
        tokens = {name: text for name, text in tokenizer.template_tokens.items() if name in source}
        self.key = json.dumps([source, tokens], sort_keys=True)
        """Of two templates with the same one, neither writes what the other does not."""
        self._jinja = JinjaTemplate(source, tokenizer.template_tokens)
        self._also: frozenset[str] = frozenset()
        self._control = any_of([*tokenizer.special_ids, *tokenizer.added_ids])
        kept = [text for text in self._jinja.looks_for if not any_of(tokenizer.special_ids).search(text)]
        self._kept = any_of(kept) if kept else None
        self._look()
        self._control = any_of([*tokenizer.special_ids, *self._also])
        self._compare_prompt()

    def _usual(self) -> _Usual:
        special = self._tokenizer.special_ids
        usual = next((one for one in _USUAL if special.keys() >= set(one.tokens)), None)
        if usual is None:
            raise ValueError(
                f"the tokenizer has no chat template, and no control tokens for conversations, such as {MESSAGE_START} "
                f"and {MESSAGE_END}: put a chat_template.jinja into its folder, or use a tokenizer that was trained "
                f"with `python -m tokenizer.train_tokenizer`"
            )
        return usual

    def _look(self) -> None:
        """See how it asks for an answer and ends one.

        Raises:
            ValueError: it does neither.
        """
        marked = self._mark(_TALK)
        text = self._jinja.render(marked.messages)
        asked = self._jinja.render(marked.messages[:1], add_generation_prompt=True)
        alone = self._jinja.render(marked.messages[:1])
        places = self._places(text, marked)
        if not all(places):
            raise ValueError("the chat template leaves out the question or the answer of a simple conversation")
        begin, end = places[1][0].start(), places[1][-1].end()
        stop = self._control.search(text, end)
        if stop is None:
            raise ValueError(
                "the chat template ends an answer with no token of its own, so no model could learn to stop"
            )
        self._end = stop[0]
        self.end_id = (self._tokenizer.special_ids | self._tokenizer.added_ids)[self._end]
        self._asks = asked[len(alone) :] if asked.startswith(alone) else ""
        fits = text[:begin].startswith(asked)
        # Some ask by nothing but the end of the question, and put something between it and the answer.
        self._lead = text[len(asked) : begin] if fits else ""
        between = self._between_turns()
        self._end_within = self._look_within(between, alone)
        # Tokens round messages are not for people to write, also where the tokenizer does not call them special.
        gaps = text[places[0][-1].end() : begin - len(self._lead)] + between + self._end
        layout = {found[0] for found in self._control.finditer(gaps)}
        self._also = frozenset(layout & self._tokenizer.added_ids.keys() - set(self._jinja.looks_for))
        if not self._asks and self._control.search(self._lead):
            self.notes.append(
                f"the chat template has nothing by which it asks for an answer: {self._lead!r} is learnt with it"
            )
        # Others begin the answer themselves, with a tag that thoughts begin with.
        self._opening = asked[begin:] if asked.startswith(text[:begin]) else ""
        if not fits:
            served, taught = (_MARK.sub("...", one)[-60:] for one in (asked, text[:begin]))
            note = (
                f"the chat template asks for an answer by {served!r}, but lays a given answer out behind {taught!r}: "
                f"answers are learnt as it lays them out"
            )
            if opening := self._opening.strip():
                note += f"; the last one of a sample, if it begins with {opening}, behind what asks for it"
            self.notes.append(note)
        if self._jinja.asks_for_the_date:
            self.notes.append(
                f"the chat template writes today's date: here it is always {DAY:%d %B %Y}, so that the same "
                f"conversation stays the same tokens"
            )

    def _compare_prompt(self) -> None:
        """See whether what is trained on begins with the tokens that ask for it."""
        asked = self.prompt(_TALK[:1])
        if not self._opening and self.render(_TALK).ids[: len(asked)] != asked:
            self.notes.append(
                "the prompt that asks for an answer becomes other tokens once the answer follows, as the tokenizer "
                "joins them: answers are learnt as they stand there"
            )

    def _between_turns(self) -> str:
        """What the template writes between an answer and the next question; empty if it refuses."""
        marked = self._mark([*_TALK, Message("user", "And?")])
        text = self._tried(marked.messages)
        places = self._places(text, marked)
        return text[places[1][-1].end() : places[2][0].start()] if all(places) else ""

    def _tried(self, messages: Sequence[dict]) -> str:
        """What the template writes; nothing where it refuses."""
        try:
            return self._jinja.render(messages)
        except ValueError:
            return ""

    def _look_within(self, between: str, alone: str) -> str:
        """The token that ends an answer which others follow, where it is another one (gpt-oss's); else empty.

        Args:
            between: see _between_turns.
            alone: a question by itself.
        """
        stop = self._control.search(between)
        if stop is None or self._end in between:
            return ""
        # It may also be what the next message begins with, behind a token that begins a conversation perhaps.
        begins = self._control.findall(alone.partition("\ufdd2")[0])
        if stop[0] in begins[:2]:
            self.notes.append(f"the chat template ends no answer but the last one: {self._end} is learnt there alone")
            return ""
        return stop[0]

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
        marked = self._mark(messages)
        text = self._write(marked, tools, upto=len(messages) - 1 if goes_on else None)
        if goes_on:
            text += marked.messages[-1]["content"] + self._end
        regions = self._regions(text, messages, marked, learnt, tools)
        return self._encode(self._pieces(text, marked, regions, learnt))

    def _goes_on(self, answer: Message) -> Message | None:
        """The rest of an answer which the prompt that asks for it begins; None where it does not."""
        tag = self._opening.strip()
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
        marked = self._mark(messages)
        text = self._write(marked, tools, upto=len(messages))
        regions = self._regions(text, messages, marked, set(), tools)
        return self._encode(self._pieces(text, marked, regions, set())).ids

    def _mark(self, messages: Sequence[Message]) -> _Marked:
        """The messages for the template. Outer blanks stay outside of the placeholders, for it to strip, and so do the
        strings that it looks for.

        Raises:
            ValueError: an unknown role, or something that cannot be told from what the template writes.
        """
        marked = _Marked([], [], [], [])
        for number, message in enumerate(messages):
            if message.role not in ROLES:
                raise ValueError(f'unknown role "{message.role}": it is none of {", ".join(ROLES)}')
            is_quoted = message.role == "tool" and self._quotes_results
            values = {"role": message.role, "content": self._placeholders(message.text, number, marked, is_quoted)}
            if message.reasoning:
                values[self._reasoning_key or _REASONING_KEYS[0]] = self._placeholders(
                    message.reasoning, number, marked
                )
            if message.tool_calls:
                self._check_no_control(message.tool_calls, "a call of a tool")
                values["tool_calls"] = [self._call(call) for call in message.tool_calls]
            for key, value in (("name", message.name), ("tool_call_id", message.call_id)):
                if value:
                    self._check_no_control(value, f'a "{key}"')
                    values[key] = value
            marked.messages.append(values)
        return marked

    def _placeholders(self, text: str, message: int, marked: _Marked, is_quoted: bool = False) -> str:
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
        if not self._joins_arguments:
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    @cached_property
    def _joins_arguments(self) -> bool:
        """Whether it takes the arguments of a call as a text of JSON, as OpenAI does, instead of as a dictionary."""

        def works(arguments: object) -> bool:
            return "one" in self._tried(_calling(arguments))

        return not works({"one": 1}) and works('{"one": 1}')

    @cached_property
    def _quotes_results(self) -> bool:
        """Whether it writes the results of tools as JSON, as Llama 3.1's does."""
        messages = _calling('{"one": 1}' if self._joins_arguments else {"one": 1})
        result = {"role": "tool", "content": 'a"b', "name": "f", "tool_call_id": "call00001"}
        return 'a\\"b' in self._tried([*messages, result])

    def _check_no_control(self, value: object, what: str) -> None:
        text = json.dumps(value, ensure_ascii=False)
        if found := self._control.search(text):
            raise ValueError(f"{what} spells the control token {found[0]}")
        if _NONCHARACTERS.search(text):
            raise ValueError(f"{what} holds U+FDD0 to U+FDD3, which Unicode keeps for programs")

    def _write(self, marked: _Marked, tools: Sequence[dict], upto: int | None) -> str:
        """What the template writes of the placeholders; the same as of the texts themselves.

        Args:
            upto: number of the message that is asked for; None if none is.
        Raises:
            ValueError: it is not, or the tools leave no trace.
        """
        if tools:
            self._check_no_control(tools, "a description of a tool")
        messages, asks = marked.messages[:upto], upto is not None
        text = self._jinja.render(messages, tools, asks)
        if tools and text == self._jinja.render(messages, (), asks):
            raise ValueError('the chat template has no place for tools ("tools" or "functions")')
        if not self._is_known:
            texts = ("content", *_REASONING_KEYS)
            plain = [
                {k: self._filled(v, marked.texts) if k in texts else v for k, v in one.items()} for one in messages
            ]
            if self._jinja.render(plain, tools, asks) != self._filled(text, marked.written):
                raise ValueError("the chat template alters the texts of its messages by more than outer blanks")
        return text

    @staticmethod
    def _filled(text: str, texts: Sequence[str]) -> str:
        return _MARK.sub(lambda mark: texts[int(mark[1])], text)

    @staticmethod
    def _places(text: str, marked: _Marked) -> list[list[re.Match]]:
        """For each message, its placeholders in their order in a text.

        Raises:
            ValueError: one is there twice.
        """
        places: list[list[re.Match]] = [[] for _ in marked.messages]
        seen: set[str] = set()
        for mark in _MARK.finditer(text):
            message = marked.owners[int(mark[1])]
            if mark[1] in seen:
                raise ValueError(f"the chat template repeats message {message}")
            seen.add(mark[1])
            places[message].append(mark)
        return places

    def _regions(
        self,
        text: str,
        messages: Sequence[Message],
        marked: _Marked,
        learnt: set[int],
        tools: Sequence[dict],
    ) -> list[_Region]:
        """Where the messages stand, in the order of the text.

        Raises:
            ValueError: the template left out something that counts.
        """
        places = self._places(text, marked)
        calls = {
            number: self._region_of_calls(text, number, message, marked, tools)
            for number, message in enumerate(messages)
            if message.tool_calls
        }
        begins = sorted([marks[0].start() for marks in places if marks] + [region.begin for region in calls.values()])
        regions: list[_Region] = []
        for number, (message, marks) in enumerate(zip(messages, places)):
            self._check_is_there(number, message, marks, marked, number in learnt)
            if number in calls:
                regions.append(calls[number])
            elif marks:
                first, last = self._around(text, marks, marked.messages[number])
                low = max((m[-1].end() for m in places if m and m[-1].end() <= first), default=0)
                limit = next((begin for begin in begins if begin > marks[-1].start()), len(text))
                begin = self._begin(text, low, first, marks[0].start()) if message.role == "assistant" else first
                regions.append(_Region(begin, self._end_of(text, last, limit, message.role), number))
        regions.sort()
        for before, after in pairwise(regions):
            if after.begin < before.end:
                raise ValueError(
                    f"the chat template does not tell messages {before.message} and {after.message} from each other"
                )
        return regions

    def _check_is_there(
        self, number: int, message: Message, marks: list[re.Match], marked: _Marked, is_learnt: bool
    ) -> None:
        if len(marks) == marked.owners.count(number):
            if is_learnt and not marks and not message.tool_calls:
                raise ValueError(f"answer {number} says nothing that could be learnt")
            return
        if message.reasoning and not self._reasoning_key and (is_learnt or not self._opening.strip()):
            raise ValueError(
                f'the chat template has no place for thoughts ("reasoning_content"), as message {number} has them'
            )
        if is_learnt:
            told = f"the chat template leaves out a part of answer {number}, which is to be learnt"
            if self._keeps_thoughts and (message.reasoning or "</think>" in message.text):
                told += ", such as thoughts of an earlier one: --sft_loss=split makes every answer the last of a sample"
            raise ValueError(told)
        # A thought may go once the answer is given.
        if message.role != "assistant" or not (marks or message.tool_calls):
            raise ValueError(f"the chat template leaves out message {number} ({message.role}) or a part of it")

    @cached_property
    def _reasoning_key(self) -> str:
        """What the template calls thoughts that stand apart from the text; empty if it shows none."""
        shown = (key for key in _REASONING_KEYS if self._keeps({"content": "\ufdd20\ufdd3", key: "\ufdd21\ufdd3"}))
        return next(shown, "")

    @cached_property
    def _keeps_thoughts(self) -> bool:
        """Whether it leaves thoughts within the text in the last answer."""
        return self._keeps({"content": "<think>\n\ufdd20\ufdd3\n</think>\n\n\ufdd21\ufdd3"})

    def _keeps(self, answer: dict[str, str]) -> bool:
        """Whether both placeholders of a last answer are in what it writes."""
        text = self._tried([{"role": "user", "content": "What?"}, {"role": "assistant", **answer}])
        return sorted(mark[1] for mark in _MARK.finditer(text)) == ["0", "1"]

    @staticmethod
    def _around(text: str, marks: list[re.Match], message: dict) -> tuple[int, int]:
        """Where the text of a message begins and ends, with what of it was left as it is round the placeholders."""
        before, *_, after = _MARK.split(message["content"])
        first, last = marks[0].start(), marks[-1].end()
        before = before if text.endswith(before, 0, first) else before.lstrip()
        after = after if text.startswith(after, last) else after.rstrip()
        begin = first - len(before) if text.endswith(before, 0, first) else first
        return begin, last + len(after) if text.startswith(after, last) else last

    def _end_of(self, text: str, low: int, high: int, role: str) -> int:
        """Where a message ends whose text ends at `low`: behind the token that ends answers."""
        place, end = text.find(self._end, low, high), self._end
        if place < 0 and role == "assistant" and self._end_within:
            place, end = text.find(self._end_within, low, high), self._end_within
        return low if place < 0 else place + len(end)

    def _begin(self, text: str, low: int, high: int, mark: int) -> int:
        """Where an answer begins whose text begins at `high` and whose first placeholder is at `mark`: behind the
        prompt that asks for one."""
        if self._asks:
            place = text.rfind(self._asks, low, high)
            # What the template stripped, or what the prompt gives away, may look like the text's own beginning.
            place = text.rfind(self._asks, low, mark) if place < 0 else place
            return high if place < 0 else place + len(self._asks)
        return high - len(self._lead) if text[low:high].endswith(self._lead) else high

    def _region_of_calls(
        self, text: str, number: int, message: Message, marked: _Marked, tools: Sequence[dict]
    ) -> _Region:
        """Where an answer stands that calls tools, by what the template writes before it and up to it.

        Raises:
            ValueError: the template has no place for calls, or what it writes depends on what follows.
        """
        asked = self._jinja.render(marked.messages[:number], tools, add_generation_prompt=True)
        if not text.startswith(asked):
            # The prompt may begin the answer with a tag that an answer without thoughts does not show.
            asked = asked.removesuffix(self._opening)
        done = self._jinja.render(marked.messages[: number + 1], tools)
        begin = place = len(asked)
        for call in message.tool_calls:
            place = text.find(call["function"]["name"], place)
            if place < 0:
                raise ValueError(
                    f'the chat template has no place for calls of tools ("tool_calls"), as message {number} has them'
                )
        if text.startswith(done):
            stops = list(self._control.finditer(done, begin))
            end = stops[-1].end() if stops else len(done)
        else:
            end = text.find(self._end, place) + len(self._end)
        if not text.startswith(asked) or not place < end:
            raise ValueError(f"the chat template does not tell where the calls of message {number} begin and end")
        return _Region(begin, end, number)

    @staticmethod
    def _pieces(text: str, marked: _Marked, regions: list[_Region], learnt: set[int]) -> Iterator[_Piece]:
        """The text cut where what it is changes. What stands before a region is its header; what stands behind the last
        one belongs to it, but nobody learns it."""
        position = 0
        for index, region in enumerate(regions):
            is_last = index + 1 == len(regions)
            stretches = [(position, region.begin, True, False), (*region[:2], False, region.message in learnt)]
            if is_last:
                stretches.append((region.end, len(text), False, False))
            for begin, end, is_header, is_learnt in stretches:
                for part, is_layout in _cut(text[begin:end], marked):
                    yield _Piece(part, is_layout, region.message, is_header, is_learnt)
            position = region.end
        if not regions:
            yield _Piece(text, True, 0, True, False)

    def _encode(self, pieces: Iterator[_Piece]) -> Rendered:
        pieces = list(pieces)
        ids, counts = self._tokenizer.encode_pieces([(one.text, one.is_layout) for one in pieces], self._also)
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


def _calling(arguments: object) -> list[dict]:
    """A question whose answer is a call, to see what a template makes of it."""
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


@lru_cache(maxsize=4)
def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer, which is looked at once.

    Raises:
        ValueError: see ChatTemplate.
    """
    return ChatTemplate(tokenizer)


def _cut(text: str, marked: _Marked) -> Iterator[tuple[str, bool]]:
    """(text, whether the template wrote it)."""
    for index, part in enumerate(_MARK.split(text)):
        is_layout = index % 2 == 0
        if filled := part if is_layout else marked.written[int(part)]:
            yield filled, is_layout
