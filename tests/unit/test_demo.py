"""The demo's questions, answers, pairs and scores."""

import json
import statistics
from pathlib import Path

import pytest

from demo import conversations, preferences
from demo.functions import Function, asked_name, functions_of, is_asked_function, modules_of
from demo.preferences import pairs_of
from demo.sampling import Answer, draw_all
from demo.scores import Score, difference, score_of, verdict
from evaluation.python_source import parses
from model import Decoder, ModelConfig
from serving.generation import generate
from serving.loading import Served, Speech
from tokenizer.hf_bbpe import train_hf_bbpe


@pytest.mark.parametrize(
    ("answer", "is_good"),
    [
        ("def add(a, b):\n    return a + b\n", True),
        ("\ndef add(a):\n    pass\n    return a", True),
        ("def sub(a, b):\n    return a - b\n", False),
        ("def add(a, b):\n    return a +\n", False),
        ("def add(a, a):\n    return a\n", False),
        ("def add(a, b):\n    pass\n", False),
        ('def add(a, b):\n    """Adds."""\n    ...\n', False),
        ("def add(a, b):\n    return a\nprint(1)\n", False),
        ("add = 3", False),
        ("def add(a):\n    return '\0'", False),
        ("def add(a):\n    return " + "(" * 300 + ")" * 300, False),
        ("", False),
    ],
)
def test_a_good_answer_is_one_function_of_the_asked_name_that_compiles(answer: str, is_good: bool):
    assert is_asked_function(answer, "add") == is_good


def test_nothing_of_an_answer_is_run_or_warned_of(recwarn: pytest.WarningsRecorder):
    assert parses("raise SystemExit(7)")
    assert is_asked_function("def f(x):\n    return x is 1 or '\\d'", "f")
    assert not recwarn.list


def test_a_question_names_the_function_last():
    found = list(functions_of('def double(x):\n    """Returns twice\n    x.  More."""\n    return 2 * x\n', "a.b"))
    assert found == [Function("a.b", "double", "Returns twice x.", "def double(x):\n    return 2 * x\n")]
    assert found[0].question == "a.b: Returns twice x. Write the function double"
    assert asked_name(found[0].question) == "double"
    with pytest.raises(ValueError, match="asks for no function"):
        asked_name("What does it do?")


def test_held_out_functions_are_asked_for_and_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = tmp_path / "corpus" / "package"
    corpus.mkdir(parents=True)
    for number in range(40):
        name = "__init__" if number == 0 else f"m{number}"
        text = f'def of_{number}(x):\n    """Returns one and a number."""\n    return {number}\n'
        (corpus / f"{name}.py").write_text(text * 30)
    (corpus / "broken.py").write_text("def :\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pretokenize.json").write_text(json.dumps({"valid_ratio": 0.3}))
    flags = [f"--corpus_dir={corpus.parent}", f"--data_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'talk'}"]
    monkeypatch.setattr("sys.argv", ["demo.conversations", *flags])
    assert conversations.main() == 0
    asked = {}
    for name in ("sft", "sft_valid"):
        lines = (tmp_path / "talk" / name / "functions.jsonl").read_text().splitlines()
        asked[name] = [asked_name(json.loads(line)["messages"][0]["content"]) for line in lines]
    assert set(asked["sft"]).isdisjoint(asked["sft_valid"])
    assert set(asked["sft"]) | set(asked["sft_valid"]) == {f"of_{number}" for number in range(40)}
    held_out = {name for split, name, _ in modules_of(corpus.parent, 0.3) if split == "valid"}
    # Modules have the names under which they are imported; no module dominates the scores.
    assert held_out == {"package" if n == "of_0" else f"package.m{n.removeprefix('of_')}" for n in asked["sft_valid"]}
    assert {asked["sft"].count(name) for name in asked["sft"]} == {30}
    assert {asked["sft_valid"].count(name) for name in asked["sft_valid"]} == {24}


@pytest.fixture(scope="module")
def served() -> Served:
    tokenizer = train_hf_bbpe(["def add(a, b):\n    return a + b\n"] * 9, 270, show_progress=False)
    config = ModelConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    ).resolve()  # fmt: skip
    model = Decoder(config)
    model.initialize(0)
    return Served(model, Speech(tokenizer, frozenset([tokenizer.eod_id]), {}))


