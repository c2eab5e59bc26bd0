"""To and from Hugging Face: llama, and qwen2 where only Q, K and V carry a bias. Only safetensors are read.

`qwen2` also tells other programs how texts are split: transformers from 5.8 on, and llama.cpp's converter, then put
Qwen's own rules in the place of the tokenizer's. So a model with `qkv_bias` and a tokenizer that is not Qwen's is
written as a llama whose fourth bias is zero (`as_llama`), with `qkv_bias` beside it, by which it comes back as it was.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.config import LlamaConfig
from model.decoder import Llama
from model.hf_files import INDEX, MISTAKES, is_pointer, read_json, weight_files, without_config
from model.hf_keys import check_keys, require, shown

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_CONSTANT = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""What transformers kept beside a llama's weights until 2023, and passes over today: it follows from the
configuration."""
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|input_scale|SCB)$"
    r"|\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$"
)
"""What stands beside weights that GPTQ, AWQ, compressed-tensors, bitsandbytes or MLX made smaller."""
_DTYPES = ("F64", "F32", "F16", "BF16")
"""Of weights, in safetensors' words. Others are quantized, and mean nothing without their scales."""


def to_hf_name(name: str) -> str:
    return name if name == _HEAD else f"model.{name}"


def from_hf_name(name: str) -> str:
    return name.removeprefix("model.")


def to_hf_config(
    config: LlamaConfig,
    dtype: torch.dtype,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    as_llama: bool = False,
) -> dict:
    """Content of a `config.json` that transformers loads as it is. The tokens are as in generation_config.py; where
    there is none, that is said, too, since a llama's configuration has ids for them otherwise.

    Args:
        as_llama: also with `qkv_bias`, see above; the weights must be named the same way.
    """
    qwen2 = config.qkv_bias and not as_llama
    number = str(dtype).removeprefix("torch.")
    values = {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen2 else "llama",
        "dtype": number,
        "torch_dtype": number,
        "hidden_act": "silu",
        "eos_token_id": eos_token_id,
        "bos_token_id": bos_token_id,
        "pad_token_id": pad_token_id,
    } | _rope_of(config)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
                 "tie_word_embeddings", "attention_dropout"):  # fmt: skip
        values[name] = getattr(config, name)
    if qwen2:
        values["use_sliding_window"] = False
    else:
        values |= {"attention_bias": config.attention_bias or config.qkv_bias, "mlp_bias": False}
    return values | ({"qkv_bias": True} if config.qkv_bias and not qwen2 else {})


def _rope_of(config: LlamaConfig) -> dict[str, object]:
    """Rotary positions in both spellings, which every reader takes for the same: `rope_parameters` is transformers
    5's, `rope_scaling` and `rope_theta` version 4's. Where nothing is scaled, version 4 has no word for it."""
    scaling: dict[str, object] = {}
    if config.rope_scaling != "none":
        # Before version 4.43 it was "type", which readers besides transformers still ask for.
        scaling = {"rope_type": config.rope_scaling, "type": config.rope_scaling, "factor": config.rope_scaling_factor}
        if config.rope_scaling == "llama3":
            scaling["original_max_position_embeddings"] = config.original_max_position_embeddings
            scaling["low_freq_factor"] = config.rope_low_freq_factor
            scaling["high_freq_factor"] = config.rope_high_freq_factor
    new = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    new.pop("type", None)
    old = {"rope_theta": config.rope_theta} | ({"rope_scaling": scaling} if scaling else {})
    return old | {"rope_parameters": new}


