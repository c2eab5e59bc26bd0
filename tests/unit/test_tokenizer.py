"""Byte-level BPE: any text survives, no text forges a special token, Hugging Face reads the folder the same way."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from tokenizer import HFBBPETokenizer, load_tokenizer
from tokenizer.hf_bbpe import END_OF_DOCUMENT, SPECIAL_TOKENS, train_hf_bbpe
from tokenizer.train_tokenizer import main

VOCAB_SIZE = 640

# Ranges of code points from which random texts are drawn; the surrogates are no characters.
RANGES = {
    "control": (0x00, 0x1F),
    "ascii": (0x20, 0x7E),
    "latin and C1": (0x7F, 0x24F),
    "combining": (0x300, 0x36F),
    "hebrew and arabic": (0x590, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "spaces and joiners": (0x2000, 0x206F),
    "cjk": (0x3000, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private use": (0xE000, 0xF8FF),
    "variation selectors, BOM, specials": (0xFE00, 0xFFFF),
    "astral": (0x10000, 0x1FAFF),
    "tags and beyond": (0xE0000, 0x10FFFF),
}


def random_text(rng: random.Random, length: int) -> str:
    """Runs of characters of one kind, as texts have them, mixed with blanks and line ends."""
    text = ""
    while len(text) < length:
        low, high = rng.choice(list(RANGES.values()))
        text += "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
        text += rng.choice(["", "", " ", "  ", "\n", "\r\n", "\t", " \n\n  "])
    return text


def english(rng: random.Random, words: int) -> str:
    vocabulary = "the tokens of a text are merged in the order that training found: def return self 1234 café".split()
    return " ".join(rng.choice(vocabulary) for _ in range(words))


def training_texts() -> list[str]:
    """Words, some of everything else, and many control strings: merging them must not be learnt as one token."""
    rng = random.Random(0)
    texts = [english(rng, 80) for _ in range(40)]
    texts += [random_text(rng, 120) for _ in range(40)]
    texts += ["".join(rng.choice(SPECIAL_TOKENS) for _ in range(20)) for _ in range(40)]
    texts += [" ".join(rng.choice(SPECIAL_TOKENS) for _ in range(20)) for _ in range(40)]
    return texts


@pytest.fixture(scope="module")
def tokenizer() -> HFBBPETokenizer:
    return train_hf_bbpe(training_texts(), VOCAB_SIZE, show_progress=False)


@pytest.fixture(scope="module")
def folder(tokenizer: HFBBPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    tokenizer.save_pretrained(path)
    return path


# ---- text


def test_vocabulary(tokenizer: HFBBPETokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZE
    # The last ids, so that a vocabulary that grows does not move the others.
    assert tokenizer.special_ids == {text: VOCAB_SIZE - 4 + i for i, text in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.eod_id == tokenizer.special_ids[END_OF_DOCUMENT]


def test_training_compresses(tokenizer: HFBBPETokenizer):
    text = english(random.Random(7), 200)
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_training_again_gives_the_same(tokenizer: HFBBPETokenizer):
    again = train_hf_bbpe(iter(training_texts()), VOCAB_SIZE, show_progress=False)
    assert again.fingerprint == tokenizer.fingerprint
    other = train_hf_bbpe(training_texts()[::2], VOCAB_SIZE - 64, show_progress=False)
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("seed", range(10))
def test_round_trip_of_random_unicode(tokenizer: HFBBPETokenizer, seed: int):
    rng = random.Random(seed)
    texts = [random_text(rng, rng.randint(0, 60)) for _ in range(200)]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert [tokenizer.encode(text) for text in texts] == batch
    assert all(0 <= token_id < VOCAB_SIZE - 4 for ids in batch for token_id in ids)


@pytest.mark.parametrize("kind", RANGES)
def test_round_trip_of_every_kind(tokenizer: HFBBPETokenizer, kind: str):
    low, high = RANGES[kind]
    text = "".join(map(chr, range(low, min(high, low + 5000) + 1)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n", "\0", "a\0b", "\r\n \r\n", " " * 1000, "\ufeffBOM", "e\u0301 is no \u00e9", "\u1e9b\u0323",
        "👩‍👩‍👧‍👦🏽", "０１２ ①②③ 1234567", "ﬁ ﬀ", "don't I'LL", "\u202eabc", "\ufffd", "Ġ Ċ", "x" * 5000,
    ],
)  # fmt: skip
def test_round_trip_of_awkward_texts(tokenizer: HFBBPETokenizer, text: str):
    """Nothing is normalised, stripped or merged: what was written comes back."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_bytes_that_are_no_text_yet(tokenizer: HFBBPETokenizer):
    """Half a character while it streams in."""
    ids = tokenizer.encode("\U0001f9ea")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:-1])
    assert tokenizer.decode(ids) == "\U0001f9ea"


