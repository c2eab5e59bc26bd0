"""generate.py with adapters: which counts, how to go on with another one, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.adapters import merge as merging
from model.config import ModelConfig
from model.kernels.experts import sorted_experts
from model.quantized import Linear4bit
from serving import loading
from serving.arguments import parse_adapters
from serving.loading import load
from tests.adapter_folders import make_adapter
from tests.peers import peer
from tests.unit.test_chat import complete, folder, generated_tokens, talk, tokenizer

peer("peft")
pytest.importorskip("transformers")
__all__ = ["folder", "tokenizer"]


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the model; the second one says other things."""
    home = tmp_path_factory.mktemp("adapters")
    return [make_adapter(home / name, folder, seed, target_modules="all-linear", r=8, lora_alpha=64)
            for seed, name in enumerate(["one", "two"])]  # fmt: skip


def test_the_first_adapter_counts_and_an_adapter_names_its_base(
    folder: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one, two = map(str, adapters)
    assert merging.main([f"--adapter={two}", f"--output={tmp_path / 'merged'}"]) == 0
    capsys.readouterr()
    merged, plain = (complete(path, capsys, "--prompt=hello") for path in (tmp_path / "merged", folder))
    assert merged[0] == 0 and merged[1] != plain[1]
    for ckpt, flags in ((folder, [f"--adapter={two}", f"--adapter={one}"]), (adapters[1], []),
                        (adapters[1], [f"--adapter={one}"]), (folder, [f"--adapter=2nd={two}"])):  # fmt: skip
        assert complete(ckpt, capsys, "--prompt=hello", *flags) == merged


def test_a_talk_goes_on_with_another_adapter(
    folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    flags = [f"--adapter=a={adapters[0]}", f"--adapter={adapters[1]}"]
    said = "".join(f"{command}\n/reset\nhello\n" for command in ("/adapter a", "/adapter two", "/adapter none"))
    assert talk(folder, monkeypatch, f"hello\n{said}/adapter c\n/adapter\n/help\n", *flags) == 0
    both = capsys.readouterr()
    alone = []
    for more in ([flags[0]], [flags[1]], []):
        assert talk(folder, monkeypatch, "hello\n", *more) == 0
        alone.append(capsys.readouterr().out)
    assert len(set(alone)) == 3 and both.out == alone[0] + "".join(alone)
    for sentence in ("goes on with the adapter two", "goes on with no adapter",
                     "there is no adapter c: loaded are a, two",
                     "in use is no adapter, of a, two, none: /adapter NAME"):  # fmt: skip
        assert sentence in both.err
    assert talk(folder, monkeypatch, "/adapter a\n") == 0
    plain = capsys.readouterr()
    assert not plain.out and "no adapter is loaded: give some with --adapter" in plain.err


def test_tokenizer_and_ends_are_the_adapters_own(
    folder: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    own = shutil.copytree(adapters[0], tmp_path / "own")
    for path in (*folder.glob("tokenizer*"), folder / "chat_template.jinja"):
        shutil.copy(path, own)
    before = complete(own, capsys, "--chat", "--prompt=hello")
    assert before == complete(adapters[0], capsys, "--chat", "--prompt=hello")
    # A template that says nothing but the question.
    (own / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    assert complete(own, capsys, "--chat", "--prompt=hello")[1] != before[1]
    said = generated_tokens(monkeypatch)
    assert complete(own, capsys, "--prompt=hello")[0] == 0
    stop = next(token_id for token_id in said[0][2:] if token_id not in said[0][:2])
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    assert complete(own, capsys, "--prompt=hello")[0] == 0
    assert said[1] == said[0][: said[0].index(stop)]


@torch.no_grad()
def test_adapters_of_a_model_in_4_bits(folder: Path, adapters: list[Path]):
    """As of the plain model that holds the same values."""
    peer("bitsandbytes")
    where, ids = (torch.device("cpu"), torch.float32), torch.arange(24).view(2, 12)
    four, plain = (load(folder, {"two": adapters[1]}, *where, in_4bit=in_4bit) for in_4bit in (True, False))
    for name in ("two", None):
        four.use(name)
        plain.use(None)
        for path, layer in four.model.named_modules():
            if isinstance(layer, Linear4bit):
                plain.model.get_submodule(path.removesuffix(".base_layer")).weight.copy_(layer.matrix())
        plain.use(name)
        scores = [served.model.logits(served.model(ids)) for served in (four, plain)]
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_refusals(folder: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = adapters[0]
    noted = shutil.copytree(one, tmp_path / "noted")
    (noted / "adapter_base.json").write_text(json.dumps({"base": str(folder), "fingerprint": "another"}))
    for flags, sentence in (
        ([f"--adapter={one}", f"--adapter={one}"], "two adapters are called one: give one as NAME=DIR, with another"),
        ([f"--adapter=none={one}"], "no adapter can be called none"),
        ([f"--adapter=a b={one}"], "a name has no blanks"),
        (["--adapter=a="], "a folder is missing"),
        ([f"--adapter={tmp_path / 'on'}"], "does not exist"),
        ([f"--adapter={folder}"], "holds no adapter_config.json: give the folder of an adapter"),
        ([f"--adapter={noted}"], "was trained on other weights than those in"),
    ):
        code, out, err = complete(folder, capsys, "--prompt=x", *flags)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1, err


def test_names_of_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    texts = ["a=$SOMEWHERE/x", "out/run/", "/data/r=8/b", "c=d=e"]
    found = {"a": Path("/data/x"), "run": Path("out/run"), "b": Path("/data/r=8/b"), "c": Path("d=e")}
    assert parse_adapters(texts) == found


@pytest.mark.parametrize(("device", "kernels"), [("cpu", "reference"), ("cuda", "auto")])
def test_a_gpu_has_the_operations_of_training(monkeypatch: pytest.MonkeyPatch, device: str, kernels: str):
    asked = []

    def choose(*arguments: Any) -> dict[str, str]:
        asked.append(arguments)
        return {"swiglu": "reference", "experts": "sorted"}

    monkeypatch.setattr(loading, "choose_ops", choose)
    config = ModelConfig(vocab_size=32, max_position_embeddings=16, sliding_window=4).resolve()
    *_, ops = loading._options(config, torch.device(device), torch.bfloat16)
    assert asked == [(kernels, {}, torch.device(device), torch.bfloat16, frozenset({"window"}))]
    assert ops.experts is sorted_experts
