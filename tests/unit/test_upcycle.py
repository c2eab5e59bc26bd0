"""Sparse models that begin with the weights of dense ones."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import train_my_ddp
from model import Decoder, ModelConfig, flops, hf, upcycle
from tests.runs import elsewhere, final_state, losses, out_dir, same_bits
from training.build_model import build_model, choose_shape
from training.config import RunConfig, SystemConfig

DENSE = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
).resolve()  # fmt: skip
CPU = torch.device("cpu")


def save(folder: Path, config: ModelConfig) -> Decoder:
    """A model in a folder as others write them."""
    from safetensors.torch import save_file

    model = Decoder(config)
    model.initialize(3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
    save_file({name: tensor.contiguous() for name, tensor in hf.named_weights(model).items()},
              folder / "model.safetensors")  # fmt: skip
    return model


def shape_of(folder: Path, **fields) -> ModelConfig:
    wanted = ModelConfig(**{"num_local_experts": 4} | fields)
    given = frozenset({"num_local_experts", *fields})
    return choose_shape(wanted, RunConfig(init_from=str(folder)), given, folder, False, 96, 32)


@pytest.mark.parametrize(("changes", "fields", "family"), [
    ({}, {}, "mixtral"), ({}, {"num_experts_per_tok": 3}, "mixtral"), ({"qk_norm": True}, {}, "qwen3_moe"),
    ({"model_type": "mistral", "sliding_window": 8}, {}, "mixtral"),
    ({"qk_norm": True}, {"dense_layers": "0", "num_experts_per_tok": 1}, "qwen3_moe"),
    ({"tie_word_embeddings": True}, {}, "mixtral"),
])  # fmt: skip
def test_scores_are_those_of_the_dense_model_at_first(tmp_path: Path, changes: dict, fields: dict, family: str):
    dense = save(tmp_path / "dense", dataclasses.replace(DENSE, **changes).resolve())
    shape = shape_of(tmp_path / "dense", **fields)
    assert shape.model_type == family and shape.moe_intermediate_size == 48
    sparse = build_model(shape, SystemConfig(), 7, CPU, torch.float32, tmp_path / "dense")
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sparse.logits(sparse(ids)), dense.logits(dense(ids)), atol=1e-5)
    routers = {name: p for name, p in sparse.named_parameters() if ".router." in name}
    again = build_model(shape, SystemConfig(), 7, CPU, torch.float32, tmp_path / "dense")
    other = build_model(shape, SystemConfig(), 8, CPU, torch.float32, tmp_path / "dense")
    assert len(routers) == 2 - (shape.dense_layers == "0")
    for name, router in routers.items():
        assert torch.equal(again.get_parameter(name), router) and not torch.equal(other.get_parameter(name), router)
        assert 0.01 < router.std() < 0.03


@pytest.mark.parametrize(("changes", "fields", "message"), [
    ({}, {"moe_intermediate_size": 64}, "begin as copies of a layer whose width is 48: leave it out"),
    ({}, {"num_shared_experts": 1}, "--num_shared_experts: with the weights of a dense model"),
    ({}, {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_local_experts 4"),
    ({}, {"model_type": "llama"}, "num_local_experts is 0 in every llama, not 4"),
    ({"qkv_bias": True}, {}, "qkv_bias is False in every"),
])  # fmt: skip
def test_what_cannot_be_upcycled_is_refused(tmp_path: Path, changes: dict, fields: dict, message: str):
    save(tmp_path / "dense", dataclasses.replace(DENSE, **changes).resolve())
    with pytest.raises(ValueError, match=message):
        shape_of(tmp_path / "dense", **fields)


def test_layers_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="experts are SwiGLU without bias, and the feed-forward layers of the bloom"):
        upcycle.sparse_config(ModelConfig(mlp="gelu", model_type="bloom"), ModelConfig(num_local_experts=4))


def test_an_upcycled_run_begins_with_the_dense_loss(tiny_run: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)

    def train(flags: list[str], *more: str) -> int:
        return train_my_ddp.main([*flags, *more])

    assert train(tiny_run, "--max_iters=2") == 0
    sparse, dense = elsewhere(tiny_run, tmp_path / "sparse"), elsewhere(tiny_run, tmp_path / "dense")
    experts = [f"--init_from={out_dir(tiny_run)}", "--num_local_experts=4", "--router_aux_loss_coef=0.01"]
    assert train(dense, experts[0], "--max_iters=1") == 0
    assert train(sparse, *experts, "--max_iters=4") == 0
    assert losses(sparse)[0] == pytest.approx(losses(dense)[0], rel=1e-5)
    folder = out_dir(sparse) / "ckpt" / "step-4"
    config = hf.read_config(folder)
    assert config.model_type == "mixtral" and config.num_local_experts == 4

    resumed = elsewhere(tiny_run, tmp_path / "resumed")
    assert train(resumed, *experts, "--max_iters=4", "--save_interval=2") == 0
    shutil.rmtree(out_dir(resumed) / "ckpt" / "step-4")
    assert train(resumed, "--resume") == 0
    assert same_bits(final_state(resumed, 4), final_state(sparse, 4))
    assert train(resumed, "--resume", "--num_local_experts=3") == 2
    assert "--num_local_experts=3 does not fit the weights to start from, which have 4" in capsys.readouterr().out
