"""Tokenizers of every kind: any text survives, no text forges a special token, Hugging Face reads the folder the same
way; and Hugging Face folders from elsewhere."""

import errno
import functools
import json
import os
import random
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

import train_my_ddp
from data_preprocess import import_tokens, pretokenize_pretrain_data, pretokenize_sft_data
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import Corpus
from dataset import show_mask
from dataset.format import map_tokens, read_bin_header
from serving.text import stream_text
from tokenizer import HFBBPETokenizer, SPBBPETokenizer, Tokenizer, load_tokenizer
from tokenizer.base import END_OF_DOCUMENT, SPECIAL_TOKENS
from tokenizer.hf_bbpe import train_hf_bbpe
from tokenizer.sp_bbpe import train_sp_bbpe

KINDS = ("hf_bbpe", "sp_bbpe")
VOCAB_SIZE = 640
SP_VOCAB_SIZE = 421

# Ranges of code points for random texts; surrogates are not characters.
RANGES = {
    "control": (0x00, 0x1F),
    "ascii": (0x20, 0x7E),
    "latin and C1": (0x7F, 0x24F),
    "combining": (0x300, 0x36F),
    "hebrew and arabic": (0x590, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "spaces and joiners": (0x2000, 0x206F),
    "blocks": (0x2580, 0x259F),
    "cjk": (0x3000, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private use": (0xE000, 0xF8FF),
    "variation selectors, BOM, specials": (0xFE00, 0xFFFF),
    "astral": (0x10000, 0x1FAFF),
    "tags and beyond": (0xE0000, 0x10FFFF),
}


def random_text(rng: random.Random, length: int) -> str:
    """Runs of characters of one kind, as in real texts, mixed with blanks and line ends."""
    text = ""
    while len(text) < length:
        low, high = rng.choice(list(RANGES.values()))
        text += "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
        text += rng.choice(["", "", " ", "  ", "\n", "\r\n", "\t", " \n\n  "])
    return text


def english(rng: random.Random, words: int) -> str:
    vocabulary = "the tokens of a text are merged in the order that training found: def return self 1234 café".split()
    return " ".join(rng.choice(vocabulary) for _ in range(words))


def control_strings() -> list[str]:
    """Their merge must not be learnt as one token."""
    rng = random.Random(1)
    return [joint.join(rng.choice(SPECIAL_TOKENS) for _ in range(20)) for joint in ("", " ") for _ in range(40)]


def training_texts() -> list[str]:
    """Words, a little of everything else, and many control strings."""
    rng = random.Random(0)
    texts = [english(rng, 80) for _ in range(40)]
    texts += [random_text(rng, 120) for _ in range(40)]
    return texts + control_strings()


def sp_training_texts() -> list[str]:
    """Without the rare characters, each of which SentencePiece would make an entry."""
    rng = random.Random(0)
    texts = [english(rng, 80) for _ in range(40)] + ["中文训练数据 天地玄黄\n" * 10, "    <unk> <0x41>\n" * 20]
    return texts + control_strings()


@functools.cache
def trained(kind: str) -> Tokenizer:
    if kind == "hf_bbpe":
        return train_hf_bbpe(training_texts(), VOCAB_SIZE, show_progress=False)
    return train_sp_bbpe(sp_training_texts(), SP_VOCAB_SIZE, show_progress=False)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hf() -> HFBBPETokenizer:
    return trained("hf_bbpe")


@pytest.fixture(scope="module")
def hf_folder(hf: HFBBPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "hf"
    hf.save_pretrained(path)
    return path


def auto_tokenizer(folder: Path):
    # Imported here, because it takes seconds and most tests do without.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that no text may get: special tokens, and SentencePiece's unknown token, which would lose text."""
    return {i for i, length in enumerate(tokenizer.token_byte_lengths()) if length == 0}


def read_alike(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Texts for which other programs must give the same ids."""
    controls = list(tokenizer.special_ids)
    if isinstance(tokenizer, SPBBPETokenizer):
        controls += ["<unk>", "▁"]
    return [text for text in texts if not any(control in text for control in controls)]


# ---- text


def test_vocabulary(hf: HFBBPETokenizer):
    assert hf.vocab_size == VOCAB_SIZE
    # The last ids, so that a growing vocabulary does not move the others.
    assert hf.special_ids == {text: VOCAB_SIZE - len(SPECIAL_TOKENS) + i for i, text in enumerate(SPECIAL_TOKENS)}
    assert hf.eod_id == hf.special_ids[END_OF_DOCUMENT]


def test_special_tokens_of_every_kind(tokenizer: Tokenizer):
    assert set(tokenizer.special_ids) == set(SPECIAL_TOKENS)
    assert tokenizer.eod_id == tokenizer.special_ids[END_OF_DOCUMENT]
    assert tokenizer.pad_id == tokenizer.special_ids["<|pad|>"] != tokenizer.eod_id
    assert tokenizer.vocab_size == (SP_VOCAB_SIZE if isinstance(tokenizer, SPBBPETokenizer) else VOCAB_SIZE)


def test_training_compresses(tokenizer: Tokenizer):
    text = english(random.Random(7), 200)
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_training_again_gives_the_same(hf: HFBBPETokenizer):
    again = train_hf_bbpe(iter(training_texts()), VOCAB_SIZE, show_progress=False)
    assert again.fingerprint == hf.fingerprint
    other = train_hf_bbpe(training_texts()[::2], VOCAB_SIZE - 64, show_progress=False)
    assert other.fingerprint != hf.fingerprint


@pytest.mark.parametrize("seed", range(10))
def test_round_trip_of_random_unicode(tokenizer: Tokenizer, seed: int):
    rng = random.Random(seed)
    texts = [random_text(rng, rng.randint(0, 60)) for _ in range(200)]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert [tokenizer.encode(text) for text in texts] == batch
    possible = set(range(tokenizer.vocab_size)) - control_ids(tokenizer)
    assert {token_id for ids in batch for token_id in ids} <= possible


@pytest.mark.parametrize("kind", RANGES)
def test_round_trip_of_every_kind(tokenizer: Tokenizer, kind: str):
    low, high = RANGES[kind]
    text = "".join(map(chr, range(low, min(high, low + 5000) + 1)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.soak), 8])
def test_round_trip_and_lengths_of_every_character(tokenizer: Tokenizer, share: int):
    """Characters of all planes: those of the first one in order, the others, or a share of them, mixed."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    later = characters[0xF800:]
    random.Random(0).shuffle(later)
    characters[0xF800:] = later[: len(later) // share]
    texts = ["".join(characters[start : start + 4096]) for start in range(0, len(characters), 4096)]
    lengths, forbidden = tokenizer.token_byte_lengths(), control_ids(tokenizer)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert sum(lengths[token_id] for token_id in ids) == len(text.encode("utf-8"))
        assert forbidden.isdisjoint(ids)


AWKWARD = [
    "", " ", "\n", "\0", "a\0b", "\0\0 \0", "\r\n \r\n", " " * 1000, "\ufeffBOM", "\ufeff", "e\u0301 is no \u00e9",
    "\u1e9b\u0323", "👩‍👩‍👧‍👦🏽", "０１２ ①②③ 1234567", "ﬁ ﬀ", "don't I'LL", "\u202eabc", "\ufffd", "\ufffd\ufffd",
    "Ġ Ċ", "x" * 5000, "\u0301\u0301", "  leading", "trailing  ", " \u00a0 \u3000 ", "\x1b[0m\x7f\x80\x9f",
    "\u2028\u2029\x85",
    "▁", "▁▁▁", " ▁ ▁", "a▁b", "▁ \0 ▁", "▁the▁text▁", "\n▁\n", "▅", "⁇", "<unk>", "▁<unk>▁", " ⁇ ", "<s>", "</s>",
    "<pad>", "<0x41>", "<0x00>", "<0xE2><0x96><0x81>", "▁<0x0A>", "<0x4", *SPECIAL_TOKENS, "".join(SPECIAL_TOKENS),
    "".join(f"{token}{token[:5]}" for token in SPECIAL_TOKENS), "\U0010ffff\U00010000\uffff\ue000\ud7ff",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_texts(tokenizer: Tokenizer, text: str):
    """Nothing is normalised, stripped or merged: decoding gives the text back."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert control_ids(tokenizer).isdisjoint(ids)
    lengths = tokenizer.token_byte_lengths()
    assert sum(lengths[token_id] for token_id in ids) == len(text.encode("utf-8"))


@pytest.mark.parametrize("num_threads", [0, 1, 2, 3, 16])
def test_threads_do_not_change_the_ids(tokenizer: Tokenizer, num_threads: int):
    rng = random.Random(num_threads)
    texts = [random_text(rng, rng.randint(0, 60)) for _ in range(300)] + AWKWARD
    rng.shuffle(texts)
    assert tokenizer.encode_batch(texts, num_threads) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(tuple(texts[:5]), num_threads) == tokenizer.encode_batch(texts)[:5]
    assert tokenizer.encode_batch([], num_threads) == []


def test_bytes_that_are_not_text_yet(tokenizer: Tokenizer):
    """Half a character while it streams in, and its remainder when its start was cut off."""
    ids = tokenizer.encode("\U0001f9ea")
    assert len(ids) > 1
    for cut in range(1, len(ids)):
        assert set(tokenizer.decode(ids[:cut])) == {"\ufffd"}
        assert set(tokenizer.decode(ids[cut:])) == {"\ufffd"}
        # A special token cannot complete it.
        text = tokenizer.decode([*ids[:cut], tokenizer.eod_id, *ids[cut:]])
        assert text.count(END_OF_DOCUMENT) == 1 and set(text.replace(END_OF_DOCUMENT, "")) == {"\ufffd"}
    assert tokenizer.decode(ids) == "\U0001f9ea"


@pytest.mark.parametrize("seed", range(3))
def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer, seed: int):
    rng = random.Random(seed)
    for text in [*(random_text(rng, rng.randint(0, 40)) for _ in range(60)), *AWKWARD]:
        if len(text) > 200:
            continue
        ids = tokenizer.encode(text)
        pieces = list(stream_text(tokenizer, iter(ids)))
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        with_special = [*ids, tokenizer.special_ids["<|im_end|>"], *ids]
        assert "".join(stream_text(tokenizer, iter(with_special))) == f"{text}<|im_end|>{text}"


def test_token_byte_lengths(tokenizer: Tokenizer):
    lengths = tokenizer.token_byte_lengths()
    assert len(lengths) == tokenizer.vocab_size
    assert [lengths[token_id] for token_id in tokenizer.special_ids.values()] == [0] * len(SPECIAL_TOKENS)
    assert min(length for i, length in enumerate(lengths) if i not in control_ids(tokenizer)) == 1
    assert len(control_ids(tokenizer) - set(tokenizer.special_ids.values())) == isinstance(tokenizer, SPBBPETokenizer)
    rng = random.Random(3)
    for text in [*(random_text(rng, 50) for _ in range(300)), *SPECIAL_TOKENS, english(rng, 100)]:
        assert sum(lengths[token_id] for token_id in tokenizer.encode(text)) == len(text.encode("utf-8"))


# ---- special tokens


FRAGMENTS = ["<|", "|>", "<", "|", ">", "im", "_", "start", "end", "of", "text", "pad", "im_start", "endoftext"]
FRAGMENTS += [
    "\u200b",
    "\u200d",
    "\ufeff",
    "\0",
    "\u0301",
    "＜｜",
    "｜＞",
    " ",
    "\n",
    "\r\n",
    "\t",
    "<s>",
    "Ġ",
    "▁",
    "⁇",
]
FRAGMENTS += ["<unk>", "<0x3C>", "<0x3C><0x7C>", "<0x00>", "</s>", "▅", "\U0001f9ea", "\u2581\u2581", "    "]


def forgeries(rng: random.Random, count: int, controls: Sequence[str] = SPECIAL_TOKENS) -> list[str]:
    """Control strings whole, cut, nested and doubled, with look-alikes, invisible characters and blanks in between."""
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            control = rng.choice(controls)
            cut = rng.randint(0, len(control))
            way = rng.randrange(9)
            parts.append(
                control if way == 0
                else control[:cut] if way == 1
                else control[cut:] if way == 2
                else control[:cut] + rng.choice(controls) + control[cut:] if way == 3
                else control[:cut] + rng.choice(FRAGMENTS) + control[cut:] if way == 4
                else control.upper() if way == 5
                else unicodedata.normalize("NFKC", "＜｜im_end｜＞") if way == 6
                else rng.choice(FRAGMENTS) if way == 7
                else random_text(rng, 3)
            )  # fmt: skip
        texts.append("".join(parts))
    return texts


@functools.cache
def many_forgeries() -> list[str]:
    return forgeries(random.Random(2024), 100_000)


def test_no_text_forges_a_special_token(tokenizer: Tokenizer):
    texts = many_forgeries()
    forbidden = control_ids(tokenizer)
    spelled_out = sum(any(control in text for control in SPECIAL_TOKENS) for text in texts)
    assert spelled_out > 30_000
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert forbidden.isdisjoint(ids), text
    for text in texts[:5000]:
        ids = tokenizer.encode(text)
        assert forbidden.isdisjoint(ids), text
        assert tokenizer.decode(ids) == text


def test_no_document_forges_a_special_token(tokenizer: Tokenizer, folder: Path, tmp_path: Path):
    """Through the data path: the only special token in the files is the one that ends each document."""
    texts = [text for text in many_forgeries()[:3000] if text]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text(lines, "utf-8", newline="\n")
    single = "".join(SPECIAL_TOKENS) * 50 + "end"
    (tmp_path / "corpus" / "b.txt").write_text(single, "utf-8")
    output = tmp_path / "tokens"
    manifest = process_corpus(PretrainJob(Corpus(str(tmp_path / "corpus")), str(output), str(folder), valid_ratio=0.0))
    assert manifest["documents"] == len(texts) + 1 and manifest["bad_records"] == 0
    documents: list[list[int]] = [[]]
    for name in manifest["shards"]["train"]:
        header = read_bin_header(output / name)
        assert (header.eod_id, header.vocab_size) == (tokenizer.eod_id, tokenizer.vocab_size)
        for token_id in map_tokens(output / name, header).tolist():
            if token_id == tokenizer.eod_id:
                documents.append([])
            else:
                documents[-1].append(token_id)
    assert documents.pop() == []
    assert control_ids(tokenizer).isdisjoint(token_id for ids in documents for token_id in ids)
    assert [tokenizer.decode(ids) for ids in documents] == [*texts, single]
    assert load_tokenizer(output / "tokenizer").fingerprint == tokenizer.fingerprint


def test_no_text_forges_a_special_token_of_a_loaded_tokenizer(tokenizer: Tokenizer, folder: Path):
    loaded = load_tokenizer(folder)
    for text in [*SPECIAL_TOKENS, "".join(SPECIAL_TOKENS), *forgeries(random.Random(99), 300)]:
        assert control_ids(tokenizer).isdisjoint(loaded.encode(text))
        assert loaded.encode(text) == tokenizer.encode(text)


def test_decode_of_special_tokens(tokenizer: Tokenizer):
    start, end = (tokenizer.special_ids[text] for text in ("<|im_start|>", "<|im_end|>"))
    ids = [start, *tokenizer.encode("héllo"), end, tokenizer.eod_id]
    assert tokenizer.decode(ids) == "<|im_start|>héllo<|im_end|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "héllo"
    assert tokenizer.decode([]) == ""
    # Blanks beside a special token are ordinary text, and text that spells a special token out is not skipped.
    rng = random.Random(5)
    for text in [" ", "  a ", "\n", "<|im_end|>", *(random_text(rng, 20) for _ in range(100))]:
        ids = [start, *tokenizer.encode(text), end, *tokenizer.encode(text)]
        assert tokenizer.decode(ids) == f"<|im_start|>{text}<|im_end|>{text}"
        assert tokenizer.decode(iter(ids), skip_special_tokens=True) == text + text


# ---- the folder


def test_hugging_face_gives_the_same_ids(tokenizer: Tokenizer, folder: Path):
    theirs = auto_tokenizer(folder)
    rng = random.Random(11)
    texts = [random_text(rng, rng.randint(0, 80)) for _ in range(500)] + [english(rng, 50) for _ in range(20)]
    texts = read_alike(texts + forgeries(rng, 1000) + AWKWARD, tokenizer)
    assert len(texts) > 600
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eod_id, tokenizer.special_ids["<|pad|>"])
    for text, token_id in tokenizer.special_ids.items():
        assert theirs.convert_tokens_to_ids(text) == token_id
        assert token_id in theirs.all_special_ids
        # Hugging Face's convention, from which ours deviates on purpose.
        assert theirs(text)["input_ids"] == [token_id]


def test_the_raw_libraries_give_the_same_ids(tokenizer: Tokenizer, folder: Path):
    rng = random.Random(12)
    texts = [random_text(rng, rng.randint(0, 80)) for _ in range(500)] + [english(rng, 50) for _ in range(20)]
    texts += forgeries(rng, 500) + AWKWARD
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    alike = read_alike(texts, tokenizer)
    assert len(alike) > 500
    for text in alike:
        ids = tokenizer.encode(text)
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode(ids) == text
    if isinstance(tokenizer, SPBBPETokenizer):
        processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for text in texts:
            if "▁" not in text:
                assert processor.encode(text) == tokenizer.encode(text)
                assert processor.decode(tokenizer.encode(text)) == text


def test_the_folder_needs_no_code_of_ours(tokenizer: Tokenizer, folder: Path):
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    names += ["tokenizer.model"] * isinstance(tokenizer, SPBBPETokenizer)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert type(auto_tokenizer(folder)).__module__.startswith("transformers.")


def test_save_and_load(tokenizer: Tokenizer, folder: Path, tmp_path: Path):
    loaded = load_tokenizer(str(folder))
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special_ids == tokenizer.special_ids and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.token_byte_lengths() == tokenizer.token_byte_lengths() and loaded.eod_id == tokenizer.eod_id
    texts = [random_text(random.Random(seed), 60) for seed in range(200)] + AWKWARD
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    loaded.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in files)


def change_definition(folder: Path, target: Path, change: Callable[[dict], object]) -> Path:
    """A copy of a folder with a changed `tokenizer.json`."""
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    definition = json.loads(path.read_text("utf-8"))
    change(definition)
    path.write_text(json.dumps(definition), "utf-8")
    return target


@pytest.mark.parametrize("change", ["merge", "special id", "normalizer"])
def test_fingerprint_changes_with_the_ids_that_a_text_gets(
    hf: HFBBPETokenizer, hf_folder: Path, tmp_path: Path, change: str
):
    """Token files carry the fingerprint: equal fingerprints promise equal ids."""

    def edit(definition: dict) -> None:
        if change == "merge":
            definition["model"]["merges"].pop()
        elif change == "special id":
            first, second = definition["added_tokens"][:2]
            first["content"], second["content"] = second["content"], first["content"]
        else:
            definition["normalizer"] = {"type": "NFC"}

    changed = change_definition(hf_folder, tmp_path / "changed", edit)
    assert load_tokenizer(changed).fingerprint != hf.fingerprint


def test_missing_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist: train a tokenizer with .*-m tokenizer.train_tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer.json.*python -m tokenizer.train_tokenizer"):
        load_tokenizer(tmp_path)


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
    assert "train" in refusal(tmp_path)


def refusal(folder: Path) -> str:
    """The one sentence that refuses a folder."""
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


DAMAGES: dict[str, Callable[[dict], object]] = {
    "cut merges": lambda d: d["model"].update(merges=None),
    "merges of another kind": lambda d: d["model"].update(merges=[1, 2]),
    "a merge of something that is not an entry": lambda d: d["model"]["merges"].append(["no such", "entry"]),
    "an entry lost": lambda d: d["model"]["vocab"].pop("".join(d["model"]["merges"][0])),
    "no vocabulary": lambda d: d["model"].pop("vocab"),
    "a list for a vocabulary": lambda d: d["model"].update(vocab=[]),
    "null for a vocabulary": lambda d: d["model"].update(vocab=None),
    "unknown pre-tokenizer": lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(type="Unheard"),
    "unknown decoder": lambda d: d.update(decoder={"type": "Unheard"}),
    "unknown normalizer": lambda d: d.update(normalizer="lower"),
    "text for an id": lambda d: d["added_tokens"][0].update(id="first"),
    "null for an id": lambda d: d["added_tokens"][1].update(id=None),
    "a list for a token": lambda d: d["added_tokens"][0].update(content=[]),
    "null for a token": lambda d: d["added_tokens"].append(None),
    "unknown version": lambda d: d.update(version="99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_definition(hf_folder: Path, tmp_path: Path, damage: str):
    """The libraries and a careless look-up raise other kinds of exceptions, which the commands would not catch."""
    changed = change_definition(hf_folder, tmp_path / "changed", DAMAGES[damage])
    assert "train" in refusal(changed)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"1", b'"text"', b"\xff\xfe"])
def test_damaged_configuration(folder: Path, tmp_path: Path, content: bytes):
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer_config.json").write_bytes(content)
    assert "train" in refusal(tmp_path / "changed")


def set_id(position: int, value: object) -> Callable[[dict], object]:
    return lambda definition: definition["added_tokens"][position].update(id=value)


def set_entry(value: object) -> Callable[[dict], object]:
    """Give the token of the first merge this id."""
    return lambda d: d["model"]["vocab"].update({"".join(d["model"]["merges"][0]): value})


def add_token(**changes: object) -> Callable[[dict], object]:
    return lambda d: d["added_tokens"].append({**d["added_tokens"][0], **changes})


def nested(depth: int) -> dict:
    value = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for _ in range(depth):
        value = {"type": "Sequence", "pretokenizers": [value]}
    return value


HOSTILE: dict[str, Callable[[dict], object]] = {
    **{f"id {value!r}": set_id(0, value) for value in (-1, 5, 3.0, "5", True, [1], 10**7, 2**31, 2**32 - 1, 10**30)},
    **{f"entry {value!r}": set_entry(value) for value in (-1, 5, 300.5, "5", None, 10**8, 2**32 - 1, 2**40)},
    "a token twice": add_token(id=VOCAB_SIZE),
    "an id twice": add_token(content="<|other|>"),
    "the id of an entry": add_token(content="<|other|>", id=3),
    "an id far beyond": add_token(content="<|other|>", id=5_000_000),
    "half a surrogate pair": add_token(content="\ud800", id=VOCAB_SIZE),
    "ids in another order": lambda d: d["added_tokens"].reverse(),
    "one id for all": lambda d: d["model"].update(vocab=dict.fromkeys(d["model"]["vocab"], 0)),
    "the name of a special token": lambda d: d["model"]["vocab"].update({f"special {VOCAB_SIZE - 1}": 3}),
    "a prefix": lambda d: d["model"].update(continuing_subword_prefix="##"),
    "no decoder": lambda d: d.update(decoder=None),
    "a decoder of another kind": lambda d: d.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "capitals lost": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "a broken pattern": lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "((("}),
    "no pattern": lambda d: d["pre_tokenizer"]["pretokenizers"][0].pop("pattern"),
    "null for a step": lambda d: d["pre_tokenizer"].update(pretokenizers=[None]),
    "deeply nested": lambda d: d.update(pre_tokenizer=nested(400)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_definition(hf_folder: Path, tmp_path: Path, name: str):
    """The result is neither another exception, nor a tokenizer that loses text or gives ids that fit nowhere."""
    assert "train" in refusal(change_definition(hf_folder, tmp_path / "changed", HOSTILE[name]))


HOSTILE_FILES = {
    "tokenizer.json": [b"[" * 10**5 + b"]" * 10**5, b'{"a": ' + b"9" * 5000 + b"}", "{}".encode("utf-16"), None],
    "tokenizer_config.json": [b'{"a":' * 10**5 + b"1" + b"}" * 10**5, b'{"a": "\\ud800"}', b'{"a": "\xff"}', None],
    "chat_template.jinja": [b"\xff", None],
    "tokenizer.model": [b"", b"garbage" * 100, None],
}
"""Content of files; None for a folder of this name."""


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, many in HOSTILE_FILES.items() for one in many])
def test_hostile_file(tmp_path: Path, file: str, content: bytes | None):
    trained("sp_bbpe" if file == "tokenizer.model" else "hf_bbpe").save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content)
    assert "train" in refusal(tmp_path)


def test_file_beyond_measure(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tokenizer.loading._LARGEST_FILE", 1000)
    assert "larger than" in refusal(hf_folder)


@pytest.mark.parametrize("method", ["stat", "read_bytes"])
def test_failing_disk_is_not_a_broken_tokenizer(hf_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    """A run that is tried again may find the disk mended; a refused one is not tried again."""
    real = getattr(Path, method)

    def fail(path: Path, **how) -> object:
        if path.name == "tokenizer_config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **how)

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_tokenizer(hf_folder)


def test_panic_at_a_text_is_an_error(hf_folder: Path, tmp_path: Path):
    """The library raises an error that nobody catches; here the message names the record, and the command ends with
    2."""

    def edit(definition: dict) -> None:
        definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"

    tokenizer = load_tokenizer(change_definition(hf_folder, tmp_path / "changed", edit))
    with pytest.raises(ValueError, match="panics: .*retry-limit"):
        tokenizer.encode("a" * 40 + "!")


@pytest.mark.parametrize("command", ["pretokenize", "pretokenize_sft_data", "show_mask", "import_tokens", "train"])
def test_hostile_tokenizer_ends_each_command(
    hf_folder: Path, tmp_path: Path, command: str, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
):
    folder = str(change_definition(hf_folder, tmp_path / "bad", HOSTILE["an id twice"]))
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "x"}')
    flags = ["--tokenizer_dir", folder, "--output_dir", str(tmp_path / "out")]
    code = {
        "pretokenize": lambda: pretokenize_pretrain_data.main(["--data_dir", str(data), *flags]),
        "pretokenize_sft_data": lambda: pretokenize_sft_data.main(["--data_dir", str(data), *flags]),
        "show_mask": lambda: show_mask.main([str(data / "a.jsonl"), *flags[:2]]),
        "import_tokens": lambda: import_tokens.main(["--format", "nanogpt", "--input", str(data / "a.jsonl"), *flags]),
        "train": lambda: train_my_ddp.main([*tiny_run, f"--tokenizer_dir={folder}"]),
    }[command]()
    printed = capsys.readouterr()
    assert code == 2 and "cannot be used" in printed.out + printed.err


@pytest.mark.parametrize("vocab_size", [0, 64, 259])
def test_vocabulary_too_small(vocab_size: int):
    with pytest.raises(ValueError, match="--vocab_size must be at least 261"):
        train_hf_bbpe(["some text"], vocab_size, show_progress=False)
    assert train_hf_bbpe(["some text"], 261, show_progress=False).vocab_size == 261


@pytest.mark.parametrize("texts", [[], [""], ["some text"]])
def test_too_little_text(texts: list[str]):
    with pytest.raises(ValueError, match="use more text or a smaller --vocab_size"):
        train_hf_bbpe(texts, 512, show_progress=False)


# ---- folders from elsewhere


@dataclass(frozen=True)
class Foreign:
    """A folder like those of published models, and the facts known about it."""

    folder: Path
    eod: str
    specials: tuple[str, ...]
    ordinary: tuple[str, ...] = ()
    """Added tokens that are text."""
    prepended: int = 0
    """Blanks put in front of every text."""
    lost: str = ""
    """Pattern of texts that it does not reproduce, nor does AutoTokenizer; "" for none."""


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    size: int = 500, first: Sequence[str] = (), split: Sequence | None = None, missing: str = "", **options: bool
) -> LibraryTokenizer:
    """Make a byte-level tokenizer.

    Args:
        first: special tokens that take the first ids, as entries of the vocabulary.
        split: steps that split a text into words.
        missing: characters that spell bytes and have no entry.
    """
    tokenizer = LibraryTokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in missing]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def with_definition(tokenizer: LibraryTokenizer, change: Callable[[dict], object]) -> LibraryTokenizer:
    definition = json.loads(tokenizer.to_str())
    change(definition)
    return LibraryTokenizer.from_str(json.dumps(definition))


def add_tokens(tokenizer: LibraryTokenizer, tokens: Sequence[str], ordinary: Sequence[str] = ()) -> None:
    """Add tokens in this order, which determines their ids; those in `ordinary` as text."""
    for token in tokens:
        if token in ordinary:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
        else:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def save_foreign(tokenizer: LibraryTokenizer, folder: Path, **tokens: object) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


def gpt2(folder: Path) -> Foreign:
    """The end of a document has an entry in the model's vocabulary, here in its middle."""

    def insert(definition: dict) -> None:
        vocab = definition["model"]["vocab"]
        for token, token_id in vocab.items():
            vocab[token] = token_id + (token_id >= 300)
        vocab[END_OF_DOCUMENT] = 300

    tokenizer = with_definition(byte_level(), insert)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == 300
    end = END_OF_DOCUMENT
    save_foreign(tokenizer, folder, eos_token=end, bos_token=end, unk_token=end, add_prefix_space=False)
    return Foreign(folder, END_OF_DOCUMENT, (END_OF_DOCUMENT,))


def llama3(folder: Path) -> Foreign:
    """No <|endoftext|>; words with an entry are used whole; a text gets a token in front."""
    tokenizer = with_definition(byte_level(), lambda d: d["model"].update(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>")
    add_tokens(tokenizer, specials)
    begin = specials[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A", pair=f"{begin} $A {begin} $B",
                special_tokens=[(begin, tokenizer.token_to_id(begin))],
            ),
        ]
    )  # fmt: skip
    save_foreign(tokenizer, folder, bos_token=begin, eos_token="<|end_of_text|>")
    return Foreign(folder, "<|end_of_text|>", specials)


def qwen2(folder: Path, order: Sequence[str] = ()) -> Foreign:
    """Normalises to NFC; control tokens come before added tokens that are text; a chat ends with another token."""
    specials, ordinary = (END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>"), ("    ", "<tool_call>", "</think>")
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.normalizer = normalizers.NFC()
    add_tokens(tokenizer, order or [*specials, *ordinary], ordinary)
    save_foreign(tokenizer, folder, eos_token="<|im_end|>", pad_token=END_OF_DOCUMENT)
    return Foreign(folder, END_OF_DOCUMENT, specials, ordinary)


def qwen2_mixed(folder: Path) -> Foreign:
    """Added tokens that are text before, between and after the control tokens."""
    return qwen2(folder, ["<tool_call>", END_OF_DOCUMENT, "    ", "<|im_start|>", "<|im_end|>", "</think>"])


_BARE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
"""Spells bytes, and splits nothing."""
# UTF-8 does not use the bytes with these spellings.
DEEPSEEK_ADDED = "ÀÁõö÷øùúûüýþÿ"


def deepseek(folder: Path) -> Foreign:
    """Has no entries for bytes that UTF-8 does not use: the characters that would spell them are tokens of text."""
    patterns = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+")
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    split += [pre_tokenizers.Digits(True), _BARE]
    tokenizer = byte_level(split=split, missing=DEEPSEEK_ADDED)
    tokenizer.normalizer = normalizers.Sequence([])
    specials = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    ordinary = (*DEEPSEEK_ADDED, "<｜User｜>")
    for token in (*specials, *ordinary):
        tokenizer.add_tokens([AddedToken(token, normalized=True, special=token in specials)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    save_foreign(tokenizer, folder, bos_token=specials[0], eos_token=specials[1], pad_token=specials[2])
    return Foreign(folder, specials[1], specials, ordinary)


def smollm2(folder: Path) -> Foreign:
    """Special tokens are the first entries; every digit is split off."""
    specials = (END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>", "<repo_name>")
    digits = pre_tokenizers.Digits(True)
    tokenizer = byte_level(first=specials, split=[digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    save_foreign(tokenizer, folder, bos_token=specials[1], eos_token=specials[2], unk_token=specials[0])
    return Foreign(folder, END_OF_DOCUMENT, specials)


def gpt_neox(folder: Path) -> Foreign:
    """Runs of blanks as added tokens, found in the normalised text. OLMo has the same."""
    tokenizer = byte_level(first=(END_OF_DOCUMENT, "<|padding|>"))
    tokenizer.normalizer = normalizers.NFC()
    ordinary = tuple(" " * count for count in range(24, 1, -1))
    tokenizer.add_tokens([AddedToken(blanks, normalized=True) for blanks in ordinary])
    save_foreign(tokenizer, folder, bos_token=END_OF_DOCUMENT, eos_token=END_OF_DOCUMENT, unk_token=END_OF_DOCUMENT)
    return Foreign(folder, END_OF_DOCUMENT, (END_OF_DOCUMENT, "<|padding|>"), ordinary)


def falcon(folder: Path) -> Foreign:
    """Splits further after bytes are spelt."""
    split = [
        pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]  # fmt: skip
    tokenizer = byte_level(first=(">>TITLE<<", END_OF_DOCUMENT), split=split)
    save_foreign(tokenizer, folder, eos_token=END_OF_DOCUMENT)
    return Foreign(folder, END_OF_DOCUMENT, (">>TITLE<<", END_OF_DOCUMENT))


def bytes_as_pieces(specials: Sequence[str], blank_in_front: bool = True) -> LibraryTokenizer:
    """SentencePiece's BPE as transformers converts it: rare characters become bytes."""
    tokenizer = LibraryTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if blank_in_front:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rng = random.Random(0)
    entries = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=entries, show_progress=False)
    tokenizer.train_from_iterator([english(rng, 30) for _ in range(20)], trainer)
    tokenizer = with_definition(
        tokenizer, lambda d: d.update(added_tokens=[t for t in d["added_tokens"] if t["content"] in specials])
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if blank_in_front else [])])
    return tokenizer


def llama2(folder: Path) -> Foreign:
    """A blank in front. To such a folder the sign is a blank."""
    specials = ("<unk>", "<s>", "</s>")
    tokenizer = bytes_as_pieces(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    save_foreign(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Foreign(folder, "</s>", specials, prepended=1, lost="▁")


def phi3(folder: Path) -> Foreign:
    """Special tokens that swallow following blanks, and one of Llama 2's that became text."""

    def edit(definition: dict) -> None:
        definition["added_tokens"][2] |= {"special": False, "rstrip": True}

    tokenizer = with_definition(bytes_as_pieces(("<unk>", "<s>", "</s>")), edit)
    added = (END_OF_DOCUMENT, "<|assistant|>", "<|end|>", "<|user|>")
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False, special=True) for token in added])
    save_foreign(tokenizer, folder, bos_token="<s>", eos_token=END_OF_DOCUMENT, unk_token="<unk>")
    return Foreign(folder, END_OF_DOCUMENT, ("<unk>", "<s>", *added), ("</s>",), prepended=1, lost="▁|</s>")


def yi(folder: Path) -> Foreign:
    """No blank in front."""
    specials = ("<unk>", "<|startoftext|>", END_OF_DOCUMENT, "<|im_start|>")
    tokenizer = bytes_as_pieces(specials, blank_in_front=False)
    save_foreign(tokenizer, folder, bos_token=specials[1], eos_token=END_OF_DOCUMENT, unk_token="<unk>")
    return Foreign(folder, END_OF_DOCUMENT, specials, lost="▁")


def mistral3(folder: Path) -> Foreign:
    """A blank in front unless there is one."""
    specials = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    tokenizer = bytes_as_pieces(specials)
    tokenizer = with_definition(tokenizer, lambda d: d.update(normalizer=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    save_foreign(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Foreign(folder, "</s>", specials, prepended=1, lost=r"▁|\A ")


BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def bloom(folder: Path) -> Foreign:
    """Words, and marks apart; the special tokens are the first entries."""
    specials = ("<unk>", "<s>", "</s>", "<pad>")
    tokenizer = byte_level(first=specials, split=[pre_tokenizers.Split(Regex(BLOOM_SPLIT), "isolated"), _BARE])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    save_foreign(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return Foreign(folder, "</s>", specials)


FAMILIES = [gpt2, llama3, qwen2, qwen2_mixed, llama2, deepseek, smollm2, gpt_neox, falcon, phi3, yi, mistral3, bloom]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return request.param(tmp_path_factory.mktemp("foreign") / request.param.__name__)


def foreign_texts(foreign: Foreign, seed: int) -> list[str]:
    """In NFC, the normal form of some folders."""
    rng = random.Random(seed)
    texts = [random_text(rng, rng.randint(0, 60)) for _ in range(300)] + [english(rng, 40) for _ in range(10)]
    texts += forgeries(rng, 500, foreign.specials + foreign.ordinary)
    texts += [text for text in AWKWARD if len(text) < 200]
    texts += [*foreign.specials, *foreign.ordinary]
    texts += [f"a{token}{token} b {token}\n" for token in (*foreign.specials, *foreign.ordinary)]
    texts += ["    indented\n        twice", "<tool_call>\n{}\n</tool_call>", "<think>\n</think>", "1234567 don't I'LL"]
    return [unicodedata.normalize("NFC", text) for text in texts]


def test_foreign_folder_gives_the_ids_of_hugging_face(foreign: Foreign):
    ours, theirs = load_tokenizer(foreign.folder), auto_tokenizer(foreign.folder)
    texts = [t for t in foreign_texts(foreign, 1) if not any(special in t for special in foreign.specials)]
    assert len(texts) > 400
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ids == ours.encode(text)
    assert ours.vocab_size == len(theirs)
    assert ours.eod_id == theirs.convert_tokens_to_ids(foreign.eod)
    assert ours.special_ids == {token: theirs.convert_tokens_to_ids(token) for token in foreign.specials}


def test_foreign_control_strings_stay_text(foreign: Foreign):
    """Even if the model's vocabulary holds them, and beside added tokens that are text."""
    ours = load_tokenizer(foreign.folder)
    forbidden = set(ours.special_ids.values())
    for text in foreign_texts(foreign, 2):
        ids = ours.encode(text)
        assert forbidden.isdisjoint(ids), text
        assert max(ids, default=0) < ours.vocab_size


def test_foreign_round_trip_and_lengths(foreign: Foreign):
    ours = load_tokenizer(foreign.folder)
    lengths = ours.token_byte_lengths()
    assert len(lengths) == ours.vocab_size
    assert [lengths[token_id] for token_id in ours.special_ids.values()] == [0] * len(ours.special_ids)
    for text in foreign_texts(foreign, 3):
        if foreign.lost and re.search(foreign.lost, text):
            continue
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        # The blank put in front has a byte, too.
        added = foreign.prepended if text else 0
        assert sum(lengths[token_id] for token_id in ids) == len(text.encode("utf-8")) + added
        whole = [*ids, ours.eod_id, *ids]
        assert ours.decode(whole) == text + foreign.eod + text
        assert ours.decode(whole, skip_special_tokens=True) == text + text
        assert "".join(stream_text(ours, iter(ids))) == text


def test_foreign_folder_is_kept(foreign: Foreign, tmp_path: Path):
    """The configuration of chats and lengths is none of our business, and stays; settings that only transformers 5
    knows are also written for version 4."""
    changed = tmp_path / "changed"
    shutil.copytree(foreign.folder, changed)
    config = json.loads((changed / "tokenizer_config.json").read_text("utf-8"))
    config |= {"chat_template": "{% for m in messages %}«{{ m }}»{% endfor %}", "model_max_length": 4096}
    assert config["tokenizer_class"] == "TokenizersBackend"
    config |= {"extra_special_tokens": [foreign.specials[0]]}
    (changed / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    ours = load_tokenizer(changed)
    ours.save_pretrained(tmp_path / "copy")
    del config["extra_special_tokens"]
    version_4 = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": [foreign.specials[0]]}
    version_4 |= {"model_input_names": ["input_ids", "attention_mask"]}
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text("utf-8")) == config | version_4
    definitions = [json.loads((d / "tokenizer.json").read_text("utf-8")) for d in (foreign.folder, tmp_path / "copy")]
    assert definitions[0] == definitions[1]
    again = load_tokenizer(tmp_path / "copy")
    assert again.fingerprint == ours.fingerprint == load_tokenizer(foreign.folder).fingerprint
    assert (again.eod_id, again.vocab_size) == (ours.eod_id, ours.vocab_size)
    theirs = auto_tokenizer(tmp_path / "copy")
    assert len(theirs) == ours.vocab_size and theirs.chat_template == config["chat_template"]


def test_foreign_folder_without_a_configuration(tmp_path: Path):
    """Files beside it must not name tokens that it lacks: AutoTokenizer would add them."""
    tokenizer = byte_level()
    add_tokens(tokenizer, [END_OF_DOCUMENT, "<|other|>"])
    (tmp_path / "bare").mkdir()
    tokenizer.save(str(tmp_path / "bare" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "bare")
    assert (ours.eod_id, ours.pad_id, ours.vocab_size) == (500, 500, 502)
    ours.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == ours.fingerprint
    assert len(auto_tokenizer(tmp_path / "copy")) == ours.vocab_size


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_foreign_settings_for_batches_do_not_change_the_ids(tmp_path: Path, setting: str):
    """A folder saved after fine-tuning often holds the last call's truncation and padding."""
    tokenizer = byte_level()
    add_tokens(tokenizer, [END_OF_DOCUMENT])
    text = "def return self: a text of several tokens"
    expected = tokenizer.encode(text).ids
    if setting == "truncation":
        tokenizer.enable_truncation(max_length=4)
    else:
        tokenizer.enable_padding(pad_id=500, pad_token=END_OF_DOCUMENT, length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.encode(text) == expected
    assert ours.encode_batch([text, "a"]) == [expected, tokenizer.encode("a", add_special_tokens=False).ids[:1]]


def steps_after(name: str, bos: int):
    """A post-processor that may put a token in front of a text."""
    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", bos), ("</s>", bos + 1)]
    )
    spelling = processors.ByteLevel(trim_offsets=False)
    return {
        "byte level": spelling, "template": template, "sequence": processors.Sequence([spelling, template]),
        "roberta": processors.RobertaProcessing(("</s>", bos + 1), ("<s>", bos)),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer_class", "add_bos_token"),
    [("PreTrainedTokenizerFast", True), ("LlamaTokenizer", True), ("LlamaTokenizer", False), ("LlamaTokenizer", None)],
)
@pytest.mark.parametrize("steps", ["none", "byte level", "template", "sequence", "roberta"])
def test_ids_that_begin_a_text(tmp_path: Path, steps: str, tokenizer_class: str, add_bos_token: bool | None):
    """As AutoTokenizer puts them there."""
    tokenizer = byte_level(300)
    add_tokens(tokenizer, ["<s>", "</s>"])
    if steps != "none":
        tokenizer.post_processor = steps_after(steps, tokenizer.token_to_id("<s>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, ids = load_tokenizer(tmp_path), auto_tokenizer(tmp_path)("some text")["input_ids"]
    assert ids[: len(ours.begin_ids)] == ours.begin_ids
    assert ids[len(ours.begin_ids)] not in ours.special_ids.values()


def test_no_ids_begin_a_text_of_ours(tokenizer: Tokenizer, folder: Path):
    assert tokenizer.begin_ids == [] and auto_tokenizer(folder)("text")["input_ids"] == tokenizer.encode("text")


def special_merges(definition: dict) -> None:
    """A converter that knew no special tokens found merges of one."""
    vocab = definition["model"]["vocab"]
    for entry in ("</", "s>", *"</s>"):
        vocab.setdefault(entry, max(vocab.values()) + 1)
    definition["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]


ODD: dict[str, tuple[Callable[[], LibraryTokenizer], Callable[[dict], object]]] = {
    "GPT-2's own": (byte_level, lambda d: [d["model"].pop("type"), d["model"].pop("ignore_merges")]),
    "merges as text": (byte_level, lambda d: d["model"].update(merges=[" ".join(m) for m in d["model"]["merges"]])),
    "bytes spelt by the normalizer": (
        byte_level,
        lambda d: d.update(
            normalizer={"type": "ByteLevel"},
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "Ġ?[^Ġ]+"}, "behavior": "Isolated", "invert": False},
        ),
    ),
    "an end that is an entry only": (
        functools.partial(byte_level, first=["</s>", "<s>"]),
        lambda d: d.update(added_tokens=[t for t in d["added_tokens"] if t["content"] != "</s>"]),
    ),
    "merges of a special token": (functools.partial(bytes_as_pieces, ("<unk>", "<s>", "</s>")), special_merges),
}


FORM = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    "place, eos",
    [("tokenizer_config.json", "</s>"), ("special_tokens_map.json", "</s>")]
    + [("special_tokens_map.json", {"content": "</s>", **FORM})],
)
@pytest.mark.parametrize("name", ODD)
def test_odd_and_old_folders(tmp_path: Path, name: str, place: str, eos: object):
    """Harmless oddities are accepted."""
    make, edit = ODD[name]
    definition = json.loads(make().to_str())
    if not any(token["content"] == "</s>" for token in definition["added_tokens"]):
        largest = max(definition["model"]["vocab"].values())
        definition["added_tokens"].append({"content": "</s>", "id": largest + 1, "special": True, **FORM})
    edit(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / place).write_text(json.dumps({"eos_token": eos}))
    ours, theirs = load_tokenizer(tmp_path), auto_tokenizer(tmp_path)
    rng = random.Random(0)
    texts = [random_text(rng, 40) for _ in range(30)] + [english(rng, 30), "</s", "s> def return", "  a\n\tb"]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.eod_id == theirs.eos_token_id
    forged = ours.encode("a </s>")
    assert ours.eod_id not in forged and ours.decode(forged).strip() == "a </s>"
    ours.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == ours.fingerprint
    assert auto_tokenizer(tmp_path / "copy").eos_token_id == ours.eod_id


def word_piece() -> LibraryTokenizer:
    return LibraryTokenizer(models.WordPiece({"[UNK]": 0, "word": 1, "##s": 2}, unk_token="[UNK]"))


def unigram() -> LibraryTokenizer:
    return LibraryTokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)], unk_id=0))


def word_level() -> LibraryTokenizer:
    return LibraryTokenizer(models.WordLevel({"?": 0, "word": 1}, unk_token="?"))


def characters_only() -> LibraryTokenizer:
    """BPE that neither spells bytes nor falls back to them."""
    tokenizer = LibraryTokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([english(random.Random(0), 100)], trainer)
    return tokenizer


def promised_bytes() -> LibraryTokenizer:
    """Claims to fall back to bytes, but lacks some."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256) if byte != 0xF4} | {"a": 256, "<unk>": 257}
    return LibraryTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))


def bytes_missing() -> LibraryTokenizer:
    """Byte-level, but only with the bytes of its training text: the library drops the others."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["abc abc"] * 5, trainers.BpeTrainer(vocab_size=20, show_progress=False))
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [word_piece, unigram, word_level, characters_only, promised_bytes, bytes_missing],
    ids=lambda make: make.__name__,
)
def test_tokenizer_of_another_kind_is_refused(tmp_path: Path, make: Callable[[], LibraryTokenizer]):
    """It would lose text that it does not know, and its tokens' lengths are not bytes."""
    tokenizer = make()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    save_foreign(tokenizer, tmp_path, eos_token=END_OF_DOCUMENT)
    message = refusal(tmp_path)
    assert "cannot be used" in message and ("BPE" in message or "byte" in message)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path: Path, name: str):
    """A clone made without Git LFS holds such files."""
    if name == "tokenizer_config.json":
        save_foreign(byte_level(), tmp_path, eos_token="</s>")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n")
    assert f"{name} is a pointer of Git LFS, run `git lfs pull`" in refusal(tmp_path)


@pytest.mark.parametrize("tokens", [[], ["<|other|>"], ["<|other|>", "</s>"]])
def test_tokenizer_that_ends_no_document_is_refused(tmp_path: Path, tokens: list[str]):
    tokenizer = byte_level(300)
    add_tokens(tokenizer, tokens)
    save_foreign(tokenizer, tmp_path)
    message = refusal(tmp_path)
    assert END_OF_DOCUMENT in message and "eos_token" in message


@pytest.mark.parametrize("name", [None, "eos_token", "additional_special_tokens"])
def test_an_end_of_document_that_was_added_as_text(tmp_path: Path, name: str | None):
    """Any text could end a document with it, unless the configuration names it, so that it is special to transformers,
    too."""
    tokenizer = byte_level(300)
    add_tokens(tokenizer, [END_OF_DOCUMENT], ordinary=[END_OF_DOCUMENT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {None: {}, "eos_token": {"eos_token": END_OF_DOCUMENT}}.get(name, {name: [END_OF_DOCUMENT]})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if name is None:
        assert END_OF_DOCUMENT in refusal(tmp_path)
        return
    ours, theirs = load_tokenizer(tmp_path), auto_tokenizer(tmp_path)
    assert ours.special_ids == {END_OF_DOCUMENT: ours.eod_id} and theirs.all_special_ids == [ours.eod_id]
    ids = ours.encode(f"a {END_OF_DOCUMENT}{END_OF_DOCUMENT}")
    assert ours.eod_id not in ids and ours.decode(ids) == f"a {END_OF_DOCUMENT}{END_OF_DOCUMENT}"
