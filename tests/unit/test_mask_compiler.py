"""Supervised tokens for every way to learn from a conversation, and the treatment of texts that are too long."""

import random

import pytest

from data_preprocess.conversations import Conversation, PlainText
from data_preprocess.mask_compiler import TrainingSample, compile_conversation, compile_text
from tests.unit.test_tokenizer import random_text, training_texts
from tokenizer import Tokenizer
from tokenizer.chat_template import ChatTemplate, Message
from tokenizer.hf_bbpe import train_hf_bbpe

NO_LIMIT = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_hf_bbpe(training_texts(), 700, show_progress=False)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def talk(*turns: str) -> Conversation:
    """A conversation from "role: text" strings."""
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns))


THREE = talk("system: s", "user: q1", "assistant: a1", "user: q2", "assistant: a2", "user: q3", "assistant: a3")


def shown(tokenizer: Tokenizer, sample: TrainingSample) -> str:
    """The sample's text with its supervised stretches in braces, and control tokens shortened."""
    assert len(sample.ids) == len(sample.supervised)
    text, inside = "", False
    for token_id, is_learnt in zip(sample.ids, sample.supervised):
        text += ("{" if is_learnt and not inside else "}" if inside and not is_learnt else "") + tokenizer.decode(
            [token_id]
        )
        inside = is_learnt
    text += "}" if inside else ""
    return text.replace("<|im_start|>", "<").replace("<|im_sep|>", ":").replace("<|im_end|>", ">")


def compiled(
    tokenizer: Tokenizer, template: ChatTemplate, conversation: Conversation, loss: str, limit: int
) -> list[str]:
    result = compile_conversation(conversation, template, loss, limit)
    assert all(len(sample.ids) <= limit for sample in result.samples)
    return [shown(tokenizer, sample) for sample in result.samples]


def test_all(tokenizer: Tokenizer, template: ChatTemplate):
    assert compiled(tokenizer, template, THREE, "all", NO_LIMIT) == [
        "<system:s><user:q1><assistant:{a1>}<user:q2><assistant:{a2>}<user:q3><assistant:{a3>}"
    ]


def test_last(tokenizer: Tokenizer, template: ChatTemplate):
    assert compiled(tokenizer, template, THREE, "last", NO_LIMIT) == [
        "<system:s><user:q1><assistant:a1><user:q2><assistant:a2><user:q3><assistant:{a3>}"
    ]


def test_split(tokenizer: Tokenizer, template: ChatTemplate):
    assert compiled(tokenizer, template, THREE, "split", NO_LIMIT) == [
        "<system:s><user:q1><assistant:{a1>}",
        "<system:s><user:q1><assistant:a1><user:q2><assistant:{a2>}",
        "<system:s><user:q1><assistant:a1><user:q2><assistant:a2><user:q3><assistant:{a3>}",
    ]


def test_results_of_tools_are_not_learnt(tokenizer: Tokenizer, template: ChatTemplate):
    conversation = talk("user: q", "assistant: call()", "tool: 5", "assistant: five")
    assert compiled(tokenizer, template, conversation, "all", NO_LIMIT) == [
        "<user:q><assistant:{call()>}<tool:5><assistant:{five>}"
    ]


def length(template: ChatTemplate, *turns: str) -> int:
    return len(template.render(talk(*turns).messages).ids)


def test_all_is_cut_at_its_end(tokenizer: Tokenizer, template: ChatTemplate):
    """A cut answer is learnt without its end; later answers are gone."""
    head = length(template, "system: s", "user: q1", "assistant: a1")
    assert compiled(tokenizer, template, THREE, "all", head) == ["<system:s><user:q1><assistant:{a1>}"]
    assert compiled(tokenizer, template, THREE, "all", head - 1) == ["<system:s><user:q1><assistant:{a1}"]
    assert compiled(tokenizer, template, THREE, "all", head + 1) == ["<system:s><user:q1><assistant:{a1>}<"]


