"""To and from Hugging Face: llama, and qwen2 when only Q, K and V carry a bias. Only safetensors are read."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import LlamaConfig
from model.llama import Llama

_HEAD = "lm_head.weight"


def to_hf_name(name: str) -> str:
    return name if name == _HEAD else f"model.{name}"


def from_hf_name(name: str) -> str:
    return name.removeprefix("model.")


def to_hf_config(config: LlamaConfig, dtype: torch.dtype, eos_token_id: int | None = None) -> dict:
    """Content of a `config.json` that transformers loads as it is."""
    qwen2 = config.qkv_bias
    rope: dict[str, object] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_scaling_factor}
        if config.rope_scaling == "llama3":
            rope["original_max_position_embeddings"] = config.original_max_position_embeddings
            rope["low_freq_factor"] = config.rope_low_freq_factor
            rope["high_freq_factor"] = config.rope_high_freq_factor
    values = {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen2 else "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "eos_token_id": eos_token_id,
        "bos_token_id": eos_token_id,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
    }
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
                 "tie_word_embeddings", "attention_dropout"):  # fmt: skip
        values[name] = getattr(config, name)
    if qwen2:
        values["use_sliding_window"] = False
    else:
        values |= {"attention_bias": config.attention_bias, "mlp_bias": False}
    return values


def from_hf_config(values: dict) -> LlamaConfig:
    """The config of a Hugging Face folder.

    Raises:
        ValueError: an architecture or option that this model does not have.
    """
    kind = values.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"a model of type {kind!r} cannot be loaded: only llama and qwen2 can")
    if values.get("mlp_bias") or values.get("use_sliding_window") or values.get("hidden_act", "silu") != "silu":
        raise ValueError("the model uses an MLP bias, a sliding window or another activation, which are not supported")
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = "none" if rope_type == "default" else rope_type
    if scaling not in ("none", "linear", "dynamic", "llama3"):
        raise ValueError(f"rope scaling of type {scaling!r} is not supported: only linear, dynamic and llama3 are")
    max_positions = values["max_position_embeddings"]
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_dim=values.get("head_dim") or 0,
        max_position_embeddings=max_positions,
        rms_norm_eps=values["rms_norm_eps"],
        initializer_range=values.get("initializer_range", 0.02),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        attention_bias=values.get("attention_bias", False) and kind == "llama",
        qkv_bias=kind == "qwen2",
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        rope_scaling=scaling,
        rope_scaling_factor=float(rope.get("factor", 1.0)),
        rope_low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        rope_high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=rope.get("original_max_position_embeddings") or max_positions,
        attention_dropout=values.get("attention_dropout", 0.0),
    ).resolve()


def named_weights(model: Llama) -> dict[str, Tensor]:
    """The weights under Hugging Face's names; a tied matrix once, as the embedding."""
    return {to_hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def read_config(directory: str | Path) -> LlamaConfig:
    path = Path(directory) / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no config.json: give a Hugging Face folder, a run or a checkpoint")
    try:
        return from_hf_config(json.loads(path.read_text()))
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no complete llama or qwen2 configuration: {error}") from None


@torch.no_grad()
def load_weights(model: Llama, directory: str | Path) -> None:
    """Copy the weights of a folder's `model*.safetensors` into the model, whatever dtype either has.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the first such is named.
    """
    files = sorted(Path(directory).glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no model.safetensors")
    targets = dict(model.named_parameters())
    missing = set(targets)
    for file in files:
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        with opened as tensors:
            for hf_name in tensors.keys():
                name = from_hf_name(hf_name)
                if name == _HEAD and model.config.tie_word_embeddings:
                    continue
                if name not in targets:
                    raise ValueError(f"{file.name} holds {hf_name}, which this model does not have")
                weight = tensors.get_tensor(hf_name)
                if weight.shape != targets[name].shape:
                    raise ValueError(
                        f"{hf_name} is {tuple(weight.shape)} in {file.name}, {tuple(targets[name].shape)} in the model"
                    )
                targets[name].copy_(weight)
                missing.discard(name)
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} weights of the model, for example {sorted(missing)[0]}")
