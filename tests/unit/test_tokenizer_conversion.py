"""Folders without tokenizer.json: their files are converted, with the ids of SentencePiece or AutoTokenizer, or refused
with a sentence that does no harm."""

import functools
import io
import json
import random
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from model.adapters.folder import Weights
from model.config import ModelConfig
from model.hf import to_hf_config
from tests.unit.test_tokenizer import AWKWARD, auto_tokenizer, byte_level, english, random_text, refusal
from tokenizer import load_tokenizer
from tokenizer.base import END_OF_DOCUMENT
from training.data import require_tokenizer_of

MODELS = {
    "llama 2": {},
    "no blank in front": {"add_dummy_prefix": False},
    "pieces of the user": {"user_defined_symbols": ["<|im_start|>", "   ", "\t"], "control_symbols": ["<|pad|>"]},
    "unigram": {"model_type": "unigram", "vocab_size": 310},
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@functools.cache
def sentence_piece(name: str) -> bytes:
    """A `tokenizer.model` with the settings of Llama 2, or others."""
    rng = random.Random(0)
    texts = [english(rng, 80) for _ in range(100)] + ["中文训练数据 天地玄黄\n" * 10, "    x = 1\n\ty\n" * 20]
    model = io.BytesIO()
    options = {"model_type": "bpe", "add_dummy_prefix": True, "vocab_size": 380} | MODELS[name]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


def write(folder: Path, **files: object) -> Path:
    """A folder of files, with "_" for "." in their names; values other than bytes are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@functools.cache
def texts() -> list[str]:
    rng = random.Random(1)
    made = [random_text(rng, rng.randint(0, 40)) for _ in range(200)] + [english(rng, 30) for _ in range(10)]
    made += [text for text in AWKWARD if len(text) < 300] + ["    x = 1\n\ty", "## # ###", "s</s", "don't 12345"]
    return [text for text in made if not any(sign in text for sign in ("▁", "<s>", "</s>", "<unk>", "<|", "<0x"))]


LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMED, "add_bos_token": True}


@pytest.mark.parametrize("config", [{}, LLAMA, {**LLAMA, "legacy": False}], ids=["alone", "llama", "llama 2"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "unigram"])
def test_sentencepiece_model(tmp_path: Path, model: str, config: dict):
    """Alone, or with the class for which transformers 5 would have its own treatment."""
    content = sentence_piece(model)
    folder = write(tmp_path / "source", tokenizer_model=content, tokenizer_config_json=config)
    ours, theirs = load_tokenizer(folder), SentencePieceProcessor(model_proto=content)
    for text in texts():
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    for text in ("<0x41>", "   <0x0A>\t"):
        assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == theirs.vocab_size() and ours.eod_id == theirs.eos_id()
    assert ours.begin_ids == ([theirs.bos_id()] if config else [])
    assert {i for i in range(ours.vocab_size) if theirs.is_control(i)} <= set(ours.special_ids.values())
    ours.save_pretrained(tmp_path / "copy")
    copy, whole = auto_tokenizer(tmp_path / "copy"), load_tokenizer(tmp_path / "copy")
    assert copy(texts(), add_special_tokens=False)["input_ids"] == ours.encode_batch(texts())
    assert copy("x")["input_ids"] == ours.begin_ids + ours.encode("x")
    assert whole.fingerprint == ours.fingerprint and whole.begin_ids == ours.begin_ids


@pytest.mark.parametrize("add_prefix_space", [True, False])
@pytest.mark.parametrize("model", ["llama 2", "no blank in front"])
def test_what_the_folder_says_of_the_first_blank(tmp_path: Path, model: str, add_prefix_space: bool):
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": add_prefix_space, **NAMED}
    folder = write(tmp_path, tokenizer_model=sentence_piece(model), tokenizer_config_json=config)
    ours, theirs = load_tokenizer(folder), auto_tokenizer(folder)
    assert ours.encode("the end") == theirs("the end", add_special_tokens=False)["input_ids"]
    lengths = ours.token_byte_lengths()
    assert sum(lengths[token_id] for token_id in ours.encode("end")) == len("end") + add_prefix_space


TOKENS = (END_OF_DOCUMENT, "<|im_end|>", "<tool>")


@functools.cache
def vocabulary() -> tuple[bytes, bytes, int]:
    """vocab.json, merges.txt, and the first free id. A merge begins like a comment, as one of GPT-2's does."""
    model = json.loads(byte_level(400).to_str())["model"]
    model["vocab"] |= {"##": len(model["vocab"])}
    merges = [*(" ".join(merge) for merge in model["merges"]), "# #"]
    return json.dumps(model["vocab"]).encode(), "\n".join(["#version: 0.2", *merges]).encode(), len(model["vocab"])


def added_tokens(how: str) -> dict[str, object]:
    """Files that say which tokens were added, and under which ids."""
    first = vocabulary()[2]
    named = {"eos_token": "<|im_end|>", "pad_token": END_OF_DOCUMENT}
    if how == "added_tokens.json":
        return {
            "added_tokens_json": {token: first + i for i, token in enumerate(TOKENS)},
            "special_tokens_map_json": named,
            "tokenizer_config_json": {},
        }
    form = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {str(first + i): {"content": t, "special": t != "<tool>", **form} for i, t in enumerate(TOKENS)}
    return {"tokenizer_config_json": {**named, "added_tokens_decoder": decoder}}


@pytest.mark.parametrize("how", ["added_tokens.json", "added_tokens_decoder"])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "qwen2"])
def test_vocabulary_and_merges(tmp_path: Path, kind: str, how: str):
    """The class comes from its own name, or from that of the model."""
    vocab, merges, first = vocabulary()
    files = added_tokens(how)
    if kind.endswith("Tokenizer"):
        files["tokenizer_config_json"]["tokenizer_class"] = kind
    folder = write(tmp_path / "source", vocab_json=vocab, merges_txt=merges, **files)
    write(folder, config_json={"model_type": "llama" if kind.endswith("Tokenizer") else kind})
    ours, theirs = load_tokenizer(folder), auto_tokenizer(folder)
    ids = ours.encode_batch(texts())
    assert ids == theirs(texts(), add_special_tokens=False)["input_ids"]
    assert ours.encode("##") == [json.loads(vocab)["##"]] and ours.encode("<tool>") == [first + 2]
    assert ours.special_ids == {END_OF_DOCUMENT: first, "<|im_end|>": first + 1}
    assert (ours.eod_id, ours.vocab_size, ours.begin_ids) == (first, len(theirs), [])
    ours.save_pretrained(tmp_path / "copy")
    copy = auto_tokenizer(tmp_path / "copy")
    assert copy(texts(), add_special_tokens=False)["input_ids"] == ids and copy.eos_token == "<|im_end|>"
    assert load_tokenizer(tmp_path / "copy").fingerprint == ours.fingerprint


