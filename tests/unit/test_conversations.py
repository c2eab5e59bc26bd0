"""Every format of conversations, written by hand, and the problems of refused records."""

import random

import pytest

from data_preprocess.conversations import (
    FIELDS,
    Conversation,
    PlainText,
    Preference,
    parse_record,
    read_record,
    roles_with,
)
from tokenizer.chat_template import Message


def talk(*turns: str) -> Conversation:
    """Messages from "role: text" strings."""
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns))


CONVERSATIONS = {
    "ShareGPT with a type of its own": (
        {"type": "conversation", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        talk("user: Hi", "assistant: Yes"),
    ),
    "Parquet's union of two kinds of messages": (
        {"messages": [{"from": None, "value": None, "role": "system", "content": None},
                      {"from": None, "value": None, "role": "user", "content": "a"},
                      {"from": "gpt", "value": "b", "role": None, "content": None}]},
        talk("user: a", "assistant: b"),
    ),
    "ShareGPT": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        talk("user: Hi", "assistant: Hello"),
    ),
    "ShareGPT with a system text and a question left open": (
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "1"},
                {"from": "gpt", "value": "one"},
                {"from": "human", "value": "2"},
            ]
        },
        talk("system: be brief", "user: 1", "assistant: one"),
    ),
    "role names in capitals": (
        {"conversation": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello"}]},
        talk("user: Hi", "assistant: Hello"),
    ),
    "an empty system text": (
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}]},
        talk("user: a", "assistant: b"),
    ),
    "OpenAI": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      {"role": "assistant", "content": "call()"}, {"role": "tool", "content": "3"},
                      {"role": "assistant", "content": "It is 3."}]},
        talk("user: ab", "assistant: call()", "tool: 3", "assistant: It is 3."),
    ),
    "Alpaca": (
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        talk("user: Add\n1 and 2", "assistant: 3"),
    ),
    "Alpaca without input": (
        {"instruction": "Say a", "input": "", "output": "a"},
        talk("user: Say a", "assistant: a"),
    ),
    "Alpaca with history": (
        {"system": "s", "history": [["q1", "a1"]], "instruction": "q2", "output": "a2"},
        talk("system: s", "user: q1", "assistant: a1", "user: q2", "assistant: a2"),
    ),
    "ShareGPT with a system text beside it": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        talk("system: s", "user: a", "assistant: b"),
    ),
    "the same system text twice, and an empty one": (
        {"system_prompt": "s", "system": "", "messages": [{"role": "developer", "content": "s"},
                                                          {"role": "user", "content": "a"},
                                                          {"role": "assistant", "content": "b"}]},
        talk("system: s", "user: a", "assistant: b"),
    ),
    "OpenAI's content with ShareGPT's roles": (
        {"conversations": [{"from": "human", "content": "a"}, {"from": "gpt", "content": "b"}]},
        talk("user: a", "assistant: b"),
    ),
    "turns of two, as in ms-swift": (
        {"system": "s", "conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
        talk("system: s", "user: a", "assistant: b", "user: c", "assistant: d"),
    ),
    "turns of two, as in XTuner": (
        {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
        talk("system: s", "user: a", "assistant: b"),
    ),
    "messages as a text of JSON, as in a table": (
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', "system": ""},
        talk("user: a", "assistant: b"),
    ),
    "messages and what is in them once more": (
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        talk("user: a", "assistant: b"),
    ),
    "TRL, texts": ({"prompt": "a", "completion": " b"}, talk("user: a", "assistant:  b")),
    "Dolly": (
        {"instruction": "a", "context": "c", "response": "b", "category": "open_qa"},
        talk("user: a\nc", "assistant: b"),
    ),
    "Dolly in a table, without context": (
        {"instruction": "a", "context": "", "response": "b"}, talk("user: a", "assistant: b"),
    ),
    "Firefly": ({"kind": "NLI", "input": "a", "target": "b"}, talk("user: a", "assistant: b")),
    "question and answer": ({"question": "a", "answer": "b", "id": 1}, talk("user: a", "assistant: b")),
    "OpenOrca": (
        {"system_prompt": "s", "question": "a", "response": "b"}, talk("system: s", "user: a", "assistant: b"),
    ),
    "ms-swift": (
        {"system": "s", "history": [["q", "r"]], "query": "a", "response": "b"},
        talk("system: s", "user: q", "assistant: r", "user: a", "assistant: b"),
    ),
    "gdGPT pretrain": ({"type": "pretrain", "text": "a text"}, PlainText("a text")),
    "gdGPT instruct": (
        {"type": "instruct", "instruct": "补充", "input": "再多看一眼", "output": "再靠近点"},
        talk("user: 补充\n再多看一眼", "assistant: 再靠近点"),
    ),
    "gdGPT conversation with questions in a row": (
        {"type": "conversation", "rounds": [["ask", "a"], ["ans", "b"], ["ask", "c"], ["ask", "d"], ["ans", "e"]]},
        talk("user: a", "assistant: b", "user: c", "user: d", "assistant: e"),
    ),
    "gdGPT ref_qa": (
        {"type": "ref_qa", "reference": "a text", "rounds": [["ask", "how long?"], ["ans", "short"]]},
        talk("system: a text", "user: how long?", "assistant: short"),
    ),
    "gdGPT with an API": (
        {
            "type": "conver_has_api",
            "api_desc": "search: finds",
            "rounds": [
                ["ask", "find it"],
                ["ans-api", {
                    "actions": [
                        {"inner_thought": "let me see", "api_name": "search", "api_param": '{"q": 1}', "api_res": "no"},
                        {"inner_thought": "", "api_name": "search", "api_param": "", "api_res": ""},
                    ],
                    "ans": "not found",
                }],
                ["ask", "thanks"],
                ["ans", "bye"],
            ],
        },
        talk("system: search: finds", "user: find it", 'assistant: let me see\nsearch({"q": 1})', "tool: no",
             "assistant: search()", "tool: ", "assistant: not found", "user: thanks", "assistant: bye"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str):
    record, expected = CONVERSATIONS[name]
    assert parse_record(record) == expected


PROMPT = (Message("user", "q"),)
PREFERENCES = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "ShareGPT prompt, messages as answers": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"},
    },
    "ShareGPT prompt, texts as answers": {
        "conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad",
    },
    "lists of messages": {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "good"}], "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "whole conversations": {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
    "whole conversations and their prompt": {
        "prompt": "q",
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str):
    good, bad = (Message("assistant", text) for text in ("good", "bad"))
    assert parse_record(PREFERENCES[name]) == Preference(PROMPT, good, bad)


PREFERENCES |= {
    "Alpaca's": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "a question": {"question": "q", "chosen": "good", "rejected": "bad"},
    "HH's dialogues": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    "HH's prompt": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
    "UltraFeedback": {
        **PREFERENCES["whole conversations and their prompt"], "score_chosen": 8.0,
        "messages": PREFERENCES["whole conversations"]["chosen"],
    },
    "messages that end with the better answer": {**PREFERENCES["texts"], "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"},
    ]},
    "ms-swift": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
                 "rejected_response": "bad"},
    "ms-swift, one turn": {"query": "q", "response": "good", "rejected_response": "bad"},
    "OpenAI": {"input": {"messages": [{"role": "user", "content": "q"}], "parallel_tool_calls": True},
               "preferred_output": [{"role": "assistant", "content": "good"}],
               "non_preferred_output": [{"role": "assistant", "content": "bad"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PREFERENCES if "Alpaca" in name or "messages" in PREFERENCES[name]])
def test_what_stands_before_the_question_of_a_preference(name: str):
    """A system text beside it; for a text also the history and the input."""
    record, system = PREFERENCES[name], Message("system", "s")
    sample = parse_record({**record, "system": "s"})
    assert sample.prompt == (system, *PROMPT)
    if "Alpaca" in name:
        sample = parse_record({**record, "history": [["h", "i"]], "input": "more"})
        assert sample.prompt == talk("user: h", "assistant: i", "user: q\nmore").messages


DIALOGUE = "Human:q0\nAssistant:a\nHuman:b\nAssistant:"
UNLEARNT = {
    "OpenAI's weight": {"messages": [
        {"role": "user", "content": "q0", "weight": 0}, {"role": "assistant", "content": "a", "weight": 0},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "r", "weight": 1},
    ]},
    "ms-swift's loss": {"messages": [
        {"role": "user", "content": "q0"}, {"role": "assistant", "content": "a", "loss": False},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "r", "loss": None},
    ]},
    "axolotl's train, and an answer behind the last": {"conversations": [
        {"from": "human", "value": "q0"}, {"from": "gpt", "value": "a", "train": "false"},
        {"from": "human", "value": "b"}, {"from": "gpt", "value": "r", "train": True},
        {"from": "human", "value": "c"}, {"from": "gpt", "value": "d", "train": False},
    ]},
    "a mask": {"messages": [
        {"role": "user", "content": "q0"}, {"role": "assistant", "content": "a", "mask": True},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "r"},
    ]},
    "XTuner's": {"conversation": [
        {"input": "q0", "output": "a", "output_with_loss": False}, {"input": "b", "output": "r"},
    ]},
    "TRL's prompt": {
        "prompt": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a"},
                   {"role": "user", "content": "b"}],
        "completion": [{"role": "assistant", "content": "r"}],
    },
    "BELLE's dialogue": {"instruction": DIALOGUE, "input": "", "output": "r"},
}  # fmt: skip


