"""Keys in the config.json of any causal language model that cannot change it.

A key's meaning is known, or the folder is refused. transformers silently ignores keys of other families, and may then
build another model than was trained. This file is plain data and checks; it builds nothing.
"""

from collections.abc import Mapping, Set

from model.hf_files import shown

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
"""Settings of transformers' sampling, and the tokens that begin and end a text."""
_OUTPUTS = {
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "tie_last_hidden_states", "dtype",
    "torch_dtype", "use_bfloat16", "torchscript", "gradient_checkpointing", "chunk_size_feed_forward", "is_decoder",
    "tf_legacy_loss", "xla_device",
}  # fmt: skip
"""Settings of what transformers returns besides scores, of its dtypes, and of how it saves memory."""
_SAME_MATH = {"pretraining_tp"}
"""Number of slices into which transformers 4 cuts its matmuls."""
_HEADS = {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"}
"""Keys of a classifier's head, which no causal language model has."""
_TOKENIZER = {"tokenizer_class", "prefix", "model_max_length"}
_ORIGIN = {
    "model_type", "transformers_version", "name_or_path", "_name_or_path", "_model_name_or_path", "_commit_hash",
    "_from_model_config", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_pre_quantization_dtype",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "max_sequence_length", "seq_length",
}  # fmt: skip
"""Notes on who wrote the folder, from what and with what; and lengths that only repeat max_position_embeddings."""
HARMLESS = frozenset(_GENERATION | _OUTPUTS | _SAME_MATH | _HEADS | _TOKENIZER | _ORIGIN)
"""Keys that cannot change the model's scores, whatever their value."""

_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
HARMLESS_AT: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    # The same formula in other kernels. Other names fetch code from elsewhere, or attend otherwise.
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
}
"""Key -> values, besides null, with which the model is the same."""

_QUANTIZED = "the weights are quantized, take a folder where they are not"
_WHY = {"quantization_config": _QUANTIZED, "compression_config": _QUANTIZED, "quantization": _QUANTIZED}


def check_keys(
    values: dict, seen: Set[str], harmless_at: Mapping[str, tuple[object, ...]], replaces_code: bool = False
) -> None:
    """See that every key of a configuration is read, or cannot matter at the value it has.

    Args:
        values: content of a config.json.
        seen: keys that are read elsewhere, or cannot matter whatever their value.
        harmless_at: key -> values with which it cannot matter.
        replaces_code: whether all models of the family come with the same code, which ours replaces.
    Raises:
        ValueError: a key may change the model; it is named.
    """
    if not replaces_code:
        _check_code(values)
    for name, value in values.items():
        if name in seen or name in ("architectures", "auto_map") or value is None:
            continue
        if name not in harmless_at:
            why = _WHY.get(name, "it is not known here, take it out if the model is the same without it")
            raise ValueError(f"{shown(name)} = {shown(value)} is not supported: {why}")
        require(name, value, harmless_at[name])


def require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """See that a key has one of the allowed values, or null.

    Raises:
        ValueError: it has another value, with which the model would be another one.
    """
    if value is not None and value not in allowed:
        raise ValueError(f"{name} = {shown(value)} is not supported: only {shown(allowed[0])} is")


def check_architectures(values: dict, allowed: tuple[str, ...]) -> None:
    """See that `architectures` names only classes of the family.

    Raises:
        ValueError: it names another head than that of the next token, or another family.
    """
    given = values.get("architectures")
    if given is not None and (not isinstance(given, list) or any(name not in allowed for name in given)):
        raise ValueError(f"architectures {shown(given)} cannot be loaded: only {allowed[0]} can")


def _check_code(values: dict) -> None:
    """Refuse code that the folder brings for its model. Code for its tokenizer is checked where that is read."""
    given = values.get("auto_map")
    if given is not None and (not isinstance(given, dict) or given.keys() - {"AutoTokenizer"}):
        raise ValueError(
            f"auto_map = {shown(given)} is not supported: code of a folder is not run, take it out if the model is a "
            f"plain {values['model_type']}"
        )


def require_full_attention(values: Mapping) -> None:
    """See that `layer_types` names no layer that attends within a window.

    Raises:
        ValueError: it does, or it does not fit the number of layers.
    """
    kinds, layers = values.get("layer_types"), values.get("num_hidden_layers")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError(f"layer_types {shown(kinds)} are not supported: only full_attention is")
    if kinds and len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers {shown(layers)}")
