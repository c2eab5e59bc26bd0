"""Every key of llama's and qwen2's configurations: another value changes our scores as it changes transformers', or the
folder is refused by the key's name."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import LlamaConfig as TheirLlama
from transformers import Qwen2Config as TheirQwen2

from model import Decoder, hf
from model.families import FAMILIES

SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
}  # fmt: skip
LENGTH = 24
"""Length of the text: beyond the context, so that dynamic scaling acts, and beyond any window."""

OTHER: dict[str, list[object]] = {
    # Keys of the model.
    "vocab_size": [80], "hidden_size": [32], "intermediate_size": [48], "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 8], "num_key_value_heads": [1, 4, None], "head_dim": [6],
    "hidden_act": ["gelu", "swish"], "max_position_embeddings": [8, 64], "initializer_range": [0.5],
    "rms_norm_eps": [0.5], "tie_word_embeddings": [True],
    "attention_bias": [True], "attention_dropout": [0.3], "mlp_bias": [True], "pretraining_tp": [2],
    "rope_theta": [100.0], "partial_rotary_factor": [0.5], "original_max_position_embeddings": [4],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, {"type": "yarn", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}, {"rope_type": "default"}, {},
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 50.0}, {"rope_type": "proportional", "rope_theta": 1e4},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0},
        {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ],
    "use_sliding_window": [True], "sliding_window": [4], "max_window_layers": [0, 1],
    "layer_types": [["full_attention"] * 2, ["full_attention", "sliding_attention"], ["full_attention"]],
    # Keys about how transformers computes, and what it returns.
    "use_cache": [False], "return_dict": [False], "output_hidden_states": [True], "output_attentions": [True],
    "dtype": ["bfloat16"], "torch_dtype": ["float16"], "torchscript": [True], "use_bfloat16": [True],
    "tf_legacy_loss": [True], "chunk_size_feed_forward": [4], "gradient_checkpointing": [True], "xla_device": [True],
    "attn_implementation": ["sdpa", "flash_attention_2", "paged|eager"], "_attn_implementation_autoset": [True],
    "_attn_implementation": ["sdpa", "paged|eager"], "_attn_implementation_internal": ["sdpa", "paged|eager"],
    "experts_implementation": ["grouped_mm"], "tie_last_hidden_states": [False], "pruned_heads": [{"0": [1]}, {}],
    "is_encoder_decoder": [True], "is_decoder": [True], "add_cross_attention": [True], "tie_encoder_decoder": [True],
    "cross_attention_hidden_size": [8], "per_layer_config": [{"0": {"intermediate_size": 8}}],
    # Keys about the folder, its tokenizer and another head.
    "model_type": ["qwen3"], "architectures": [["LlamaForSequenceClassification"], ["MistralForCausalLM"], "Llama"],
    "transformers_version": ["4.31.0"],
    "_name_or_path": ["a"], "_model_name_or_path": ["a"], "name_or_path": ["a"], "_commit_hash": ["abc"],
    "tokenizer_class": ["LlamaTokenizer"], "prefix": ["a"], "id2label": [{"0": "a"}], "label2id": [{"a": 0}],
    "num_labels": [3], "problem_type": ["regression"], "finetuning_task": ["a"], "task_specific_params": [{"a": 1}],
    "auto_map": [{"AutoModelForCausalLM": "modeling_a.A"}, {"AutoTokenizer": ["a.A", None]}],
    "bos_token_id": [5], "eos_token_id": [5, [5, 6]], "pad_token_id": [5], "sep_token_id": [5],
    "decoder_start_token_id": [5], "unk_token_id": [5], "mask_token_id": [5], "cls_token_id": [5],
    # Keys of published folders.
    "_from_model_config": [True], "_flash_attn_2_enabled": [True], "_pre_quantization_dtype": ["float16"],
    "transformers.js_config": [{"kv_cache_dtype": {"fp16": "float16"}}], "unsloth_fixed": [True],
    "unsloth_version": ["2025.1.1"], "max_sequence_length": [2048], "model_max_length": [99], "seq_length": [99],
    "bias": [True], "rope_interleaved": [True, False], "rope_condense_ratio": [8, 1], "use_mrope": [True, False],
    "qkv_bias": [True], "is_llama_config": [True], "quantization_config": [{"quant_method": "awq"}],
    "quantization": [{"bits": 4}],
    "compression_config": [{"format": "dense"}],
    # Keys of sister families, in which they change the model.
    "attention_multiplier": [0.1], "embedding_multiplier": [12.0], "logits_scaling": [8.0],
    "residual_multiplier": [0.2],
    "logit_scale": [0.1], "final_logit_softcapping": [30.0], "attn_logit_softcapping": [50.0], "scale_emb": [12],
    "query_pre_attn_scalar": [256], "use_qk_norm": [True], "num_experts": [8], "num_local_experts": [8],
    "no_rope_layers": [[1, 0]], "is_causal": [False], "attention_chunk_size": [4], "transformers_weights": ["a.bin"],
    "fusion_config": [{}], "text_config": [{}], "rope_local_base_freq": [1e4], "alibi": [True], "neft": [5],
}  # fmt: skip
"""Key -> values other than its default."""

GENERATION = {
    "do_sample": True, "early_stopping": True, "bad_words_ids": [[5]], "suppress_tokens": [5], "output_scores": True,
    "begin_suppress_tokens": [5], "num_assistant_tokens_schedule": "constant", "return_dict_in_generate": True,
    "remove_invalid_values": True, "exponential_decay_length_penalty": [5, 1.1],
}  # fmt: skip
DRAWN = sorted(GenerationConfig._get_default_generation_params() | {"max_new_tokens": None})
OTHER = OTHER | {key: [GENERATION.get(key, 3)] for key in DRAWN if key not in OTHER}
"""Keys about sampling are numbers, except those above."""
VERSION_4 = (
    # Constructors of 4.46.3 and 4.57.6 that version 5 no longer has.
    "rope_theta rope_scaling torch_dtype torchscript use_bfloat16 tf_legacy_loss pruned_heads is_decoder "
    "cross_attention_hidden_size add_cross_attention tie_encoder_decoder finetuning_task num_labels "
    "task_specific_params tokenizer_class prefix bos_token_id pad_token_id eos_token_id sep_token_id "
    "decoder_start_token_id output_attentions xla_device name_or_path _commit_hash attn_implementation "
    "gradient_checkpointing _attn_implementation_autoset"
).split()


def test_no_key_of_the_classes_is_left_out():
    fields = {field.name for kind in (TheirLlama, TheirQwen2) for field in dataclasses.fields(kind)}
    told = {key for family in FAMILIES.values() for key in (*family.harmless, *family.harmless_at, *family.understood)}
    assert fields | set(VERSION_4) | told <= OTHER.keys()


@cache
def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight, large enough that operations other than the matmuls count."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape, generator=generator) * 0.4 + (1.0 if "norm" in name else 0.0)


@torch.no_grad()
def scores(directory: Path, config: dict) -> tuple[torch.Tensor, torch.Tensor] | str:
    """Our logits and theirs for one folder, or the sentence that refuses it."""
    (directory / "config.json").write_text(json.dumps(config))
    try:
        ours = Decoder(hf.read_config(directory))
    except ValueError as error:
        return str(error).split("config.json: ", 1)[1]
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), **how).eval()
    theirs.config.return_dict = True  # Its own language model cannot be called without.
    for name, parameter in theirs.named_parameters():
        parameter.copy_(numbers(name, tuple(parameter.shape)))
    weights = {name: parameter.contiguous() for name, parameter in theirs.named_parameters()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    hf.load_weights(ours, directory)
    ids = torch.arange(LENGTH)[None] * 7 % 60
    return ours.eval().logits(ours(ids)), theirs(ids).logits


def agree(found: tuple[torch.Tensor, torch.Tensor] | str) -> bool:
    if not isinstance(found, str):
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)
    return not isinstance(found, str)


@pytest.mark.parametrize("key", OTHER)
def test_another_value_counts_as_in_transformers_or_is_refused_by_name(key: str, tmp_path: Path):
    for kind in ("llama", "qwen2"):
        for value in OTHER[key]:
            found = scores(tmp_path, SHAPE | {"model_type": kind} | {key: value})
            names = [key, *value] if isinstance(value, dict) else [key]
            assert agree(found) or any(name in found for name in names)


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


@pytest.mark.parametrize("rope", [{}, LINEAR, DYNAMIC, LLAMA3])
def test_either_version_of_transformers_finds_the_rope_in_what_we_write(rope: dict, tmp_path: Path):
    config = hf.from_hf_config(SHAPE | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": rope})
    written = hf.to_hf_config(config, torch.bfloat16)
    newer, older = ("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")
    for unknown, name in ((newer, "torch_dtype"), (older, "dtype")):
        read = {key: value for key, value in written.items() if key not in unknown}
        assert hf.from_hf_config(read) == config and read[name] == "bfloat16"
        assert agree(scores(tmp_path, read))


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        # The first layers of a qwen2 have no window, and all layers here are first ones.
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window = true"),
        ({"model_type": "llama", "use_sliding_window": False, "sliding_window": 4}, "sliding_window = 4"),
        # 32 for transformers.
        ({"model_type": "qwen2", "num_key_value_heads": ...}, "num_key_value_heads is missing"),
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
    "Qwen2.5, saved by transformers 5": {
        "model_type": "qwen2", "dtype": "bfloat16", "layer_types": ["full_attention"] * 2, "max_window_layers": 1,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None,
        "use_sliding_window": False, "pad_token_id": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_as_they_are_published_load(name: str, tmp_path: Path):
    assert agree(scores(tmp_path, SHAPE | {"model_type": "llama"} | PUBLISHED[name]))
