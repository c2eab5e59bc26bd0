"""A family by itself: renamed and fused tensors are converted both ways, and every parameter has a role."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Decoder, ModelConfig, hf
from model.config import ModelType
from model.families import FAMILIES, family_of
from model.families.family import Family, Rule, fused_rows
from model.families.llama import LlamaFamily
from model.roles import role_of
from optimizer.param_groups import is_hidden_matrix
from training.build_model import choose_shape
from training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
).resolve()  # fmt: skip


class PackedFamily(LlamaFamily):
    """A llama with other names, whose Q, K and V are one tensor, and whose up and gate are halves of another."""

    model_type = "packed"
    architectures = ("PackedForCausalLM",)
    prefix = "transformer."
    harmless = LlamaFamily.harmless | {"brand"}

    def their_name(self, name: str) -> str:
        return "output.weight" if name == "lm_head.weight" else super().their_name(name)

    def rules(self, config: ModelConfig, names: Iterable[str]) -> list[Rule]:
        fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        rules = super().rules(config, [name for name in names if not any(f".{part}." in name for part in fused)])
        query, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        for layer in (f"layers.{number}" for number in range(config.num_hidden_layers)):
            qkv = [f"{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
            rules.append(fused_rows(f"transformer.{layer}.attn.W_pack.weight", qkv, [query, kv, kv]))
            halves = [f"{layer}.mlp.{part}_proj.weight" for part in ("up", "gate")]
            rules.append(fused_rows(f"transformer.{layer}.mlp.in.weight", halves, [config.intermediate_size] * 2))
        return rules


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> PackedFamily:
    monkeypatch.setitem(FAMILIES, "packed", PackedFamily())
    return FAMILIES["packed"]


def save(directory: Path, model: Decoder, family: Family, **changes: torch.Tensor) -> Path:
    weights = hf.named_weights(model, family) | changes
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    brand = {"brand": "any"} if family.model_type == "packed" else {}
    config = hf.to_hf_config(model.config, torch.float32, family=family) | brand
    (directory / "config.json").write_text(json.dumps(config))
    return directory


EVEN = {"num_key_value_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CHANGES: dict[str, dict[str, object]] = {
    "llama": {"mlp_bias": True}, "qwen2": {"sliding_window": 4, "full_attention_layers": "1"},
    "mistral": {"sliding_window": 4}, "qwen3": {"attention_bias": True, "head_dim": 8},
    "mixtral": EXPERTS | {"sliding_window": 4}, "qwen3_moe": EXPERTS | {"dense_layers": "1", "norm_topk_prob": False},
    "ernie4_5_moe": EXPERTS | {"moe_intermediate_size": 8, "num_shared_experts": 2, "router_bias": True},
    "bloom": EVEN | {"intermediate_size": 64}, "baichuan": EVEN, "chatglm": {"qkv_bias": False}, "internlm": EVEN,
    "yuan": EVEN | {"rms_norm_eps": 1e-6},
}  # fmt: skip
"""Family -> fields of CONFIG in which a model of it differs."""


def model_of(model_type: str, **more: object) -> ModelConfig:
    changes = CHANGES.get(model_type, {}) | more
    return FAMILIES[model_type].new(dataclasses.replace(CONFIG, **changes), changes.keys()).resolve()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_each_family_comes_back(model_type: str, tied: bool, tmp_path: Path):
    model = Decoder(model_of(model_type, tie_word_embeddings=tied))
    model.initialize(1)
    save(tmp_path, model, FAMILIES[model_type])
    again = Decoder(hf.read_config(tmp_path))
    hf.load_weights(again, tmp_path)
    assert again.config == model.config and all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_fused_tensors_come_back(packed: PackedFamily, tied: bool, tmp_path: Path):
    model = Decoder(packed.new(dataclasses.replace(CONFIG, tie_word_embeddings=tied), frozenset()))
    model.initialize(1)
    save(tmp_path, model, packed)
    written = load_file(tmp_path / "model.safetensors")
    assert written["transformer.layers.1.attn.W_pack.weight"].shape == (32, 16)
    assert ("output.weight" in written) == (not tied)
    config = hf.read_config(tmp_path)
    hf.check_weights(config, tmp_path)
    again = Decoder(config)
    hf.load_weights(again, tmp_path)
    assert config == model.config and all(map(torch.equal, model.parameters(), again.parameters()))
    # Also without the prefix, and over several files.
    names = sorted(written)
    for part, number in ((names[::2], 1), (names[1::2], 2)):
        short = {name.removeprefix("transformer."): written[name] for name in part}
        save_file(short, tmp_path / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "model.safetensors").unlink()
    fresh = Decoder(config)
    hf.load_weights(fresh, tmp_path)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_a_fused_tensor_is_checked_as_any_other(packed: PackedFamily, tmp_path: Path):
    model, name = Decoder(CONFIG), "transformer.layers.0.attn.W_pack.weight"
    model.initialize(1)
    for wrong, message in (
        (torch.ones(31, 16), r"W_pack.weight is \(31, 16\) in .*, \(32, 16\) in the model"),
        (torch.full((32, 16), torch.nan), "W_pack.weight in .* holds values that are not finite"),
    ):
        save(tmp_path, model, packed, **{name: wrong})
        with pytest.raises(ValueError, match=message):
            hf.load_weights(Decoder(CONFIG), tmp_path)
    weights = hf.named_weights(model, packed)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights of the model, for example layers.0.attn.W_pack.weight"):
        hf.check_weights(CONFIG, tmp_path)


def test_a_tensor_that_is_part_of_several_files_is_joined(packed: PackedFamily, monkeypatch, tmp_path: Path):
    """Several tensors of a folder are one of our parameters, as experts may be."""

    def rules(config: ModelConfig, names: Iterable[str]) -> list[Rule]:
        rest = LlamaFamily.rules(packed, config, [name for name in names if name != "norm.weight"])
        halves = ("transformer.norm.a", "transformer.norm.b")
        join = lambda ours: ours[0].split(8)  # noqa: E731
        return [*rest, Rule(halves, ("norm.weight",), join, lambda theirs: [torch.cat(theirs)])]

    monkeypatch.setattr(packed, "rules", rules)
    model, again = Decoder(CONFIG), Decoder(CONFIG)
    model.initialize(1)
    model.norm.weight.data = torch.arange(16.0)
    save(tmp_path, model, packed)
    written = load_file(tmp_path / "model.safetensors")
    save_file({"transformer.norm.b": written.pop("transformer.norm.b")}, tmp_path / "model-00002-of-00002.safetensors")
    save_file(written, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors").unlink()
    hf.load_weights(again, tmp_path)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_every_family_can_be_named_by_a_flag():
    assert sorted(get_args(ModelType)) == sorted(["", *FAMILIES])


def test_a_family_is_named_in_its_own_room_alone():
    # "llama" is also a mode of a kernel from elsewhere.
    names = "|".join(FAMILIES.keys() - {"llama"})
    a_family = re.compile(rf"""model_type\b[^\n]{{0,3}}(==|!=| in )|["']({names})["']""")
    rooms = [ROOT / name for name in ("model", "training", "tasks", "serving", "optimizer", "parallel")]
    for path in [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]:
        if path.parent != ROOT / "model" / "families":
            # model/config.py lists the names that a flag may have.
            text = re.sub(r"ModelType = Literal\[.*?\]", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not a_family.search(text), path


UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
"""Heads that cannot share the width evenly."""


@pytest.mark.parametrize(("changes", "expected", "generic"), [
    ({}, "llama", None), ({"attention_bias": True}, "llama", None), ({"qkv_bias": True}, "qwen2", "llama"),
    # Of a window, only a qwen2 knows beside these biases.
    ({"qkv_bias": True, "sliding_window": 4}, "qwen2", None), ({"sliding_window": 4}, "mistral", None),
    ({"qk_norm": True}, "qwen3", None), (EXPERTS, "mixtral", None), (EXPERTS | {"qk_norm": True}, "qwen3_moe", None),
    (EXPERTS | {"rope_interleaved": True, "router_bias": True}, "ernie4_5_moe", None),
    # transformers 5 refuses such a llama.
    (UNEVEN, "mistral", None), (UNEVEN | {"qkv_bias": True}, "qwen2", None),
])  # fmt: skip
def test_a_model_without_a_family_finds_one(changes: dict, expected: str, generic: str | None):
    config = dataclasses.replace(CONFIG, **changes).resolve()
    assert family_of(config).model_type == expected
    assert family_of(config, generic_tokenizer=True).model_type == (generic or expected)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"qk_norm": True, "qkv_bias": True},
     "no checkpoint can hold this model, since no family of models has all of it: qkv_bias is False in every qwen3, "
     "not True; qk_norm is False in every qwen2, not True"),
    (EXPERTS | {"moe_intermediate_size": 8},
     "moe_intermediate_size is intermediate_size, 32, in every mixtral, not 8"),
    (EXPERTS | {"qk_norm": True, "num_shared_experts": 1}, "all of it: num_shared_experts is 0 in every qwen3_moe, "),
    (EXPERTS | {"router_bias": True, "model_type": "mixtral"},
     "no checkpoint can hold the model as a mixtral: router_bias is False in every mixtral, not True; change that, or"),
    (UNEVEN | {"model_type": "llama"}, "hidden_size is a multiple of num_attention_heads, 3, in every llama, not "),
    ({"model_type": "mixtral", "mlp_bias": True}, "num_local_experts is above 0 in every mixtral, and 1 more;"),
    (EXPERTS | {"model_type": "ernie4_5_moe", "rope_interleaved": True, "dense_layers": "0,1"},
     "dense_layers leaves layers at equal distances, each a multiple of it, in every ernie4_5_moe, not 0,1"),
    (EXPERTS | {"router_bias": True}, "mixtral, not True; to begin such a model, give --model_type=ernie4_5_moe"),
    (EXPERTS | {"dense_layers": "0"},
     "dense_layers is empty in every mixtral, not 0; to begin such a model, give --model_type=qwen3_moe"),
])  # fmt: skip
def test_a_model_that_no_family_can_hold_is_refused(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        family_of(dataclasses.replace(CONFIG, **changes).resolve())


@pytest.mark.parametrize("biases", [{}, {"qkv_bias": True}, {"attention_bias": True}])
def test_every_parameter_has_the_role_that_its_shape_says(biases: dict):
    model = Decoder(dataclasses.replace(CONFIG, **biases))
    roles = model.roles()
    for name, parameter in model.named_parameters():
        role = roles[name]
        assert role.decays == (parameter.dim() == 2) == (role.begins in ("normal", "residual"))
        named = dataclasses.make_dataclass("Named", ["name", "shape"])(name, tuple(parameter.shape))
        assert role.is_hidden == is_hidden_matrix(named)
        assert (role.cut == "vocabulary") == (name in ("embed_tokens.weight", "lm_head.weight"))
        assert (role.cut == "row") == name.endswith(("o_proj.weight", "down_proj.weight"))
    assert roles["layers.0.self_attn.q_proj.weight"].cut == "column"
    with pytest.raises(AssertionError, match="layers.0.mlp.gate.weight has no role"):
        role_of("layers.0.mlp.gate.weight")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_value_that_is_not_known_to_be_harmless_is_refused_by_name(model_type: str):
    family = FAMILIES[model_type]
    config = model_of(model_type)
    values = hf.to_hf_config(config, torch.float32, family=family)
    assert hf.from_hf_config(values) == config
    assert family.harmless_at
    for key in family.harmless_at:
        with pytest.raises(ValueError, match=re.escape(key)):
            hf.from_hf_config(values | {key: 12345})


def test_what_a_family_brings_is_not_missed_before_it_is_asked():
    """Flags are checked before the family fills in the rest."""
    wanted = ModelConfig(model_type="ernie4_5_moe", router_bias=True, num_shared_experts=1)
    wanted.check()
    new = FAMILIES["ernie4_5_moe"].new(wanted, {"router_bias", "num_shared_experts"})
    assert new.num_local_experts > 0 and new.router_bias and new.num_shared_experts == 1
    with pytest.raises(ValueError, match="num_shared_experts has no meaning without experts"):
        dataclasses.replace(wanted, model_type="").check()


def test_a_run_that_was_saved_as_a_llama_that_transformers_refuses_goes_on(tmp_path: Path):
    """Earlier versions wrote such checkpoints."""
    config = dataclasses.replace(CONFIG, **UNEVEN)
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32, family=FAMILIES["llama"])))
    shape = choose_shape(config, RunConfig(), frozenset(), tmp_path, True, config.vocab_size, 32)
    assert family_of(shape).model_type == "mistral" and shape == config