def test_class_with_its_code_beside_it(tmp_path: Path):
    """The code is not run; a SentencePiece model needs none."""
    config = {"tokenizer_class": "OurTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_our.OurTokenizer", None]}}
    write(tmp_path, tokenizer_model=sentence_piece("llama 2"), tokenizer_config_json=config | NAMED)
    write(tmp_path, tokenization_our_py=b"raise SystemExit(3)")
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())


REFUSED = {
    "zeros": ({"tokenizer_model": b"\0" * 2000}, "damaged"),
    "tiktoken": ({"tokenizer_model": b"IQ== 0\nIg== 1\n"}, "not a SentencePiece model"),
    "empty vocabulary": ({"vocab_json": {}, "merges_txt": b"#version: 0.2\n"}, "tokenizer_class"),
    "no class": ({"vocab_json": {"a": 0}, "merges_txt": b""}, "tokenizer_class"),
    "a class of other files": (
        {"vocab_json": {"a": 0}, "merges_txt": b"", "tokenizer_config_json": {"tokenizer_class": "LlamaTokenizer"}},
        "does not read its vocab.json",
    ),
    "no merges": ({"vocab_json": {"a": 0}}, "holds vocab.json but no tokenizer.json"),
    "tekken": ({"tekken_json": {}}, "holds tekken.json"),
    "word pieces": ({"vocab_txt": b"[UNK]"}, "holds vocab.txt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_here(tmp_path: Path, name: str):
    """The sentence says what converts it, and never to train a tokenizer into this folder."""
    files, why = REFUSED[name]
    message = refusal(write(tmp_path, **files))
    assert why in message and "save_pretrained" in message
    assert "train_tokenizer" not in message and "output_dir" not in message


def test_unigram_is_not_bpe(tmp_path: Path):
    message = refusal(write(tmp_path, tokenizer_model=sentence_piece("unigram")))
    assert "only BPE" in message and "--output_dir" not in message


def test_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install protobuf" in refusal(write(tmp_path, tokenizer_model=sentence_piece("llama 2")))


def test_folder_without_any_tokenizer(tmp_path: Path):
    message = refusal(write(tmp_path, config_json={"model_type": "llama"}))
    assert "holds no tokenizer.json" in message and f"--output_dir {tmp_path}" not in message


# ---- weights and the tokenizer of the data


def test_weights_of_another_tokenizer(tmp_path: Path):
    """They are compared, whichever files hold the model's own."""
    vocab, merges, _ = vocabulary()
    files = added_tokens("added_tokens_decoder")
    files["tokenizer_config_json"]["tokenizer_class"] = "GPT2Tokenizer"
    bpe = write(tmp_path / "bpe", vocab_json=vocab, merges_txt=merges, **files)
    sp = write(tmp_path / "sp", tokenizer_model=sentence_piece("llama 2"))
    for weights, other in ((bpe, sp), (sp, bpe)):
        load_tokenizer(weights).save_pretrained(tmp_path / f"of {weights.name}")
        require_tokenizer_of(Weights(weights), load_tokenizer(tmp_path / f"of {weights.name}"))
        with pytest.raises(ValueError, match="not tokenized with the tokenizer that the weights"):
            require_tokenizer_of(Weights(weights), load_tokenizer(other))


@pytest.mark.parametrize(("rows", "fits"), [(1, False), (379, False), (380, True), (444, True), (445, False)])
def test_weights_without_any_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, fits: bool):
    """If the sizes differ, the folder is refused; otherwise a warning says that nobody can tell."""
    tokenizer = load_tokenizer(write(tmp_path / "sp", tokenizer_model=sentence_piece("llama 2")))
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = to_hf_config(ModelConfig(vocab_size=rows, max_position_embeddings=32, **sizes).resolve(), torch.float32, 2)
    weights = write(tmp_path / "weights", config_json=config)
    if fits:
        require_tokenizer_of(Weights(weights), tokenizer)
        assert "holds weights but no tokenizer" in caplog.text and str(weights) in caplog.text
    else:
        with pytest.raises(ValueError, match=f"holds weights but no tokenizer, and its vocab_size is {rows}"):
            require_tokenizer_of(Weights(weights), tokenizer)
