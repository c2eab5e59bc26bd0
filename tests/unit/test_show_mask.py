"""Output of show_mask: the supervised stretches, and nothing that a terminal or a browser would obey."""

import html
import json
import re
from pathlib import Path

import pytest

from data_preprocess.pretokenize_sft_data import main as pretokenize
from dataset.show_mask import main, pieces, visible
from tests.unit.test_tokenizer import training_texts
from tokenizer import Tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe

ESCAPE = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_hf_bbpe(training_texts(), 400, show_progress=False)


@pytest.fixture(scope="module")
def home(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("show")
    tokenizer.save_pretrained(home / "tokenizer")
    records = [
        {"messages": [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "漢字 🧪\nb"}]},
        {"messages": [{"role": "user", "content": "q\x1b[31m"}, {"role": "assistant", "content": "<b>&</b>"}]},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"instruction": "long " * 60, "output": "never"},
    ]
    (home / "talk").mkdir()
    (home / "talk" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (home / "pairs").mkdir()
    (home / "pairs" / "b.jsonl").write_text('{"prompt": "p", "chosen": "good", "rejected": "bad"}\n')
    return home


def shown(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--tokenizer_dir", str(home / "tokenizer")]) == 0
    return capsys.readouterr().out


def test_records_of_a_file(home: Path, capsys: pytest.CaptureFixture[str]):
    out = shown(home, capsys, str(home / "talk" / "a.jsonl"), "--max_seq_len=60")
    lines = out.split("\n--- ")
    assert (
        "<|im_start|>user<|im_sep|>say <|im_end|><|im_end|><|im_start|>assistant<|im_sep|>⟦漢字 🧪\nb<|im_end|>⟧"
        in lines[0]
    )
    assert "user<|im_sep|>q␛[31m<|im_end|>" in lines[1] and "⟦<b>&</b><|im_end|>⟧" in lines[1]
    assert re.match(r"a.jsonl at byte \d+: skipped, it holds no answer", lines[2])
    assert re.match(r"a.jsonl at byte \d+: 1 dropped, too long: no answer is left", lines[3])


def test_record_with_a_name_that_cannot_be_printed(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    messages = [{"role": "\ud800", "content": "a"}]
    records = [{"messages": messages}, {"instruction": "q", "output": "a"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = shown(home, capsys, str(tmp_path / "a.jsonl"))
    out.encode("utf-8")
    assert 'skipped, message 0 has the unknown role "\\ud800"' in out and out.count("--- ") == 2


def test_nothing_but_skipped_records_is_an_error(home: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(home / "pairs" / "b.jsonl"), "--tokenizer_dir", str(home / "tokenizer")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "skipped" in printed.out
    assert "every record was skipped or dropped; records of pairs (chosen, rejected) need --task dpo" in printed.err
    assert main([*arguments, "--task=dpo"]) == 0
    (home / "other.jsonl").write_text('{"body": "words"}\n')
    assert main([str(home / "other.jsonl"), *arguments[1:]]) == 2
    assert capsys.readouterr().err.endswith("every record was skipped or dropped\n")


def test_color_says_the_same(home: Path, capsys: pytest.CaptureFixture[str]):
    """Green is the text in brackets; an injected control string does not have the colour of a control token."""
    path = str(home / "talk" / "a.jsonl")
    plain = shown(home, capsys, path, "--num=2", "--max_seq_len=60")
    colored = shown(home, capsys, path, "--num=2", "--max_seq_len=60", "--color=always")
    assert ESCAPE.sub("", colored) == plain.replace("⟦", "").replace("⟧", "")
    green = "".join(re.findall("\x1b\\[30;42m(.*?)\x1b\\[0m", colored.replace("\n", "\x00\x1b[0m"), re.S))
    assert green == "漢字 🧪b<|im_end|><b>&</b><|im_end|>"
    blue = re.findall("\x1b\\[36m(.*?)\x1b\\[0m", colored)
    assert blue.count("<|im_end|>") == 2 and "say <|im_end|>" in colored.replace("\x1b[36m<|im_end|>", "")


def test_page(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    page = tmp_path / "mask.html"
    shown(home, capsys, str(home / "talk" / "a.jsonl"), "--max_seq_len=60", "--html", str(page))
    text = page.read_text()
    spans = re.findall(
        r'<span class="([a-z ]*)" title="token (\d+), id ([\d, ]+), (message [^"]*)">(.*?)</span>', text, re.S
    )
    learnt = html.unescape("".join(content for classes, *_, content in spans if "learnt" in classes))
    assert learnt.replace("↵", "") == "漢字 🧪\nb<|im_end|><b>&</b><|im_end|>"
    control = [html.unescape(content) for classes, *_, content in spans if "control" in classes]
    whose = {belongs for classes, _, _, belongs, _ in spans if "learnt" in classes}
    assert whose == {"message 1, assistant's text"}
    assert len(control) == 12 and control.count("<|im_end|>") == 4
    assert "\x1b" not in text and "<b>" not in text


def test_pretokenized_directory(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Training uses the tokens that the raw records showed."""
    common = ["--tokenizer_dir", str(home / "tokenizer"), "--max_seq_len=60", "--num_workers=1"]
    assert pretokenize(["--data_dir", str(home / "talk"), "--output_dir", str(tmp_path / "sft"), *common]) == 0
    assert (
        pretokenize(["--task=dpo", "--data_dir", str(home / "pairs"), "--output_dir", str(tmp_path / "dpo"), *common])
        == 0
    )
    capsys.readouterr()
    raw = shown(home, capsys, str(home / "talk" / "a.jsonl"), "--num=2", "--max_seq_len=60")
    assert main([str(tmp_path / "sft")]) == 0
    assert capsys.readouterr().out == raw
    assert main([str(tmp_path / "dpo")]) == 0
    out = capsys.readouterr().out
    assert "b.jsonl at byte 0, chosen: " in out and "⟦good<|im_end|>⟧" in out and "⟦bad<|im_end|>⟧" in out


def test_pieces_are_whole_characters(tokenizer: Tokenizer):
    """The pieces hold every token once, with its supervision."""
    text = "a漢字🧪é" * 3
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        supervised = [index >= cut for index in range(len(ids))]
        parts = list(pieces(tokenizer, ids, supervised))
        assert [i for part in parts for i in part.ids] == ids
        assert [part.supervised for part in parts for _ in part.ids] == supervised
    assert "".join(part.text for part in pieces(tokenizer, ids, [True] * len(ids))) == text


def test_nothing_that_a_terminal_obeys():
    assert visible("a\x1b]0;x\x07\r\x9b1m\x7f\tb\n") == "a␛]0;x␇␍␡1m␡\tb\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist"), (["talk/b.jsonl"], "talk/a.jsonl?"),
        (["talk"], "nor a pretokenized directory: name a file in it, such as "),
        (["talk/a.jsonl", "--num=0"], "--num must be positive"),
        (["talk/a.jsonl", "--max_prompt_len=5000"], "must leave room for an answer"),
    ],
)
def test_refusals(home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str):
    path, *more = arguments
    assert main([str(home / path), "--tokenizer_dir", str(home / "tokenizer"), *more]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("show_mask: ") and sentence in said and "\n" not in said


def test_what_is_not_shown_is_said(home: Path, capsys: pytest.CaptureFixture[str]):
    path, count = home / "talk" / "a.jsonl", len((home / "talk" / "a.jsonl").read_text().splitlines())
    for num in (1, count):
        assert main([str(path), "--tokenizer_dir", str(home / "tokenizer"), f"--num={num}"]) == 0
        assert ("there are more than these 1:" in capsys.readouterr().err) == (num < count)
    assert count > 1


def test_raw_records_need_a_tokenizer(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(home / "talk" / "a.jsonl")]) == 2
    assert "need --tokenizer_dir" in capsys.readouterr().err
