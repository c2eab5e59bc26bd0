"""Models to and from the folders of Hugging Face: files, dtypes and checks. Only safetensors are read.

What a configuration means and what tensors are called, model/families/ says.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.config import ModelConfig
from model.decoder import Decoder
from model.families import family_named, family_of
from model.families.family import Beside, Family, Rule
from model.hf_files import INDEX, MISTAKES, PADDING, is_pointer, read_json, shown, weight_files, without_config
from model.quantized import give_memory, quantized_layers

_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|input_scale|SCB)$"
    r"|\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$"
)
"""Tensors that GPTQ, AWQ, compressed-tensors, bitsandbytes or MLX store beside quantized weights."""
_FURTHER_TOKENS = re.compile(r"(^|\.)mtp[._]")
"""Tensors of layers that predict tokens beyond the next one, which transformers leaves out when it saves a folder."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights, by safetensors' words. Others are quantized, and mean nothing without their scales."""


def to_hf_config(
    config: ModelConfig,
    dtype: torch.dtype,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    family: Family | None = None,
) -> dict[str, object]:
    """Content of a `config.json` that transformers loads as it is. The tokens are as in generation_config.py; a token
    that does not exist is written as null, since transformers would otherwise fill in an id.

    Args:
        family: the family to write; `family_of(config)` if None. The weights must be written in the same one.
    """
    family = family or family_of(config)
    number = str(dtype).removeprefix("torch.")
    return {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        "dtype": number,
        "torch_dtype": number,
        "eos_token_id": eos_token_id,
        "bos_token_id": bos_token_id,
        "pad_token_id": pad_token_id,
    } | family.keys(config)


def from_hf_config(values: object) -> ModelConfig:
    """The configuration that the content of a Hugging Face folder's config.json describes.

    Raises:
        ValueError: it has an architecture or an option that this model does not have, or an impossible value.
    """
    values = _dictionary(values)
    return family_named(values.get("model_type")).read(values)


def _dictionary(values: object) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"it must hold a dictionary, not {shown(values)}")
    return values


@torch.no_grad()
def named_weights(model: Decoder, family: Family | None = None) -> dict[str, Tensor]:
    """The weights under Hugging Face's names; a tied matrix only once, as the embedding.

    Args:
        family: as in to_hf_config.
    """
    family = family or family_of(model.config)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return converted(parameters, written_rules(family, model.config, list(parameters)))


def written_rules(family: Family, config: ModelConfig, names: list[str]) -> list[Rule]:
    """Rules for all tensors that a folder of ours holds.

    Args:
        names: names of all the model's parameters.
    """
    written = [beside for beside in family.besides(config) if beside.is_written]
    return [*_rules(family, config, names), *map(_rule_of, written)]


def _rule_of(beside: Beside) -> Rule:
    return Rule((beside.theirs,), (beside.like,), lambda tensors: [beside.expected(tensors[0])])


