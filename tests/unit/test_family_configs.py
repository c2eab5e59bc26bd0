"""Configurations of families with their own code, as published, and those of new models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from model import Decoder, ModelConfig, hf
from model.families import FAMILIES

CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
ANY = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.29.2", "use_cache": True, "auto_map": CODE}
SEVEN = {
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "pad_token_id": 0,
    "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
}  # fmt: skip
THIRTEEN = SEVEN | {"hidden_size": 5120, "intermediate_size": 13696, "num_attention_heads": 40, "num_hidden_layers": 40,
                    "model_max_length": 4096}  # fmt: skip
GLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696, "hidden_dropout": 0.0,
    "fp32_residual_connection": False, "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05,
    "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28,
    "original_rope": True, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True, "seq_length": 32768,
    "quantization_bit": 0, "pre_seq_len": None, "prefix_projection": False, "tie_word_embeddings": False,
}  # fmt: skip
BLOOM = {
    "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_embed": 1024, "n_inner": None, "n_layer": 24,
    "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True, "vocab_size": 250880,
    "skip_bias_add_qkv": False, "unk_token_id": 0,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict, dict[str, object]]] = {
    "BLOOM 560M": (BLOOM, {"hidden_size": 1024, "intermediate_size": 4096, "position_embedding": "alibi",
                           "norm": "layernorm", "tie_word_embeddings": True}),
    "Baichuan 7B": (
        SEVEN | {"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000,
                 "max_position_embeddings": 4096},
        {"position_embedding": "rope", "normalized_head": False, "max_position_embeddings": 4096},
    ),
    "Baichuan 13B": (
        THIRTEEN | {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "vocab_size": 64000,
                    "_from_model_config": True},
        {"position_embedding": "alibi", "normalized_head": False, "max_position_embeddings": 4096},
    ),
    "Baichuan 2 7B": (
        SEVEN | {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "vocab_size": 125696,
                 "max_position_embeddings": 4096, "model_max_length": 4096, "z_loss_weight": 0},
        {"position_embedding": "rope", "normalized_head": True},
    ),
    "Baichuan 2 13B": (
        THIRTEEN | {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "vocab_size": 125696,
                    "gradient_checkpointing": False, "tokenizer_class": "BaichuanTokenizer"},
        {"position_embedding": "alibi", "normalized_head": True},
    ),
    "ChatGLM2 6B": ({key: value for key, value in GLM.items() if key != "quantization_bit"}, {"rope_theta": 1e4}),
    "ChatGLM3 6B": (GLM, {"rope_theta": 1e4, "num_key_value_heads": 2, "head_dim": 128, "qkv_bias": True,
                          "rope_interleaved": True, "partial_rotary_factor": 0.5}),
    "ChatGLM3 6B 32K": (GLM | {"rope_ratio": 50}, {"rope_theta": 5e5, "max_position_embeddings": 32768}),
    "GLM-4 9B": (
        GLM | {"rope_ratio": 500, "num_layers": 40, "num_hidden_layers": 40, "padded_vocab_size": 151552,
               "vocab_size": 151552, "layernorm_epsilon": 1.5625e-07, "seq_length": 131072, "classifier_dropout": None},
        {"rope_theta": 5e6, "num_hidden_layers": 40, "vocab_size": 151552},
    ),
    "InternLM 7B": (
        SEVEN | {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True, "vocab_size": 103168,
                 "max_position_embeddings": 2048, "rotary": {"base": 10000, "type": "dynamic"}},
        {"attention_bias": True, "rope_scaling": "dynamic", "rope_scaling_factor": 1.0},
    ),
    "InternLM 20B": (
        SEVEN | {"model_type": "internlm", "bias": False, "hidden_size": 5120, "intermediate_size": 13824,
                 "num_attention_heads": 40, "num_key_value_heads": 40, "num_hidden_layers": 60, "pretraining_tp": 1,
                 "vocab_size": 103168, "rotary": {"base": 10000, "type": "dynamic"}, "max_position_embeddings": 4096},
        {"attention_bias": False, "num_key_value_heads": 40},
    ),
    "AquilaChat2 34B 16K": (
        SEVEN | {"model_type": "aquila", "architectures": ["AquilaForCausalLM"], "hidden_size": 6144,
                 "intermediate_size": 24576, "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 100008,
                 "max_position_embeddings": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        {"rope_scaling": "linear", "rope_scaling_factor": 4.0, "num_key_value_heads": 8},
    ),
    "Yuan 2 2B": (
        SEVEN | {"model_type": "yuan", "architectures": ["YuanForCausalLM"], "hidden_size": 2048, "vocab_size": 135040,
                 "intermediate_size": 8192, "num_hidden_layers": 24, "max_position_embeddings": 8192,
                 "model_max_length": 8192, "tie_word_embeddings": True, "causal_mask": True, "dropout": 0.1,
                 "eod_token": 77185, "eod_token_id": 77185, "sep_token": 77187, "sep_token_id": 77185,
                 "mask_token_id": 77185, "reset_attention_mask": True, "reset_position_ids": True,
                 "tokenizer_class": "YuanTokenizer", "use_flash_attention": False, "use_loss_mask": False},
        {"local_filter": True, "tie_word_embeddings": True, "rope_theta": 1e4},
    ),
}  # fmt: skip
"""Model -> (keys of its config.json, some of our fields)."""
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str):
    values, fields = PUBLISHED[name]
    brings_code = FAMILIES[values["model_type"]].brings_code
    config = hf.from_hf_config(ANY | values | ({} if brings_code else {"auto_map": None}))
    assert {field: getattr(config, field) for field in fields} == fields
    assert hf.from_hf_config(hf.to_hf_config(config, torch.bfloat16)) == config
    # Shapes and names fit, too.
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(config, num_hidden_layers=1))
    assert hf.named_weights(model)


@pytest.mark.parametrize(("name", "changes", "sentence"), [
    ("Baichuan 13B", {"max_position_embeddings": 4096}, "position_embedding is alibi in every baichuan with"),
    ("Baichuan 2 7B", {"max_position_embeddings": None}, "position_embedding is rope in every baichuan with"),
    ("Baichuan 7B", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ("Baichuan 13B", {"normalized_head": True}, "normalized_head is False in every baichuan with vocab_size 64000"),
    ("Baichuan 13B", {"vocab_size": 64100}, "add normalized_head"),
    ("ChatGLM2 6B", {"rope_ratio": 16}, "rope_ratio = 16 divides the positions of ChatGLM2-6B-32K"),
    ("ChatGLM3 6B", {"rope_ratio": 16, "rope_theta": 1e4}, "rope_theta = 10000 is not 10000 times rope_ratio = 16"),
    ("ChatGLM3 6B", {"quantization_bit": 4}, "quantization_bit = 4"),
    ("ChatGLM3 6B", {"multi_query_attention": None}, "multi_query_attention = null"),
    ("GLM-4 9B", {"num_hidden_layers": 41}, "num_layers is 40 and num_hidden_layers is 41"),
    ("BLOOM 560M", {"n_embed": None}, r"hidden_size \(or n_embed\) is missing"),
    ("BLOOM 560M", {"n_head": 8}, "num_attention_heads is 16 and n_head is 8"),
    ("BLOOM 560M", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("BLOOM 560M", {"pretraining_tp": 2, "slow_but_exact": True}, "slow_but_exact = true"),
    ("BLOOM 560M", {"auto_map": CODE}, "auto_map"),
    ("Yuan 2 2B", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
    ("Yuan 2 2B", {"use_moe": True}, "use_moe"),
    ("InternLM 7B", {"rope_theta": 5e5}, "rope_theta is 500000 and rotary has base 10000"),
    ("AquilaChat2 34B 16K", {"rope_scaling": LLAMA3}, "rope_scaling of type llama3 is not supported"),
])  # fmt: skip
def test_what_is_ambiguous_or_another_model_is_refused(name: str, changes: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        hf.from_hf_config(PUBLISHED[name][0] | changes)


TINY = ModelConfig(
    vocab_size=48, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=16
)  # fmt: skip
OWN = ("bloom", "baichuan", "chatglm", "internlm", "aquila", "yuan")


@pytest.mark.parametrize("model_type", OWN)
def test_a_new_model_of_the_family(model_type: str, tmp_path: Path):
    given = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
    family = FAMILIES[model_type]
    config = family.new(TINY, given).resolve()
    assert {name: getattr(config, name) for name in (*family.fixed, *family.usual)} == {**family.usual, **family.fixed}
    model = Decoder(config)
    model.initialize(3)
    save_file(hf.named_weights(model), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
    again = Decoder(hf.read_config(tmp_path))
    hf.load_weights(again, tmp_path)
    assert again.config == config and all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize(("model_type", "change", "sentence"), [
    ("bloom", {"position_embedding": "rope"}, "position_embedding is alibi in every bloom, not rope"),
    ("bloom", {"num_key_value_heads": 1}, "as many key and value heads as query heads, not 1"),
    ("bloom", {"intermediate_size": 64}, "intermediate_size is 4 hidden_size"),
    ("yuan", {"rope_theta": 500.0}, "rope_theta is 10000 in every yuan, not 500"),
    ("yuan", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06 in every yuan, not 1e-05"),
    ("baichuan", {"rope_theta": 500.0}, "rope_theta is 10000 in every baichuan, not 500"),
    ("baichuan", {"head_dim": 16}, "its head_dim is hidden_size / num_attention_heads, not 16"),
    ("internlm", {"rope_scaling": "linear"}, "rope_scaling is none or dynamic in every internlm, not linear"),
    ("chatglm", {"attention_bias": True}, "attention_bias is False in every chatglm, not True"),
])  # fmt: skip
def test_a_new_model_that_the_family_cannot_be(model_type: str, change: dict, sentence: str):
    wanted = dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match=sentence):
        FAMILIES[model_type].new(wanted, frozenset(change))


def test_sizes_of_a_bloom_may_be_written_with_a_point():
    values = PUBLISHED["BLOOM 560M"][0]
    config = hf.from_hf_config(values | {"n_embed": 1024.0, "n_layer": 24.0})
    assert config == hf.from_hf_config(values) and type(config.intermediate_size) is int


def test_transformers_loads_a_bloom_that_we_wrote(tmp_path: Path):
    model = Decoder(FAMILIES["bloom"].new(TINY, frozenset()).resolve())
    model.initialize(3)
    save_file(hf.named_weights(model), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(24)[None] * 5 % 48
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.eval().logits(model(ids)), atol=1e-5, rtol=0.0)
