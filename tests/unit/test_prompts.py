"""generate.py's prompts and sampling flags, before any model is loaded."""

import io
import json
import sys
from pathlib import Path

import pytest

import generate
from serving.arguments import sampling_of
from serving.prompts import prompts_of
from serving.requests import Sampling
from tokenizer.messages import Message


def sampling(*flags: str, **recommended: object) -> Sampling:
    return sampling_of(generate.parse(["--model=M", *flags]), recommended)


def test_flags_count_before_the_folder_and_the_folder_before_the_usual():
    usual = Sampling(max_new_tokens=200, temperature=0.8, top_k=50)
    assert sampling() == usual == sampling(do_sample=True, max_length=20)
    folder = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1}
    assert sampling(**folder) == Sampling(max_new_tokens=200, **folder)
    assert sampling("--temperature=0", "--top_p=1", **folder).temperature == 0
    assert sampling("--temperature=0", "--top_p=1", **folder).top_p == 1
    for name, value in (("temperature", -1), ("top_k", "many"), ("top_p", 0), ("min_p", 2), ("repetition_penalty", 0)):
        with pytest.raises(ValueError, match=f"impossible {name}: .*; give --{name}"):
            sampling(**{name: value})
        assert sampling(f"--{name}=1", **{name: value})
    flags = ["--stop=a", "--stop=b\n", "--seed=3", "--logprobs=2", "--presence_penalty=1", "--frequency_penalty=-1"]
    assert sampling(*flags) == Sampling(
        max_new_tokens=200, temperature=0.8, top_k=50, stop=("a", "b\n"), seed=3, logprobs=2, presence_penalty=1.0,
        frequency_penalty=-1.0,
    )  # fmt: skip


def test_beams_draw_only_if_one_asks_for_it():
    beams = sampling("--num_beams=3", "--length_penalty=2", "--early_stopping=never", temperature=0.6)
    assert (beams.temperature, beams.num_beams, beams.length_penalty, beams.early_stopping) == (0.0, 3, 2.0, "never")
    drawn = sampling("--num_beams=3", "--temperature=0.5", "--early_stopping=true")
    assert (drawn.temperature, drawn.early_stopping) == (0.5, True)


def test_prompts_of_flags_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n  {two}\r\n漢字", "utf-8")
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    records.write_text(f'{{"prompt": "a\\nb", "id": 7}}\n{json.dumps({"messages": talk})}\n', "utf-8")
    assert [prompt.text for prompt in prompts_of(["x"], str(lines), False, "")] == ["x", "one", "  {two}", "漢字"]
    first, second = prompts_of([], str(records), False, "S")
    assert (first.text, first.messages, first.fields) == ("a\nb", (), {"prompt": "a\nb", "id": 7})
    # A conversation keeps its own first message.
    assert second.messages == (Message("system", "s"), Message("user", "q")) and second.fields == {"messages": talk}
    asked = prompts_of(["x"], str(records), True, "S")
    assert [prompt.messages[0] for prompt in asked] == [Message("system", "S")] * 2 + [Message("system", "s")]
    assert [prompt.messages[-1].text for prompt in asked] == ["x", "a\nb", "q"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert [(prompt.where, prompt.text) for prompt in prompts_of([], "-", False, "")] == [
        ("standard input, line 1", "one"), ("standard input, line 2", "two")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "sentence"), [
        ("{", "line 2: it is not complete JSON"), ("[1]", "line 2 must be a record"),
        ('{"text": "a"}', 'line 2 has neither a "prompt"'), ('{"prompt": ""}', 'line 2 has neither a "prompt"'),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "line 2: a message must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2 ends with an answer"),
        ('{"prompt": "\\udcff"}', "line 2 is not UTF-8"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture, line: str, sentence: str):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert generate.main([f"--model={tmp_path}", f"--prompts={path}"]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("flags", "sentence"), [
        (["--top_p=0"], "--top_p must lie in (0, 1], got 0.0"), (["--min_p=1.5"], "--min_p must lie between 0 and 1"),
        (["--repetition_penalty=0"], "--repetition_penalty must be positive"), (["--n=0"], "--n must be positive"),
        (["--frequency_penalty=nan"], "--frequency_penalty must be a finite number, got nan"),
        (["--stop="], "--stop is empty"), (["--logprobs=-1"], "--logprobs must not be negative"),
        (["--length_penalty=2"], "--length_penalty needs --num_beams"), (["--top_k=-1"], "--top_k must not be "),
        (["--n=3", "--num_beams=2"], "--n 3 texts need as many beams"), (["--num_beams=0"], "--num_beams must be "),
        (["--prompts=nowhere.txt"], "nowhere.txt does not exist"), (["--system=s"], "--system needs --chat"),
        (["--prompt="], "--prompt is missing"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str):
    assert generate.main([f"--model={tmp_path}", "--prompt=x", *flags]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1, err


def test_a_talk_has_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for flag in ("--json", "--n=2", "--logprobs=1"):
        assert generate.main([f"--model={tmp_path}", "--chat", flag]) == 2
        assert "needs --prompt or --prompts" in capsys.readouterr().err
