"""The measurement of the engine runs, and its contenders say the same."""

import importlib.util
import json

import pytest
import torch

from benchmarks import gguf_file, serving
from benchmarks.serving_peers import Answer
from model import ModelConfig
from tests.peers import peer


def test_a_quick_run(capsys: pytest.CaptureFixture[str]):
    peer("transformers")
    installed = importlib.util.find_spec("xllamacpp") is not None and importlib.util.find_spec("gguf") is not None
    names = ["ours", "transformers", *(["llama.cpp"] if installed else [])]
    serving.main(["--quick", "--contenders", ",".join(names)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[1]) for row in rows] == [(f"| {count}", name) for count in (1, 3) for name in names]
    assert all(row[5] == "100% |" for row in rows if row[1] != "llama.cpp")


def test_an_unknown_contender_is_refused():
    with pytest.raises(ValueError, match="--contenders can be ours, transformers, continuous, llama.cpp, not vllm"):
        serving.main(["--quick", "--contenders", "ours,vllm"])


def test_equal_tokens_are_those_before_the_first_difference():
    ours = [Answer([1, 2, 3, 4], 0.0), Answer([5, 6], 0.0)]
    assert serving.agreement(ours, ours) == 1.0
    assert serving.agreement(ours, [Answer([1, 2, 9, 4], 0.0), Answer([5, 6], 0.0)]) == 4 / 6


def test_texts_of_a_ggufs_tokens_are_their_numbers():
    assert gguf_file.ids_of("".join(map(gguf_file.token_of, [3, 0, 511]))) == [3, 0, 511] and gguf_file.ids_of("") == []


def test_only_a_plain_llama_becomes_a_gguf(tmp_path):
    config = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, qkv_bias=True).resolve(32, 32)
    with pytest.raises(ValueError, match="only a llama without biases"):
        gguf_file.check(config)
    serving.make_folder(tmp_path, serving.SIZES["tiny"], torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
