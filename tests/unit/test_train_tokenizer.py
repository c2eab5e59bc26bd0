"""The command that trains a tokenizer: its input, the sample, its report, and its refusals."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

import train_my_ddp
from configurator import parse_config
from data_preprocess import sampling
from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import BadRecords, Corpus, Document
from data_preprocess.sampling import Source, budgets, mixed_texts, sample_texts
from dataset.format import read_bin_header
from model.config import padded_vocab_size
from model.hf import count_padding
from tests.conftest import TINY_MODEL
from tests.unit.test_tokenizer import english, random_text, training_texts
from tokenizer import HFBBPETokenizer, SPBBPETokenizer, load_tokenizer
from tokenizer.base import SPECIAL_TOKENS
from tokenizer.hf_bbpe import train_hf_bbpe
from tokenizer.long_words import LongWords
from tokenizer.split_pattern import split_pattern
from tokenizer.train_tokenizer import main
from training.build_model import resolve_model

HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"


def write_lines(path: Path, texts: list[str], key: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")


def num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def chinese(rng: random.Random, length: int) -> str:
    """Phrases of four, some sentences and numbers."""
    phrases = [HAN[i : i + 4] for i in range(0, len(HAN), 4)]
    text = ""
    while len(text) < length:
        text += rng.choice(phrases) + rng.choice(["", "", "，", "。\n", "1999年"])
    return text


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """All three kinds of input."""
    texts = training_texts()
    directory = tmp_path / "corpus"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.txt").write_text("".join(texts[:40]), "utf-8", newline="")
    (directory / "sub" / "b.py").write_text("".join(texts[40:80]), "utf-8", newline="")
    lines = [json.dumps({"text": text, "body": "other"}) for text in texts[80:]]
    (directory / "c.jsonl").write_text("\n".join(lines), "utf-8")
    return directory


@pytest.fixture
def three_sources(tmp_path: Path) -> Path:
    """zh, en and code: 300 kB or more of each, in documents of at most 2 kB."""
    rng = random.Random(0)
    write_lines(tmp_path / "zh" / "a.jsonl", [chinese(rng, 400) for _ in range(300)])
    write_lines(tmp_path / "en" / "a.jsonl", [english(rng, 200) for _ in range(400)])
    code = ["".join(f"    self.x{rng.randrange(99)} = {rng.randrange(9999)}\n" for _ in range(50)) for _ in range(400)]
    write_lines(tmp_path / "code" / "a.jsonl", code)
    return tmp_path


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text("utf-8"))


# ---- the command


def test_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (corpus / "latin-1.txt").write_bytes(b"caf\xe9")
    (corpus / "picture.png").write_bytes(b"PNG")
    assert main(["--data_dir", str(corpus), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]) == 0
    output = capsys.readouterr()
    assert "320 entries" in output.out and "1 records skipped" in output.out
    left_out, skipped = output.err.splitlines()
    assert left_out == "left out 1 files of other kinds (.png)" and skipped.startswith("skipped latin-1.txt: not UTF-8")
    assert load_tokenizer(tmp_path / "out").vocab_size == 320
    assert isinstance(load_tokenizer(tmp_path / "out"), HFBBPETokenizer)


@pytest.mark.parametrize("vocab_size", [299, 300, 321])
@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
def test_any_vocabulary_size(three_sources: Path, kind: str, vocab_size: int, capsys: pytest.CaptureFixture[str]):
    out = three_sources / "out"
    command = ["--data_dir", str(three_sources / "en"), "--output_dir", str(out), "--kind", kind]
    assert main([*command, "--vocab_size", str(vocab_size)]) == 0
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, SPBBPETokenizer if kind == "sp_bbpe" else HFBBPETokenizer)
    assert tokenizer.vocab_size == vocab_size == report_of(out)["entries"]
    assert f"{vocab_size} entries" in capsys.readouterr().out
    text = english(random.Random(1), 50)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
def test_the_same_command_gives_the_same_tokenizer(three_sources: Path, kind: str):
    """Even with a sample that is only part of the text."""
    command = ["--data_dir", str(three_sources / "en"), "--kind", kind, "--vocab_size", "320", "--sample_mb", "0.1"]
    files = [path.name for path in three_sources.iterdir()]
    for name in ("first", "second"):
        assert main([*command, "--output_dir", str(three_sources / name)]) == 0
    assert sorted(path.name for path in three_sources.iterdir()) == sorted([*files, "first", "second"])
    for path in (three_sources / "first").iterdir():
        assert path.read_bytes() == (three_sources / "second" / path.name).read_bytes()
    assert 100_000 <= report_of(three_sources / "first")["trained_on_bytes"]["all"] <= 102_000


def test_weights_and_the_budget(three_sources: Path):
    sources = [f"--source={name}={three_sources / name}@{w}" for name, w in (("zh", 4), ("en", 1.5), ("code", 0.5))]
    out = three_sources / "out"
    assert main([*sources, "--output_dir", str(out), "--vocab_size", "400", "--sample_mb", "0.24"]) == 0
    report = report_of(out)
    assert list(report["trained_on_bytes"]) == ["zh", "en", "code"] == list(report["sources"])
    for name, wanted in (("zh", 160_000), ("en", 60_000), ("code", 20_000)):
        assert wanted <= report["trained_on_bytes"][name] <= wanted + 2000
        # Drawn again for the report, with the same budget.
        assert wanted <= report["sources"][name]["bytes"] <= wanted + 2000


def test_weight_is_one_unless_given(three_sources: Path):
    out = three_sources / "out"
    odd = three_sources / "en@2x"
    (three_sources / "en").rename(odd)
    sources = ["--source", f"zh={three_sources / 'zh'}", "--source", f"en={odd}"]
    assert main([*sources, "--output_dir", str(out), "--vocab_size", "400", "--sample_mb", "0.2"]) == 0
    trained = report_of(out)["trained_on_bytes"]
    assert all(100_000 <= trained[name] <= 102_000 for name in ("zh", "en"))


def test_a_source_that_is_too_small_is_used_whole(three_sources: Path):
    write_lines(three_sources / "small" / "a.jsonl", ["few words", "of text"])
    sources = [f"--source=small={three_sources / 'small'}@9", f"--source=en={three_sources / 'en'}"]
    out = three_sources / "out"
    assert main([*sources, "--output_dir", str(out), "--vocab_size", "300", "--sample_mb", "0.2"]) == 0
    trained = report_of(out)["trained_on_bytes"]
    assert trained["small"] == len("few wordsof text") and 20_000 <= trained["en"] <= 22_000


def test_weights_decide_what_is_learnt(three_sources: Path):
    """The mixture shows in how well each source is compressed."""
    bytes_a_token = {}
    for favourite in ("zh", "en"):
        sources = [f"--source={n}={three_sources / n}@{50 if n == favourite else 1}" for n in ("zh", "en")]
        out = three_sources / favourite
        assert main([*sources, "--output_dir", str(out), "--vocab_size", "330", "--sample_mb", "0.2"]) == 0
        bytes_a_token[favourite] = {n: c["bytes_a_token"] for n, c in report_of(out)["sources"].items()}
    assert bytes_a_token["zh"]["zh"] > 1.2 * bytes_a_token["en"]["zh"]
    assert bytes_a_token["en"]["en"] > 1.2 * bytes_a_token["zh"]["en"]


@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
def test_report(tmp_path: Path, kind: str):
    """Against counts by hand. All text is within the budget, so the report covers all of it."""
    rng = random.Random(3)
    texts = {
        "en": [english(rng, 60).replace("é", "e") for _ in range(60)],
        "code": ["return 12 def\n" * 30 for _ in range(20)],
    }
    for name, documents in texts.items():
        write_lines(tmp_path / name / "a.jsonl", documents)
    sources = [f"--source={name}={tmp_path / name}" for name in texts]
    out = tmp_path / "out"
    assert main([*sources, "--output_dir", str(out), "--kind", kind, "--vocab_size", "320"]) == 0
    report, tokenizer = report_of(out), load_tokenizer(out)
    assert report["fingerprint"] == tokenizer.fingerprint and report["entries"] == 320
    used = set()
    for name, documents in texts.items():
        ids = [token_id for text in documents for token_id in tokenizer.encode(text)]
        used.update(ids)
        size = num_bytes(documents)
        assert report["trained_on_bytes"][name] == size
        assert report["sources"][name] == {
            "bytes": size, "tokens": len(ids), "bytes_a_token": pytest.approx(size / len(ids), abs=1e-4)
        }  # fmt: skip
    # Text of each entry, as the raw library spells it.
    if kind == "sp_bbpe":
        processor = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
        learnt = {i: processor.id_to_piece(i).replace("▁", " ") for i in range(262, 320)}
    else:
        vocab = LibraryTokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
        learnt = {i: token.replace("Ġ", " ").replace("Ċ", "\n") for token, i in vocab.items() if i < 315}
    learnt = {i: text for i, text in learnt.items() if len(text.encode("utf-8")) > 1 and i > 255}
    unused = [text for i, text in learnt.items() if i not in used]
    assert report["unused_entries"] == len(unused)
    assert len(report["unused_examples"]) == min(20, len(unused)) and set(report["unused_examples"]) <= set(unused)
    longest = sorted((len(text.encode("utf-8")) for text in learnt.values()), reverse=True)[:20]
    assert [len(text.encode("utf-8")) for text in report["longest_tokens"]] == longest
    assert set(report["longest_tokens"]) <= set(learnt.values())


def test_text_keys(tmp_path: Path):
    """Several fields are joined; the tokenizer does not see the others."""
    lines = [{"title": "alphaalpha", "body": "betabeta", "text": "gammagamma"}] * 50
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["--data_dir", str(tmp_path / "corpus"), "--output_dir", str(tmp_path / "out"), "--vocab_size", "265"]
    assert main([*command, "--text_key", "title,body", "--text_separator", "\\t"]) == 0
    report = report_of(tmp_path / "out")
    assert report["trained_on_bytes"] == {"all": 50 * len("alphaalpha\tbetabeta")}
    learnt = "".join(report["longest_tokens"])
    assert "pha" in learnt and "g" not in learnt
    assert main([*command, "--text_key", "text"]) == 0
    learnt = "".join(report_of(tmp_path / "out")["longest_tokens"])
    assert "mm" in learnt and "b" not in learnt


def longest_run(folder: Path, characters: str) -> int:
    """Entries that contain these characters."""
    tokenizer = load_tokenizer(folder)
    entries = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids.values()]
    return max((len(run) for text in entries for run in re.findall(f"[{characters}]+", text)), default=0)


def test_digits_and_chinese_characters_in_an_entry(three_sources: Path):
    both = [f"--source={name}={three_sources / name}" for name in ("zh", "code")]
    lengths = {}
    for name, flags in {
        "default": [], "one digit": ["--max_digits=1"], "two digits": ["--max_digits=2"], "two of Han": ["--max_han=2"],
        "one of Han": ["--max_han=1", "--max_digits=1"], "sp": ["--kind=sp_bbpe", "--max_digits=1"],
    }.items():  # fmt: skip
        out = three_sources / name
        vocab_size = "320" if name == "one of Han" else "460"
        assert main([*both, "--output_dir", str(out), "--vocab_size", vocab_size, *flags]) == 0
        lengths[name] = longest_run(out, "0-9"), longest_run(out, HAN)
    assert lengths["default"][0] == 3 and lengths["default"][1] >= 4
    assert lengths["one digit"][0] == 1 and lengths["one digit"][1] >= 4
    assert lengths["two digits"][0] == 2
    assert lengths["two of Han"] == (3, 2) and lengths["one of Han"] == (1, 1)
    assert lengths["sp"][0] == 1 and lengths["sp"][1] >= 2


# ---- words that are too long to train on


@pytest.mark.parametrize("max_han", [0, 4])
def test_a_long_word_is_cut_for_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], max_han: int):
    """The tokenizer equals one trained on the parts; the cut is reported once, with the number, and ordinary text is
    left alone."""
    rng = random.Random(0)
    long = ["".join(rng.choice(letters) for _ in range(length)) for letters, length in (("acgt", 2500), ("天地", 1001))]
    texts = [english(rng, 400), f"a {long[0]} b\n{long[1]}, c", "x" * 1000, english(rng, 400)]
    write_lines(tmp_path / "corpus" / "a.jsonl", texts)
    command = ["--data_dir", str(tmp_path / "corpus"), "--vocab_size", "330", f"--max_han={max_han}"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "longer than 1,000 characters" in line]
    assert len(said) == 1 and said[0].endswith(f": {1 if max_han else 2}, the longest of 2,501")
    first = f"a {long[0][:999]}", long[0][999:1999], f"{long[0][1999:]} b\n" + (long[1] if max_han else long[1][:1000])
    parts = [texts[0], *first, *texts[2:]] + ([", c"] if max_han else [f"{long[1][1000:]}, c"])
    by_parts = train_hf_bbpe(parts, 330, show_progress=False, max_han=max_han)
    assert load_tokenizer(tmp_path / "out").fingerprint == by_parts.fingerprint


def test_only_what_is_too_long_is_cut():
    """Against a plain look at every word of texts in which long and short words mix freely."""
    rng = random.Random(0)
    cuts = long_words_seen = 0
    for _ in range(60):
        kinds = ["a", "天", "e\u0301", " ", "\n", "!", "!\n", "1", "a1", " b"]
        text = "".join(rng.choice(kinds) * rng.choice([1, 3, 400, 499, 500, 501, 999, 1000, 1001]) for _ in range(6))
        words, counter = pieces(text), LongWords()
        parts = list(counter.cut([text], split_pattern()))
        assert "".join(parts) == text and counter.count == sum(len(word) > 1000 for word in words)
        assert max(map(len, (word for part in parts for word in pieces(part))), default=0) <= 1000
        if counter.count == 0:
            assert parts == [text]
        long_words_seen += counter.count
        cuts += len(parts) - 1
    assert cuts >= long_words_seen > 20


# ---- refusals


@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([{"content": "one"}, {"content": "two"}], 'no text under the key "text"'),
        ([{"text": ""}, {"text": ""}], "every record is empty"),
        ([{"text": 5}], "text"),
    ],
)
def test_nothing_that_could_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, lines: list[dict], why: str
):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--vocab_size", "300"]
    assert main([*command, "--kind", kind]) == 2
    error_output = capsys.readouterr().err
    assert one_sentence(error_output) and "no text was read" in error_output and why in error_output


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer.model", "sp_bbpe"), ("vocab.json", "hf_bbpe"), ("tokenizer.json", "hf_bbpe"),
        ("config.json", "hf_bbpe"), ("model-00001-of-00002.safetensors", "sp_bbpe"), ("ckpt", "hf_bbpe"),
    ],
)  # fmt: skip
def test_folder_of_another_tokenizer_or_model_is_not_overwritten(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
):
    out = tmp_path / "model"
    out.mkdir()
    (out / name).write_bytes(b"theirs")
    command = ["--data_dir", str(corpus), "--output_dir", str(out), "--vocab_size", "320", "--kind", kind]
    assert main(command) == 2
    assert name in capsys.readouterr().err
    assert [path.read_bytes() for path in out.iterdir()] == [b"theirs"]


def test_own_folder_may_be_trained_into_again(three_sources: Path, capsys: pytest.CaptureFixture[str]):
    """Only with the same kind, because a remaining tokenizer.model would be another's; not if a model is in the
    folder."""
    out = three_sources / "out"
    command = ["--data_dir", str(three_sources / "en"), "--output_dir", str(out), "--sample_mb", "0.1"]
    for vocab_size in ("300", "310"):
        assert main([*command, "--vocab_size", vocab_size, "--kind", "sp_bbpe"]) == 0
    assert load_tokenizer(out).vocab_size == 310
    assert main([*command, "--vocab_size", "310"]) == 2
    assert "tokenizer.model" in capsys.readouterr().err
    (out / "config.json").write_text("{}")
    assert main([*command, "--vocab_size", "310", "--kind", "sp_bbpe"]) == 2


def one_sentence(error_output: str) -> bool:
    lines = error_output.splitlines()
    return len(lines) == 1 and lines[0].startswith("train_tokenizer: ") and "Traceback" not in error_output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "64"], "at least 261"),
        (["--vocab_size", "0"], "at least 261"),
        (["--vocab_size", "-1"], "at least 261"),
        (["--vocab_size", "260"], "at least 261"),
        (["--vocab_size", "640000"], "use more text or a smaller --vocab_size"),
        (["--kind", "sp_bbpe", "--vocab_size", "262"], "more than 262"),
        (["--kind", "sp_bbpe", "--vocab_size", "-1"], "more than 262"),
        (["--kind", "sp_bbpe", "--vocab_size", "640000"], "use more text or a smaller --vocab_size"),
        (["--kind", "sp_bbpe", "--max_digits", "3"], "--max_digits"),
        (["--kind", "sp_bbpe", "--max_digits", "2"], "--max_digits"),
        (["--kind", "sp_bbpe", "--max_han", "4"], "--max_han"),
        (["--max_han", "-1"], "--max_han"),
        (["--sample_mb", "0"], "--sample_mb"),
        (["--sample_mb", "-1"], "--sample_mb"),
        (["--sample_mb", "nan"], "--sample_mb"),
        (["--sample_mb", "inf"], "--sample_mb"),
        (["--data_dir", "nowhere"], "nowhere does not exist"),
        (["--text_key", " , "], "--text_key"),
        (["--include", "*.nothing"], "--include"),
    ],
)
def test_command_on_wrong_flags(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
):
    command = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320", *flags]
    assert main(command) == 2
    error_output = capsys.readouterr().err
    assert one_sentence(error_output) and message in error_output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data_dir is missing"),
        (["--data_dir", "{c}", "--source", "a={c}"], "both say where the text is"),
        (["--source", "a=$NO_SUCH_VARIABLE/b"], "$NO_SUCH_VARIABLE is not set here"),
        (["--source", "{c}"], "NAME=DIR"),
        (["--source", "={c}"], "NAME=DIR"),
        (["--source", "a="], "NAME=DIR"),
        (["--source", "a=@3"], "NAME=DIR"),
        (["--source", ""], "NAME=DIR"),
        (["--source", "a={c}@0"], "NAME=DIR"),
        (["--source", "a={c}@-2"], "NAME=DIR"),
        (["--source", "a={c}@nan"], "NAME=DIR"),
        (["--source", "a={c}@inf"], "NAME=DIR"),
        (["--source", "a={c}", "--source", "b={c}@x"], "{c}@x does not exist"),
        (["--source", "a={c}", "--source", "a={c}@2"], "a name of its own"),
        (["--source", "a={c}", "--source", "b={c}/nowhere"], "nowhere does not exist"),
        (["--source", "a={c}", "--source", "b={c}/sub/empty"], "holds no text"),
    ],
)
def test_command_on_wrong_sources(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
):
    (corpus / "sub" / "empty").mkdir()
    flags = [flag.format(c=corpus) for flag in flags]
    assert main([*flags, "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]) == 2
    error_output = capsys.readouterr().err
    assert one_sentence(error_output) and message.format(c=corpus) in error_output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
def test_records_without_the_field_are_the_first_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text('{"body": "words"}\n' * 3)
    flags = ["--data_dir", str(tmp_path / "c"), "--output_dir", str(tmp_path / "out"), "--kind", kind]
    assert main([*flags, "--vocab_size", "320"]) == 2
    error_output = capsys.readouterr().err
    assert error_output.startswith("train_tokenizer: no text was read: 3 records could not be read, for example ")
    assert one_sentence(error_output) and "--text_key" in error_output


@pytest.mark.parametrize(
    "flags", [["--max_digits", "4"], ["--kind", "unigram"], ["--vocab_size", "many"], ["--sample_mb", "x"], ["--what"]]
)
def test_command_on_words_that_are_not_flags(corpus: Path, capsys: pytest.CaptureFixture[str], flags: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(["--data_dir", str(corpus), "--output_dir", "out", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
def test_too_little_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a few words are not enough")
    command = ["--data_dir", str(tmp_path / "corpus"), "--output_dir", str(tmp_path / "out"), "--kind", kind]
    assert main([*command, "--vocab_size", "5000"]) == 2
    error_output = capsys.readouterr().err
    assert one_sentence(error_output) and "use more text or a smaller --vocab_size" in error_output
    assert not (tmp_path / "out").exists()


def test_the_advised_vocabulary_is_the_largest_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Any size is allowed, so the advice is not rounded."""
    write_lines(tmp_path / "corpus" / "a.jsonl", [english(random.Random(0), 100)])
    command = ["--data_dir", str(tmp_path / "corpus"), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--vocab_size", "5000"]) == 2
    advised = re.search(r"at most ([\d,]+)", capsys.readouterr().err)
    assert advised is not None
    largest = int(advised[1].replace(",", ""))
    assert main([*command, "--vocab_size", str(largest)]) == 0
    assert main([*command, "--vocab_size", str(largest + 1)]) == 2


def test_command_on_an_empty_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    command = ["--data_dir", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]
    assert main(command) == 2
    assert one_sentence(capsys.readouterr().err)


def test_command_where_the_output_cannot_be_written(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("in the way")
    command = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "file"), "--vocab_size", "320"]
    assert main(command) == 2
    error_output = capsys.readouterr().err
    assert one_sentence(error_output) and str(tmp_path / "file") in error_output


