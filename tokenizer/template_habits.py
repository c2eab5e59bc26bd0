"""Habits of a chat template: how it asks for an answer and how it ends one, seen in a simple conversation."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizer.base import Tokenizer
from tokenizer.jinja_template import DAY, JinjaTemplate
from tokenizer.messages import Message
from tokenizer.placeholders import MARK, Marked, places_of
from tokenizer.template_features import tried

TALK = (Message("user", "What?"), Message("assistant", "That."))
"""The simple conversation."""


@dataclass(frozen=True)
class Habits:
    """Habits of one template. Most templates write a simple conversation as

        question  <end>  <asks>  <lead>  answer  <end>
    """

    end: str
    """Token that ends an answer."""
    end_within: str
    """Token that ends an answer before further messages, if it is another one (gpt-oss's); empty otherwise."""
    is_open: bool
    """Whether the template writes no end behind the last answer: there, the end of a document is added. Before further
    messages, the token that begins the next one is the end (ChatGLM3's)."""
    stops: frozenset[str]
    """Further tokens that end an answer: in such a template, those that begin a question or a tool's result."""
    asks: str
    """Text that asks for an answer; empty if the end of the question does that."""
    lead: str
    """Text between that and the answer."""
    opening: str
    """Tag by which the prompt already begins the answer, as thoughts do; empty if there is none."""
    also: frozenset[str]
    """Added tokens around messages. People may not write them, although the tokenizer does not call them special."""
    notes: tuple[str, ...]
    """Sentences that a user should read before training."""


def habits_of(
    jinja: JinjaTemplate, tokenizer: Tokenizer, mark: Callable[[Sequence[Message]], Marked], control: re.Pattern[str]
) -> Habits:
    """Habits of a template, seen in a simple conversation.

    Args:
        mark: puts placeholders into messages.
        control: matches special and added tokens.
    Raises:
        ValueError: the template leaves out a message, or ends an answer with no token of its own.
    """
    marked = mark(TALK)
    text = jinja.render(marked.messages)
    asked = jinja.render(marked.messages[:1], add_generation_prompt=True)
    alone = jinja.render(marked.messages[:1])
    places = places_of(text, marked)
    if not all(places):
        raise ValueError("the chat template leaves out the question or the answer of a simple conversation")
    begin, end = places[1][0].start(), places[1][-1].end()
    before, between = _within_talk(jinja, mark, Message("user", "And?"))
    stop = control.search(text, end)
    goes_on = control.search(between)
    if stop is None and goes_on is None:
        raise ValueError("the chat template ends an answer with no token of its own, so no model could learn to stop")
    asks = asked[len(alone) :] if asked.startswith(alone) else ""
    fits = text[:begin].startswith(asked)
    # Some ask by the end of the question alone, and put something between it and the answer.
    lead = text[len(asked) : begin] if fits else ""
    # Others begin the answer themselves, with the tag at the beginning of thoughts.
    opening = asked[begin:] if asked.startswith(text[:begin]) else ""
    stops: frozenset[str] = frozenset()
    if stop is None and goes_on is not None:
        last, end_within = _text_of(tokenizer, tokenizer.eod_id), goes_on[0]
        result = control.search(_within_talk(jinja, mark, Message("tool", "These."))[1])
        stops = frozenset(found[0] for found in (goes_on, result) if found)
        notes = [
            f"the chat template ends no answer: {end_within}, by which it goes on, is learnt as the end, and {last} "
            f"behind the last one"
        ]
    else:
        assert stop is not None
        last = stop[0]
        end_within, notes = _end_within(between, alone, last, control)
    gaps = text[places[0][-1].end() : begin - len(lead)] + between + last
    layout = {found[0] for found in control.finditer(gaps)}
    if not asks and control.search(lead):
        notes.append(f"the chat template has nothing by which it asks for an answer: {lead!r} is learnt with it")
    if not fits:
        notes.append(_note_of_another_beginning(asked, text[:begin], opening.strip()))
    elif before and not before.startswith(asked):
        notes.append(_note_of_an_earlier_beginning(asked, before))
    if jinja.asks_for_the_date:
        notes.append(
            f"the chat template writes today's date: here it is always {DAY:%d %B %Y}, so that the same conversation "
            f"stays the same tokens"
        )
    also = frozenset(layout & tokenizer.added_ids.keys() - set(jinja.looks_for))
    return Habits(last, end_within, stop is None, stops, asks, lead, opening, also, tuple(notes))


def _text_of(tokenizer: Tokenizer, token_id: int) -> str:
    """Text of a special token."""
    return next(text for text, other in tokenizer.special_ids.items() if other == token_id)


def _within_talk(
    jinja: JinjaTemplate, mark: Callable[[Sequence[Message]], Marked], following: Message
) -> tuple[str, str]:
    """Text before an answer that another message follows, and text between the two; empty if the template refuses."""
    marked = mark([*TALK, following])
    text = tried(jinja, marked.messages)
    places = places_of(text, marked)
    if not all(places):
        return "", ""
    return text[: places[1][0].start()], text[places[1][-1].end() : places[2][0].start()]


def _end_within(between: str, alone: str, end: str, control: re.Pattern[str]) -> tuple[str, list[str]]:
    """Habits.end_within, and notes about it.

    Args:
        between: text between an answer and the next question.
        alone: a question by itself.
        end: token that ends the last answer.
    """
    stop = control.search(between)
    if end in between or not between:
        return "", []
    note = f"the chat template ends no answer but the last one: {end} is learnt there alone"
    if stop is None:
        return "", [note]
    # It may instead be the token at the beginning of the next message, perhaps after one that begins a conversation.
    begins = control.findall(alone.partition("\ufdd2")[0])
    if stop[0] in begins[:2]:
        return "", [note]
    return stop[0], []


def _note_of_another_beginning(asked: str, given: str, opening: str) -> str:
    """Note on a template that puts another text before a given answer than before one that it asks for."""
    served, taught = (MARK.sub("...", one)[-60:] for one in (asked, given))
    note = (
        f"the chat template asks for an answer by {served!r}, but lays a given answer out behind {taught!r}: "
        f"answers are learnt as it lays them out"
    )
    if opening:
        note += f"; the last one of a sample, if it begins with {opening}, behind what asks for it"
    return note


def _note_of_an_earlier_beginning(asked: str, given: str) -> str:
    """Note on a template that puts another text before an earlier answer than before one that it asks for."""
    served, taught = (MARK.sub("...", one)[-60:] for one in (asked, given))
    return (
        f"the chat template asks for an answer by {served!r}, but lays an earlier one out behind {taught!r}: "
        f"--sft_loss=split makes every answer the last one of a sample"
    )
