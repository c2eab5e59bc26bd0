"""Folders of adapters: peft reads ours, we read peft's, and what neither may read is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import Decoder, ModelConfig, hf
from model.adapters import folder, lora
from model.adapters.folder import Weights
from model.adapters.lora import LoraSpec
from model.families import family_named
from tests.peers import peer

IDS = torch.arange(24).view(2, 12)
ADAPTERS: dict[str, LoraSpec] = {
    "lora": LoraSpec(4, 16.0, 0.1, ("q_proj", "v_proj")),
    "rslora": LoraSpec(3, 8.0, 0.0, ("all-linear",), (), use_rslora=True),
    "dora": LoraSpec(2, 4.0, 0.0, ("q_proj", "down_proj"), ("embed_tokens", "lm_head"), use_dora=True),
    "one layer": LoraSpec(2, 4.0, 0.0, ("layers.1.self_attn.q_proj",), ("norm",)),
}


def config(model_type: str = "llama", tied: bool = False, **more: object) -> ModelConfig:
    return ModelConfig(
        model_type=model_type, vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
        initializer_range=0.1, **more,
    ).resolve()  # fmt: skip


def write_base(path: Path, shape: ModelConfig, seed: int = 0) -> Path:
    model = Decoder(shape)
    model.initialize(seed)
    path.mkdir()
    save_file(hf.named_weights(model), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(hf.to_hf_config(shape, torch.float32)))
    return path


def adapted(base: Path, spec: LoraSpec, seed: int = 1) -> Decoder:
    """A model whose adapter has learnt something."""
    model = Decoder(hf.read_config(base)).eval()
    hf.load_weights(model, base)
    lora.attach(model, spec, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(path: Path, model: Decoder, spec: LoraSpec, base: Path) -> Path:
    saved = folder.saved_files(model, spec, base, folder.fingerprint(base))
    path.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in saved.convert(saved.parameters).items()}
    save_file(tensors, path / folder.TENSORS, {"format": "pt"})
    for name, content in saved.jsons.items():
        (path / name).write_text(json.dumps(content))
    return path


def read(base: Path, adapter: Path) -> Decoder:
    model = Decoder(hf.read_config(base)).eval()
    hf.load_weights(model, base)
    lora.attach(model, folder.read_spec(adapter, model), 0)
    folder.load(model, adapter)
    return model


@torch.no_grad()
def scores(model: Decoder) -> Tensor:
    return model.logits(model(IDS))


def scores_of_peft(base: Path, adapter: Path) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_reads_ours_and_we_read_it_back(name: str, tied: bool, tmp_path: Path):
    base, spec = write_base(tmp_path / "base", config(tied=tied)), ADAPTERS[name]
    model = adapted(base, spec)
    path = write(tmp_path / "adapter", model, spec, base)
    again = read(base, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert folder.weights_of(path) == Weights(base, path)
    peer("peft")
    theirs = scores_of_peft(base, path)
    assert (theirs - scores(model)).abs().max() < 1e-5 and (theirs - scores(read_plain(base))).abs().max() > 1e-3


def read_plain(base: Path) -> Decoder:
    model = Decoder(hf.read_config(base)).eval()
    hf.load_weights(model, base)
    return model


THEIRS: dict[str, dict] = {
    "lora": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["o_proj", "up_proj"], "use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    "pattern": {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.up_proj)",
                "exclude_modules": ["k_proj"]},
    "layers": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "lora_dropout": 0.1},
    "ranks": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_pefts(name: str, tmp_path: Path):
    peft = peer("peft")
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", config())
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, **THEIRS[name]),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "adapter")
    assert (scores(read(base, tmp_path / "adapter")) - scores_of_peft(base, tmp_path / "adapter")).abs().max() < 1e-5
    assert folder.weights_of(tmp_path / "adapter") == Weights(base, tmp_path / "adapter")
    assert folder.require_base(Weights(base, tmp_path / "adapter"), "any") is False


# Families whose folders keep q, k and v together, or their rows in another order.


def fused(model_type: str) -> ModelConfig:
    shape = ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
        initializer_range=0.1,
    )  # fmt: skip
    return family_named(model_type).new(shape, frozenset()).resolve()


@pytest.mark.parametrize("model_type", ["bloom", "baichuan", "chatglm", "yuan", "ernie4_5_moe"])
@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_adapters_of_fused_layers_are_those_of_the_whole(model_type: str, name: str, tmp_path: Path):
    base, spec = write_base(tmp_path / "base", fused(model_type)), ADAPTERS[name]
    model = adapted(base, spec)
    path = write(tmp_path / "adapter", model, spec, base)
    again = read(base, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    # Added to the folder's own tensors, by the scale that PEFT would take.
    merged = merged_by_hand(base, path)
    assert (scores(read_plain(merged)) - scores(model)).abs().max() < 1e-5


def merged_by_hand(base: Path, adapter: Path) -> Path:
    values, tensors = json.loads((adapter / folder.CONFIG).read_text()), load_file(adapter / folder.TENSORS)
    weights = load_file(base / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = (
            next((v for k, v in values[f"{name}_pattern"].items() if re.fullmatch(rf"(.*\.)?({k})", module)), default)
            for name, default in (("rank", values["r"]), ("alpha", values["lora_alpha"]))
        )
        assert len(tensors[key]) == rank
        scale = alpha / (rank**0.5 if values["use_rslora"] else rank)
        weights[f"{module}.weight"] += scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    other = adapter.with_name("merged")
    shutil.copytree(base, other)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return other


def test_peft_adapts_a_bloom_as_a_whole(tmp_path: Path):
    peer("peft")
    base, spec = write_base(tmp_path / "base", fused("bloom")), LoraSpec(2, 4.0, 0.0, ("all-linear",), (), False, True)
    model = adapted(base, spec)
    path = write(tmp_path / "adapter", model, spec, base)
    assert (scores_of_peft(base, path) - scores(model)).abs().max() < 1e-5
    # As PEFT alone would have written it.
    (path / folder.BASE).unlink()
    with pytest.raises(ValueError, match="gives some layers another rank"):
        folder.read_spec(path, read_plain(base))
    spec = replace(spec, targets=("q_proj", "k_proj", "v_proj"))
    model = adapted(base, spec)
    path = write(tmp_path / "attention", model, spec, base)
    (path / folder.BASE).unlink()
    assert (scores(read(base, path)) - scores(model)).abs().max() < 1e-5


def test_a_fingerprint_is_that_of_the_weights_however_they_are_split(tmp_path: Path):
    base = write_base(tmp_path / "base", config())
    fingerprint, weights = folder.fingerprint(base), load_file(base / "model.safetensors")
    (tmp_path / "split").mkdir()
    names = list(weights)
    for number, part in enumerate((names[1:], names[:1]), 1):
        file = tmp_path / "split" / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file, {"format": "pt"})
    assert folder.fingerprint(tmp_path / "split") == fingerprint
    weights[names[0]].view(-1)[0] += 1
    save_file(weights, base / "model.safetensors")
    assert folder.fingerprint(base) != fingerprint


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base, spec = write_base(tmp_path / "base", config()), ADAPTERS["lora"]
    return write(tmp_path / "adapter", adapted(base, spec), spec, base)


REFUSED: dict[str, tuple[dict, str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type = \"IA3\" is not supported: only LORA"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type"),
    "biases": ({"bias": "all"}, "bias = \"all\" is not supported"),
    "another base": ({"init_lora_weights": "pissa"}, "it changes the base"),
    "an unknown key": ({"lora_of_tomorrow": 3}, "\"lora_of_tomorrow\" = 3 is not supported"),
    "no layer": ({"target_modules": ["c_attn"]}, "fits no layer"),
    "rank 0": ({"r": 0}, "r = 0 is not possible"),
    "several ranks": ({"rank_pattern": {"q_proj": 2}}, "another rank"),
    "no module": ({"modules_to_save": ["classifier"]}, "modules_to_save names \"classifier\""),
    "a damaged pattern": ({"target_modules": "("}, "is no pattern"),
    "replicas": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "other rows": ({"r": 8}, "lora_A.weight is (4, 16) in"),
    "more layers": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks 4 tensors"),
    "fewer layers": ({"target_modules": ["q_proj"]}, "which adapter_config.json does not ask for"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_are_not_understood_are_refused_by_name(name: str, adapter: Path):
    change, says = REFUSED[name]
    path = adapter / folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(says)):
        folder.check(config(), adapter)


def no_tensors(adapter: Path) -> None:
    (adapter / folder.TENSORS).unlink()


def pickled(adapter: Path) -> None:
    # Not even a pickle: nobody opens it.
    (adapter / folder.TENSORS).rename(adapter / "adapter_model.bin")


def not_finite(adapter: Path) -> None:
    tensors = load_file(adapter / folder.TENSORS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, adapter / folder.TENSORS)


def cut_off(adapter: Path) -> None:
    content = (adapter / folder.TENSORS).read_bytes()
    (adapter / folder.TENSORS).write_bytes(content[:-10])


def damaged_note(adapter: Path) -> None:
    (adapter / folder.BASE).write_text('{"base": 3}')


@pytest.mark.parametrize(("damage", "says"), [
    (no_tensors, "holds no adapter_model.safetensors: fetch"), (pickled, "only adapter_model.bin, which may run code"),
    (not_finite, "not finite"), (cut_off, "cannot be read"), (damaged_note, "must name a base"),
])  # fmt: skip
def test_damaged_folders_are_refused(damage: Callable[[Path], None], says: str, adapter: Path):
    base = folder.base_of(adapter)
    damage(adapter)
    with pytest.raises(ValueError, match=says):
        read(base, adapter)


def test_another_base_and_a_base_that_is_gone_are_refused(adapter: Path, tmp_path: Path):
    base, other = folder.base_of(adapter), write_base(tmp_path / "other", config(), seed=2)
    assert folder.require_base(Weights(base, adapter), folder.fingerprint(base))
    with pytest.raises(ValueError, match="trained on other weights than those in"):
        folder.require_base(Weights(other, adapter), folder.fingerprint(other))
    with pytest.raises(ValueError, match="holds an adapter, too"):
        folder.weights_of(adapter, adapter)
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        folder.weights_of(base, other)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="which is not there: give the base itself, and this folder with --adapter"):
        folder.weights_of(adapter)
    assert folder.weights_of(other, adapter) == Weights(other, adapter)