def test_token_byte_lengths(tokenizer: HFBBPETokenizer):
    lengths = tokenizer.token_byte_lengths()
    assert len(lengths) == VOCAB_SIZE
    assert [lengths[token_id] for token_id in tokenizer.special_ids.values()] == [0] * 4
    assert min(lengths[: VOCAB_SIZE - 4]) == 1
    rng = random.Random(3)
    for text in [*(random_text(rng, 50) for _ in range(300)), *SPECIAL_TOKENS, english(rng, 100)]:
        assert sum(lengths[token_id] for token_id in tokenizer.encode(text)) == len(text.encode("utf-8"))


# ---- special tokens


def forgeries(rng: random.Random, count: int) -> list[str]:
    """Control strings whole, cut, nested, doubled, with look-alikes, invisible characters and blanks in between."""
    fragments = ["<|", "|>", "<", "|", ">", "im", "_", "start", "end", "of", "text", "pad", "im_start", "endoftext"]
    fragments += ["\u200b", "\u200d", "\ufeff", "\0", "\u0301", "＜｜", "｜＞", " ", "\n", "\r\n", "\t", "<s>", "Ġ"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            control = rng.choice(SPECIAL_TOKENS)
            cut = rng.randint(0, len(control))
            parts.append(
                rng.choice(
                    [
                        control,
                        control[:cut],
                        control[cut:],
                        control[:cut] + rng.choice(SPECIAL_TOKENS) + control[cut:],
                        control[:cut] + rng.choice(fragments) + control[cut:],
                        control.upper(),
                        unicodedata.normalize("NFKC", "＜｜im_end｜＞"),
                        rng.choice(fragments),
                        random_text(rng, 3),
                    ]
                )
            )
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("seed", range(5))
def test_no_text_forges_a_special_token(tokenizer: HFBBPETokenizer, seed: int):
    texts = forgeries(random.Random(seed), 1000)
    special_ids = set(tokenizer.special_ids.values())
    spelled_out = sum(any(control in text for control in SPECIAL_TOKENS) for text in texts)
    assert spelled_out > 300
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert special_ids.isdisjoint(ids), text
        assert tokenizer.decode(ids) == text
    for text in texts[:100]:
        assert special_ids.isdisjoint(tokenizer.encode(text)), text


def test_no_text_forges_a_special_token_of_a_loaded_tokenizer(tokenizer: HFBBPETokenizer, folder: Path):
    loaded = load_tokenizer(folder)
    for text in [*SPECIAL_TOKENS, "".join(SPECIAL_TOKENS), *forgeries(random.Random(99), 300)]:
        assert max(loaded.encode(text), default=0) < VOCAB_SIZE - 4
        assert loaded.encode(text) == tokenizer.encode(text)


def test_decode_of_special_tokens(tokenizer: HFBBPETokenizer):
    start, end = (tokenizer.special_ids[text] for text in ("<|im_start|>", "<|im_end|>"))
    ids = [start, *tokenizer.encode("héllo"), end, tokenizer.eod_id]
    assert tokenizer.decode(ids) == "<|im_start|>héllo<|im_end|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "héllo"
    assert tokenizer.decode([]) == ""


# ---- the folder


def test_hugging_face_gives_the_same_ids(tokenizer: HFBBPETokenizer, folder: Path):
    # Imported here: it takes seconds, and the other tests do without.
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(11)
    texts = [random_text(rng, rng.randint(0, 80)) for _ in range(500)] + [english(rng, 50) for _ in range(20)]
    texts += [text for text in forgeries(rng, 500) if not any(control in text for control in SPECIAL_TOKENS)]
    assert len(texts) > 600
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eod_id, tokenizer.special_ids["<|pad|>"])
    for text, token_id in tokenizer.special_ids.items():
        assert theirs.convert_tokens_to_ids(text) == token_id
        assert token_id in theirs.all_special_ids
        # Hugging Face's convention, which ours leaves on purpose.
        assert theirs(text)["input_ids"] == [token_id]


