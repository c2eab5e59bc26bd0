"""Regions: the places of a conversation's messages in the output of a chat template."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tokenizer.jinja_template import JinjaTemplate
from tokenizer.messages import Message
from tokenizer.placeholders import MARK, Marked, places_of
from tokenizer.template_features import Features
from tokenizer.template_habits import Habits


class Region(NamedTuple):
    """Place of a message's text in the output."""

    begin: int
    end: int
    message: int


class RegionFinder:
    """Finder of messages in the output of one template.

    Args:
        control: matches control tokens.
    """

    def __init__(self, jinja: JinjaTemplate, features: Features, habits: Habits, control: re.Pattern[str]):
        self._jinja, self._features, self._habits, self._control = jinja, features, habits, control

    def regions(
        self,
        text: str,
        messages: Sequence[Message],
        marked: Marked,
        learnt: set[int],
        tools: Sequence[dict],
    ) -> list[Region]:
        """Regions of the messages, in the order of the text.

        Raises:
            ValueError: the template left out something that matters.
        """
        places = places_of(text, marked)
        calls = {
            number: self._region_of_calls(text, number, message, marked, tools)
            for number, message in enumerate(messages)
            if message.tool_calls
        }
        begins = sorted([marks[0].start() for marks in places if marks] + [region.begin for region in calls.values()])
        regions: list[Region] = []
        for number, (message, marks) in enumerate(zip(messages, places)):
            self._check_is_there(number, message, marks, marked, number in learnt)
            if number in calls:
                regions.append(calls[number])
            elif marks:
                first, last = self._around(text, marks, marked.messages[number])
                low = max((m[-1].end() for m in places if m and m[-1].end() <= first), default=0)
                limit = next((begin for begin in begins if begin > marks[-1].start()), len(text))
                begin = self._begin(text, low, first, marks[0].start()) if message.role == "assistant" else first
                regions.append(Region(begin, self._end_of(text, last, limit, message.role), number))
        regions.sort()
        for before, after in pairwise(regions):
            if after.begin < before.end:
                raise ValueError(
                    f"the chat template does not tell messages {before.message} and {after.message} from each other"
                )
        return regions

    def _check_is_there(
        self, number: int, message: Message, marks: list[re.Match], marked: Marked, is_learnt: bool
    ) -> None:
        if len(marks) == marked.owners.count(number):
            if is_learnt and not marks and not message.tool_calls:
                raise ValueError(f"answer {number} says nothing that could be learnt")
            return
        if message.reasoning and not self._features.reasoning_key and (is_learnt or not self._habits.opening.strip()):
            raise ValueError(
                f'the chat template has no place for thoughts ("reasoning_content"), as message {number} has them'
            )
        if is_learnt:
            told = f"the chat template leaves out a part of answer {number}, which is to be learnt"
            if self._features.keeps_thoughts and (message.reasoning or "</think>" in message.text):
                told += ", such as thoughts of an earlier one: --sft_loss=split makes every answer the last of a sample"
            raise ValueError(told)
        # A template may drop thoughts once the answer is given.
        if message.role != "assistant" or not (marks or message.tool_calls):
            raise ValueError(f"the chat template leaves out message {number} ({message.role}) or a part of it")

    @staticmethod
    def _around(text: str, marks: list[re.Match], message: dict) -> tuple[int, int]:
        """Bounds of a message's text, including the parts around the placeholders that the template left unchanged."""
        before, *_, after = MARK.split(message["content"])
        first, last = marks[0].start(), marks[-1].end()
        before = before if text.endswith(before, 0, first) else before.lstrip()
        after = after if text.startswith(after, last) else after.rstrip()
        begin = first - len(before) if text.endswith(before, 0, first) else first
        return begin, last + len(after) if text.startswith(after, last) else last

    def _end_of(self, text: str, low: int, high: int, role: str) -> int:
        """End of a message whose text ends at `low`: after the token that ends answers."""
        place, end = text.find(self._habits.end, low, high), self._habits.end
        if place < 0 and role == "assistant" and self._habits.end_within:
            place, end = text.find(self._habits.end_within, low, high), self._habits.end_within
        return low if place < 0 else place + len(end)

    def _begin(self, text: str, low: int, high: int, mark: int) -> int:
        """Beginning of an answer, after the prompt that asks for it. Its text begins at `high`, and its first
        placeholder is at `mark`."""
        if self._habits.asks:
            place = text.rfind(self._habits.asks, low, high)
            # Text that the template stripped, or that the prompt already gives, may look like the beginning of the
            # text.
            place = text.rfind(self._habits.asks, low, mark) if place < 0 else place
            return high if place < 0 else place + len(self._habits.asks)
        return high - len(self._habits.lead) if text[low:high].endswith(self._habits.lead) else high

    def _region_of_calls(
        self, text: str, number: int, message: Message, marked: Marked, tools: Sequence[dict]
    ) -> Region:
        """Region of an answer that calls tools, found by the template's output before it and up to it.

        Raises:
            ValueError: the template has no place for calls, or its output depends on later messages.
        """
        asked = self._jinja.render(marked.messages[:number], tools, add_generation_prompt=True)
        if not text.startswith(asked):
            # The prompt may begin the answer with a tag that an answer without thoughts does not show.
            asked = asked.removesuffix(self._habits.opening)
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
            # A call of a template that ends no answer ends with what begins the tool's result.
            if self._habits.is_open and (follows := self._control.match(text, len(done))):
                end = follows.end()
        else:
            end = text.find(self._habits.end, place) + len(self._habits.end)
        if not text.startswith(asked) or not place < end:
            raise ValueError(f"the chat template does not tell where the calls of message {number} begin and end")
        return Region(begin, end, number)
