"""Encoding word by word gives the library's ids for the whole text."""

import json
import random
import sys
import unicodedata

import pytest
import regex
from tokenizers import Regex, normalizers

import tokenizer.word_cache
from tests.unit.test_tokenizer import english, random_text, training_texts
from tokenizer import HFBBPETokenizer
from tokenizer.hf_bbpe import train_hf_bbpe

CHARACTERS = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


FRAMES = {(3, 0): "1{}\n", (1, 0): "a{}b", (2, 3): " {} "}
"""Limits of digits and Chinese characters -> text in which this tokenizer sees every character."""


@pytest.fixture(scope="module", params=[
    (2, 3), *(pytest.param(limits, marks=pytest.mark.soak) for limits in FRAMES if limits != (2, 3)),
], ids=str)  # fmt: skip
def both(request: pytest.FixtureRequest) -> HFBBPETokenizer:
    """A tokenizer that uses the cache with one thread and not with many."""
    return train_hf_bbpe(
        training_texts(), 700, show_progress=False, max_digits=request.param[0], max_han=request.param[1]
    )


def assert_same(both: HFBBPETokenizer, texts: list[str]) -> None:
    for text, cached, library in zip(texts, both.encode_batch(texts, 1), both.encode_batch(texts, 64), strict=True):
        assert cached == library, repr(text)


def test_it_is_in_use(both: HFBBPETokenizer):
    assert both._word_cache is not None
    before = len(both._word_cache._known)
    both.encode_batch(["a word that nobody knows: xyzzyxyzzy"], 1)
    assert len(both._word_cache._known) > before


@pytest.mark.parametrize("expression", [r"\p{L}", r"\p{M}", r"\p{N}", r"\p{Han}", r"\s"])
def test_both_engines_know_the_same_characters(expression: str):
    """All characters of Python's Unicode; the cache leaves others to the library."""
    known = [character for character in CHARACTERS if unicodedata.category(character) != "Cn"]
    remove = normalizers.Replace(Regex(expression), "")
    matches = regex.compile(expression, regex.V1).fullmatch
    for start in range(0, len(known), 8192):
        block = known[start : start + 8192]
        assert remove.normalize_str("".join(block)) == "".join(c for c in block if not matches(c))


def test_it_knows_every_character_of_unicode(both: HFBBPETokenizer):
    known = {character for character in CHARACTERS if both._word_cache.knows(character)}
    assert known == {character for character in CHARACTERS if unicodedata.category(character) != "Cn"}


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("frame", FRAMES.values())
def test_every_character(both: HFBBPETokenizer, frame: str, all_of_them: bool):
    """By the hundred, because a text with an unknown character goes to the library whole."""
    # Letters without case and private characters are nineteen of twenty, and are cut alike everywhere.
    others = ("Cn",) if all_of_them else ("Cn", "Lo", "Co")
    known = [character for character in CHARACTERS if unicodedata.category(character) not in others]
    framed = [frame.replace("{}", character) for character in known]
    assert_same(both, ["".join(framed[start : start + 100]) for start in range(0, len(framed), 100)])


@pytest.mark.parametrize("seed", range(5))
def test_random_texts(both: HFBBPETokenizer, seed: int):
    rng = random.Random(seed)
    pieces = ["the", "123", "4", "²", "_", "==", "'s", "é", "e\u0301", "列表", "的", "ー", "🧪", "\U000323b0", "\u0558"]
    pieces += [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\x1c", "\x85", "\u200b"]
    texts = ["".join(rng.choice(pieces) for _ in range(rng.randint(0, 30))) for _ in range(2000)]
    texts += [random_text(rng, 60) for _ in range(300)] + [english(rng, 50)]
    assert_same(both, texts)


def test_long_words_are_not_kept(both: HFBBPETokenizer):
    assert_same(both, ["x" * 1000 + " y", "列" * 1000, " " * 500 + "\n" * 500])
    assert max(map(len, both._word_cache._known)) <= tokenizer.word_cache._LONGEST_WORD


def test_memory_is_bounded(both: HFBBPETokenizer, monkeypatch: pytest.MonkeyPatch):
    """Forgetting words in between changes nothing."""
    monkeypatch.setattr(tokenizer.word_cache, "_MOST_WORDS", 50)
    rng = random.Random(9)
    for _ in range(20):
        assert_same(both, [random_text(rng, 200) for _ in range(3)])
        both.encode_batch(["again"], 1)
        assert len(both._word_cache._known) < 1000


def test_others_patterns_go_without():
    """For another pattern, it is unknown whether both engines read it alike and whether it cuts its own matches."""
    ours = train_hf_bbpe(training_texts(), 700, show_progress=False)
    definition = {**ours._definition}
    split, spelling = definition["pre_tokenizer"]["pretokenizers"]
    other = {**split, "pattern": {"Regex": split["pattern"]["Regex"] + r"|\w"}}
    for steps in (
        [other, spelling],
        [split, {**spelling, "add_prefix_space": True}],
        [{**split, "invert": True}, spelling],
    ):
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

        assert HFBBPETokenizer(json.dumps(definition))._word_cache is None
