"""Every key of each family's configuration: another value changes our scores as it changes transformers', or the folder
is refused by the key's name."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model import Decoder, ModelConfig, hf
from model.families import FAMILIES
from model.families.rope import rope_fields, rope_keys
from model.rope import attention_scale
from tests.config_keys import MISSING, OTHER, ROPES, SHAPE, SWEPT, VERSION_4, Config, Swept, ropes

LENGTH = 24
"""Length of the text: beyond the context, so that dynamic scaling acts, and beyond any window."""
IDS = torch.arange(LENGTH)[None] * 7 % 60
LLAMA = SWEPT["llama"]


def test_every_family_is_swept():
    assert SWEPT.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", SWEPT)
def test_no_key_is_left_out(model_type: str):
    family, swept = FAMILIES[model_type], SWEPT[model_type]
    told = {*family.harmless, *family.harmless_at, *family.understood, *VERSION_4}
    if model_type in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[model_type]
        told |= {field.name for field in dataclasses.fields(kind)} | kind.attribute_map.keys()
    assert told <= OTHER.keys() | swept.other.keys()


@cache
def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight, large enough that operations other than the matmuls count."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape, generator=generator) * 0.4 + (1.0 if "norm" in name else 0.0)


@torch.no_grad()
def theirs(directory: Path, config: Config) -> torch.nn.Module:
    """transformers' model for a configuration."""
    (directory / "config.json").write_text(json.dumps(config))
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), **how).eval()
    model.config.return_dict = True  # Its own language model cannot be called without.
    for name, parameter in model.named_parameters():
        parameter.copy_(numbers(name, tuple(parameter.shape)))
    return model


class Comparison:
    """Our models of one family beside transformers'."""

    def __init__(self, swept: Swept, directory: Path):
        self.swept, self.directory = swept, directory
        self._scores: dict[ModelConfig, torch.Tensor] = {}

    @torch.no_grad()
    def of(self, config: Config) -> tuple[torch.Tensor, torch.Tensor] | str:
        """Our logits and theirs for one folder, or the sentence that refuses it, ours or theirs."""
        assert self.swept.as_theirs is not None
        try:
            ours = hf.from_hf_config(json.loads(json.dumps(config)))
        except ValueError as error:
            return str(error)
        try:
            model = theirs(self.directory, self.swept.as_theirs(config))
            expected = model(IDS).logits
        except Exception:
            # A value that transformers cannot build, as null for a number: there is nothing to compare with.
            return f"transformers refuses it: {', '.join(config)}"
        if ours not in self._scores:
            self._scores[ours] = self._compute(ours, config, model)
        return self._scores[ours], expected

    def _compute(self, ours: ModelConfig, config: Config, model: torch.nn.Module) -> torch.Tensor:
        """Our scores with the weights of transformers' model, through a folder. They depend on nothing but `ours`,
        since the weights are `numbers`."""
        tensors = revert_weight_conversion(model, dict(model.named_parameters()))
        stored = self.swept.as_folder({name: tensor.contiguous() for name, tensor in tensors.items()})
        save_file(stored, self.directory / "model.safetensors", {"format": "pt"})
        (self.directory / "config.json").write_text(json.dumps(config))
        decoder = Decoder(ours).eval()
        hf.load_weights(decoder, self.directory)
        return decoder.logits(decoder(IDS))

    def difference(self, changes: Config) -> str:
        """What is silently different in a folder with these keys; empty: nothing."""
        found = self.of({key: value for key, value in (self.swept.shape | changes).items() if value is not MISSING})
        if isinstance(found, str):
            return "" if any(is_named(key, value, found) for key, value in changes.items()) else found
        is_same = found[0].shape == found[1].shape and torch.allclose(*found, atol=2e-5, rtol=1e-4)
        return "" if is_same else "the scores differ"


def scores(directory: Path, config: Config) -> tuple[torch.Tensor, torch.Tensor] | str:
    return Comparison(SWEPT[str(config["model_type"])], directory).of(config)


def agree(found: tuple[torch.Tensor, torch.Tensor] | str) -> bool:
    if not isinstance(found, str):
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)
    return not isinstance(found, str)


def values_of(swept: Swept) -> list[tuple[str, object]]:
    """Each key with each of its values."""
    values = {key: [MISSING] for key in swept.shape if key != "model_type"}
    for key, others in (OTHER | swept.other).items():
        values[key] = [*others, *values.get(key, [])]
    return [(key, value) for key, others in values.items() for value in others]


def is_named(key: str, value: object, sentence: str) -> bool:
    return any(name in sentence for name in [key, *(value if isinstance(value, dict) else [])])


