"""Keys of the configurations in Hugging Face's folders, with values by which families are compared with transformers.

tests/unit/test_hf_keys.py goes through them. A new family gets an entry in `SWEPT`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import GenerationConfig

from tests.family_folders import aquila_as_llama, chatglm_as_glm, chatglm_tensors, internlm_as_llama

MISSING = "the key is not there"
"""Value that takes a key out."""
Config = dict[str, object]
"""Content of a config.json."""
Tensors = dict[str, Tensor]
"""Name in a folder -> tensor."""

SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
}  # fmt: skip

_YARN = {
    "factor": 4.0, "beta_fast": 0.9, "beta_slow": 0.1, "original_max_position_embeddings": 12, "rope_theta": 100.0,
}  # fmt: skip
_LONGROPE = {"short_factor": [1.0, 1.5], "long_factor": [1.25, 3.0], "original_max_position_embeddings": 8}
_LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
    "rope_theta": 20.0,
}  # fmt: skip
ROPES: dict[str, tuple[Config, list[Config]]] = {
    "default": ({"rope_theta": 20.0}, [{"rope_theta": 100.0}]),
    "linear": ({"factor": 2.0}, [{"factor": 3.0}, {"rope_theta": 100.0}]),
    "dynamic": ({"factor": 2.0}, [{"factor": 3.0}, {"rope_theta": 100.0}]),
    "llama3": (
        _LLAMA3, [{"factor": 2.0}, {"low_freq_factor": 0.5}, {"high_freq_factor": 2.0}, {"rope_theta": 50.0},
                  {"original_max_position_embeddings": 12}],
    ),
    "yarn": (
        _YARN,
        [{"factor": 2.0}, {"beta_fast": 0.5}, {"beta_slow": 0.2}, {"beta_fast": None, "beta_slow": None},
         {"truncate": False}, {"attention_factor": 0.5}, {"attention_factor": 0.8, "mscale": 2, "mscale_all_dim": 1},
         {"mscale": 2.0, "mscale_all_dim": 0.5}, {"rope_theta": 50.0},
         {"original_max_position_embeddings": MISSING, "truncate": False},
         {"factor": None, "original_max_position_embeddings": 7}],
    ),
    "longrope": (
        _LONGROPE,
        [{"factor": 8.0}, {"attention_factor": 0.5}, {"long_factor": [2, 3]}, {"rope_theta": 100.0},
         {"original_max_position_embeddings": 6},
         # The text has 24 tokens: the short list counts.
         {"original_max_position_embeddings": 24}, {"original_max_position_embeddings": 24, "short_factor": [1, 2]}],
    ),
    "proportional": (
        {"partial_rotary_factor": 0.5}, [{"partial_rotary_factor": 1.0}, {"factor": 2.0}, {"rope_theta": 100.0}],
    ),
}  # fmt: skip
"""Kind of rotary positions -> its keys, and changes each of which makes another model."""


def ropes(*kinds: str, num_pairs: int = 2) -> list[Config]:
    """Rotary positions of these kinds.

    Args:
        num_pairs: half the width of a head.
    """
    found = []
    for kind in kinds:
        usual, changes = ROPES[kind]
        for change in ({}, *changes):
            rope = {"rope_type": kind, "rope_theta": 10.0} | usual | change
            lists = {key: value * (num_pairs // 2) for key, value in rope.items() if isinstance(value, list)}
            found.append({key: value for key, value in (rope | lists).items() if value is not MISSING})
    return found


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
        {"rope_theta": 100.0, "partial_rotary_factor": 0.5}, {"rope_type": "su", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "truncate": None}, {"rope_type": "default", "mrope_section": [1, 1]},
        *ropes(*ROPES),
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
    "model_type": ["gpt2"], "architectures": [["LlamaForSequenceClassification"], ["MistralForCausalLM"], "Llama"],
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


@dataclass(frozen=True)
class Swept:
    """A family, to be compared with transformers at many values of its keys."""

    shape: Config
    """Keys that all folders of the family have. The text has 24 tokens: make the context and any window shorter."""
    other: dict[str, list[object]] = field(default_factory=dict)
    """Key -> values other than its default, for keys that OTHER lacks, or in place of its values. Each key of `shape`
    is also tried without being there."""
    as_theirs: Callable[[Config], Config] | None = lambda values: values
    """The configuration of a class of transformers that computes the same; None: there is none, so that a key which is
    not refused must change our configuration, or be known to be harmless."""
    as_folder: Callable[[Tensors], Tensors] = lambda tensors: tensors
    """Tensors of that class's folder -> those of the family's own."""


WITHOUT_CLASS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"} | {"rms_norm_eps": 1e-6}
OTHER_BLOOM = {
    "n_embed": [16, 32], "n_layer": [2, 3], "n_head": [4, 2], "n_inner": [64, 99], "layer_norm_epsilon": [0.5],
    "hidden_dropout": [0.3], "apply_residual_connection_post_layernorm": [True], "slow_but_exact": [True],
    "attention_softmax_in_fp32": [False], "bias_dropout_fusion": [False], "masked_softmax_fusion": [False],
    "skip_bias_add": [False], "skip_bias_add_qkv": [True], "offset_alibi": [7], "tie_word_embeddings": [False],
    "num_hidden_layers": [2, 3], "num_attention_heads": [4, 8],
}  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "padded_vocab_size": 64, "hidden_size": 16, "ffn_hidden_size": 32, "num_layers": 2,
    "num_attention_heads": 4, "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2,
    "seq_length": 16, "layernorm_epsilon": 1e-5, "add_qkv_bias": True,
}  # fmt: skip
OTHER_CHATGLM = {
    "padded_vocab_size": [80], "ffn_hidden_size": [48], "num_layers": [1, 3], "num_hidden_layers": [2, 3],
    "vocab_size": [64, 80], "kv_channels": [16], "multi_query_attention": [False], "multi_query_group_num": [1, 4],
    "layernorm_epsilon": [0.5], "add_qkv_bias": [False], "add_bias_linear": [True], "rope_ratio": [1, 50, 16],
    "hidden_dropout": [0.3], "classifier_dropout": [0.1], "rmsnorm": [False], "post_layer_norm": [False],
    "apply_residual_connection_post_layernorm": [True], "apply_query_key_layer_scaling": [False],
    "attention_softmax_in_fp32": [False], "bias_dropout_fusion": [False], "fp32_residual_connection": [True],
    "original_rope": [False], "quantization_bit": [0, 4], "pre_seq_len": [0, 128], "prefix_projection": [True],
}  # fmt: skip
OTHER_YUAN = {
    "num_key_value_heads": [1], "tie_word_embeddings": [False], "causal_mask": [False], "use_shareqk": [True],
    "use_moe": [True], "dropout": [0.1], "use_flash_attention": [True], "reset_attention_mask": [True],
    "reset_position_ids": [True], "eod_token": [5], "eod_token_id": [5], "sep_token": [5], "use_loss_mask": [True],
    "lf_conv2d_num_pad": [0], "moe_config": [{}],
    "attention_projection_size": [8], "rotary_base": [500],
}  # fmt: skip
OTHER_ROTARY = [
    {"base": 100, "type": "origin"}, {"base": 100, "type": "dynamic", "scaling_factor": 2.0}, {"base": 100},
    {"base": 10000, "type": "origin", "long": 2}, {"base": 10000, "type": "yarn"},
]  # fmt: skip

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW: Config = {"use_sliding_window": True, "sliding_window": 6}
WINDOWS_BY_LAYER = {
    "use_sliding_window": [False, None], "sliding_window": [4, 4096, None, 0], "max_window_layers": [0, 2, -1, 9],
    "layer_types": [[FULL] * 2, [SLIDING] * 2, [SLIDING, FULL], [FULL], [FULL, "chunked_attention"], SLIDING],
}  # fmt: skip
WINDOW_OF_ALL = {
    "use_sliding_window": [False, True], "sliding_window": [4, 4096, None, 0], "max_window_layers": [0, 2],
    "layer_types": [[FULL] * 2, [SLIDING] * 2, [SLIDING, FULL], [SLIDING]],
}  # fmt: skip
EXPERTS: dict[str, list[object]] = {
    "num_local_experts": [3, 0], "num_experts": [3], "num_experts_per_tok": [1, 3, 9], "output_router_logits": [True],
    "router_aux_loss_coef": [0.5], "moe_intermediate_size": [12],
}  # fmt: skip
SWEPT = {
    "bloom": Swept(
        {"model_type": "bloom", "vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}, OTHER_BLOOM
    ),
    "baichuan": Swept(
        WITHOUT_CLASS | {"model_type": "baichuan", "normalized_head": False},
        {"normalized_head": [True], "z_loss_weight": [0.1], "hidden_size": [32, 5120], "vocab_size": [80, 125696],
         "num_key_value_heads": [1]},
        as_theirs=None,
    ),
    "chatglm": Swept(CHATGLM, OTHER_CHATGLM, chatglm_as_glm, chatglm_tensors),
    "internlm": Swept(WITHOUT_CLASS | {"model_type": "internlm"},
                      {"rotary": OTHER_ROTARY, "bias": [False], "num_attention_heads": [2]}, internlm_as_llama),
    "aquila": Swept(SHAPE | {"model_type": "aquila"}, as_theirs=aquila_as_llama),
    "yuan": Swept(WITHOUT_CLASS | {"model_type": "yuan"}, OTHER_YUAN, as_theirs=None),
    "llama": Swept(SHAPE | {"model_type": "llama"}),
    "qwen2": Swept(SHAPE | WINDOW | {"model_type": "qwen2", "max_window_layers": 1}, WINDOWS_BY_LAYER),
    "mistral": Swept(SHAPE | {"model_type": "mistral", "sliding_window": 6}, WINDOW_OF_ALL),
    "qwen3": Swept(SHAPE | WINDOW | {"model_type": "qwen3", "max_window_layers": 1, "head_dim": 4}, WINDOWS_BY_LAYER),
    "mixtral": Swept(
        SHAPE | {"model_type": "mixtral", "sliding_window": 6, "num_local_experts": 4},
        WINDOW_OF_ALL | EXPERTS | {"router_jitter_noise": [0.1]},
    ),
    "qwen3_moe": Swept(
        SHAPE | WINDOW
        | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        WINDOW_OF_ALL | EXPERTS | {
            "num_experts": [3, 0], "num_local_experts": [3], "norm_topk_prob": [True, None],
            "decoder_sparse_step": [2, 3, 0], "mlp_only_layers": [[0], [1], [0, 1], [7], [], None, "0"],
        },
    ),
    "ernie4_5_moe": Swept(
        SHAPE
        | {"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8,
           "moe_layer_start_index": 0},
        EXPERTS | {
            "tie_word_embeddings": [False, True], "moe_num_experts": [3, 0], "num_experts": [3], "moe_k": [1, 3, 9],
            "moe_num_shared_experts": [0, 1], "moe_layer_start_index": [1, 2, -5], "moe_layer_end_index": [0, 1, 7, -2],
            "moe_layer_interval": [2, 3, 0], "moe_norm_min": [0.5], "moe_use_aux_free": [True, None],
            "moe_gate": ["topk", "top2_fused"], "moe_capacity": [[64, 64]], "num_nextn_predict_layers": [1],
            "use_bias": [True], "use_rmsnorm": [True, False],
        },
    ),
}  # fmt: skip
