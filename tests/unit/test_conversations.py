"""Every format of conversations, written by hand, and what is wrong with records that are refused."""

import random

import pytest

from data_preprocess.conversations import FIELDS, Conversation, PlainText, Preference, parse_record, roles_with
from tokenizer.chat_template import Message


def talk(*turns: str) -> Conversation:
    """From "role: text" strings."""
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
        ("text", "no object with fields"),
        ([], "no object with fields"),
        ({}, "it is empty"),
        ({"text": "a", "id": 1}, f"no known format: it has the fields id, text; {KNOWN}"),
        ({"type": "other", "rounds": []}, f"no known format: it has the fields rounds, type; {KNOWN}"),
        ({"conversations": []}, '"conversations" is no list of messages'),
        ({"conversations": "a"}, '"conversations" is no list of messages'),
        ({"messages": ["a"]}, "message 0 is no message"),
        (sharegpt(("human", "a"), ("narrator", "b")), f'message 1 has the unknown role "narrator"{FLAGS}'),
        (sharegpt(("human", "a"), (None, "b")), "message 1 has the unknown role null"),
        (sharegpt(("human", "a"), ("gpt", "")), "message 1 is empty"),
        (sharegpt(("human", " \n"), ("gpt", "a")), "message 0 is empty"),
        (sharegpt(("human", "a"), ("gpt", None)), 'message 1 has no text: its "value" is missing'),
        (sharegpt(("human", "a"), ("gpt", 5)), "message 1 is no text"),
        (sharegpt(("human", "a"), ("gpt", "\ud800")), "message 1 is not valid Unicode"),
        (sharegpt(("human", "a")), "it holds no answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 0 holds more than text"),
        ({"instruction": "a", "output": " "}, '"output" is empty'),
        ({"instruction": "", "output": "a"}, '"instruction" is empty'),
        ({"instruction": "a", "input": 5, "output": "b"}, '"input" is no text'),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, '"history" 0 is no pair of question and answer'),
        ({"type": "pretrain"}, '"text" is missing'),
        ({"type": "instruct", "instruct": "a"}, '"output" is missing'),
        ({"type": "conversation", "rounds": {}}, '"rounds" is no list'),
        ({"type": "conversation", "rounds": [["ask"]]}, "round 0 is no pair"),
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
            '"prompt" is not read beside the other fields, and says something else: put it where it belongs, or drop '
            "it",
        ),
    ],
)
def test_what_is_refused(record: object, complaint: str):
    with pytest.raises(ValueError) as caught:
        parse_record(record)
    assert str(caught.value) == complaint


class Watched(dict):
    """Notes which of its fields are asked for."""

    asked: set[str] = set()

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)


def test_fields_are_all_that_is_looked_at():
    """Of a table other columns are not read: a format's field that is missing among them would be lost."""
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
    """A record is read, or refused in one sentence; nothing in it is another exception."""
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