def silent_differences(swept: Swept, directory: Path, *only: str) -> list[str]:
    """Values of keys that neither count as in transformers nor are refused by name.

    Args:
        only: keys to try; by default all.
    """
    comparison, harmless = Comparison(swept, directory), FAMILIES[str(swept.shape["model_type"])].harmless
    assert agree(comparison.of(swept.shape))
    values = [(key, value) for key, value in values_of(swept) if not only or key in only]
    singly = [(key, value) for key, value in values if key not in harmless]
    # Keys that change nothing do not do so together either; that saves half of the time.
    together = [dict(values), dict(reversed(values))]
    for changes in together:
        changes = {key: value for key, value in changes.items() if key in harmless}
        if comparison.difference(changes):
            singly += changes.items()
    told = {f"{key} = {value}": comparison.difference({key: value}) for key, value in singly}
    return [f"{what}: {difference}" for what, difference in told.items() if difference]


@pytest.mark.parametrize("model_type", [name for name, swept in SWEPT.items() if swept.as_theirs])
def test_another_value_counts_as_in_transformers_or_is_refused_by_name(model_type: str, tmp_path: Path):
    assert not silent_differences(SWEPT[model_type], tmp_path)


def test_a_silent_difference_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(FAMILIES["llama"], "harmless", FAMILIES["llama"].harmless | {"rope_interleaved", "hidden_act"})
    found = silent_differences(LLAMA, tmp_path, "rope_interleaved", "hidden_act", "rms_norm_eps")
    assert found == ["hidden_act = gelu: the scores differ"]


@pytest.mark.parametrize("model_type", [name for name, swept in SWEPT.items() if not swept.as_theirs])
def test_another_value_changes_the_configuration_or_is_refused_by_name(model_type: str):
    """For families that transformers does not have."""
    family, swept, silent = FAMILIES[model_type], SWEPT[model_type], []
    usual = hf.from_hf_config(swept.shape)
    for key, value in values_of(swept):
        known = family.harmless | {"architectures", "auto_map"}
        if key in known or value is MISSING or value in family.harmless_at.get(key, ()):
            continue
        try:
            if hf.from_hf_config(swept.shape | {key: value}) == usual:
                silent.append(f"{key} = {value} changes nothing")
        except ValueError as error:
            if not is_named(key, value, str(error)):
                silent.append(f"{key} = {value}: {error}")
    assert not silent


@pytest.mark.parametrize("kind", ROPES)
def test_every_number_of_every_rope_counts_as_in_transformers(kind: str, tmp_path: Path):
    """The text is longer than the context."""
    comparison, seen = Comparison(LLAMA, tmp_path), list[torch.Tensor]()
    for rope in ropes(kind, num_pairs=8):
        found = comparison.of(LLAMA.shape | {"head_dim": 16, "rope_parameters": rope})
        assert agree(found), found
        assert not any(torch.allclose(torch.as_tensor(found[0]), scores, atol=1e-3) for scores in seen), rope
        seen.append(torch.as_tensor(found[0]))


LINEAR, DYNAMIC = {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
BEFORE = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("rope", "refused"),
    [
        ({"rope_scaling": LINEAR, "rope_theta": 100.0}, None),
        # Version 5 also accepts the older key.
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        ({"rope_scaling": LINEAR, "rope_parameters": DYNAMIC | {"rope_theta": 50.0}, "rope_theta": 50.0}, None),
        ({"rope_scaling": {}, "rope_parameters": DYNAMIC | {"rope_theta": 50.0}}, None),
        ({"rope_scaling": LINEAR | {"rope_theta": 50.0}, "rope_theta": 50.0}, None),
        ({"rope_scaling": LLAMA3, BEFORE: 8}, None),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 50.0}, BEFORE: 4}, None),
        ({"rope_parameters": DYNAMIC | {"rope_theta": 50.0}, BEFORE: 4}, None),
        # Versions 4 and 5 would read different numbers, or neither reads the number there.
        ({"rope_scaling": LINEAR | {"rope_theta": 50.0}}, "rope_theta is 50 in rope_scaling and 10000 for want of"),
        ({"rope_scaling": LINEAR | {"rope_theta": 50.0}, "rope_theta": 60}, "rope_theta is 50 in rope_scaling and 60"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 50.0}}, "rope_theta is 50 in rope_parameters and"),
        ({"rope_parameters": {"rope_theta": 50.0}, "rope_theta": 1e4}, "rope_theta is 50 in rope_parameters and 10000"),
        ({"rope_scaling": LLAMA3, BEFORE: 4}, "original_max_position_embeddings is 8 in rope_scaling and 4 beside it"),
        ({"rope_scaling": LLAMA3 | {BEFORE: None}}, "rope_scaling has original_max_position_embeddings null"),
        ({"rope_scaling": LINEAR | {"rope_type": "dynamic"}}, 'rope_scaling has rope_type "dynamic" and type "linear"'),
        ({"rope_scaling": False}, "rope_scaling must be a dictionary, not false"),
    ],
)  # fmt: skip
def test_a_rope_that_stands_in_several_places(rope: dict, refused: str | None, tmp_path: Path):
    found = scores(tmp_path, SHAPE | {"model_type": "llama"} | rope)
    assert refused in found if refused else agree(found)