@pytest.mark.parametrize("name", UNLEARNT)
def test_answers_that_are_not_to_be_learnt(name: str):
    messages = parse_record(UNLEARNT[name]).messages
    assert [(message.role, message.text, message.learnt) for message in messages] == [
        ("user", "q0", True), ("assistant", "a", False), ("user", "b", True), ("assistant", "r", True),
    ]  # fmt: skip


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def asks(*middle: dict, **beside: object) -> dict:
    return {**beside, "messages": [{"role": "user", "content": "q"}, *middle, {"role": "assistant", "content": "r"}]}


def calls(*given: dict, **more: object) -> dict:
    return {"role": "assistant", "tool_calls": list(given), **more}


WITH_TOOLS = {
    "OpenAI": asks(calls({**CALL, "id": "1"}), {"role": "tool", "content": "3", "tool_call_id": "1"}, tools=[TOOL]),
    "arguments and tools as texts of JSON": asks(
        calls({"function": {"name": "f", "arguments": '{"x": 1}'}}, content=None), {"role": "tool", "content": "3"},
        tools='[{"name": "f", "parameters": {"type": "object"}}]',
    ),
    "the old functions": asks(
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "3"}, functions=[TOOL["function"]],
    ),
    "ShareGPT": {"tools": [TOOL], "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "r"},
    ]},
    "tools in the message of the system": {"messages": [
        {"role": "system", "content": "", "tools": [TOOL]},
        *asks(calls(CALL), {"role": "tool", "content": "3"})["messages"],
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_and_calls(name: str):
    # Ids stay if the data has them: Mistral's templates write them.
    call, id = ({"id": "1", **CALL}, "1") if name == "OpenAI" else (CALL, "")
    expected = (Message("user", "q"), Message("assistant", "", tool_calls=(call,)),
                Message("tool", "3", name="f", call_id=id), Message("assistant", "r"))  # fmt: skip
    assert read_record(WITH_TOOLS[name]).sample == Conversation(expected, (TOOL,))
    with pytest.raises(ValueError, match='it has "tools", which are more than text'):
        parse_record(WITH_TOOLS[name])


def test_an_answer_goes_on_with_its_calls():
    """As in ms-swift, where each call is a message."""
    turns = [
        ("user", "q"), ("assistant", "I look."), ("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("tool_call", '{"name": "g"}'), ("tool_response", "3"), ("tool_response", "4"), ("assistant", "r"),
    ]  # fmt: skip
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    other = {"type": "function", "function": {"name": "g", "arguments": {}}}
    assert read_record(record).sample.messages == (
        Message("user", "q"), Message("assistant", "I look.", tool_calls=(CALL, other)), Message("tool", "3", name="f"),
        Message("tool", "4", name="g"), Message("assistant", "r"),
    )  # fmt: skip


def test_preferences_with_tools():
    """Answers that differ only in their calls."""
    record = {"prompt": "q", "chosen": [calls(CALL, content="I look.")], "tools": [TOOL],
              "rejected": [{"role": "assistant", "content": "I look.", "tool_calls": None}]}  # fmt: skip
    chosen, rejected = Message("assistant", "I look.", tool_calls=(CALL,)), Message("assistant", "I look.")
    assert read_record(record).sample == Preference(PROMPT, chosen, rejected, (TOOL,))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought", "think", "cot"])
def test_reasoning(name: str):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", name: "well"}]}
    expected = Conversation((Message("user", "q"), Message("assistant", "r", reasoning="well")))
    assert read_record(record).sample == expected == read_record({"question": "q", name: "well", "answer": "r"}).sample
    with pytest.raises(ValueError, match="a message of the assistant has reasoning"):
        parse_record(record)


@pytest.mark.parametrize("switch", ["on", "off", "Low", True])
def test_a_switch_is_no_thought(switch: object):
    """Nemotron's post-training data says "reasoning": "on" if the model was to think."""
    one_turn = {"input": [{"role": "user", "content": "q"}], "output": "<think>t</think>r", "reasoning": switch}
    expected = talk("user: q", "assistant: <think>t</think>r")
    for record in (one_turn, asks({"role": "assistant", "content": "r", "thinking": switch}, reasoning=switch)):
        read = read_record(record)
        assert "reasoning=" + str(switch).lower() in [name.replace('"', "").lower() for name in read.unread]
        assert not any(message.reasoning for message in read.sample.messages)
    assert read_record({**one_turn, "reasoning_content": "t"}).sample.messages[1].reasoning == "t"
    assert read_record(one_turn).sample == expected


def test_magpies_knowledge_is_named():
    read = read_record(asks(knowledge="To answer, one needs to know more.", instruction="q", response="r"))
    assert read.sample == talk("user: q", "assistant: r") and read.unread == ("knowledge",)


def test_what_is_not_read_is_named():
    """Marks are named with their values, also those of messages. Empty or repeated fields need not be named."""
    record = {
        "id": 7, "text": "a formatted", "split": "test", "images": [], "rejected": False, "weight": 1, "label": 3,
        "deleted": False, "type": "chat", "prompt": "a", "answer": "7", "messages": [
            {"role": "user", "content": "a", "name": "Ann"},
            {"role": "assistant", "content": "b", "time": 5, "time\n": 6},
        ],
    }  # fmt: skip
    read = read_record(record)
    assert read.sample == talk("user: a", "assistant: b") and read.format == "messages"
    assert set(read.unread) == {
        "id", "text", 'split="test"', "rejected", "weight", "label", "deleted", "type", "answer", "name of messages",
        "time of messages",
    }  # fmt: skip


CHANGES_MEANING = [
    ({"images": ["a.jpg"]}, 'it has "images": pictures and sounds cannot be learnt here'),
    ({"image": "a.jpg"}, 'it has "image": pictures'),
    ({"videos": ["a"]}, 'it has "videos"'),
    ({"chat_template_kwargs": {"enable_thinking": False}}, 'it has "chat_template_kwargs"'),
    ({"label": True}, '"label" tells good answers from bad ones .KTO.'),
    ({"label": "false"}, '"label" tells good'),
    ({"kto_tag": True}, '"kto_tag" tells good'),
    ({"deleted": True}, '"deleted" is true: it is not to be learnt'),
    ({"is_valid": 0}, '"is_valid" is 0: it is not to be learnt'),
    ({"train": False}, '"train" is false: it is not to be learnt'),
    ({"weight": 0.5}, '"weight" is 0.5: only yes and no'),
    ({"loss_mask": [0, 1]}, '"loss_mask" is .0, 1.: only yes and no'),
    ({"mask": "assistant"}, '"mask" is "assistant"'),
    ({"rejected": True}, '"rejected" is true'),
    ({"rejected": "worse"}, '"chosen" is missing, beside "rejected"'),
    ({"chosen": "better", "rejected": None}, '"rejected" is null, beside "chosen"'),
    ({"is_valid": "No"}, '"is_valid" is "No": it is not to be learnt'),
    ({"article": "text"}, '"article" is not read beside '),
    ({"documents": [{"title": "t", "text": "text"}]}, '"documents" is not read'),
    ({"tools": "no JSON"}, '"tools" is not a list of tools'),
    ({"tools": [{"type": "function"}]}, 'tool 0 of "tools" has no "name"'),
    ({"system": "s", "system_prompt": "t"}, '"system" and "system_prompt" say different things'),
]


@pytest.mark.parametrize("beside, complaint", CHANGES_MEANING)
@pytest.mark.parametrize("record", [asks(), {"instruction": "q", "output": "r"}], ids=["messages", "Alpaca"])
def test_what_changes_the_meaning_is_refused(record: dict, beside: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        read_record({**record, **beside})


@pytest.mark.parametrize(
    "beside",
    [{"input": "more"}, {"context": "more"}, {"history": [["h", "i"]]}, {"instruction": "do"}, {"response": "s"},
     {"conversations": [{"from": "human", "value": "other"}, {"from": "gpt", "value": "r"}]}],
)  # fmt: skip
def test_texts_beside_messages_are_refused_if_they_say_more(beside: dict):
    with pytest.raises(ValueError, match='"(input|context|history|instruction|response|messages)" is not read beside'):
        read_record(asks(**beside))
    assert read_record(asks(prompt="q", response="r", history=[["q", "r"]])).sample == talk("user: q", "assistant: r")


@pytest.mark.parametrize(
    "record, complaint",
    [
        (asks({"role": "user", "content": "a", "images": ["x"]}), 'message 1 has "images": pictures'),
        (asks({"role": "assistant", "content": "a", "deleted": True}), 'message 1 is not to be learnt: "deleted"'),
        (asks({"role": "assistant", "content": "a", "weight": 0.5}), 'message 1 has the "weight" 0.5'),
        (asks({"role": "assistant", "content": "a", "train": True, "mask": True}), "message 1 says both that it is"),
        (asks({"role": "user", "content": "a", "train": True}), "message 1 of the user is to be learnt"),
        (asks({"role": "assistant", "content": "a", "channel": "analysis"}), '1 is of the "channel" "analysis"'),
        (asks({"role": "assistant", "content": None, "refusal": "no"}), '1 has no text: its "content" is missing'),
        (asks({"role": "user", "content": "a", "reasoning": "b"}), "message 1 of the user has reasoning"),
        (asks({"role": "user", "content": "a", "value": "b"}), 'message 1: "content" and "value" say different things'),
        (asks({"role": "user", "content": [{"type": "text", "text": "a", "train": False}]}), "part of message 1 is no"),
        (asks(calls({"function": {"name": "f", "arguments": "[1]"}})), 'call 0 of "tool_calls" of message 1 has "arg'),
        (asks(calls({"function": {"arguments": "{}"}})), 'call 0 of "tool_calls" of message 1 has no "name"'),
        (asks(calls({"type": "custom", "function": {"name": "f"}})), "is not a call of a function"),
        (asks(calls({**CALL, "id": "1"}, {**CALL, "id": "2"}), {"role": "tool", "tool_call_id": "2", "content": "a"}),
         "message 2 is the result of another call than the one whose turn it is"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, *asks()["messages"]]}, '"system" says some'),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
         "message 1 is not a call"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
         "none of its answers is to be learnt"),
        ({"question": "q", "answer": "a", "response": "b"}, '"answer" is not read'),
        ({"question": "q", "answer": "a", "knowledge": "k"}, '"knowledge" is not read'),
        ({"instruction": "q", "output": "r", "history": [{"q": "a"}]}, '"history" 0 is not a pair'),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, '"rejected" is a list of texts that do not say'),
        ({"chosen": None, "rejected": None, "prompt": "q"}, '"chosen" and "rejected" are null'),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, '"chosen" is missing, beside "rejected"'),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}, "the same prompt"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"},
         '"rejected" is a dialogue that does not end with an answer'),
        ({"plain_text": "[Human]: x<eoh> [MOSS]: y<eoa>", "num_turns": 1}, "it has the fields num_turns, plain_text"),
    ],
)  # fmt: skip
def test_what_a_message_or_a_format_has_no_place_for(record: dict, complaint: str):
    with pytest.raises(ValueError) as caught:
        read_record(record)
    assert complaint in str(caught.value)


