"""Hugging Face folders that people bring: odd ones end with a sentence, old ones load."""

import json
import math
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import generate
from model import Decoder, ModelConfig, hf
from tokenizer.hf_bbpe import train_hf_bbpe

SMALL = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
).resolve()  # fmt: skip
CONFIG = hf.to_hf_config(SMALL, torch.float32)
MISSING = object()


def write(directory: Path, config: object = CONFIG, **changes: object) -> Path:
    """A complete folder."""
    model = Decoder(SMALL)
    model.initialize(0)
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    if isinstance(config, dict):
        config = {name: value for name, value in (config | changes).items() if value is not MISSING}
        config = json.dumps(config)
    (directory / "config.json").write_bytes(config if isinstance(config, bytes) else str(config).encode())
    return directory


def rope(kind: str | None = "linear", **values: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | values}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

ODD = {
    # Changes of a good configuration -> words that the sentence must contain.
    "eps as a string": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "eps null": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "eps missing": ({"rms_norm_eps": MISSING}, "rms_norm_eps"),
    "eps negative": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "eps not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "eps true": ({"rms_norm_eps": True}, "rms_norm_eps"),
    "eps infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "width as a string": ({"hidden_size": "16"}, "hidden_size"),
    "width as a list": ({"hidden_size": [16]}, "hidden_size"),
    "width null": ({"hidden_size": None}, "hidden_size"),
    "width missing": ({"hidden_size": MISSING}, "hidden_size"),
    "width zero": ({"hidden_size": 0}, "hidden_size"),
    "width negative": ({"hidden_size": -16}, "hidden_size"),
    "width with a fraction": ({"hidden_size": 16.5}, "hidden_size"),
    "width huge": ({"hidden_size": 1 << 40}, "hidden_size"),
    "width of 400 digits": ({"hidden_size": 10**400}, "hidden_size"),
    "vocabulary zero": ({"vocab_size": 0}, "vocab_size"),
    "vocabulary negative": ({"vocab_size": -64}, "vocab_size"),
    "vocabulary infinite": ({"vocab_size": float("inf")}, "vocab_size"),
    "layers zero": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    "layers a million": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers"),
    "layers as a dictionary": ({"num_hidden_layers": {}}, "num_hidden_layers"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "heads zero": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads"),
    "key heads negative": ({"num_key_value_heads": -2}, "num_key_value_heads"),
    "key heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "key heads as a list": ({"num_key_value_heads": [2, 2]}, "num_key_value_heads"),
    "head width odd": ({"head_dim": 3}, "head_dim"),
    "head width negative": ({"head_dim": -4}, "head_dim"),
    "inner width zero": ({"intermediate_size": 0}, "intermediate_size"),
    "inner width as a list": ({"intermediate_size": [32, 32]}, "intermediate_size"),
    "positions zero": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "positions null": ({"max_position_embeddings": None}, "max_position_embeddings"),
    "range as a string": ({"initializer_range": "0.02"}, "initializer_range"),
    "dropout one": ({"attention_dropout": 1}, "attention_dropout"),
    "dropout as a string": ({"attention_dropout": "0"}, "attention_dropout"),
    # A string would count as true.
    "tied as a string": ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "bias as a string": ({"attention_bias": "no"}, "attention_bias"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "a bias in the MLP": ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    "part of a head rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a window": ({"use_sliding_window": True}, "use_sliding_window"),
    "layers with a window": ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    "layer types as a number": ({"layer_types": 2}, "layer_types"),
    "another model": ({"model_type": "gpt2"}, "gpt2"),
    "model as a list": ({"model_type": ["llama"]}, "llama"),
    "no model": ({"model_type": MISSING}, "model_type"),
    "theta zero": ({"rope_parameters": None, "rope_theta": 0}, "rope_theta"),
    "theta as a string": ({"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta"),
    "theta beyond float32": ({"rope_parameters": {"rope_theta": 1e300}}, "rope_theta"),
    "rope a string": ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling"),
    "rope a list": ({"rope_parameters": [1, 2]}, "rope_parameters"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    "rope of an unknown type": (rope("mrope", factor=4.0), "mrope"),
    "rope type a list": (rope(["linear"], factor=4.0), "linear"),
    "rope without its factor": (rope("linear"), "factor"),
    "factor as a string": (rope("dynamic", factor="2"), "factor"),
    "factor null": (rope("linear", factor=None), "factor"),
    "factor below one": (rope("linear", factor=0.5), "factor"),
    "factor not a number": (rope("linear", factor=float("nan")), "factor"),
    "factor of nothing": (rope("default", factor=4.0), "factor"),
    "dynamic on heads of two": (rope("dynamic", factor=2.0) | {"head_dim": 2}, "head_dim"),
    "llama3 without a part": (rope("llama3", factor=8.0), "low_freq_factor"),
    "llama3 upside down": (rope("llama3", **LLAMA3 | {"low_freq_factor": 8.0}), "high_freq_factor"),
    "llama3 with a factor of zero": (rope("llama3", **LLAMA3 | {"low_freq_factor": 0}), "rope_low_freq_factor"),
    "llama3 with equal factors": (rope("llama3", **LLAMA3 | {"low_freq_factor": 4.0}), "high_freq_factor"),
    "llama3 of no context": (rope("llama3", **LLAMA3 | {"original_max_position_embeddings": -1}), "original_max"),
    "llama3 of a context of zero": (rope("llama3", **LLAMA3 | {"original_max_position_embeddings": 0}), "original_max"),
    "yarn without its factor": (rope("yarn"), "factor is missing"),
    "yarn with a factor of zero": (rope("yarn", factor=0), "factor must be positive"),
    "yarn upside down": (rope("yarn", factor=4.0, beta_fast=1, beta_slow=32), "beta_fast"),
    "yarn with a range from zero": (rope("yarn", factor=4.0, beta_slow=0), "beta_slow"),
    "yarn with truncate null": (rope("yarn", factor=4.0, truncate=None), "truncate null"),
    "yarn with truncate a number": (rope("yarn", factor=4.0, truncate=1), "truncate"),
    "yarn that scales to zero": (rope("yarn", factor=4.0, attention_factor=0.0), "attention_factor must be positive"),
    "yarn with a negative scale": (rope("yarn", factor=4.0, attention_factor=-1.0), "attention_factor"),
    "yarn with mscale a string": (rope("yarn", factor=4.0, mscale="1", mscale_all_dim=1), "mscale"),
    "yarn of another program": (rope("yarn", factor=4.0, finetuned=True), "finetuned"),
    "longrope with a list missing": (rope("longrope", short_factor=[1, 1]), "long_factor is missing"),
    "longrope with one number for all": (rope("longrope", short_factor=1.0, long_factor=[1, 2]), "short_factor"),
    "longrope with a short list": (rope("longrope", short_factor=[1.0], long_factor=[1.0] * 2), "short_factor"),
    "longrope with a string": (rope("longrope", short_factor=[1, "1"], long_factor=[1, 1]), "short_factor"),
    "longrope with a zero": (rope("longrope", short_factor=[1, 1], long_factor=[1, 0]), "long_factor"),
    "proportional without a pair": (rope("proportional", partial_rotary_factor=0.1), "partial_rotary_factor"),
    "a rotated part": (rope("linear", factor=2.0, partial_rotary_factor=0.5), "partial_rotary_factor"),
    "a rotated part, told beside": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "two parts": (rope("proportional", partial_rotary_factor=1.0) | {"partial_rotary_factor": 0.5}, "0.5 beside them"),
}
ODD_FILES = {
    "a list": (b"[1, 2]", "dictionary"),
    "null": (b"null", "dictionary"),
    "empty": (b"", "JSON"),
    "cut off": (json.dumps(CONFIG).encode()[:-20], "JSON"),
    "no text": (b"\x80\x81\xff" * 9, "JSON"),
    "Latin": (json.dumps(CONFIG | {"note": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"), "JSON"),
    "deeply nested": (b"[" * 200_000, "JSON"),
    "a number of 5,000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "JSON"),
    "a key given twice": (b'{"model_type": "llama", ' + json.dumps(CONFIG).encode()[1:], "model_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_an_odd_configuration_is_refused_by_name(case: str, tmp_path: Path):
    changes, named = ODD[case]
    with pytest.raises(ValueError) as caught:
        hf.read_config(write(tmp_path, **changes))
    sentence = str(caught.value)
    assert str(tmp_path / "config.json") in sentence and named in sentence.split("config.json", 1)[1]
    assert "\n" not in sentence and len(sentence) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("case", ODD_FILES)
def test_a_file_that_is_not_a_configuration_is_refused(case: str, tmp_path: Path):
    content, named = ODD_FILES[case]
    with pytest.raises(ValueError) as caught:
        hf.read_config(write(tmp_path, content))
    assert str(tmp_path / "config.json") in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"hidden_size": 16.0}, "hidden_size", 16),
        ({"rms_norm_eps": 1}, "rms_norm_eps", 1.0),
        ({"num_key_value_heads": MISSING}, "num_key_value_heads", 4),
        ({"head_dim": None}, "head_dim", 4),
        ({"attention_dropout": None}, "attention_dropout", 0.0),
        ({"hidden_act": "swish", "quantization_config": None, "mlp_bias": None}, "intermediate_size", 32),
        ({"rope_parameters": None, "rope_theta": 500}, "rope_theta", 500.0),
        ({"rope_parameters": {"rope_theta": None, "rope_type": None}}, "rope_theta", 10000.0),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling_factor", 2.0),
        (rope("llama3", **LLAMA3) | {"original_max_position_embeddings": 8}, "original_max_position_embeddings", 8),
        (rope("proportional") | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", 0.5),
        (rope("su", short_factor=[1, 1], long_factor=[1, 2.5]), "rope_scaling", "longrope"),
        (rope("longrope", short_factor=[1, 1], long_factor=[1, 2.5]), "rope_long_factor", "1.0,2.5"),
        (rope("yarn", factor=4, mscale=1, mscale_all_dim=1), "rope_attention_factor", 1.0),
        (rope("yarn", factor=None, original_max_position_embeddings=4), "rope_scaling_factor", 8.0),
        ({"model_type": "qwen2", "attention_bias": True, "layer_types": ["full_attention"] * 2}, "qkv_bias", True),
    ],
)
def test_what_is_unambiguous_is_read(changes: dict, field: str, value: object, tmp_path: Path):
    found = getattr(hf.read_config(write(tmp_path, **changes)), field)
    assert found == value and type(found) is type(value)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path):
    write(tmp_path)
    for name, read in (("model.safetensors", hf.check_weights), ("config.json", lambda _, path: hf.read_config(path))):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            read(SMALL, tmp_path)


def save(directory: Path, changes: dict[str, torch.Tensor | object], name: str = "model.safetensors") -> None:
    """The weights again, with some changed or removed."""
    weights = load_file(directory / "model.safetensors") | changes
    kept = {key: weight for key, weight in weights.items() if weight is not MISSING}
    save_file(kept, directory / name, {"format": "pt"})


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
ODD_WEIGHTS = {
    "int8": ({NORM: torch.ones(16, dtype=torch.int8)}, f"{NORM} in .*model.safetensors is of dtype I8"),
    "float8": ({NORM: torch.ones(16).to(torch.float8_e4m3fn)}, "is of dtype F8_E4M3"),
    "another shape": ({NORM: torch.ones(8)}, r"model.norm.weight is \(8,\) in .*, \(16,\) in the model"),
    "a scalar": ({NORM: torch.tensor(1.0)}, r"model.norm.weight is \(\) in"),
    "missing": ({NORM: MISSING}, "lacks 1 weights of the model, for example norm.weight"),
    "too many layers": ({"model.layers.2.mlp.up_proj.weight": torch.ones(32, 16)}, "layers.2.* this model does not"),
    "an adapter": (
        {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)},
        "lora_A.*, of an adapter: mer",
    ),
    "GPTQ": (
        {"model.layers.0.self_attn.q_proj.qweight": torch.ones(2, dtype=torch.int32)},
        "qweight, of weights that",
    ),
    "bitsandbytes": ({f"{NORM}.absmax": torch.ones(2)}, "absmax, of weights that are quantized: take a folder where"),
    "layers for further tokens": (
        {"model.mtp_block.0.input_layernorm.weight": torch.ones(16)},
        "mtp_block.0.input_layernorm.weight, of layers for further tokens, which are not built here: save",
    ),
    "a value head": (
        {"v_head.summary.weight": torch.ones(1, 16)},
        "v_head.summary.weight, which this model",
    ),
    "attention.bias of GPT-NeoX": (
        {"model.layers.0.attention.bias": torch.ones(4, 4)},
        "attention.bias, which this model",
    ),
    # GPT-2's folders have these; in a llama's, such a name carries something else.
    "a mask": ({"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}, "masked_bias"),
    "the same twice": ({"norm.weight": torch.ones(16)}, "holds model.norm.weight and norm.weight, the same weight"),
}


@pytest.mark.parametrize("case", ODD_WEIGHTS)
def test_odd_weights_are_refused_by_name(case: str, tmp_path: Path):
    changes, message = ODD_WEIGHTS[case]
    save(write(tmp_path), changes)
    for read in (lambda: hf.check_weights(SMALL, tmp_path), lambda: hf.load_weights(Decoder(SMALL), tmp_path)):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path):
    """They would generate the vocabulary's first entry over and over, or raise an error in torch."""
    save(write(tmp_path), {NORM: torch.tensor([1.0, value] * 8, dtype=dtype)})
    with pytest.raises(ValueError, match=f"{NORM} in .*model.safetensors holds values that are not finite: "):
        hf.load_weights(Decoder(SMALL), tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1], lambda content: content[:100], lambda content: b"", lambda content: b"{" * 64,
        lambda content: struct.pack("<Q", 1 << 40) + content[8:], lambda content: content.replace(b'"F32"', b'"X99"'),
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n",
    ],
    ids=["a byte short", "cut in the header", "empty", "garbage", "a huge header", "an unknown dtype", "a pointer"],
)  # fmt: skip
def test_damaged_weights_are_refused(damage, tmp_path: Path):
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    what = "it is a pointer of Git LFS, run `git lfs pull`" if file.read_bytes().startswith(b"version") else ""
    with pytest.raises(ValueError, match=f"model.safetensors cannot be read: {what}"):
        hf.load_weights(Decoder(SMALL), tmp_path)


def test_a_configuration_that_is_off_by_some_zeros_asks_for_no_memory(tmp_path: Path):
    config = hf.read_config(write(tmp_path, hidden_size=1 << 20, vocab_size=1 << 30))
    with pytest.raises(ValueError, match=r"is \(64, 16\) in .*, \(1073741824, 1048576\) in the model"):
        hf.check_weights(config, tmp_path)


PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def split(directory: Path, **changes: object) -> dict[str, str]:
    """The weights in two parts with their index, with some of its entries changed or removed."""
    whole = directory / "model.safetensors"
    weights = load_file(whole)
    mapping = {name: PARTS[number % 2] for number, name in enumerate(sorted(weights))}
    for part in PARTS:
        save_file({name: weights[name] for name in mapping if mapping[name] == part}, directory / part)
    whole.unlink()
    named = {name: file for name, file in (mapping | changes).items() if file is not MISSING}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))
    return mapping


ODD_ENTRIES = {"not named": {NORM: MISSING}, "named alone": {"lm_head.bias": PARTS[0]}, "elsewhere": {NORM: PARTS[1]}}


def damage(directory: Path, what: str) -> None:
    split(directory, **ODD_ENTRIES.get(what, {}))
    first, second = (directory / part for part in PARTS)
    assert NORM in load_file(first)
    if what == "a part is missing":
        second.unlink()
    elif what == "in both":
        save_file(load_file(second) | {NORM: torch.ones(16)}, second)
    elif what == "two sets":
        save_file(load_file(first) | load_file(second), directory / "model.safetensors")
    elif what.startswith("no index"):
        (directory / INDEX).unlink()
        second.rename(directory / ("x.safetensors" if "missing" in what else "model-00003-of-00003.safetensors"))


ODD_SETS = {
    "a part is missing": f"{PARTS[1]} is missing: .*{INDEX} names it",
    "not named": f"{PARTS[0]} holds {NORM}, which {INDEX} does not name",
    "named alone": f"{PARTS[0]} in .* lacks lm_head.bias, which {INDEX} says it holds",
    "elsewhere": f"{PARTS[0]} holds {NORM}, which {INDEX} says is in {PARTS[1]}",
    "in both": f"{NORM} is in .*{PARTS[0]} and in .*{PARTS[1]}: delete",
    "two sets": f"model.safetensors and .*{PARTS[0]} are two sets of weights: delete",
    "no index, a part missing": f"{PARTS[1]} is missing, and no {INDEX} tells",
    "no index, a part of another set": f"{PARTS[1]} is missing, and no {INDEX} tells",
}


@pytest.mark.parametrize("case", ODD_SETS)
def test_odd_sets_of_weights_are_refused(case: str, tmp_path: Path):
    damage(write(tmp_path), case)
    for read in (lambda: hf.check_weights(SMALL, tmp_path), lambda: hf.load_weights(Decoder(SMALL), tmp_path)):
        with pytest.raises(ValueError, match=ODD_SETS[case]):
            read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"), (b"[]", "must hold a weight_map"), (b'{"weight_map": {}}', "must hold a weight"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', '"a" is given twice'),
        (b'{"weight_map": {"a": "../model.safetensors"}}', '"a" is in "../model.safetensors": that is not a'),
        (b'{"weight_map": {"a": 5}}', '"a" is in 5: that is'),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', '"a" is in "pytorch_model.bin": that is not a safetensors'),
    ],
)  # fmt: skip
def test_a_file_that_is_not_an_index_is_refused(content: bytes, message: str, tmp_path: Path):
    split(write(tmp_path))
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        hf.check_weights(SMALL, tmp_path)
    assert str(tmp_path / INDEX) in str(caught.value)