@pytest.mark.parametrize("loss", ["last", "split"])
def test_others_lose_their_oldest_exchanges(tokenizer: Tokenizer, template: ChatTemplate, loss: str):
    whole = length(template, *(f"{m.role}: {m.text}" for m in THREE.messages))
    two = length(template, "system: s", "user: q2", "assistant: a2", "user: q3", "assistant: a3")
    one = length(template, "system: s", "user: q3", "assistant: a3")
    for limit in range(two, whole):
        assert compiled(tokenizer, template, THREE, loss, limit)[-1] == (
            "<system:s><user:q2><assistant:a2><user:q3><assistant:{a3>}"
        )
    for limit in range(one, two):
        assert compiled(tokenizer, template, THREE, loss, limit)[-1] == "<system:s><user:q3><assistant:{a3>}"
    assert compiled(tokenizer, template, THREE, loss, one - 1)[-1] == "<system:s><user:q3><assistant:{a3}"


def test_an_exchange_of_several_questions_and_calls_stays_together(tokenizer: Tokenizer, template: ChatTemplate):
    turns = ["user: q1", "user: q2", "assistant: call()", "tool: 5", "assistant: a1", "user: q3", "assistant: a2"]
    limit = length(template, *turns) - 1
    assert compiled(tokenizer, template, talk(*turns), "last", limit) == ["<user:q3><assistant:{a2>}"]


@pytest.mark.parametrize("loss", ["all", "last", "split"])
def test_without_an_answer_it_is_dropped(template: ChatTemplate, loss: str):
    """Never trained on: its loss would be a sum over nothing."""
    conversation = talk("user: " + "a long question " * 30, "assistant: a")
    result = compile_conversation(conversation, template, loss, 20)
    assert (result.samples, result.dropped) == ([], 1)


def test_what_was_left_out_is_counted(template: ChatTemplate):
    whole = length(template, *(f"{m.role}: {m.text}" for m in THREE.messages))
    for loss in ("all", "last"):
        for limit in (whole - 3, whole - 1, whole, whole + 1):
            (sample,) = compile_conversation(THREE, template, loss, limit).samples
            assert sample.left_out == whole - len(sample.ids)


@pytest.mark.parametrize("seed", range(10))
def test_properties(tokenizer: Tokenizer, template: ChatTemplate, seed: int):
    """Whatever the texts, exactly the answers are supervised, and `split` learns each answer once."""
    rng = random.Random(seed)
    for _ in range(20):
        roles = ["system"] * rng.randint(0, 1)
        roles += [role for _ in range(rng.randint(1, 4)) for role in ["user"] * rng.randint(1, 2) + ["assistant"]]
        conversation = Conversation(tuple(Message(role, random_text(rng, rng.randint(1, 20))) for role in roles))
        limit = rng.choice([NO_LIMIT, rng.randint(5, 150)])
        for loss in ("all", "last", "split"):
            result = compile_conversation(conversation, template, loss, limit)
            answers = sum(role == "assistant" for role in roles)
            assert len(result.samples) + result.dropped == (answers if loss == "split" else 1)
            for sample in result.samples:
                assert len(sample.ids) <= limit and sample.spans[-1].end == len(sample.ids)
                learnt = {i for i, is_learnt in enumerate(sample.supervised) if is_learnt}
                of_answers = [
                    set(range(span.begin, span.end))
                    for span in sample.spans
                    if not span.is_header and sample.messages[span.message].role == "assistant"
                ]
                if loss != "all":
                    of_answers = of_answers[-1:]
                assert learnt == set().union(*of_answers)
                for span in sample.spans:
                    if not span.is_header and span.end < len(sample.ids):
                        text = tokenizer.decode(sample.ids[span.begin : span.end])
                        assert text == sample.messages[span.message].text + "<|im_end|>"


def test_plain_text(tokenizer: Tokenizer):
    """In pieces, every token except the first is learnt exactly once."""
    text = "the tokens of a text are merged " * 20
    ids = [*tokenizer.encode(text), tokenizer.eod_id]
    for limit in (2, 7, len(ids) - 1, len(ids), NO_LIMIT):
        samples = compile_text(PlainText(text), tokenizer, limit).samples
        learnt = [i for s in samples for i, is_learnt in zip(s.ids, s.supervised) if is_learnt]
        assert learnt == ids[1:] and all(len(sample.ids) <= limit for sample in samples)
        assert all(before.ids[-1] == after.ids[0] for before, after in zip(samples, samples[1:]))