def test_role_names_of_a_dataset():
    record = {"conversations": [{"from": "Kunde", "value": "a"}, {"from": "Berater", "value": "b"}]}
    with pytest.raises(ValueError, match='message 0 has the unknown role "Kunde"'):
        parse_record(record)
    assert parse_record(record, roles_with("Kunde", "Berater")) == talk("user: a", "assistant: b")
    assert parse_record(CONVERSATIONS["ShareGPT"][0], roles_with("Kunde", "Berater")) == CONVERSATIONS["ShareGPT"][1]


def sharegpt(*turns: tuple[object, object]) -> dict:
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


KNOWN = (
    "known are messages; conversations; prompt and completion; instruction and output; question and answer; query and "
    "response; input and target; for DPO chosen and rejected"
)
FLAGS = ": say whose it is with --user_name or --assistant_name"


@pytest.mark.parametrize(
    "record, complaint",
    [
        ("text", "not an object with fields"),
        ([], "not an object with fields"),
        ({}, "it is empty"),
        ({"text": "a", "id": 1}, f"no known format: it has the fields id, text; {KNOWN}"),
        ({"type": "other", "rounds": []}, f"no known format: it has the fields rounds, type; {KNOWN}"),
        ({"conversations": []}, '"conversations" is not a list of messages'),
        ({"conversations": "a"}, '"conversations" is not a list of messages'),
        (
            {"messages": ["a"]},
            '"messages" is a list of texts that do not say whose they are: give each of them a "role"',
        ),
        ({"messages": [5]}, "message 0 is not a message"),
        (sharegpt(("human", "a"), ("narrator", "b")), f'message 1 has the unknown role "narrator"{FLAGS}'),
        (sharegpt(("human", "a"), (None, "b")), "message 1 has the unknown role null"),
        (sharegpt(("human", "a"), ("gpt", "")), "message 1 is empty"),
        (sharegpt(("human", " \n"), ("gpt", "a")), "message 0 is empty"),
        (sharegpt(("human", "a"), ("gpt", None)), 'message 1 has no text: its "value" is missing'),
        (sharegpt(("human", "a"), ("gpt", 5)), "message 1 is not text"),
        (sharegpt(("human", "a"), ("gpt", "\ud800")), "message 1 is not valid Unicode"),
        (sharegpt(("human", "a")), "it holds no answer"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'message 0 holds more than text: a part of "image_url"',
        ),
        ({"instruction": "a", "output": " "}, '"output" is empty'),
        ({"instruction": "", "output": "a"}, '"instruction" is empty'),
        ({"instruction": "a", "input": 5, "output": "b"}, '"input" is not text'),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, '"history" 0 is not a pair of question and answer'),
        ({"type": "pretrain"}, '"text" is missing'),
        ({"type": "instruct", "instruct": "a"}, '"output" is missing'),
        ({"type": "conversation", "rounds": {}}, '"rounds" is not a list'),
        ({"type": "conversation", "rounds": [["ask"]]}, "round 0 is not a pair"),
        ({"type": "conversation", "rounds": [["say", "a"]]}, f'round 0 has the unknown role "say"{FLAGS}'),
        ({"type": "conversation", "rounds": [["ask", "a"]]}, "it holds no answer"),
        ({"type": "ref_qa", "rounds": [["ask", "a"], ["ans", "b"]]}, '"reference" is missing'),
        ({"type": "conver_has_api", "api_desc": "a", "rounds": [["ans-api", {}]]}, 'round 0 has no "actions"'),
        (
            {"type": "conver_has_api", "api_desc": "a", "rounds": [["ans-api", {"actions": [{}], "ans": "b"}]]},
            "the API of action 0 of round 0 is missing",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen and the rejected answer are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, '"rejected" is empty'),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, '"prompt" is empty'),
        (
            {"chosen": "b", "rejected": "c"},
            'it has no "prompt": the question is read from "prompt", "conversations", "messages", "instruction", '
            '"question" or "query", or from "chosen" and "rejected" if both are whole conversations',
        ),
        (
            {**sharegpt(("human", "a"), ("gpt", "x")), "chosen": "b", "rejected": "c"},
            "the prompt has no question that the answers follow",
        ),
        (
            {"prompt": "a", "chosen": {"from": "human", "value": "b"}, "rejected": "c"},
            '"chosen" does not end with an answer',
        ),
        (
            {**PREFERENCES["whole conversations"], "prompt": "another"},
            '"prompt" is not read beside chosen, rejected, and says something else: put it where it belongs, or drop '
            "it",
        ),
    ],
)
def test_what_is_refused(record: object, complaint: str):
    with pytest.raises(ValueError) as caught:
        parse_record(record)
    assert str(caught.value) == complaint