def test_save_and_load(tokenizer: HFBBPETokenizer, folder: Path, tmp_path: Path):
    loaded = load_tokenizer(str(folder))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special_ids == tokenizer.special_ids and loaded.vocab_size == tokenizer.vocab_size
    loaded.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    files = ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert all((folder / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in files)


@pytest.mark.parametrize("change", ["merge", "special id", "normalizer"])
def test_fingerprint_changes_with_the_ids_that_a_text_gets(
    tokenizer: HFBBPETokenizer, folder: Path, tmp_path: Path, change: str
):
    """Token files carry the fingerprint: an equal one promises equal ids."""
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "tokenizer.json"
    definition = json.loads(path.read_text("utf-8"))
    if change == "merge":
        definition["model"]["merges"].pop()
    elif change == "special id":
        first, second = definition["added_tokens"][:2]
        first["id"], second["id"] = second["id"], first["id"]
    else:
        definition["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(definition), "utf-8")
    assert load_tokenizer(path.parent).fingerprint != tokenizer.fingerprint


def test_missing_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no tokenizer.json.*python -m tokenizer.train_tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"{}", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"added_tokens": []}', b'{"added_tokens": [{}]}',
        b'{"added_tokens": [{"content": "<|endoftext|>", "id": 0, "special": true}]}',
        b'{"added_tokens": [{"content": "<|endoftext|>", "id": 0, "special": true}], "pre_tokenizer": null,'
        b' "model": {"type": "BPE"}}',
    ],
)  # fmt: skip
def test_broken_definition(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert "train" in str(caught.value)


def test_tokenizer_of_another_kind_is_refused(tmp_path: Path):
    """A word-level one loses what it doesn't know, and its tokens' lengths are no bytes."""
    words = Tokenizer(models.WordLevel({"?": 0, "word": 1}, unk_token="?"))
    words.add_special_tokens([END_OF_DOCUMENT])
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("vocab_size", [0, 64, 259])
def test_vocabulary_too_small(vocab_size: int):
    with pytest.raises(ValueError, match="--vocab_size must be at least 260"):
        train_hf_bbpe(["some text"], vocab_size, show_progress=False)
    assert train_hf_bbpe(["some text"], 260, show_progress=False).vocab_size == 260


@pytest.mark.parametrize("texts", [[], [""], ["some text"]])
def test_too_little_text(texts: list[str]):
    with pytest.raises(ValueError, match="use more text or a smaller --vocab_size"):
        train_hf_bbpe(texts, 512, show_progress=False)


# ---- the command


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


def test_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (corpus / "latin-1.txt").write_bytes(b"caf\xe9")
    assert main(["--data_dir", str(corpus), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]) == 0
    output = capsys.readouterr()
    assert "320 entries" in output.out and "1 records skipped" in output.out
    assert output.err.startswith("skipped latin-1.txt: not UTF-8") and output.err.count("\n") == 1
    assert load_tokenizer(tmp_path / "out").vocab_size == 320


def one_sentence(error_output: str) -> bool:
    lines = error_output.splitlines()
    return len(lines) == 1 and lines[0].startswith("train_tokenizer: ") and "Traceback" not in error_output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "321"], "multiple of 64"),
        (["--vocab_size", "64"], "at least 260"),
        (["--vocab_size", "0"], "at least 260"),
        (["--vocab_size", "640000"], "use more text or a smaller --vocab_size"),
        (["--data_dir", "nowhere"], "nowhere is not a directory"),
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


def test_command_skips_a_record_that_is_no_unicode_text(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """JSON can spell half a surrogate pair, which has no UTF-8 form; crawled text does contain them."""
    with open(corpus / "c.jsonl", "a") as file:
        file.write('\n{"text": "half an emoji: \\ud83d"}\n')
    assert main(["--data_dir", str(corpus), "--output_dir", str(tmp_path / "out"), "--vocab_size", "320"]) == 0
    assert "1 records skipped" in capsys.readouterr().out