@pytest.mark.parametrize("beside", ["nothing", "a stray part", "a variant", "no index", "an index of nothing there"])
def test_the_files_that_transformers_takes_are_read_and_no_other(beside: str, tmp_path: Path):
    write(tmp_path)
    other = {name: weight + 1 for name, weight in load_file(tmp_path / "model.safetensors").items()}
    if beside in ("a variant", "an index of nothing there"):
        save_file(other, tmp_path / "model.fp16.safetensors")
        if beside != "a variant":
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": {NORM: PARTS[0]}}))
    else:
        split(tmp_path)
    if beside == "a stray part":
        save_file(other, tmp_path / "model-00001-of-00001.safetensors")
    if beside == "no index":
        (tmp_path / INDEX).unlink()
    model, expected = Decoder(SMALL), Decoder(SMALL)
    hf.load_weights(model, tmp_path)
    expected.initialize(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))
    if beside != "no index":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(a, theirs.state_dict()[name]) for name, a in hf.named_weights(model).items())


def test_weights_in_two_files_that_hold_the_same_are_refused(tmp_path: Path):
    save(write(tmp_path), {}, "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="model.safetensors and .*model-00001-of-00001.safetensors are two sets"):
        hf.load_weights(Decoder(SMALL), tmp_path)


FORMATS = {
    # Files in place of model.safetensors -> words that the sentence must contain.
    ("pytorch_model.bin",): ("only pytorch_model.bin", 'M.from_pretrained("DIR", dtype="auto").save_pretrained("DIR")'),
    ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"): (
        "only pytorch_model-00001",
        "save_pretrained",
    ),
    ("adapter_model.safetensors", "adapter_config.json"): ("only an adapter: give its base", "merge --adapter DIR"),
    ("model-q4.gguf", "tokenizer.json"): ("only model-q4.gguf", 'gguf_file="model-q4.gguf"'),
    ("consolidated.00.pth", "consolidated.01.pth", "params.json"): (
        "only Meta's consolidated.00.pth",
        "--num_shards 2 ",
    ),
    ("flax_model.msgpack",): ("only flax_model.msgpack", "from_flax=True"),
    ("tf_model.h5",): ("only tf_model.h5, which is not read", "take the same model in safetensors"),
    ("model.pt", "optimizer.pt"): ("only model.pt, which is not read", "take the same model in safetensors"),
    ("model.fp16.safetensors",): ("only model.fp16.safetensors", "rename it to model.safetensors"),
    ("training_args.bin", "README.md"): ("holds no model.safetensors", ""),
}


