"""SentencePiece's BPE: tests beyond those of both kinds in test_tokenizer.py."""

import json
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as LibraryTokenizer

from tests.unit.test_tokenizer import SP_VOCAB_SIZE, english, sp_training_texts, trained
from tokenizer import SPBBPETokenizer, load_tokenizer
from tokenizer.base import SPECIAL_TOKENS
from tokenizer.sp_bbpe import train_sp_bbpe

BLANK_SIGN = "▁"


@pytest.fixture(scope="module")
def tokenizer() -> SPBBPETokenizer:
    return trained("sp_bbpe")


@pytest.fixture(scope="module")
def folder(tokenizer: SPBBPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "sp"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def learnt_pieces(tokenizer: SPBBPETokenizer, folder: Path) -> list[str]:
    """All pieces except the unknown token, the special tokens and the bytes."""
    tokenizer.save_pretrained(folder)
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(1 + len(SPECIAL_TOKENS) + 256, processor.vocab_size())
    return [processor.id_to_piece(i) for i in ids]


def test_layout(tokenizer: SPBBPETokenizer, processor: SentencePieceProcessor):
    assert tokenizer.vocab_size == SP_VOCAB_SIZE == processor.vocab_size()
    assert processor.is_unknown(0)
    assert tokenizer.special_ids == {token: 1 + i for i, token in enumerate(SPECIAL_TOKENS)}
    assert [processor.id_to_piece(6 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    # Lengths from the spelling of the pieces.
    lengths = tokenizer.token_byte_lengths()
    assert lengths[:6] == [0] * 6 and lengths[6:262] == [1] * 256
    pieces = [processor.id_to_piece(i) for i in range(262, SP_VOCAB_SIZE)]
    assert lengths[262:] == [len(piece.replace(BLANK_SIGN, " ").encode("utf-8")) for piece in pieces]


def test_blank_sign_is_its_three_bytes(tokenizer: SPBBPETokenizer, processor: SentencePieceProcessor):
    """The library takes the sign for a blank; text between two signs has the same ids as alone."""
    sign = [6 + byte for byte in BLANK_SIGN.encode("utf-8")]
    assert tokenizer.encode(BLANK_SIGN) == sign
    assert processor.encode(BLANK_SIGN) == processor.encode(" ")
    rng = random.Random(0)
    for _ in range(200):
        parts = [english(rng, rng.randint(0, 3)) + rng.choice(["", " ", "\n", "\0"]) for _ in range(rng.randint(1, 5))]
        expected = processor.encode(parts[0])
        for part in parts[1:]:
            expected += sign + processor.encode(part)
        text = BLANK_SIGN.join(parts)
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode_batch(["a", text, "", text]) == [processor.encode("a"), expected, [], expected]
        assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("seed", range(12))
def test_merges_are_the_scores(seed: int, tmp_path: Path):
    """The folder's merges stand for scores. Alphabets of few letters, where a piece can form in many ways and runs of
    one letter can be cut anywhere, would reveal another order."""
    rng = random.Random(seed)
    alphabet = rng.choice(["ab", "ab ", "abc", "a ", "ab\n", "a\nb "])

    def draw(longest: int) -> str:
        return "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 2, 5]) for _ in range(rng.randint(1, longest)))

    texts = [draw(60) for _ in range(300)]
    tokenizer = train_sp_bbpe(texts, rng.choice([270, 275, 280]), show_progress=False)
    tokenizer.save_pretrained(tmp_path)
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [draw(40) for _ in range(1000)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert library.encode(text).ids == ids
        assert tokenizer.decode(ids) == text


def test_training_again_gives_the_same(tokenizer: SPBBPETokenizer):
    again = train_sp_bbpe(iter(sp_training_texts()), SP_VOCAB_SIZE, show_progress=False)
    assert again.fingerprint == tokenizer.fingerprint
    other = train_sp_bbpe(sp_training_texts(), SP_VOCAB_SIZE - 1, show_progress=False)
    assert other.fingerprint != tokenizer.fingerprint and other.vocab_size == SP_VOCAB_SIZE - 1


def test_digits_stand_alone(tmp_path: Path):
    tokenizer = train_sp_bbpe(["in 1234 and 1234, 1234x x1234 the year 1999\n" * 50], 300, show_progress=False)
    pieces = learnt_pieces(tokenizer, tmp_path)
    assert {"1", "2", "3", "4", "9"} <= set(pieces)
    assert not [piece for piece in pieces if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("x1999")] == ["x", "1", "9", "9", "9"]


@pytest.mark.parametrize("junk", ["\0", "\r", BLANK_SIGN, "⁇", "▅", "\ufeff", "<|endoftext|>", "<unk>", "<0x41>"])
def test_training_text_with_reserved_characters(tmp_path: Path, junk: str):
    """The trainer skips a whole sentence for some characters: the rest of the sentence must still count."""
    text = f"{junk}wonderful elephants {junk} remember everything {junk}\n"
    tokenizer = train_sp_bbpe([text * 100, "plain\n"], 360, show_progress=False)
    pieces = {piece.strip(BLANK_SIGN) for piece in learnt_pieces(tokenizer, tmp_path)}
    assert {"wonderful", "elephants", "remember", "everything"} <= pieces
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and set(range(5)).isdisjoint(ids)


@pytest.mark.parametrize("joint", ["", " ", "\n"])
def test_long_training_texts_are_cut_and_used(tmp_path: Path, joint: str):
    """The trainer would leave out a sentence that is too long, such as a minified file or Chinese."""
    rng = random.Random(0)
    text = joint.join(rng.choice(["天地玄黄", "宇宙洪荒", "日月盈昃"]) for _ in range(20_000))
    tokenizer = train_sp_bbpe([text], 290, show_progress=False)
    assert any("天地" in piece for piece in learnt_pieces(tokenizer, tmp_path))
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_rare_characters_are_left_to_the_bytes(tmp_path: Path):
    tokenizer = train_sp_bbpe(["common words only " * 2000 + "鼎"], 300, show_progress=False)
    assert "鼎" not in learnt_pieces(tokenizer, tmp_path)
    assert tokenizer.encode("鼎") == [6 + byte for byte in "鼎".encode()]


@pytest.mark.parametrize("vocab_size", [-1, 0, 64, 262])
def test_vocabulary_too_small(vocab_size: int):
    with pytest.raises(ValueError, match="--vocab_size must be more than 262"):
        train_sp_bbpe(["some text"], vocab_size, show_progress=False)


def test_vocabulary_too_small_for_the_characters():
    """The advice must help: a smaller vocabulary would not, because this one is already too small."""
    text = "".join(map(chr, range(0x4E00, 0x4E80))) * 20
    with pytest.raises(ValueError) as caught:
        train_sp_bbpe([text], 300, show_progress=False)
    assert "\n" not in str(caught.value)
    assert "smaller --vocab_size" not in str(caught.value)


@pytest.mark.parametrize("texts", [[], [""], ["\0\0"], ["some text"]])
def test_too_little_text(texts: list[str]):
    with pytest.raises(ValueError, match="use more text or a smaller --vocab_size") as caught:
        train_sp_bbpe(texts, 512, show_progress=False)
    assert "\n" not in str(caught.value)


def changed(folder: Path, target: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(folder, target)
    (target / name).unlink()
    if content is not None:
        (target / name).write_bytes(content)
    return target


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "text", "without special tokens"])
def test_damaged_model(folder: Path, tmp_path: Path, damage: str):
    model = (folder / "tokenizer.model").read_bytes()
    content = {
        "missing": None, "empty": b"", "cut": model[: len(model) // 2], "text": b"{}",
        "noise": random.Random(0).randbytes(len(model)), "without special tokens": model.replace(b"<|", b"<!"),
    }[damage]  # fmt: skip
    target = changed(folder, tmp_path / "changed", "tokenizer.model", content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(target)
    message = str(caught.value)
    assert str(target) in message and "train" in message and "\n" not in message


def test_the_folder_says_what_it_is(tokenizer: SPBBPETokenizer, folder: Path, tmp_path: Path):
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert (config["kind"], config["unk_token"], config["eos_token"]) == ("sp_bbpe", "<unk>", "<|endoftext|>")
    assert isinstance(load_tokenizer(folder), SPBBPETokenizer)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    other = train_sp_bbpe(sp_training_texts()[::2], SP_VOCAB_SIZE, show_progress=False)
    other.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == other.fingerprint != tokenizer.fingerprint