def test_command_on_a_wrong_text_key(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """More text would not help: the records have another key, and the user must be told so."""
    for path in (corpus / "a.txt", corpus / "sub" / "b.py"):
        path.unlink()
    command = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]
    assert main([*command, "--text_key", "txt"]) == 2
    assert "--text_key" in capsys.readouterr().err


def test_command_skips_a_record_that_is_not_unicode_text(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """JSON can spell half a surrogate pair, which has no UTF-8 form; crawled text does contain such halves."""
    with open(corpus / "c.jsonl", "a") as file:
        file.write('\n{"text": "half an emoji: \\ud83d"}\n')
    assert main(["--data_dir", str(corpus), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]) == 0
    assert "1 records skipped" in capsys.readouterr().out


# ---- sampling


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units so small that a corpus of 2 MB has as many as one of 200 MB."""
    monkeypatch.setattr(sampling, "_UNIT_BYTES", 40_000)
    monkeypatch.setattr(sampling, "_LEAST_FROM_A_UNIT", 5_000)


@pytest.fixture
def many_files(tmp_path: Path, small_units: None) -> Corpus:
    """2 MB: 50 files of one unit each, whose documents of 1 kB name their file and their place in it."""
    for file in range(50):
        documents = [f"{file:03d} {place:03d} ".ljust(1000, "x") for place in range(39)]
        write_lines(tmp_path / "many" / f"{file:03d}.jsonl", documents)
    return Corpus(str(tmp_path / "many"))


def test_sample_reads_only_what_it_needs(many_files: Corpus, monkeypatch: pytest.MonkeyPatch):
    read = []
    original = sampling.read_unit

    def counting(*args: object):
        for item in original(*args):
            read.append(item)
            yield item

    monkeypatch.setattr(sampling, "read_unit", counting)
    texts = list(sample_texts(many_files, 100_000, BadRecords()))
    assert [item.text for item in read if isinstance(item, Document)] == texts
    assert 100_000 <= num_bytes(texts) <= 101_000
    # 20 units, each of which gives its minimum.
    files = [text[:3] for text in texts]
    assert len(set(files)) == 20 and max(files.count(name) for name in set(files)) == 5


def test_sample_is_the_same_every_time_and_another_with_another_seed(many_files: Corpus):
    def draw(seed: int) -> list[str]:
        return list(sample_texts(many_files, 100_000, BadRecords(), seed))

    assert draw(0) == draw(0) != draw(1)
    assert {text[:3] for text in draw(0)} != {text[:3] for text in draw(1)}
    assert list(sample_texts(many_files, 100_000, BadRecords())) == draw(0)


@pytest.mark.parametrize("budget", [1, 999, 1000, 5000, 40_000, 500_000, 1_500_000, 1_949_000])
def test_sample_has_the_wanted_size(many_files: Corpus, budget: int):
    texts = list(sample_texts(many_files, budget, BadRecords()))
    assert budget <= num_bytes(texts) < budget + 1000
    assert len(set(texts)) == len(texts)


def test_sample_of_more_than_there_is_is_everything(many_files: Corpus):
    texts = list(sample_texts(many_files, 10_000_000, BadRecords()))
    assert sorted(text[:7] for text in texts) == [
        f"{file:03d} {place:03d}" for file in range(50) for place in range(39)
    ]


def test_sample_of_files_of_very_different_sizes(tmp_path: Path, small_units: None):
    """A compressed file is one unit, however large: it must give what small files cannot."""
    (tmp_path / "corpus").mkdir()
    rng = random.Random(0)
    sizes = {"large.jsonl.gz": 1000, **{f"small-{i}.jsonl": 30 for i in range(4)}}
    for name, count in sizes.items():
        lines = "\n".join(json.dumps({"text": rng.randbytes(500).hex()}) for _ in range(count))
        content = lines.encode()
        (tmp_path / "corpus" / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for seed in range(6):
        texts = list(sample_texts(Corpus(str(tmp_path / "corpus")), 800_000, BadRecords(), seed))
        assert 750_000 <= num_bytes(texts) <= 801_000, seed


def test_sample_counts_bad_records(many_files: Corpus):
    path = Path(many_files.root, "000.jsonl")
    path.write_text("{broken\n" + path.read_text())
    bad = BadRecords()
    assert len(list(sample_texts(many_files, 10_000_000, bad))) == 50 * 39
    assert bad.count == 1 and bad.examples[0].startswith("000.jsonl at byte 0: not a JSON line")


def test_sources_take_turns(tmp_path: Path):
    """A trainer that stops early, or keeps the first words that it sees, must not see the sources one after another."""
    sources = []
    for name, size, weight in (("a", 1000, 3.0), ("b", 500, 1.0), ("c", 2000, 2.0)):
        write_lines(tmp_path / name / "x.jsonl", [f"{i:04d}".ljust(size, name) for i in range(100)])
        sources.append(Source(name, Corpus(str(tmp_path / name)), weight))
    assert budgets(sources, 60_000) == [30_000, 10_000, 20_000]
    named = list(mixed_texts(sources, 60_000, BadRecords()))
    assert [name for name, _ in named[:30]] == ["a", "b", "c"] * 10
    assert {name: sum(len(text) for n, text in named if n == name) for name in "abc"} == {
        "a": 30_000, "b": 10_000, "c": 20_000
    }  # fmt: skip
    assert all(text.endswith(name) for name, text in named)


# ---- how text is split


def pieces(text: str, max_digits: int = 3, max_han: int = 0) -> list[str]:
    split = pre_tokenizers.Split(Regex(split_pattern(max_digits, max_han)), "isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("max_han", [0, 1, 2, 4])
@pytest.mark.parametrize("max_digits", [1, 2, 3])
def test_the_matches_cover_any_text(max_digits: int, max_han: int):
    """The matches cover every text completely."""
    left = pre_tokenizers.Split(Regex(split_pattern(max_digits, max_han)), "removed")
    matched = pre_tokenizers.Split(Regex(split_pattern(max_digits, max_han)), "removed", invert=True)
    rng = random.Random(max_digits * 10 + max_han)
    texts = [random_text(rng, rng.randint(1, 80)) for _ in range(300)] + [chinese(rng, 50) for _ in range(20)]
    texts += [
        "〇々〆ヶ" * 3,
        "①②Ⅷ½９",
        "\u0301\u0301",
        "a\u0301\u0301b",
        "\r\r\n \n",
        " \t\u3000\u00a0",
        "\x85\u2028",
        "\0",
    ]
    texts += ["".join(rng.choice("a1天 \n,\u0301𠀀ー〇") for _ in range(30)) for _ in range(300)]
    for text in texts:
        assert left.pre_tokenize_str(text) == []
        assert "".join(piece for piece, _ in matched.pre_tokenize_str(text)) == text
        assert "".join(pieces(text, max_digits, max_han)) == text


@pytest.mark.parametrize("max_digits", [1, 2, 3])
@pytest.mark.parametrize("max_han", [0, 1, 2, 4])
def test_runs_of_digits_and_chinese_characters(max_digits: int, max_han: int):
    """By a plain loop: digits and, if requested, Chinese characters in groups from the left."""
    rng = random.Random(max_digits * 10 + max_han)
    for _ in range(200):
        runs, expected = [], []
        for _ in range(rng.randint(1, 8)):
            kind = rng.choice([k for k in ("digits", "han", "\n") if not runs or k != runs[-1][0]])
            length = 1 if kind == "\n" else rng.randint(1, 9)
            alphabet = {"digits": "0123456789", "han": HAN, "\n": "\n"}[kind]
            runs.append((kind, "".join(rng.choice(alphabet) for _ in range(length))))
            group = {"digits": max_digits, "han": max_han or 99, "\n": 1}[kind]
            expected += [runs[-1][1][i : i + group] for i in range(0, length, group)]
        assert pieces("".join(text for _, text in runs), max_digits, max_han) == expected


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("The cat sat.\n", {}, ["The", " cat", " sat", ".\n"]),
        ("don't", {}, ["don", "'t"]),
        ("x = 12345", {}, ["x", " =", " ", "123", "45"]),
        ("x = 12345", {"max_digits": 1}, ["x", " =", " ", "1", "2", "3", "4", "5"]),
        ("    return self.x", {}, ["   ", " return", " self", ".x"]),
        ("a\n\n    b", {}, ["a", "\n\n", "   ", " b"]),
        ("end  \nnext  ", {}, ["end", "  \n", "next", "  "]),
        ("foo();\r\n", {}, ["foo", "();\r\n"]),
        ("नमस्ते दुनिया", {}, ["नमस्ते", " दुनिया"]),
        ("天地玄黄，宇宙洪荒。", {}, ["天地玄黄", "，宇宙洪荒", "。"]),
        ("天地玄黄，宇宙洪荒。", {"max_han": 2}, ["天地", "玄黄", "，", "宇宙", "洪荒", "。"]),
        ("天地玄黄，宇宙洪荒。", {"max_han": 3}, ["天地玄", "黄", "，", "宇宙洪", "荒", "。"]),
        ("我用Python3写code", {}, ["我用Python", "3", "写code"]),
        ("我用Python3写code", {"max_han": 2}, ["我用", "Python", "3", "写", "code"]),
        ("公元1999年12月", {"max_han": 4, "max_digits": 2}, ["公元", "19", "99", "年", "12", "月"]),
        ("かな漢字カナ", {"max_han": 4}, ["かな", "漢字", "カナ"]),
        ("the 天地 end", {"max_han": 4}, ["the", " ", "天地", " end"]),
    ],
)
def test_split_of_known_texts(text: str, options: dict[str, int], expected: list[str]):
    assert pieces(text, **options) == expected
    english_only = text.isascii() and "max_digits" not in options
    assert not english_only or pieces(text, max_han=4) == expected


# ---- the model that is trained with it


@pytest.mark.parametrize(("entries", "rows"), [(260, 320), (320, 320), (321, 384), (64_000, 64_000), (1, 64)])
def test_the_model_pads_its_embedding(entries: int, rows: int):
    config, given = parse_config(["--data_dir=d"])
    assert padded_vocab_size(entries) == rows
    assert resolve_model(config.model, given, None, entries, 8).vocab_size == rows
    # A given size is used as it is, if the tokenizer fits in.
    config, given = parse_config(["--data_dir=d", f"--vocab_size={entries}"])
    assert resolve_model(config.model, given, None, entries, 8).vocab_size == entries
    with pytest.raises(ValueError, match="smaller than the tokenizer's"):
        resolve_model(config.model, given, None, entries + 1, 8)


def test_a_run_with_a_vocabulary_of_an_odd_size(three_sources: Path):
    """From the command to a checkpoint: the model's rows are padded, all files hold the tokenizer's size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = three_sources
    command = ["--data_dir", str(home / "en"), "--output_dir", str(home / "tokenizer"), "--kind", "sp_bbpe"]
    assert main([*command, "--vocab_size", "301"]) == 0
    job = PretrainJob(Corpus(str(home / "en")), str(home / "tokens"), str(home / "tokenizer"), valid_ratio=0.1)
    manifest = process_corpus(job)
    assert read_bin_header(home / "tokens" / manifest["shards"]["train"][0]).vocab_size == 301
    build(home / "tokens", 32)
    assert train_my_ddp.main([
        f"--data_dir={home / 'tokens'}", f"--out_dir={home / 'run'}", "--max_seq_len=32", "--dtype=float32",
        "--device=cpu", "--train_batch_size=2", "--gradient_accumulation_steps=1", "--valid_iters=1", "--max_iters=2",
        "--num_threads=1", *TINY_MODEL,
    ]) == 0  # fmt: skip
    checkpoint = home / "run" / "ckpt" / "step-2"
    model, theirs = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert model.config.vocab_size == 301 and model.get_input_embeddings().weight.shape[0] == 301
    assert count_padding(checkpoint) == 320 - 301
    ours = load_tokenizer(checkpoint)
    assert isinstance(ours, SPBBPETokenizer) and ours.vocab_size == 301 == len(theirs)
    assert ours.fingerprint == load_tokenizer(home / "tokenizer").fingerprint
    text = english(random.Random(0), 20)
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert set(ours.special_ids) == set(SPECIAL_TOKENS)