@pytest.mark.parametrize("names", FORMATS, ids=lambda names: names[0])
def test_a_folder_in_another_format_is_told_how_to_convert_it(names: tuple[str, ...], tmp_path: Path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    says = [part.replace("DIR", str(tmp_path)) for part in FORMATS[names]]
    with pytest.raises(ValueError) as caught:
        hf.check_weights(SMALL, tmp_path)
    assert all(part in str(caught.value) for part in says) and "\n" not in str(caught.value)
    # These folders come without a config.json.
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError) as caught:
        hf.read_config(tmp_path)
    alone = names[0].startswith(("adapter", "model-q4", "consolidated"))
    assert "holds no config.json" in str(caught.value) and (says[1] in str(caught.value)) == (alone or not says[1])


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_of_a_class_that_transformers_lacks_are_copied_by_the_command(parts: int, tmp_path: Path):
    """Also if they are not contiguous, or share their memory, which safetensors refuses."""
    model, folder = Decoder(SMALL), tmp_path / "a [folder]"
    folder.mkdir()
    model.initialize(1)
    weights = hf.named_weights(model)
    shared = torch.cat((weights["model.layers.0.mlp.gate_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"]))
    halves = shared.chunk(2)
    weights |= {f"model.layers.0.mlp.{name}_proj.weight": half for name, half in zip(("gate", "up"), halves)}
    weights["lm_head.weight"] = weights["lm_head.weight"].t().contiguous().t()
    names = [f"-0000{number + 1}-of-00002" for number in range(2)] if parts == 2 else [""]
    for number, name in enumerate(names):
        part = {key: weight for place, (key, weight) in enumerate(weights.items()) if place % parts == number}
        torch.save(part, folder / f"pytorch_model{name}.bin")
    write(folder, auto_map={"AutoTokenizer": ["tokenization_a.A", None]}).joinpath("model.safetensors").unlink()
    with pytest.raises(ValueError, match="only pytorch_model.*: convert it with ") as caught:
        hf.load_weights(Decoder(SMALL), folder)
    _python, *arguments = shlex.split(str(caught.value).split("convert it with ")[1])
    subprocess.run([sys.executable, *arguments], check=True)
    again = Decoder(SMALL)
    hf.load_weights(again, folder)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_missing_config_is_the_one_thing_that_is_named(tmp_path: Path):
    for file, says in (
        (None, "give the folder of a model"),
        ("model.safetensors", "fetch the one that belongs to its"),
    ):
        if file:
            (tmp_path / file).write_bytes(b"")
        with pytest.raises(ValueError, match=f"holds no config.json: {says}"):
            hf.read_config(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path):
    (write(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter beside the weights"):
        hf.check_weights(SMALL, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached", "model.layers.1.self_attn.rotary_emb.sin_cached",
    ],
)  # fmt: skip
def test_constants_of_old_folders_are_passed_over(name: str, tmp_path: Path):
    save(write(tmp_path), {name: torch.ones(2)})
    model, expected = Decoder(SMALL), Decoder(SMALL)
    hf.load_weights(model, tmp_path)
    expected.initialize(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_a_tied_head_is_the_embedding_or_refused(tmp_path: Path):
    config = ModelConfig(**SMALL.__dict__ | {"tie_word_embeddings": True})
    embedding = load_file(write(tmp_path, tie_word_embeddings=True) / "model.safetensors")[EMBEDDING]
    for head in (MISSING, embedding.clone(), embedding.half()):
        save(tmp_path, {"lm_head.weight": head, EMBEDDING: embedding if head is MISSING else embedding.to(head.dtype)})
        hf.load_weights(Decoder(config), tmp_path)
    save(tmp_path, {"lm_head.weight": embedding + 1, EMBEDDING: embedding})
    with pytest.raises(ValueError, match="lm_head.weight that is not the embedding, while .* tie_word_embeddings"):
        hf.load_weights(Decoder(config), tmp_path)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("config", 'rms_norm_eps must be a number, not "1e-5"'), ("weights", "model.safetensors cannot be read"),
        ("tokenizer", "has 262 entries, the model an embedding for 64"),
    ],
)  # fmt: skip
def test_the_command_ends_with_a_sentence(odd: str, message: str, tmp_path: Path, capsys):
    train_hf_bbpe(["ab abc abcd " * 50] * 3, 262, show_progress=False).save_pretrained(tmp_path)
    shape = ModelConfig(**SMALL.__dict__ | {"vocab_size": 64 if odd == "tokenizer" else 262})
    model = Decoder(shape)
    save_file(hf.named_weights(model), tmp_path / "model.safetensors")
    changes = {"rms_norm_eps": "1e-5"} if odd == "config" else {}
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(shape, torch.float32) | changes))
    if odd == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"{" * 64)
    assert generate.main(["--ckpt", str(tmp_path), "--prompt", "ab", "--dtype", "float32"]) == 2
    found = capsys.readouterr()
    assert message in found.err and found.err.count("\n") == 1 and not found.out