_REQUIRED = object()
_READ: dict[str, tuple[type, object]] = {
    "vocab_size": (int, _REQUIRED), "hidden_size": (int, _REQUIRED), "intermediate_size": (int, _REQUIRED),
    "num_hidden_layers": (int, _REQUIRED), "num_attention_heads": (int, _REQUIRED), "num_key_value_heads": (int, 0),
    "head_dim": (int, 0), "max_position_embeddings": (int, _REQUIRED), "rms_norm_eps": (float, _REQUIRED),
    "initializer_range": (float, 0.02), "attention_dropout": (float, 0.0), "tie_word_embeddings": (bool, False),
    "attention_bias": (bool, False), "qkv_bias": (bool, False),
}  # fmt: skip
"""Key of a configuration, which our own has, too -> (kind, value where it is missing or null). Ranges are checked by
LlamaConfig.resolve."""
_ROPE_READ: dict[str, dict[str, tuple[str, type, object]]] = {
    "default": {},
    "linear": {"factor": ("rope_scaling_factor", float, _REQUIRED)},
    "dynamic": {"factor": ("rope_scaling_factor", float, _REQUIRED)},
    "llama3": {
        "factor": ("rope_scaling_factor", float, _REQUIRED),
        "low_freq_factor": ("rope_low_freq_factor", float, _REQUIRED),
        "high_freq_factor": ("rope_high_freq_factor", float, _REQUIRED),
        "original_max_position_embeddings": ("original_max_position_embeddings", int, 0),
    },
}
"""Kind of rotary positions -> its keys -> (name in our configuration, kind, value where it is missing or null)."""
_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def _read(values: dict, name: str, kind: type, default: object) -> object:
    """The value of a key. Numbers may be written as 32000 or 32000.0, but not as "32000": what else a string might mean
    is not for us to guess, and transformers refuses it, too.

    Raises:
        ValueError: missing, or of another kind.
    """
    value = values.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{name} is missing")
        return default
    fits = isinstance(value, bool) if kind is bool else isinstance(value, (int, float)) and not isinstance(value, bool)
    # As floating point numbers go, 1e999 is infinite; integers may have any number of digits.
    fits = fits and (kind is bool or -1e300 < value < 1e300) and (kind is not int or value == int(value))
    if not fits:
        raise ValueError(f"{name} must be {_NAMES[kind]}, not {shown(value)}")
    return kind(value)


def _read_rope(values: dict) -> dict[str, object]:
    """What a configuration says of rotary positions, as fields of ours.

    transformers 5 writes `rope_parameters`, with rope_theta inside. Version 4 knows `rope_scaling`, with rope_theta
    beside it, and 5 takes that before its own (modeling_rope_utils.py, convert_rope_params_to_dict). Where the two
    versions would read different numbers, nobody can say which the weights were trained with.

    Raises:
        ValueError: it says something that this model does not do, or something else to each version.
    """
    given = {name: values[name] for name in ("rope_scaling", "rope_parameters") if values.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dictionary, not {shown(value)}")
    name, rope = next(((name, value) for name, value in given.items() if value), ("rope_parameters", {}))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_READ:
        raise ValueError(f"{name} of type {shown(kind)} is not supported: only {', '.join(_ROPE_READ)} are")
    if rope.get("type") not in (None, kind):
        raise ValueError(f"{name} has rope_type {shown(kind)} and type {shown(rope['type'])}: take one out")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_READ[kind]}
    for key, value in rope.items():
        if key not in known and value is not None:
            raise ValueError(f"{name} holds {shown(key)}, which has no meaning for type {shown(kind)}: take it out")
    require("partial_rotary_factor", rope.get("partial_rotary_factor"))
    fields = {"rope_scaling": "none" if kind == "default" else kind, "rope_theta": _read_theta(values, given, name)}
    for key, (ours, number, default) in _ROPE_READ[kind].items():
        outer = values.get(key) if key == _BEFORE else None
        if name == "rope_scaling" and rope.get(key) is not None and outer not in (None, rope[key]):
            raise ValueError(f"{key} is {shown(rope[key])} in {name} and {shown(outer)} beside it: take one out")
        if key == _BEFORE and key in rope and rope[key] is None:
            raise ValueError(f"{name} has {key} null: take it out, or write the context before the stretching")
        # As in transformers 5: where both have the context of before, the outer one counts.
        fields[ours] = _read(rope if outer is None else values, key, number, default)
    return fields


_BEFORE = "original_max_position_embeddings"


def _read_theta(values: dict, given: dict[str, dict], name: str) -> object:
    """The base of the rotary positions, which may stand in as many places as there are spellings.

    Args:
        given: rope_scaling and rope_parameters, as far as they are there.
        name: which of them counts.
    """
    places = {f"in {place}": _read(rope, "rope_theta", float, None) for place, rope in given.items()}
    outer, beside = _read(values, "rope_theta", float, None), "beside it"
    if name == "rope_scaling" and outer is None:
        # Neither version looks into rope_parameters then, and version 4 not into rope_scaling either.
        outer, beside = _THETA, "for want of one beside it"
    found = {place: theta for place, theta in (places | {beside: outer}).items() if theta is not None}
    if len(set(found.values())) > 1:
        told = " and ".join(f"{theta:g} {place}" for place, theta in found.items())
        raise ValueError(f"rope_theta is {told}: write the right one everywhere")
    return next(iter(found.values()), _THETA)


