"""Runs that train an adapter: what is saved, how it goes on, DPO's reference, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_my_ddp
from dataset.dpo import DPODataset
from model import Decoder, flops, hf
from model.adapters import folder, lora
from model.config import ModelConfig
from tasks.config import DPOConfig
from tasks.dpo import DPOTask
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits
from tests.unit.test_sft_train import (
    SEQ_LEN,
    Home,
    cache_file,
    cache_file_dir,
    dpo_flags,
    refusal,
    sft_flags,
    without,
)
from tests.unit.test_train import sigterm, train_until
from training.adapter import _fingerprint

__all__ = ["dpo_flags", "sft_flags"]

LORA = ["--lora_r=4", "--lora_target_modules=all-linear", "--lora_alpha=16"]
DROPPED = [*LORA, "--lora_dropout=0.1", "--use_dora", "--lora_modules_to_save=embed_tokens"]


def train(flags: list[str], *more: str) -> int:
    return train_my_ddp.main([*flags, *more])


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


def checkpoint(flags: list[str], step: int = 4) -> Path:
    return out_dir(flags) / "ckpt" / f"step-{step}"


def began_with(flags: list[str], weights: Path) -> list[str]:
    return [*without(flags, "--init_from"), f"--init_from={weights}"]


@pytest.fixture
def sft_run(sft_flags: list[str], tmp_path: Path) -> list[str]:
    """A run that has trained an adapter."""
    flags = elsewhere(sft_flags, tmp_path / "sft")
    assert train(flags, *LORA) == 0
    return flags


# What is saved, and how it goes on.


@pytest.mark.parametrize("more", [[], ["--dtype=bfloat16"]])
def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_with_the_same_bits(
    sft_flags: list[str], more: list[str], tmp_path: Path
):
    whole = elsewhere(sft_flags, tmp_path / "whole")
    assert train(whole, *DROPPED, *more) == 0
    names = {path.name for path in checkpoint(whole).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "tokenizer.json"} <= names
    assert {"generation_config.json", "chat_template.jinja"} <= names
    assert not names & {"config.json", "model.safetensors"}
    assert not [key for key in load_file(checkpoint(whole) / "optim-0.safetensors") if "base_layer" in key]
    assert train_until(2, sigterm, sft_flags, *DROPPED, *more) == 75
    assert train(sft_flags, "--resume", *more) == 0
    assert losses(sft_flags) == losses(whole) and len(losses(whole)) == 4
    assert same_bits(final_state(sft_flags, 4), final_state(whole, 4))
    assert records(sft_flags, "start")[-1]["changed"] == {}


def test_pretraining_goes_on_from_weights_with_an_adapter(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = elsewhere(tiny_run, tmp_path / "base")
    assert train(base, "--max_iters=2") == 0
    flags = [*without(tiny_run, "--hidden_size", "--num_hidden_layers", "--num_attention_heads",
                      "--tie_word_embeddings"), f"--init_from={tmp_path / 'base'}"]  # fmt: skip
    capsys.readouterr()
    assert train(flags, *LORA, "--use_rslora") == 0
    said = capsys.readouterr().out
    layers, rank = 2, 4
    trained = layers * rank * (4 * (64 + 64) + 3 * (64 + 192))
    assert "adapter: rsLoRA of rank 4, alpha 16, on 14 layers (down_proj, gate_proj" in said
    assert f": {trained:,} of " in said and "ruin" not in said
    assert len(load_file(checkpoint(flags) / "adapter_model.safetensors")) == 2 * 7 * layers
    assert train(flags, "--resume", "--valid_only") == 0
    assert f"loss {records(flags, 'valid')[-1]['loss']:.4f}" in capsys.readouterr().out
    # The run of the base has a newer checkpoint now. The same command goes on from the older one.
    assert train(base, "--max_iters=3", "--resume") == 0
    assert train(flags, "--max_iters=5", "--resume") == 0
    assert json.loads((checkpoint(flags, 5) / folder.BASE).read_text())["base"].endswith("step-2")


@pytest.mark.parametrize("how", ["the run", "its folder beside the base", "a folder of peft's"])
def test_an_adapter_is_continued(
    home: Home, sft_run: list[str], sft_flags: list[str], how: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Its own options count, and the first loss is that of what was trained."""
    begin = began_with(sft_flags, out_dir(sft_run))
    if how != "the run":
        adapter = shutil.copytree(checkpoint(sft_run), tmp_path / "adapter")
        for name in (folder.BASE, "manifest.json") if how == "a folder of peft's" else ():
            (adapter / name).unlink()
        begin = [*sft_flags, f"--adapter={adapter}"]
    capsys.readouterr()
    assert train(begin) == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 4, alpha 16, on 14 layers" in said
    assert ("only its shapes tell" in said) == (how == "a folder of peft's")
    # The same rows come first, and are better known now.
    assert losses(begin)[0] < losses(sft_run)[0]
    note = json.loads((checkpoint(begin) / folder.BASE).read_text())
    assert note == {"base": str(home.model.resolve()), "fingerprint": folder.fingerprint(home.model)}
    first = losses(begin)
    shutil.rmtree(checkpoint(begin))
    # Whatever becomes of the adapter that it began with, the run has its own.
    again = elsewhere(begin, tmp_path / "again")
    assert train_until(2, sigterm, again) == 75
    shutil.rmtree(out_dir(sft_run))
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    assert train([*without(again, "--adapter", "--init_from"), "--resume"]) == 0
    assert losses(again) == first