@pytest.mark.parametrize("rope", [{}, LINEAR, DYNAMIC, LLAMA3, *ropes(*ROPES)], ids=str)
def test_either_version_of_transformers_finds_the_rope_in_what_we_write(rope: dict, tmp_path: Path):
    rope = {key: value for key, value in rope.items() if key != "rope_theta"}
    config = hf.from_hf_config(SHAPE | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": rope})
    written = hf.to_hf_config(config, torch.bfloat16)
    newer, older = ("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")
    for unknown, name in ((newer, "torch_dtype"), (older, "dtype")):
        read = {key: value for key, value in written.items() if key not in unknown}
        again = hf.from_hf_config(read)
        assert hf.to_hf_config(again, torch.bfloat16) == written and read[name] == "bfloat16"
        assert BEFORE in read or again.rope_scaling != "longrope", "version 4 looks for it there"
        # Version 4 has no word for longrope's factor, so the scale that follows from it is written.
        is_told = again.rope_scaling == "longrope" and again.rope_scaling_factor == 8.0
        scale = attention_scale(config) if is_told else config.rope_attention_factor
        assert again == dataclasses.replace(config, rope_attention_factor=scale)
        assert agree(scores(tmp_path, read))


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": LINEAR}])
def test_a_rotated_part_of_a_family_that_has_one(scaling: Config):
    """In both spellings, for families that say so."""
    for values in ({"partial_rotary_factor": 0.5} | scaling, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        fields = rope_fields(values, theta=500.0, rotates_part=True)
        assert (fields["partial_rotary_factor"], fields["rope_theta"]) == (0.5, 500.0)
        written = rope_keys(dataclasses.replace(hf.from_hf_config(LLAMA.shape), **fields))
        for unknown in (("rope_parameters",), ("rope_theta", "rope_scaling", "partial_rotary_factor")):
            read = {key: value for key, value in written.items() if key not in unknown}
            assert rope_fields(read, rotates_part=True) == fields


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        # The first layers of a qwen2 have no window, and all layers here are first ones.
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, None),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types names sliding"),
        ({"model_type": "llama", "use_sliding_window": False, "sliding_window": 4}, "sliding_window = 4"),
        # 32 for transformers.
        ({"model_type": "qwen2", "num_key_value_heads": ...}, "not a multiple of num_key_value_heads 32"),
        ({"model_type": "llama", "num_key_value_heads": ...}, None),
        ({"model_type": "llama", "a\nb": [0] * 99}, '"a\\nb" = [0, 0, '),
        ({"model_type": "llama", "anything": None}, None),
    ],
)
def test_keys_that_depend_on_each_other(config: dict, refused: str | None, tmp_path: Path):
    config = {key: value for key, value in (SHAPE | config).items() if value is not ...}
    found = scores(tmp_path, config)
    assert refused in found and "\n" not in found if refused else agree(found)


PUBLISHED = {
    "Llama 2": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "max_length": 4096, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "max_sequence_length": 2048,
        "_name_or_path": "llama-7b", "tie_word_embeddings": False,
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 4,
        "bos_token_id": 1, "eos_token_id": [2, 3], "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": LLAMA3,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "unsloth_fixed": True, "unsloth_version": "2025.3.1",
        "_attn_implementation_autoset": True, "torch_dtype": "bfloat16",
    },
    "SmolLM2": {
        "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
        "rope_scaling": None, "initializer_range": 0.041666666666666664, "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "DeepSeek Coder": {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "eos_token_id": 32},
    "of 2023": {"architectures": ["LLaMAForCausalLM"], "hidden_act": "silu", "pad_token_id": -1, "bos_token_id": 0},
    "Qwen2.5": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 1, "use_mrope": False,
        "sliding_window": 8, "use_sliding_window": False, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0, "eos_token_id": 5,
    },
    "Mistral of 2023": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "rope_theta": 10000.0, "sliding_window": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": True,
    },
    "Mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
        "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    },
    "Qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "head_dim": 8, "max_window_layers": 2, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "rms_norm_eps": 1e-6,
    },
    "Qwen3 with experts": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 8, "max_window_layers": 2, "mlp_only_layers": [],
        "moe_intermediate_size": 8, "norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 8,
        "output_router_logits": False, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    },
    "Ernie 4.5 with experts": {
        "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1,
        "pad_token_id": 0, "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 8, "moe_k": 6,
        "moe_layer_end_index": 1, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 8,
        "moe_num_shared_experts": 2, "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "use_bias": False, "use_cache": False,
    },
    "Qwen2.5, saved by transformers 5": {
        "model_type": "qwen2", "dtype": "bfloat16", "layer_types": ["full_attention"] * 2, "max_window_layers": 1,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None,
        "use_sliding_window": False, "pad_token_id": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_as_they_are_published_load(name: str, tmp_path: Path):
    assert agree(scores(tmp_path, SHAPE | {"model_type": "llama"} | PUBLISHED[name]))
