"""Text that comes token by token is the text of all tokens at once, and stop texts are those of a naive search."""

import functools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from serving.requests import TokenScore
from serving.text import TextStream
from tests.unit import published_tokenizers as published
from tests.unit import test_tokenizer as made
from tokenizer import HFBBPETokenizer, Tokenizer, load_tokenizer
from tokenizer.sp_foreign import ForeignSPTokenizer

TEXTS = [
    "plain words, and a line\nend", "中文训练数据：天地玄黄，宇宙洪荒。", "👨‍👩‍👧‍👦 🏳️‍🌈 🇨🇳",
    "e\u0301a\u0302\u0300 ท้องฟ้า नमस्ते አማርኛ",
    " two  blanks   in front", "a\ufffdb\ufffd\ufffd\ufffd\ufffdc", "", "\ufffd", "漢" * 50, "\U00012000" * 30 + "x",
]  # fmt: skip


@functools.cache
def own(kind: str) -> Tokenizer:
    return made.trained(kind)


KINDS = ["hf_bbpe", "sp_bbpe", "sp_added", "deepseek", "llama2", "mistral3", "yi", "phi3", "yuan"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE, with and without added tokens; SentencePiece; bytes as pieces, with blanks in front or not."""
    folder = tmp_path_factory.mktemp("tokenizer") / "folder"
    if request.param in made.KINDS:
        return own(request.param)
    if request.param == "sp_added":
        return own("sp_bbpe").with_tokens(["<tool>", "ü"])
    if request.param == "yuan":
        folder.mkdir()
        tokenizer = load_tokenizer(published.yuan(folder, equal=3))
        assert isinstance(tokenizer, ForeignSPTokenizer)
        return tokenizer
    return load_tokenizer(getattr(made, request.param)(folder).folder)


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = (), include: bool = False, skip: bool = False
) -> tuple[list[str], list[list[int]], bool]:
    """Texts and tokens of all pieces, and whether a stop text came."""
    texts, tokens, text_stream = [], [], TextStream(tokenizer, stop, include, skip)
    for token_id in [*ids, None]:
        released = text_stream.flush() if token_id is None else text_stream.push(TokenScore(token_id))
        texts.append(released.text)
        tokens.append([token.id for token in released.tokens])
        if released.stopped:
            assert not any(text_stream.push(TokenScore(ids[0]))[:2]) and not any(text_stream.flush()[:2])
            return texts, tokens, True
    return texts, tokens, False


def check_whole(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = False) -> list[str]:
    texts, tokens, stopped = stream(tokenizer, ids, skip=skip)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert [token_id for some in tokens for token_id in some] == list(ids) and not stopped
    return texts


def test_pieces_are_the_whole(tokenizer: Tokenizer):
    rng = random.Random(1)
    texts = [*TEXTS, *(made.random_text(rng, rng.randint(0, 60)) for _ in range(40)), *made.forgeries(rng, 20)]
    special = list(tokenizer.special_ids.values())
    for text in texts:
        ids = tokenizer.encode(text)
        pieces = check_whole(tokenizer, ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        if len(text) > 100 and text.isascii():
            assert max(map(len, pieces)) < 30
        check_whole(tokenizer, [*ids, rng.choice(special), *ids, rng.choice(special)], skip=rng.random() < 0.5)


def test_random_tokens_are_the_whole(tokenizer: Tokenizer):
    """Broken bytes, blanks and special tokens in any order."""
    rng = random.Random(2)
    lengths = tokenizer.token_byte_lengths()
    usable = [i for i, length in enumerate(lengths) if length] + list(tokenizer.special_ids.values())
    short = [i for i, length in enumerate(lengths) if length == 1]
    for number in range(60):
        some = [short, usable, short * 3 + usable][number % 3]
        check_whole(tokenizer, rng.choices(some, k=rng.choice([1, 5, 30, 50])), skip=number % 2 == 0)


def test_tokens_of_no_text(tokenizer: Tokenizer):
    """Blanks alone, which are taken away in front of a text, and signs for what is unknown."""
    lengths = tokenizer.token_byte_lengths()
    blanks = [i for i in range(len(lengths)) if lengths[i] and not tokenizer.decode([i]).strip()]
    unknown = [i for i in range(len(lengths)) if not lengths[i]]
    rng, word = random.Random(3), tokenizer.encode("word")
    for _ in range(30):
        check_whole(tokenizer, rng.choices(blanks + unknown + word, k=40))


def test_time_for_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer):
    """Neither in words, nor in broken bytes, nor in long runs of byte pieces, which are shown before they end."""
    asked: list[int] = []
    original = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, *more: (asked.append(len(ids)), original(self, ids, *more))[1]
    )
    lengths = tokenizer.token_byte_lengths()
    short = [i for i, length in enumerate(lengths) if length == 1 and i not in tokenizer.encode(" a")]
    for ids in (
        tokenizer.encode("the words of a text " * 60), random.Random(4).choices(short, k=500),
        tokenizer.encode("\U00012000" * 200), [short[-1]] * 500,
    ):  # fmt: skip
        asked.clear()
        texts = stream(tokenizer, ids)[0]
        # Only a broken run of byte pieces waits for its end.
        assert sum(asked) < 60 * len(ids)
    texts = stream(tokenizer, tokenizer.encode("\U00012000" * 200))[0]
    assert max(map(len, texts)) < 20 and "".join(texts) == "\U00012000" * 200


def naive(text: str, stop: Sequence[str], include: bool) -> tuple[str, bool]:
    """Text up to the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        if ending := [s for s in stop if text[:end].endswith(s)]:
            return text[: end if include else end - max(map(len, ending))], True
    return text, False


def test_stop_texts(tokenizer: Tokenizer):
    rng = random.Random(5)
    for number in range(150):
        text = "".join(rng.choices(["a", "b", " ", "漢", "the", "\n", "é"], k=30))
        ids = tokenizer.encode(text)
        # Texts of the answer, some with another end, so that much waits in vain.
        begins = [rng.randrange(len(text)) for _ in range(rng.randint(1, 4))]
        stop = [text[b : b + rng.randint(1, 9)] + rng.choice(["", "", "x"]) for b in begins]
        include = number % 2 == 0
        expected, has_stopped = naive(tokenizer.decode(ids), stop, include)
        texts, tokens, stopped = stream(tokenizer, ids, stop, include)
        assert ("".join(texts), stopped) == (expected, has_stopped), (text, stop)
        said = [token_id for some in tokens for token_id in some]
        if stopped:
            # Tokens that are at least partly in the answer, and no others.
            assert said == ids[: len(said)]
            assert len(tokenizer.decode(said)) >= len(expected.rstrip("\ufffd"))
            if said:
                assert len(tokenizer.decode(said[:-1]).rstrip("\ufffd")) < len(expected) or not expected
        else:
            assert said == ids
        # Whatever can be shown is shown at once.
        shown = ""
        for place, piece in enumerate(texts[: len(ids)]):
            shown += piece
            whole = tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")
            if not stopped or place + 1 < len(texts):
                waiting = whole[len(shown) :]
                is_byte = ids[place] in tokenizer.run_ids
                assert is_byte or not waiting or any(s.startswith(waiting) for s in stop)


def test_earliest_stop_text():
    hf = own("hf_bbpe")
    for stop, include, text in (
        (["cd", "bcd", "d"], False, "a"), (["bcdef", "cd"], False, "ab"), (["bcdef", "cd"], True, "abcd"),
        (["x", "abcdefgh"], False, "abcdefg"), (["abcdefg"], False, ""), (["g"], True, "abcdefg"),
    ):  # fmt: skip
        texts, _, stopped = stream(hf, hf.encode("abcdefg"), stop, include)
        assert "".join(texts) == text and stopped == ("x" not in stop)


def test_a_special_token_can_stop():
    """As text it can be the stop text, unless it is skipped."""
    hf = own("hf_bbpe")
    end = hf.special_ids["<|im_end|>"]
    ids = [*hf.encode("one"), end, *hf.encode("two")]
    assert "".join(stream(hf, ids, ["<|im_end|>t"])[0]) == "one"
    texts, tokens, stopped = stream(hf, ids, ["<|im_end|>t"], skip=True)
    assert "".join(texts) == "onetwo" and not stopped and sum(tokens, []) == ids
    texts, _, stopped = stream(hf, ids, ["net"], skip=True)
    assert "".join(texts) == "o" and stopped


def test_each_token_comes_with_its_text():
    """Also the parts of one character, and what a stop text held back."""
    hf = own("hf_bbpe")
    ids = hf.encode("a漢b")
    assert len(ids) > 3
    texts, tokens, _ = stream(hf, ids)
    assert [text for text in texts if text] == ["a", "漢", "b"]
    assert [some for some in tokens if some] == [ids[:1], ids[1:-1], ids[-1:]]
    texts, tokens, _ = stream(hf, ids, ["a漢x", "漢bc"])
    assert [text for text in texts if text] == ["a", "漢b"] or [text for text in texts if text] == ["a漢b"]
    assert sum(tokens, []) == ids


def test_parts_of_a_run_end_where_their_characters_end(tmp_path: Path):
    tokenizer = load_tokenizer(made.llama2(tmp_path / "llama2").folder)
    ids = tokenizer.encode("a漢字漢e")
    assert isinstance(tokenizer, HFBBPETokenizer) and sum(i in tokenizer.run_ids for i in ids) == 9
    texts, tokens, stopped = stream(tokenizer, ids, ["字"])
    assert ("".join(texts), stopped) == ("a漢", True)
    assert tokenizer.decode(sum(tokens, [])) == "a漢"
