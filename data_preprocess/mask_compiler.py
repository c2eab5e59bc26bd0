"""Training samples of a conversation: its tokens, and which of them are supervised. No other place decides that.

`--sft_loss` says which answers are learnt, each with the token that ends it:

    all     one sample: every answer
    last    one sample: only the last answer
    split   one sample for each answer, with the messages before it; every answer is learnt once, as in `all`, and is
            the last of its sample

Samples that are too long for `max_tokens`:

    all           the end is left out. An answer that is cut is learnt without its end.
    last, split   the oldest exchanges (a question and what follows it up to the next) are left out, the system text
                  stays; if the last exchange alone is too long, its end is left out.
    plain text    cut into several samples, in which every token is learnt.
    preference    the prompt loses its beginning (keep_end) or its end (keep_start; the token that ends its last message
                  stays), then the answers lose their ends. The header of the answers stays.

A sample in which no answer is left is dropped and counted, since it would teach nothing. So is a preference whose
shortened answers are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data_preprocess.conversations import Conversation, PlainText, Preference
from tokenizer import Tokenizer
from tokenizer.chat_template import ChatTemplate, Message, MessageSpan, Rendered

SFTLoss = Literal["all", "last", "split"]
Truncation = Literal["keep_end", "keep_start"]


@dataclass(frozen=True)
class TrainingSample:
    """Tokens of one sample; the one after the last is never asked for."""

    ids: list[int]
    supervised: list[bool]
    """Whether the model learns to say each token. The first one is never supervised: nothing comes before it."""
    messages: tuple[Message, ...] = ()
    """Messages of the sample; none for plain text."""
    spans: tuple[MessageSpan, ...] = ()
    """Places of the messages in `ids`."""
    left_out: int = 0
    """Number of tokens that did not fit."""


@dataclass(frozen=True)
class Compiled:
    """Samples of one record."""

    samples: list[TrainingSample]
    dropped: int
    """Number of samples that had no answer left."""


def compile_conversation(
    conversation: Conversation, template: ChatTemplate, loss: SFTLoss, max_tokens: int
) -> Compiled:
    """Training samples of a conversation, by the rules above.

    Args:
        max_tokens: tokens of a sample: one more than the model's positions, as the last token is only a label.
    Raises:
        ValueError: the template has no place for something in the conversation.
    """
    sizes: list[int] = []
    if loss != "all":
        sizes = _sizes(conversation, template.render(conversation.messages, lambda number: False, conversation.tools))
    samples = [
        _fitted(conversation, end, learnt, sizes, template, max_tokens)
        for end, learnt in _variants(conversation.messages, loss)
    ]
    kept = [sample for sample in samples if any(sample.supervised)]
    return Compiled(kept, len(samples) - len(kept))


def compile_text(text: PlainText, tokenizer: Tokenizer, max_tokens: int) -> Compiled:
    """Samples of a text and its end of document. They overlap by one token, whose successor would be lost otherwise."""
    ids = [*tokenizer.encode(text.text), tokenizer.eod_id]
    samples = []
    for start in range(0, max(len(ids) - 1, 1), max_tokens - 1):
        piece = ids[start : start + max_tokens]
        samples.append(TrainingSample(piece, [False] + [True] * (len(piece) - 1)))
    return Compiled(samples, 0)


def compile_preference(
    preference: Preference, template: ChatTemplate, max_tokens: int, max_prompt_len: int, truncation: Truncation
) -> list[TrainingSample] | None:
    """The chosen and the rejected answer, each after the prompt; None if they are dropped.

    Args:
        max_prompt_len: largest number of tokens of the prompt and the answer's header; 0 for the room that the longer
            answer leaves, but at least half of the positions.
        truncation: which part of a long prompt is kept.
    Raises:
        ValueError: the template has no place for something in the preference.
    """
    last = len(preference.prompt)
    samples = []
    texts = [(*preference.prompt, answer) for answer in (preference.chosen, preference.rejected)]
    pair = [_learnt(template.render(messages, lambda number: number == last, preference.tools)) for messages in texts]
    longer_answer = max(len(rendered.ids) - rendered.spans[-1].begin for rendered in pair)
    room = max_prompt_len or max((max_tokens - 1) // 2, max_tokens - longer_answer)
    for rendered, messages in zip(pair, texts):
        # The same for both, unless the template lets the prompt depend on the answer.
        prompt = rendered.spans[-1].begin
        header_begin = rendered.spans[-2].begin if rendered.spans[-2].is_header else prompt
        excess = min(max(prompt - room, 0), header_begin - 1)
        begin = 0 if truncation == "keep_end" else header_begin - 1 - excess
        samples.append(_cut(_without(rendered, begin, begin + excess), messages, max_tokens, len(rendered.ids)))
    if samples[0].ids == samples[1].ids or not all(any(sample.supervised) for sample in samples):
        return None
    return samples


def _learnt(rendered: Rendered) -> Rendered:
    """A conversation without the tokens after its last supervised one, from which nothing is learnt."""
    end = len(rendered.ids) - rendered.supervised[::-1].index(True) if True in rendered.supervised else 0
    return _up_to(rendered, end)


def _up_to(rendered: Rendered, end: int) -> Rendered:
    """The first `end` tokens of a conversation."""
    spans = [
        MessageSpan(span.message, span.begin, min(span.end, end), span.is_header)
        for span in rendered.spans
        if span.begin < end
    ]
    return Rendered(rendered.ids[:end], rendered.supervised[:end], spans)


def _without(rendered: Rendered, begin: int, end: int) -> Rendered:
    """A conversation without its tokens [begin, end)."""

    def moved(position: int) -> int:
        return position - min(max(position - begin, 0), end - begin)

    spans = [MessageSpan(span.message, moved(span.begin), moved(span.end), span.is_header) for span in rendered.spans]
    return Rendered(
        rendered.ids[:begin] + rendered.ids[end:],
        rendered.supervised[:begin] + rendered.supervised[end:],
        [span for span in spans if span.begin < span.end],
    )


def _variants(messages: Sequence[Message], loss: SFTLoss) -> Iterator[tuple[int, frozenset[int]]]:
    """Samples to make of a conversation, as (number of messages, numbers of the messages that are learnt)."""
    answers = [number for number, message in enumerate(messages) if message.role == "assistant" and message.learnt]
    if loss == "all":
        yield len(messages), frozenset(answers)
    elif loss == "last":
        yield len(messages), frozenset(answers[-1:])
    else:
        for number in answers:
            yield number + 1, frozenset([number])


def _fitted(
    conversation: Conversation,
    end: int,
    learnt: frozenset[int],
    sizes: Sequence[int],
    template: ChatTemplate,
    max_tokens: int,
) -> TrainingSample:
    """A sample of the first `end` messages. It starts at the first place from which it fits, or else at the last place.

    Args:
        sizes: see _begins.
    """
    whole = sum(sizes[:end])
    for begin in _begins(conversation.messages[:end], sizes, max_tokens):
        kept = [n for n in range(end) if n >= begin or conversation.messages[n].role == "system"]
        chosen = tuple(conversation.messages[number] for number in kept)
        places = {place for place, number in enumerate(kept) if number in learnt}
        rendered = _learnt(template.render(chosen, places.__contains__, conversation.tools))
        if begin == 0:
            whole = len(rendered.ids)
        if len(rendered.ids) <= max_tokens:
            break
    return _cut(rendered, chosen, max_tokens, whole)


def _sizes(conversation: Conversation, rendered: Rendered) -> list[int]:
    """Number of tokens of each message, its header included."""
    sizes = [0] * len(conversation.messages)
    for span in rendered.spans:
        sizes[span.message] += span.end - span.begin
    return sizes


def _begins(messages: Sequence[Message], sizes: Sequence[int], room: int) -> list[int]:
    """Places where a sample may start: the first message, or the first question of an exchange. System texts are kept
    in any case.

    Args:
        sizes: tokens of the messages; empty if nothing may be left out at the front.
        room: tokens of a sample. Places from which it surely does not fit are left out. Sizes are only a guide, since a
            template may write a message differently at the start of a sample.
    """
    if not sizes:
        return [0]
    begins = [0]
    begins += [
        number
        for number in range(1, len(messages))
        if messages[number].role == "user" and messages[number - 1].role not in ("user", "system")
    ]
    left = sum(sizes[: len(messages)])
    for index, begin in enumerate(begins):
        before = range(begins[index - 1] if index else 0, begin)
        left -= sum(sizes[number] for number in before if messages[number].role != "system")
        if left <= room:
            return begins[max(index - 1, 0) :]
    return begins[-1:]


def _cut(rendered: Rendered, messages: tuple[Message, ...], max_tokens: int, whole: int) -> TrainingSample:
    kept = _up_to(rendered, max_tokens)
    shown = max((span.message for span in kept.spans), default=-1) + 1
    return TrainingSample(kept.ids, kept.supervised, messages[:shown], tuple(kept.spans), whole - len(kept.ids))