def test_a_resumed_run_finds_its_base_elsewhere_but_takes_no_other(
    home: Home, sft_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = shutil.copytree(home.model, tmp_path / "first place")
    flags = began_with(sft_flags, base)
    assert train_until(2, sigterm, flags, *LORA) == 75
    moved = base.rename(tmp_path / "second place")
    resumed = [*without(flags, "--init_from"), "--resume"]
    assert "which is not there: give the place of these weights with --init_from" in refusal(capsys, resumed)
    weights = load_file(home.model / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    other = shutil.copytree(moved, tmp_path / "other")
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert "was trained on other weights than those in" in refusal(capsys, resumed, f"--init_from={other}")
    assert "--lora_r=8 does not fit the adapter" in refusal(capsys, resumed, f"--init_from={moved}", "--lora_r=8")
    assert "--lora_target_modules=q_proj does not fit" in refusal(
        capsys, resumed, f"--init_from={moved}", "--lora_target_modules=q_proj"
    )
    # Other words for the same layers are no change.
    same = "--lora_target_modules=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert train([*resumed, f"--init_from={moved}"], same) == 0


def test_nodes_with_other_weights_are_refused(home: Home, sft_run: list[str]):
    class Nodes:
        local_rank, other = 0, "0"

        def gather_from(self, work):
            return [work(), None, [self.other, *work()[1:]]]

    weights, nodes = folder.Weights(home.model, checkpoint(sft_run)), Nodes()
    with pytest.raises(ValueError, match="the nodes hold different weights in .* with the adapter .*: copy the same"):
        _fingerprint(weights, nodes)
    nodes.other = folder.fingerprint(home.model)
    assert _fingerprint(weights, nodes) == nodes.other


# DPO.


def by_hand(model: Decoder, data: Path) -> torch.Tensor:
    """Log-probabilities of all pairs' answers under a model."""
    dataset = DPODataset(data, "train", SEQ_LEN)
    task = DPOTask(model.eval(), 0, DPOConfig())
    ids = np.arange(len(dataset))
    with torch.no_grad():
        return task.log_probs(dataset.collate(ids) | {"row_ids": torch.from_numpy(ids)}).float()


def with_adapter(base: Path, adapter: Path) -> Decoder:
    model = Decoder(hf.read_config(base))
    hf.load_weights(model, base)
    lora.attach(model, folder.read_spec(adapter, model), 0)
    folder.load(model, adapter)
    return model


@pytest.mark.parametrize("kind", ["new", "continued"])
def test_the_reference_is_the_policy_as_it_started(
    home: Home, sft_run: list[str], dpo_flags: list[str], kind: str, tmp_path: Path
):
    flags, more, first = dpo_flags, DROPPED, Decoder(hf.read_config(home.model))
    hf.load_weights(first, home.model)
    if kind == "continued":
        flags, more = began_with(dpo_flags, out_dir(sft_run)), []
        first = with_adapter(home.model, checkpoint(sft_run))
    assert train(flags, *more) == 0
    kept = cache_file(flags)
    reference = load_file(kept)["log_probs"]
    assert (reference - by_hand(first, tmp_path / "data")).abs().max() < 1e-4
    assert losses(flags)[0] == pytest.approx(np.log(2), rel=2e-2 if kind == "new" else 1e-5)
    # Gone, it is computed again, and the trained values are not disturbed.
    parts, content = elsewhere(flags, tmp_path / "parts"), kept.read_bytes()
    assert train_until(2, sigterm, parts, *more) == 75
    shutil.rmtree(cache_file_dir(flags))
    assert train(parts, "--resume") == 0
    assert cache_file(flags).read_bytes() == content
    assert losses(parts) == losses(flags) and same_bits(final_state(parts, 4), final_state(flags, 4))


# Refusals.


def test_adapters_that_cannot_be_trained_are_refused(
    home: Home, sft_run: list[str], sft_flags: list[str], tiny_run: list[str], tmp_path: Path, capsys
):
    adapter, begun = checkpoint(sft_run), began_with(sft_flags, out_dir(sft_run))
    other = shutil.copytree(adapter, tmp_path / "for another base", ignore=shutil.ignore_patterns("manifest.json"))
    note = json.loads((other / folder.BASE).read_text()) | {"fingerprint": "0"}
    (other / folder.BASE).write_text(json.dumps(note))
    pickled = shutil.copytree(adapter, tmp_path / "pickled", ignore=shutil.ignore_patterns("manifest.json"))
    (pickled / folder.TENSORS).rename(pickled / "adapter_model.bin")
    for flags, more, says in (
        (sft_flags, ["--lora_r=0"], "lora_r must be positive, got 0"),
        (sft_flags, ["--lora_r=4", "--lora_target_modules=c_attn"], "fits no layer of the model with c_attn"),
        (sft_flags, ["--lora_r=4", "--lora_target_modules=all-linear,q_proj"], "all-linear beside other names"),
        (sft_flags, ["--lora_r=65"], "--lora_r=65 is more than the rank of any matrix of the model, at most 64"),
        (sft_flags, ["--lora_alpha=16"], "--lora_alpha is for an adapter: give --lora_r, too"),
        (sft_flags, ["--use_dora"], "--use_dora is for an adapter: give --lora_r, too"),
        (sft_flags, [*LORA, "--optimizer=muon"], "two thin factors: give --optimizer=adamw"),
        (sft_flags, [*LORA, "--rope_theta=50"], "--rope_theta=50.0: an adapter is for its base as it is"),
        (sft_flags, [*LORA, "--num_local_experts=4"], "leave out the adapter"),
        (sft_flags, [f"--adapter={adapter}", "--lora_alpha=3"], "--lora_alpha=3.0 does not fit the adapter in"),
        (sft_flags, [f"--adapter={adapter}", *LORA, "--lora_modules_to_save=embed_tokens"],
         "--lora_modules_to_save=embed_tokens does not fit the adapter in"),
        (sft_flags, [f"--adapter={other}"], "was trained on other weights than those in"),
        (sft_flags, [f"--adapter={pickled}"], "only adapter_model.bin, which may run code"),
        (sft_flags, [f"--adapter={home.model}"], "holds no adapter_config.json"),
        (begun, [f"--adapter={adapter}"], "holds an adapter, too: give the base"),
        (begun, ["--lora_r=4"], "holds an adapter already: leave out --lora_r to go on with it, or begin a new one"),
        (tiny_run, LORA, "--lora_r: an adapter needs weights to stand on"),
        (tiny_run, [f"--adapter={adapter}"], "--adapter: an adapter needs weights to stand on"),
    ):
        assert says in refusal(capsys, elsewhere(flags, tmp_path / "refused"), *more), more
    assert train(elsewhere(tiny_run, tmp_path / "plain"), "--max_iters=1") == 0
    told = refusal(capsys, elsewhere(tiny_run, tmp_path / "plain"), "--resume", "--max_iters=2", *LORA)
    assert "the run was begun without an adapter" in told


def test_frozen_matrices_take_two_thirds_of_the_work():
    config = ModelConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2).resolve()
    config = ModelConfig(**config.__dict__ | {"max_position_embeddings": 8})
    attention = flops.flops_per_token_strict(config, 8) - 6 * flops.active_parameters(config)
    blocks, head = flops.active_parameters(config) - 1600, 1600
    frozen = flops.flops_per_token_strict(config, 8, 0.5, flops.Frozen(added=10, head_trains=True))
    assert frozen == 4 * blocks + 0.5 * 6 * head + 6 * 10 + attention