def test_answers_drawn_together_are_those_drawn_alone(served: Served):
    """Some end early. So cold that the likeliest token is always drawn."""
    prompts = [[5] * (1 + number % 3) + [number] for number in range(8)]

    def alone(stop_ids: frozenset[int]) -> list[list[int]]:
        return [list(generate(served.model, prompt, 12, stop_ids | served.stop_ids, 0.0,
                              vocab_size=served.tokenizer.vocab_size)) for prompt in prompts]  # fmt: skip

    stop_ids = frozenset(row[at] for at, row in enumerate(alone(frozenset())[:4], 2))
    expected = alone(stop_ids)
    assert len({len(row) for row in expected}) > 2
    drawn = draw_all(served, prompts, 2, 12, stop_ids, 1e-5, seed=1, rows=6)
    assert drawn == [[Answer(served.tokenizer.decode(row), len(row), len(row) < 12)] * 2 for row in expected]


def test_a_seed_repeats_the_answers_on_any_number_of_cores(served: Served, monkeypatch: pytest.MonkeyPatch):
    prompts = [[5] * (1 + number % 3) + [number] for number in range(8)]
    drawn = []
    for cores, seed in ((1, 1), (4, 1), (4, 2)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        drawn.append(draw_all(served, prompts, 2, 6, frozenset(), 2.0, seed=seed, rows=4))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({answer.text for answers in drawn[0] for answer in answers}) == 16


def answer(tokens: int, good: bool) -> dict:
    return {"text": f"{tokens} {good}", "tokens": tokens, "ends": True, "good": good}


def test_pairs_are_answers_to_one_question_of_like_length():
    some = [answer(9, False), answer(30, True), answer(28, False), answer(8, True), answer(50, False)]
    records = [
        {"question": "Q1", "answers": some},
        {"question": "Q2", "answers": [answer(3, True), answer(4, True)]},
        {"question": "Q3", "answers": [answer(3, False)]},
    ]
    pairs = [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs_of(records, most=4)]
    assert pairs == [("Q1", "8 True", "9 False"), ("Q1", "30 True", "28 False")]
    assert len(list(pairs_of(records, most=1))) == 1


def test_a_model_that_knows_nothing_yet_is_shown_real_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers, functions, output = tmp_path / "a.jsonl", tmp_path / "f.jsonl", tmp_path / "p" / "p.jsonl"
    answers.write_text("".join(json.dumps({"question": f"Q{n}", "answers": [answer(5, False)]}) + "\n" for n in "123"))
    talks = [[{"content": f"Q{n}"}, {"content": f"def f{n}(): return 1"}] for n in "123"]
    functions.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    flags = [f"--answers={answers}", f"--functions={functions}", f"--output={output}", "--least=2"]
    monkeypatch.setattr("sys.argv", ["demo.preferences", *flags])
    assert preferences.main() == 0
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [pair["chosen"] for pair in pairs] == ["def f1(): return 1", "def f2(): return 1"]


def test_a_change_counts_beyond_two_standard_errors_of_the_questions():
    records = [{"answers": [answer(1, good) for good in goods]} for goods in ((1, 0), (1, 1), (0, 0), (1, 0))]
    before = score_of(records)
    assert before.parts == [0.5, 1.0, 0.0, 0.5]
    assert before.mean == 0.5 and before.error == pytest.approx(statistics.stdev(before.parts) / 2)
    # The questions' difficulty cancels out: one by one, each question gained 0.1 or 0.2.
    after = Score([part + gain for part, gain in zip(before.parts, (0.1, 0.2, 0.1, 0.2))])
    assert verdict(difference(before, after)) == "improved"
    assert verdict(difference(after, before)) == "worse"
    assert verdict(difference(before, before)) == "not beyond noise"
    assert verdict(difference(before, Score([0.9, 1.0, 0.0, 0.5]))) == "not beyond noise"
    assert verdict(Score([0.5])) == "not beyond noise"
    with pytest.raises(ValueError, match="4 and 1 parts"):
        difference(before, Score([0.5]))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"question": "Q", "answers": [{"text": "t"}]}'])
def test_a_file_that_holds_no_answers_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    flags = [f"--answers={path}", f"--functions={path}", f"--output={tmp_path / 'p.jsonl'}"]
    monkeypatch.setattr("sys.argv", ["demo.preferences", *flags])
    assert preferences.main() == 2
    assert f"{path} holds no answers: give a file that demo.answer wrote" in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()
