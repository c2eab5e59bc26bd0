"""Keys in the config.json of a llama or a qwen2, besides those that hf.py reads: which of them cannot change the model.

What a key means is known, or the folder is refused: transformers passes over keys of other families in silence, and the
model that comes out is another one than was trained. Plain data and one check; nothing here builds anything.
"""

import json

_GENERATION = {
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "assistant_confidence_threshold",
    "assistant_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "mask_token_id",
    "cls_token_id", "decoder_start_token_id",
}  # fmt: skip
"""How transformers samples from the model's scores, and where a text begins and ends."""
_OUTPUTS = {
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "tie_last_hidden_states", "dtype",
    "torch_dtype", "use_bfloat16", "torchscript", "gradient_checkpointing", "chunk_size_feed_forward", "is_decoder",
    "tf_legacy_loss", "xla_device",
}  # fmt: skip
"""What transformers returns besides scores, in which numbers it computes, and how it saves memory."""
_SAME_MATH = {"pretraining_tp"}
"""Into how many slices transformers 4 cuts its matmuls."""
_HEADS = {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"}
"""Of a classifier's head, which no causal language model has."""
_TOKENIZER = {"tokenizer_class", "prefix", "model_max_length"}
_ORIGIN = {
    "model_type", "transformers_version", "name_or_path", "_name_or_path", "_model_name_or_path", "_commit_hash",
    "_from_model_config", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_pre_quantization_dtype",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "max_sequence_length", "seq_length",
}  # fmt: skip
"""Who wrote the folder, from what and with what; and lengths that are only said beside max_position_embeddings."""
HARMLESS = frozenset(_GENERATION | _OUTPUTS | _SAME_MATH | _HEADS | _TOKENIZER | _ORIGIN)
"""Keys that cannot change the model's scores, whatever their value."""

_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
HARMLESS_AT: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "bias": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rope_condense_ratio": (1,),
    "use_mrope": (False,),
    "is_llama_config": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    # The same formula in other kernels. Other names fetch code from elsewhere, or attend otherwise.
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
}
"""Key -> values, besides null, with which it is this model."""

_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "LLaMAForCausalLM")
"""Which of them a model is, model_type says. The last is what conversions of early 2023 wrote."""
_QUANTIZED = "the weights are quantized, take a folder where they are not"
_WHY = {"quantization_config": _QUANTIZED, "compression_config": _QUANTIZED, "quantization": _QUANTIZED}


def shown(value: object) -> str:
    """A value as it stands in the file, as far as a sentence has room."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_keys(values: dict, read: set[str]) -> None:
    """See that every key of a configuration is read, or cannot matter at the value it has.

    Args:
        values: content of a config.json whose model_type is llama or qwen2.
        read: keys that the caller reads itself.
    Raises:
        ValueError: a key that may change the model, which is named.
    """
    _check_architectures(values)
    _check_code(values)
    _check_windows(values)
    seen = read | HARMLESS | {"architectures", "auto_map", *_WINDOWS}
    for name, value in values.items():
        if name in seen or value is None:
            continue
        if name not in HARMLESS_AT:
            why = _WHY.get(name, "it is not known here, take it out if the model is the same without it")
            raise ValueError(f"{shown(name)} = {shown(value)} is not supported: {why}")
        require(name, value)


def require(name: str, value: object) -> None:
    """
    Raises:
        ValueError: with this value, it is another model.
    """
    allowed = HARMLESS_AT[name]
    if value is not None and value not in allowed:
        raise ValueError(f"{name} = {shown(value)} is not supported: only {shown(allowed[0])} is")


def _check_architectures(values: dict) -> None:
    """A head for something else than the next token, or another family behind a llama's model_type."""
    given = values.get("architectures")
    if given is not None and (not isinstance(given, list) or any(name not in _ARCHITECTURES for name in given)):
        raise ValueError(f"architectures {shown(given)} cannot be loaded: only {', '.join(_ARCHITECTURES[:2])} can")


def _check_code(values: dict) -> None:
    """Code that the folder brings for its model. What it says of its tokenizer is seen to where that is read."""
    given = values.get("auto_map")
    if given is not None and (not isinstance(given, dict) or given.keys() - {"AutoTokenizer"}):
        raise ValueError(
            f"auto_map = {shown(given)} is not supported: code of a folder is not run, take it out if the model is a "
            f"plain {values['model_type']}"
        )


_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def _check_windows(values: dict) -> None:
    """Whether every layer sees all that came before. Only in a qwen2 do the keys of windows depend on a switch: in a
    llama, transformers cuts the cache by sliding_window alone."""
    on, layers = values.get("use_sliding_window"), values.get("num_hidden_layers")
    window, first = values.get("sliding_window"), values.get("max_window_layers")
    if values["model_type"] == "llama":
        if window is not None:
            raise ValueError(f"sliding_window = {shown(window)} is not supported: a llama has none")
        if on not in (None, False):
            raise ValueError(f"use_sliding_window = {shown(on)} is not supported: only false is")
    elif on not in (None, False):
        # In a qwen2, the first so many layers have no window.
        beyond = isinstance(first, int) and isinstance(layers, int) and first >= layers
        none = "sliding_window" in values and window is None
        if on is not True or not (beyond or none):
            raise ValueError(
                f"use_sliding_window = {shown(on)} is not supported: only false is, or a max_window_layers that "
                f"leaves no layer with a window"
            )
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError(f"layer_types {shown(kinds)} are not supported: only full_attention is")
    if kinds and len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers {shown(layers)}")