class Watched(dict):
    """Records which of its fields are read."""

    asked: set[str] = set()

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)


def test_fields_are_all_that_is_looked_at():
    """Other columns of a table are not read, so a format's field that is not among FIELDS would be lost."""
    records = [record for record, _ in CONVERSATIONS.values()] + list(PREFERENCES.values())
    for record in records:
        expected = parse_record(record)
        assert parse_record({name: record[name] for name in record if name in FIELDS}) == expected
        parse_record(Watched(record))
    assert Watched.asked <= FIELDS


ODD = [
    None, 5, -1, 1.5, float("nan"), float("inf"), True, "", " ", "x", "\ud800", "a\0b", "user", "assistant", [], {},
    [None], [[]], ["ask", "x"], ["ans", "y"], ["ans-api", {"actions": [{}], "ans": 5}],
    ["ans-api", {"actions": [{"api_name": 3, "api_param": {}}]}], {"role": "user"}, {"role": ["user"], "content": "x"},
    {"from": "human", "value": 5}, {"role": {}, "content": {}}, {"role": "user", "content": [5, None]},
    {"role": "user", "content": [{"type": ["text"]}]},
    {"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"}, "instruct", "pretrain", "conver_has_api",
]  # fmt: skip


def test_records_of_odd_values():
    """A record is read, or refused in one sentence; it never raises another exception."""
    rng = random.Random(0)
    fields = sorted(FIELDS)

    def odd(depth: int = 0) -> object:
        if depth > 2 or rng.random() < 0.5:
            return rng.choice(ODD)
        return [odd(depth + 1) for _ in range(rng.randrange(4))]

    refused = 0
    for _ in range(10_000):
        try:
            parse_record({rng.choice(fields): odd() for _ in range(rng.randrange(5))})
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 8_000 < refused < 10_000


def test_sentence_about_odd_names():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for record in ({"a\nb": 1, "\ud800": 2}, {"messages": [{"role": deep, "content": "x"}]}):
        with pytest.raises(ValueError) as caught:
            parse_record(record)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
