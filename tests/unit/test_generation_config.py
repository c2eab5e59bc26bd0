"""Tokens that end a text: in a folder, and passed on in a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers import GenerationConfig as TheirGenerationConfig

from model.generation_config import GENERATION_CONFIG, read_generation_config
from tests.unit.test_tokenizer import Foreign, gpt2, llama2, llama3, qwen2
from tokenizer import load_tokenizer
from tokenizer.base import CHAT_TEMPLATE_NAME
from tokenizer.hf_bbpe import train_hf_bbpe
from tokenizer.sp_bbpe import train_sp_bbpe
from training.export import plan_export

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "bos_token_id": 5}


def folder(path: Path, config: object, generation: object = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", config), (GENERATION_CONFIG, generation)):
        if values is not None:
            (path / name).write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())
    return path


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, None, ()),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 8]}, None, (7, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7]}, (9, 7)),
        ({"eos_token_id": 7}, {"temperature": 0.5}, (7,)),
    ],
)
def test_ends_of_both_files_count(tmp_path: Path, config: dict, generation: dict | None, ends: tuple[int, ...]):
    assert read_generation_config(folder(tmp_path, config, generation)).eos_ids == ends


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 7, "bos_token_id": 5, "pad_token_id": -1}, {**QWEN, "eos_token_id": [9, 7]}),
        ({"eos_token_id": 7, "bos_token_id": None}, {"temperature": 0.6, "top_p": 0.9, "_from_model_config": True}),
        # Before version 4.26 there was one file, from which transformers still reads all of it.
        ({"eos_token_id": 7, "temperature": 0.6, "do_sample": True}, None),
    ],
)
def test_what_a_checkpoint_says_is_what_the_source_said_and_the_new_ends(
    tmp_path: Path, config: dict, generation: dict | None
):
    """transformers reads both in this way."""
    source = folder(tmp_path / "source", {"model_type": "llama", **config}, generation)
    again = read_generation_config(source)
    for number in range(3):
        again = again.ending_with([99, 7])
        path = folder(tmp_path / str(number), {"model_type": "llama", **again.token_ids}, again.to_hf())
        again = read_generation_config(path)
    read = TheirGenerationConfig.from_pretrained
    before, after = read(source, None if generation else "config.json").to_dict(), read(path).to_dict()
    assert after["eos_token_id"][:2] == [99, 7]
    ours = {"eos_token_id", "bos_token_id", "pad_token_id", "_from_model_config", "transformers_version"}
    assert {name: before[name] for name in after.keys() - ours} == {name: after[name] for name in after.keys() - ours}
    written = json.loads((path / "config.json").read_text())
    assert (written["bos_token_id"], written["pad_token_id"]) == (
        config.get("bos_token_id"),
        config.get("pad_token_id"),
    )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (GENERATION_CONFIG, b"{", "is not valid JSON"),
        (GENERATION_CONFIG, b"\xff\xfe", "is not valid JSON"),
        (GENERATION_CONFIG, b"[" * 100_000, "is not valid JSON"),
        (GENERATION_CONFIG, b"[1]", "must hold a dictionary, not [1]"),
        (GENERATION_CONFIG, b'{"top_p": 1, "top_p": 0.5}', '"top_p" is given twice'),
        (GENERATION_CONFIG, b'{"a": "\\ud800"}', "holds text that is not valid Unicode"),
        (GENERATION_CONFIG, b'{"eos_token_id": "</s>"}', 'eos_token_id must be the id of a token or a list of them'),
        (GENERATION_CONFIG, b'{"eos_token_id": [1, [2]]}', "eos_token_id must be"),
        (GENERATION_CONFIG, b'{"eos_token_id": 1.5}', "eos_token_id must be"),
        (GENERATION_CONFIG, b'{"eos_token_id": true}', "eos_token_id must be"),
        (GENERATION_CONFIG, b'{"pad_token_id": [1]}', "pad_token_id must be the id of a token, not [1]"),
        ("config.json", b'{"eos_token_id": {}}', "eos_token_id must be"),
        ("config.json", b'{"bos_token_id": "<s>"}', 'bos_token_id must be the id of a token, not "<s>"'),
    ],
)  # fmt: skip
def test_damage_is_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str):
    folder(tmp_path, {}, {})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="(?s).*") as caught:
        read_generation_config(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- a run's own values


def small(kind: str):
    texts = ["one two three four five six seven eight nine ten " * 40] * 4
    if kind == "hf_bbpe":
        return train_hf_bbpe(texts, 270, show_progress=False)
    return train_sp_bbpe(texts, 290, show_progress=False)


@pytest.mark.parametrize("kind", ["hf_bbpe", "sp_bbpe"])
@pytest.mark.parametrize("task", ["pretrain", "sft", "dpo"])
def test_a_model_of_ours(tmp_path: Path, kind: str, task: str):
    """Nothing precedes a text; in a chat model, every place that readers look at names the end of an answer."""
    tokenizer = small(kind)
    export = plan_export(task != "pretrain", tokenizer, None, 64)
    found = export.generation
    end, document = (tokenizer.special_ids[token] for token in ("<|im_end|>", "<|endoftext|>"))
    assert found.eos_ids == ((document,) if task == "pretrain" else (end, document))
    assert (found.bos_id, found.pad_id) == (None, tokenizer.special_ids["<|pad|>"])

    export.save_tokenizer(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (found.eos_ids[0], None)
    assert theirs("one two")["input_ids"] == tokenizer.encode("one two")
    assert (again.eod_id, again.fingerprint) == (tokenizer.eod_id, tokenizer.fingerprint)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # Otherwise llama.cpp puts a token and a blank in front of a SentencePiece model's text.
    assert said["add_bos_token"] is False and said["add_prefix_space"] is False
    # Otherwise transformers 4 returns token_type_ids, which `generate` refuses for a llama.
    assert list(theirs("one two")) == said["model_input_names"] == ["input_ids", "attention_mask"]


TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + END }}{% endfor %}"


def with_template(made: Foreign, end: str) -> Foreign:
    (made.folder / CHAT_TEMPLATE_NAME).write_text(TEMPLATE.replace("END", end))
    return made


def end_added_as_text(directory: Path) -> Foreign:
    """As `add_tokens` does, and added_tokens.json in old folders: not a special token, until somebody declares it
    one."""
    made = llama3(directory)
    path = directory / "tokenizer.json"
    definition = json.loads(path.read_text())
    last = max(definition["added_tokens"], key=lambda token: token["id"])
    definition["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<|done|>", "special": False})
    path.write_text(json.dumps(definition))
    return made


@pytest.mark.parametrize(
    ("make", "end", "eos_token"),
    [
        (llama3, "'<|eot_id|>'", "<|eot_id|>"),
        (qwen2, "'<|im_end|>'", "<|im_end|>"),
        # A template that writes eos_token would lay conversations out differently if it were another token.
        (llama3, "eos_token", "<|end_of_text|>"),
        (llama3, "'<|eot_id|>' + eos_token", "<|end_of_text|>"),
        (llama2, "'</s>'", "</s>"),
        # Its name would make it another token, even in text that people wrote.
        (end_added_as_text, "'<|done|>'", "<|end_of_text|>"),
        (gpt2, "'<|endoftext|>'", "<|endoftext|>"),
    ],
)
def test_a_foreign_tokenizer_stays_the_one_that_the_data_knows(tmp_path: Path, make, end: str, eos_token: str):
    """Even if eos_token was the only name for its end of a document, and whatever is done to it next."""
    made = with_template(make(tmp_path / "source"), end)
    source, tokenizer = folder(made.folder, {}), load_tokenizer(made.folder)
    before = (tokenizer.eod_id, tokenizer.fingerprint, tokenizer.begin_ids)
    beside = {"tokenizer.model": b"scores", "added_tokens.json": b"{}"}
    for name, content in beside.items():
        (made.folder / name).write_bytes(content)
    for number, task in enumerate(("sft", "pretrain", "dpo")):
        export = plan_export(task != "pretrain", tokenizer, source, 64)
        source = folder(tmp_path / str(number), export.generation.token_ids)
        export.save_tokenizer(source)
        tokenizer = load_tokenizer(tmp_path / str(number))
        assert (tokenizer.eod_id, tokenizer.fingerprint, tokenizer.begin_ids) == before
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert theirs.eos_token == eos_token
        assert theirs("one two")["input_ids"] == [*tokenizer.begin_ids, *tokenizer.encode("one two")]
        assert tokenizer.chat_template.startswith("{% for m in messages %}")
        # llama.cpp reads the scores of pieces and the added tokens from these.
        assert {name: (source / name).read_bytes() for name in beside} == beside


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_what_the_source_said_stays(tmp_path: Path, task: str):
    """The end that the run teaches comes first."""
    tokenizer = small("hf_bbpe")
    end, document = (tokenizer.special_ids[token] for token in ("<|im_end|>", "<|endoftext|>"))
    source = folder(tmp_path, {"eos_token_id": [3, document], "bos_token_id": 4}, {"eos_token_id": 9, **QWEN})
    found = plan_export(task != "pretrain", tokenizer, source, 64).generation
    assert found.eos_ids == ((document, 9, 3) if task == "pretrain" else (end, document, 9, 3))
    assert (found.bos_id, found.pad_id, found.settings) == (4, None, QWEN)
    assert found == replace(read_generation_config(source), eos_ids=found.eos_ids)