def converted(parameters: Mapping[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """The tensors of a folder, by their names there."""
    named: dict[str, Tensor] = {}
    for rule in rules:
        named |= zip(rule.theirs, rule.join([parameters[name] for name in rule.ours]))
    return named


def vocabulary_rows(family: Family, names: Iterable[str], rows: slice) -> dict[str, slice]:
    """These rows, for each parameter that has a row for each entry of the vocabulary."""
    return {name: rows for name in names if family.role_of(name).cut == "vocabulary"}


def cut(parameters: Mapping[str, Tensor], rows: Mapping[str, slice]) -> dict[str, Tensor]:
    """Rows of parameters, of those that are named."""
    return {name: parameters[name][rows[name]] for name in rows if name in parameters}


def count_padding(directory: str | Path) -> int:
    """Rows of the vocabulary that a run keeps beside its weights; see hf_saved.py.

    Raises:
        ValueError: their file cannot be read.
        OSError: a disk or a network fails, and may be back later.
    """
    path = Path(directory) / PADDING
    if not path.exists():
        return 0
    with opened(path) as tensors:
        return max((tensors.get_slice(name).get_shape()[0] for name in tensors.keys()), default=0)


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        ValueError: it has no config.json, or one of a model that cannot be built here; file and key are named.
        OSError: a disk or a network fails, and may be back later.
    """
    values = _read_values(directory)
    with naming(Path(directory) / "config.json"):
        return from_hf_config(values)


def _read_family(directory: str | Path) -> Family:
    """The family of a folder. Raises: see read_config."""
    values = _read_values(directory)
    with naming(Path(directory) / "config.json"):
        return family_named(_dictionary(values).get("model_type"))


def _read_values(directory: str | Path) -> object:
    """Content of a folder's config.json."""
    try:
        return read_json(Path(directory) / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no config.json{without_config(Path(directory))}") from None


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Put the file's name before a sentence about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _rules(family: Family, config: ModelConfig, names: list[str]) -> list[Rule]:
    """The rules of a family for a model's parameters."""
    rules = family.rules(config, names)
    held = sorted(name for rule in rules for name in rule.ours)
    assert held == sorted(names), f"{family.model_type}: rules must hold each parameter once: {set(held) ^ set(names)}"
    return rules


class _Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str


class _Folder(NamedTuple):
    """The places of a model's tensors in a folder."""

    weights: list[tuple[Rule, list[_Stored]]]
    """The tensors of each rule."""
    besides: list[tuple[Beside, _Stored]]
    rows: dict[str, slice]
    """Name of a parameter -> its rows that are there; of those that are not named, all are."""
    padding: dict[str, slice]
    """Name of a parameter -> its rows that are in the file of the padding."""


def _find_weights(directory: str | Path, model: Decoder) -> _Folder:
    """Find the weights, and the tensors that may be there besides, by the headers of the files alone.

    Args:
        model: without values, so that joined tensors take neither memory nor time.
    Raises:
        ValueError: see load_weights.
    """
    family, config = _read_family(directory), model.config
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows: dict[str, slice] = {}
    padding: dict[str, slice] = {}
    padded = count_padding(directory)
    if padded and read_config(directory).vocab_size == config.vocab_size - padded:
        config = replace(config, vocab_size=config.vocab_size - padded)
        rows = vocabulary_rows(family, parameters, slice(config.vocab_size))
        padding = vocabulary_rows(family, parameters, slice(config.vocab_size, None))
        _check_padding(Path(directory) / PADDING, cut(parameters, padding))
    parameters |= cut(parameters, rows)
    rules, besides = _rules_of(Path(directory), family, config, list(parameters)), family.besides(config)
    needed = {_short(family, name): tensor.shape for name, tensor in converted(parameters, rules).items()}
    spare = {_short(family, beside.theirs): beside.expected(parameters[beside.like]).shape for beside in besides}
    found = _find_tensors(Path(directory), family, needed | spare)
    if missing := sorted(needed.keys() - found.keys()):
        raise ValueError(f"{directory} lacks {len(missing)} weights of the model, for example {missing[0]}")
    return _Folder(
        [(rule, [found[_short(family, name)] for name in rule.theirs]) for rule in rules],
        [(beside, found[short]) for beside in besides if (short := _short(family, beside.theirs)) in found],
        rows, padding,
    )  # fmt: skip


def _rules_of(directory: Path, family: Family, config: ModelConfig, names: list[str]) -> list[Rule]:
    """The rules of a family that fit a folder's names; those by which we write if none do.

    Args:
        names: names of all the model's parameters.
    """
    written, others = _rules(family, config, names), family.other_rules(config, names)
    held: set[str] = set()
    for file in weight_files(directory)[0] if others else ():
        with opened(file) as tensors:
            held.update(_short(family, name) for name in tensors.keys())
    fitting = [rules for rules in others if all(_short(family, name) in held for rule in rules for name in rule.theirs)]
    return fitting[0] if fitting else written


def _check_padding(file: Path, expected: Mapping[str, Tensor]) -> None:
    """See that the file of the padding holds these tensors.

    Raises:
        ValueError: it lacks one, or has one of another shape or dtype.
    """
    with opened(file) as tensors:
        for name, tensor in expected.items():
            if name not in tensors.keys():
                raise ValueError(f"{file} lacks {name}: take the checkpoint before this one")
            check_header(file, name, tensors.get_slice(name), tensor.shape)


def _short(family: Family, name: str) -> str:
    """A tensor's name without the prefix, as in folders of the part below the head."""
    return name.removeprefix(family.prefix)


def _find_tensors(directory: Path, family: Family, shapes: dict[str, torch.Size]) -> dict[str, _Stored]:
    """Short name -> place of each tensor in a folder's files.

    Args:
        shapes: short name -> shape of each tensor that may be there.
    Raises:
        ValueError: a tensor is unknown, there twice, quantized or of another shape, or contradicts the index.
    """
    files, index = weight_files(directory)
    found: dict[str, _Stored] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():
                if family.passed_over.search(name):
                    continue
                short = _short(family, name)
                if short not in shapes:
                    raise ValueError(f"{file} holds {name}, {_told_unknown(name)}")
                if short in found and found[short].file == file:
                    raise ValueError(f"{file} holds {found[short].name} and {name}, the same weight: take one out")
                if short in found:
                    raise ValueError(f"{name} is in {found[short].file} and in {file}: delete the file not meant")
                if index and index.get(name) != file.name:
                    raise ValueError(f"{file} holds {name}, which {INDEX} {_told_index(index.get(name))}")
                check_header(file, name, tensors.get_slice(name), shapes[short])
                found[short] = _Stored(file, name)
    for lacking in index:
        if family.passed_over.search(lacking) or _short(family, lacking) in found:
            continue
        raise ValueError(f"{index[lacking]} in {directory} lacks {lacking}, which {INDEX} says it holds")
    return found


def check_header(file: Path, hf_name: str, header, shape: torch.Size) -> None:
    """See that a weight has the right dtype and shape, before it is read."""
    if header.get_dtype() not in _DTYPES:
        raise ValueError(
            f"{hf_name} in {file} is of dtype {header.get_dtype()}: only weights in floating point that are not "
            f"quantized can be loaded"
        )
    if tuple(header.get_shape()) != tuple(shape):
        raise ValueError(f"{hf_name} is {tuple(header.get_shape())} in {file}, {tuple(shape)} in the model")


def _told_unknown(hf_name: str) -> str:
    """End of a sentence about a weight for which the model has no place."""
    if _QUANTIZED.search(hf_name):
        return "of weights that are quantized: take a folder where they are not"
    if ".lora_" in hf_name or ".base_layer." in hf_name:
        return "of an adapter: merge it into the weights with python -m model.adapters.merge"
    if _FURTHER_TOKENS.search(hf_name):
        return "of layers for further tokens, which are not built here: save the folder with transformers, without them"
    return "which this model does not have"


def _told_index(elsewhere: str | None) -> str:
    return "does not name" if elsewhere is None else f"says is in {elsewhere}"


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A file of tensors. Raises ValueError: it cannot be read."""
    try:
        # safetensors' own errors of the system have no number by which to tell them apart.
        open(file, "rb").close()
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        why = "it is a pointer of Git LFS, run `git lfs pull` in its folder" if is_pointer(file) else error
        raise ValueError(f"{file} cannot be read: {why}") from None
    except MISTAKES as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


class _NoInitialValues(TorchFunctionMode):
    """Skip modules' own initial values: to draw them for tensors without memory, torch imports its compiler, which
    takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def outline(config: ModelConfig, *options: Any) -> Decoder:
    """A model without values, which takes no memory.

    Args:
        options: further arguments of Decoder.
    """
    with torch.device("meta"), _NoInitialValues():
        return Decoder(config, *options)


def check_weights(config: ModelConfig, directory: str | Path) -> None:
    """See that a folder's weights fit a configuration, before memory is allocated: a configuration that is off by a few
    zeros would ask for too much.

    Raises:
        ValueError: see load_weights.
    """
    _find_weights(directory, outline(config))


def outline_in(config: ModelConfig, device: torch.device, dtype: torch.dtype, *options: Any) -> Decoder:
    """A model for `load_weights` on its device, in its dtype: so memory never holds another copy. It has no values.

    Args:
        options: further arguments of Decoder.
    """
    model = outline(config, *options).to(dtype).to_empty(device=device)
    model.tie_weights()
    return model


def outline_in_4bit(config: ModelConfig, device: torch.device, dtype: torch.dtype, *options: Any) -> Decoder:
    """A model for `load_weights` on its device, in its dtype, whose blocks keep their matrices in 4 bits. It has no
    values.

    Args:
        options: further arguments of Decoder.
    Raises:
        ValueError: see quantized.give_memory.
    """
    model = outline(config, *options).to(dtype)
    give_memory(model, device)
    model.tie_weights()
    return model


@torch.no_grad()
def load_weights(model: Decoder, directory: str | Path, vocab_size: int | None = None) -> None:
    """Copy the weights of a folder's `model*.safetensors` into the model, whatever floating point dtype either has.
    Those of layers in 4 bits are quantized one by one, as they are read. Of a model that is cut over several processes,
    each reads what it holds something of: the rows in question where a parameter is a tensor of the folder, and
    otherwise whole tensors, one parameter after another. The model may have an adapter, whose values stay.

    Args:
        vocab_size: rows of the vocabulary in the folder; None: as many as in the model. The others stay as they are.
    Raises:
        ValueError: a file cannot be read, or a weight is missing, unknown, there twice, quantized, of another shape or
            not finite; the first one is named. Only the values that are read are looked at.
        OSError: a disk or a network fails, and may be back later.
    """
    config, quantized = model.config, quantized_layers(model)
    folder = _find_weights(directory, outline(replace(config, vocab_size=vocab_size or config.vocab_size)))
    # A layer keeps its name below an adapter.
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    here = parameters.keys() | quantized.keys()
    needed = [found for found in folder.weights if not here.isdisjoint(found[0].ours)]
    # File by file: the tensors of most rules are in one file.
    by_file = sorted(needed, key=lambda found: found[1][0].file)
    for file, group in groupby(by_file, key=lambda found: found[1][0].file):
        with opened(file) as tensors:
            for rule, stored in group:
                first, rows, ours = 0, None, parameters.get(rule.ours[0])
                if ours is not None and not model.filling.is_whole(ours):
                    first, rows, stored = _needed(rule, stored, model.filling.held(ours).rows)
                # Not kept in a variable, or the next ones would be read beside them.
                for name, weight in _read_rule(rule, stored, rows, file, tensors):
                    if name in quantized:
                        quantized[name].set_matrix(weight)
                    elif name in parameters:
                        model.filling.put(parameters[name], weight, first)
                    del weight
    for name, rows in folder.padding.items():
        if name in parameters:
            model.filling.put(parameters[name], _read_tensor(_Stored(Path(directory) / PADDING, name)), rows.start)
    known = {name: found for found in folder.weights for name in found[0].ours} if folder.besides else {}
    for beside, place in folder.besides:
        name = beside.like
        if name not in parameters:
            # Who holds it compares it.
            continue
        if model.filling.is_whole(parameters[name]):
            like = parameters[name].detach()[folder.rows.get(name, slice(None))]
        else:
            like = _read_parameter(name, *known[name]).to(model.filling.dtype)
        _check_beside(place, _read_tensor(place), beside, like)


def _needed(rule: Rule, stored: list[_Stored], held: slice) -> tuple[int, slice | None, list[_Stored]]:
    """What to read of a rule's tensors for some rows of its parameters.

    Returns:
        the first row that is read, the rows of each tensor (None: all), and the tensors.
    """
    if rule.is_plain:
        return held.start, held, stored
    if rule.theirs_a_row:
        return held.start, None, stored[held.start * rule.theirs_a_row : held.stop * rule.theirs_a_row]
    return 0, None, stored


def _read_rule(
    rule: Rule, stored: list[_Stored], rows: slice | None, file: Path, tensors: safe_open
) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each of a rule's parameters.

    Args:
        rows: of each tensor; None: all.
        file, tensors: a file that is open, which holds most of them.
    """
    theirs = [_read(tensors if place.file == file else None, place, rows) for place in stored]
    for place, tensor in zip(stored, theirs):
        check_finite(place.file, place.name, tensor)
    return zip(rule.ours, rule.split(theirs) if theirs else ())


def _read(tensors: safe_open | None, place: _Stored, rows: slice | None) -> Tensor:
    """A tensor, or some of its rows, as far as it has them.

    Args:
        tensors: its file, if that is open.
    """
    if tensors is None:
        with opened(place.file) as tensors:
            return _read(tensors, place, rows)
    if rows is None:
        return tensors.get_tensor(place.name)
    tensor = tensors.get_slice(place.name)
    end = min(rows.stop, tensor.get_shape()[0])
    # (To safetensors, an empty slice is an error.)
    return tensor[rows.start : end] if rows.start < end else torch.empty(0)


def _read_parameter(name: str, rule: Rule, stored: list[_Stored]) -> Tensor:
    """A whole parameter. What else its rule holds is read, too."""
    weights = rule.split([_read_tensor(place) for place in stored])
    return weights[rule.ours.index(name)]


class StoredWeights:
    """The weights of a folder, each read when it is asked for. For programs that never hold the whole model.

    Args:
        directory: the folder.
        config: its configuration.
    Raises:
        ValueError: see load_weights; but for values, which are looked at when they are read.
    """

    def __init__(self, directory: str | Path, config: ModelConfig):
        model = outline(config)
        folder = _find_weights(directory, model)
        self._places = {name: (rule, stored) for rule, stored in folder.weights for name in rule.ours}
        self._besides = {beside.like: (beside, place) for beside, place in folder.besides}
        self.outlines = {
            name: torch.empty_like(parameter, dtype=self._dtype_of(name), device="meta")
            for name, parameter in model.named_parameters()
        }
        """Name of each parameter -> a tensor of its shape and of the dtype in the folder, without values."""

    def _dtype_of(self, name: str) -> torch.dtype:
        place = self._places[name][1][0]
        with opened(place.file) as tensors:
            return _DTYPES[tensors.get_slice(place.name).get_dtype()]

    def read_one(self, name: str) -> Tensor:
        """A parameter, in the dtype of the folder. Raises: see load_weights."""
        return self.read([name])[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the parameters, in the dtype of the folder.

        Raises:
            ValueError, OSError: see load_weights.
        """
        wanted, found = set(names), dict[str, Tensor]()
        for name in sorted(wanted):
            if name in found:
                continue
            rule, stored = self._places[name]
            theirs = [_read_tensor(place) for place in stored]
            for place, tensor in zip(stored, theirs):
                check_finite(place.file, place.name, tensor)
            found |= {ours: tensor for ours, tensor in zip(rule.ours, rule.split(theirs)) if ours in wanted}
            if name in self._besides:
                beside, place = self._besides[name]
                _check_beside(place, _read_tensor(place), beside, found[name])
        return found


def _read_tensor(place: _Stored) -> Tensor:
    return _read(None, place, None)


def check_finite(file: Path, name: str, tensor: Tensor) -> None:
    """
    Raises:
        ValueError: a value is infinite or not a number, and the model's scores would be, too.
    """
    # The extremes of a tensor with a NaN are NaN; to find them takes less time than to read it.
    if tensor.numel() and not all(math.isfinite(value) for value in tensor.aminmax()):
        raise ValueError(
            f"{name} in {file} holds values that are not finite: take another copy of the model"
        )


def _check_beside(place: _Stored, tensor: Tensor, beside: Beside, like: Tensor) -> None:
    """
    Raises:
        ValueError: a tensor that the model has no parameter for says something new.
    """
    expected = beside.expected(like)
    if not torch.equal(tensor.to(expected), expected):
        raise ValueError(f"{place.file} holds a {place.name} {beside.otherwise}")
