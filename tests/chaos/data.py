"""The small corpus of the tests, outside pytest, and weights below an adapter."""

import inspect
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import Decoder, ModelConfig, hf
from tests import conftest
from tests.chaos.run import BASE
from tokenizer import load_tokenizer


class _Factory:
    """The part of pytest's tmp_path_factory that the fixture needs."""

    def __init__(self, home: Path):
        self._home = home

    def mktemp(self, name: str) -> Path:
        directory = self._home / name
        directory.mkdir(parents=True)
        return directory


def make_data(home: Path) -> Path:
    """The fixture's pretokenized directory, found below `home` or made there."""
    made = home / "data" / "tokens"
    if not made.exists():
        made = inspect.unwrap(conftest.data_dir)(_Factory(home))
    if not (made / BASE).exists():
        make_base(made)
    return made


def make_base(data_dir: Path) -> None:
    """Write new weights of the tests' tiny model beside the tokens."""
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, max_position_embeddings=conftest.SEQ_LEN,
    ).resolve()  # fmt: skip
    model = Decoder(config)
    model.initialize(7)
    tokenizer.save_pretrained(data_dir / BASE)
    save_file(hf.named_weights(model), data_dir / BASE / "model.safetensors", {"format": "pt"})
    (data_dir / BASE / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