_THETA = 10000.0
"""Where a configuration names none."""


def from_hf_config(values: object) -> LlamaConfig:
    """The config of a Hugging Face folder, from the content of its config.json.

    Raises:
        ValueError: an architecture or option that this model does not have, or a value that is none.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it must hold a dictionary, not {shown(values)}")
    kind = values.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"model_type {shown(kind)} cannot be loaded: only llama and qwen2 can")
    check_keys(values, _READ.keys() | {"rope_parameters", "rope_scaling", "rope_theta", _BEFORE})
    if kind == "qwen2" and "num_key_value_heads" not in values:
        # null means as many as query heads in either family; where it is missing, a qwen2 has 32 in transformers.
        raise ValueError("num_key_value_heads is missing")
    fields = {name: _read(values, name, *how) for name, how in _READ.items()} | _read_rope(values)
    for name in ("vocab_size", "max_position_embeddings", "intermediate_size"):
        # What is 0 elsewhere is to be filled in; here nothing is.
        if fields[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {fields[name]}")
    if kind == "llama" and fields["qkv_bias"] and not fields["attention_bias"]:
        raise ValueError("qkv_bias is true and attention_bias is not, which a llama needs for any bias")
    # A qwen2 has biases where it has them, whatever the key of another family says.
    biases = {"qkv_bias": True, "attention_bias": False} if kind == "qwen2" or fields["qkv_bias"] else {}
    return LlamaConfig(**fields | biases).resolve()


def named_weights(model: Llama, as_llama: bool = False) -> dict[str, Tensor]:
    """The weights under Hugging Face's names; a tied matrix once, as the embedding. `as_llama`: see to_hf_config."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if as_llama:
        weights |= {name: weights["norm.weight"].new_zeros(shape) for name, shape in _fourth_biases(model).items()}
    return {to_hf_name(name): weight for name, weight in weights.items()}


def _fourth_biases(model: Llama) -> dict[str, torch.Size]:
    """Name -> shape of those that a llama has and this model has not."""
    hidden = torch.Size([model.config.hidden_size])
    layers = range(model.config.num_hidden_layers) if model.config.qkv_bias else ()
    return {f"layers.{layer}.self_attn.o_proj.bias": hidden for layer in layers}


def read_config(directory: str | Path) -> LlamaConfig:
    """
    Raises:
        ValueError: there is none, or not one of a model that can be built here; the file and the key are named.
        OSError: a disk or a network that may be back later.
    """
    path = Path(directory) / "config.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no config.json{without_config(Path(directory))}") from None
    try:
        return from_hf_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Stored(NamedTuple):
    """A weight in a file."""

    file: Path
    hf_name: str
    """Its name there."""
    name: str
    """The model's parameter."""


