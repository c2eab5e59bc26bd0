"""Folders of families that are another family of transformers with other names, made without our rules."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Config = dict[str, object]
"""Content of a config.json."""
Tensors = dict[str, Tensor]
"""Name in a folder -> tensor."""


def baichuan_tensors(llama: Mapping[str, Tensor]) -> Tensors:
    """Q, K and V are one matrix."""
    made = {}
    for name, tensor in llama.items():
        if ".q_proj." in name:
            parts = [llama[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            made[name.replace(".q_proj.", ".W_pack.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            made[name] = tensor
    return made


CHATGLM = (
    (r"^lm_head\.", "transformer.output_layer."), (r"^model\.norm\.", "transformer.encoder.final_layernorm."),
    (r"^model\.embed_tokens\.", "transformer.embedding.word_embeddings."),
    (r"^model\.layers\.", "transformer.encoder.layers."), (r"\.self_attn\.o_proj\.", ".self_attention.dense."),
    (r"\.mlp\.gate_up_proj\.", ".mlp.dense_h_to_4h."), (r"\.mlp\.down_proj\.", ".mlp.dense_4h_to_h."),
    (r"\.self_attn\.W_pack\.", ".self_attention.query_key_value."),
)  # fmt: skip


def chatglm_tensors(glm: Mapping[str, Tensor]) -> Tensors:
    """Tensors of a Glm of transformers, named as in ChatGLM3."""
    made = {}
    for name, tensor in baichuan_tensors(glm).items():
        for theirs, ours in CHATGLM:
            name = re.sub(theirs, ours, name)
        made[name] = tensor
    return made


def aquila_as_llama(config: Config) -> Config:
    return _renamed(config, "llama")


def internlm_as_llama(config: Config) -> Config:
    made = _renamed(config, "llama")
    rotary = made.pop("rotary", None) or {"base": 10000, "type": "dynamic"}
    made["rope_theta"], made["attention_bias"] = float(rotary["base"]), made.pop("bias", True)
    if rotary["type"] == "dynamic":
        made["rope_scaling"] = {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return made


GLM_KEYS = {
    "padded_vocab_size": "vocab_size", "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "kv_channels": "head_dim", "multi_query_group_num": "num_key_value_heads", "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings", "add_qkv_bias": "attention_bias",
}  # fmt: skip
"""Key of ChatGLM3 -> that of Glm."""
GLM_DEFAULTS = {"kv_channels": 128, "multi_query_group_num": 1, "layernorm_epsilon": 1e-5, "add_qkv_bias": False,
                "seq_length": 2048, "pad_token_id": 0}  # fmt: skip
"""Defaults of ChatGLM3's class."""


def chatglm_as_glm(config: Config) -> Config:
    made = GLM_DEFAULTS | _renamed(config, "glm")
    rope = {"rope_type": "default", "rope_theta": 1e4 * made.pop("rope_ratio", 1), "partial_rotary_factor": 0.5}
    made.pop("rope_theta", None)
    named = {GLM_KEYS.get(key, key): value for key, value in made.items() if value is not None}
    return named | {"rope_parameters": rope}


def _renamed(config: Config, model_type: str) -> Config:
    others = {key: value for key, value in config.items() if key not in ("architectures", "auto_map")}
    return others | {"model_type": model_type}