def _find_weights(directory: str | Path, model: Llama) -> list[_Stored]:
    """Where the weights are, from the headers of the files alone; also those that may be there besides: a head that is
    the embedding, biases that are zero.

    Raises:
        ValueError: see load_weights.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    known, tied = shapes | _fourth_biases(model), model.config.tie_word_embeddings
    files, index = weight_files(Path(directory))
    found: dict[str, _Stored] = {}
    for file in files:
        with _opened(file) as tensors:
            for hf_name in tensors.keys():
                if _CONSTANT.search(hf_name):
                    continue
                name = from_hf_name(hf_name)
                target = _EMBEDDING if name == _HEAD and tied else name
                if target not in known:
                    raise ValueError(f"{file} holds {hf_name}, {_told_unknown(hf_name)}")
                if name in found and found[name].file == file:
                    raise ValueError(f"{file} holds {found[name].hf_name} and {hf_name}, the same weight: take one out")
                if name in found:
                    raise ValueError(f"{hf_name} is in {found[name].file} and in {file}: delete the file not meant")
                if index and index.get(hf_name) != file.name:
                    raise ValueError(f"{file} holds {hf_name}, which {INDEX} {_told_index(index.get(hf_name))}")
                _check_header(file, hf_name, tensors.get_slice(hf_name), known[target])
                found[name] = _Stored(file, hf_name, name)
    lacking = next((name for name in index if not _CONSTANT.search(name) and from_hf_name(name) not in found), None)
    if lacking is not None:
        raise ValueError(f"{index[lacking]} in {directory} lacks {lacking}, which {INDEX} says it holds")
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} weights of the model, for example {missing[0]}")
    return list(found.values())


def _check_header(file: Path, hf_name: str, header, shape: torch.Size) -> None:
    """Dtype and shape of a weight, before it is read."""
    if header.get_dtype() not in _DTYPES:
        raise ValueError(
            f"{hf_name} in {file} is of dtype {header.get_dtype()}: only weights in floating point that are not "
            f"quantized can be loaded"
        )
    if tuple(header.get_shape()) != tuple(shape):
        raise ValueError(f"{hf_name} is {tuple(header.get_shape())} in {file}, {tuple(shape)} in the model")


def _told_unknown(hf_name: str) -> str:
    """What a weight is that the model has no place for."""
    if _QUANTIZED.search(hf_name):
        return "of weights that are quantized: take a folder where they are not"
    if ".lora_" in hf_name or ".base_layer." in hf_name:
        return "of an adapter: merge it into the weights first"
    return "which this model does not have"


def _told_index(elsewhere: str | None) -> str:
    return "does not name" if elsewhere is None else f"says is in {elsewhere}"


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        # Its own errors of the system bear no number to tell them apart by.
        open(file, "rb").close()
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        why = "it is a pointer of Git LFS, run `git lfs pull` in its folder" if is_pointer(file) else error
        raise ValueError(f"{file} cannot be read: {why}") from None
    except MISTAKES as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


class _NoInitialValues(TorchFunctionMode):
    """Modules are built without their first values: for tensors without memory torch imports its compiler to make them,
    which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def check_weights(config: LlamaConfig, directory: str | Path) -> None:
    """See whether a folder's weights are those of a configuration, before there is memory for them: a configuration
    that is off by a few zeros would ask for more than there is.

    Raises:
        ValueError: see load_weights.
    """
    with torch.device("meta"), _NoInitialValues():
        model = Llama(config)
    _find_weights(directory, model)


@torch.no_grad()
def load_weights(model: Llama, directory: str | Path) -> None:
    """Copy the weights of a folder's `model*.safetensors` into the model, whatever floating point dtype either has.

    Raises:
        ValueError: a file cannot be read, or a weight is missing, unknown, there twice, quantized, of another shape or
            not finite; the first such is named.
        OSError: a disk or a network that may be back later.
    """
    targets, besides = dict(model.named_parameters()), []
    for file, group in groupby(_find_weights(directory, model), lambda stored: stored.file):
        with _opened(file) as tensors:
            for stored in group:
                if stored.name in targets:
                    weight = tensors.get_tensor(stored.hf_name)
                    _check_finite(stored, weight)
                    targets[stored.name].copy_(weight)
                else:
                    besides.append(stored)
    for stored in besides:
        with _opened(stored.file) as tensors:
            _check_beside(stored, tensors.get_tensor(stored.hf_name), targets[_EMBEDDING])


def _check_finite(stored: _Stored, weight: Tensor) -> None:
    """
    Raises:
        ValueError: a value is none, so no score of the model would be.
    """
    # The extremes of a tensor with a NaN are NaN; to find them takes less time than to read it.
    if weight.numel() and not all(math.isfinite(value) for value in weight.aminmax()):
        raise ValueError(
            f"{stored.hf_name} in {stored.file} holds values that are not finite: take another copy of the model"
        )


def _check_beside(stored: _Stored, weight: Tensor, embedding: Tensor) -> None:
    """
    Raises:
        ValueError: a weight that the model has no place for says something.
    """
    if stored.name != _HEAD:
        if weight.any():
            raise ValueError(
                f"{stored.file} holds a {stored.hf_name} that is not zero, while config.json has qkv_bias: take that "
                f"key out, to have a bias of all four"
            )
    elif not torch.equal(weight.to(embedding), embedding):
        raise ValueError(
            f"{stored.file} holds a {stored.hf_name} that is not the embedding, while config.json has "
            f"tie_word_embeddings: set that to false, or take the weight out"
        )
