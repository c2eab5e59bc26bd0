"""Folders of adapters, in PEFT's format.

    adapter_config.json         what is adapted, and how
    adapter_model.safetensors   what is trained; model/adapters/peft.py has the names
    adapter_base.json           ours, which PEFT passes over: the base and its fingerprint
    tokenizer, chat template, generation_config.json

Loading goes in this order: a plain Decoder, the base's weights, `read_spec`, `lora.attach`, `load`.
"""

import hashlib
import json
import os
import shlex
import struct
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.adapters import peft
from model.adapters.lora import LoraSpec, attach
from model.config import ModelConfig
from model.decoder import Decoder
from model.families import family_of
from model.families.family import EMBEDDING, HEAD
from model.hf import check_finite, check_header, naming, opened, outline
from model.hf_files import read_json, shown, weight_files
from model.quantized import Linear4bit

CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
_PICKLE = "adapter_model.bin"
_PIECE = 1 << 22
"""Bytes that are hashed at a time."""
_THREADS = 4


class Weights(NamedTuple):
    """What a model begins with."""

    base: Path
    """Folder of a whole model."""
    adapter: Path | None = None
    """Folder of an adapter for it."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders in which to look for a tokenizer, the first to count in front."""
        return (self.adapter, self.base) if self.adapter is not None else (self.base,)

    @property
    def told(self) -> str:
        """The weights in a sentence."""
        return f"{self.base} with the adapter {self.adapter}" if self.adapter is not None else str(self.base)


class Note(NamedTuple):
    """Content of an adapter_base.json."""

    base: str
    """Folder of the base when the adapter was trained."""
    fingerprint: str
    targets: tuple[str, ...] | None = None
    """Our names of the adapted layers, if the family fuses some of them."""
    in_4bit: bool = False
    """Whether the base was in 4 bits."""


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    return (directory / CONFIG).exists() and not any(directory.glob("model*.safetensors*"))


def weights_of(found: Path, adapter: Path | None = None) -> Weights:
    """What a model begins with.

    Args:
        found: folder of a model, or of an adapter, which names its base.
        adapter: folder of an adapter for the model in `found`.
    Raises:
        ValueError: a folder is not what it should be, or the base that an adapter names is gone.
    """
    if adapter is not None:
        if not (adapter / CONFIG).exists():
            raise ValueError(f"{adapter} holds no {CONFIG}: give the folder of an adapter")
        if is_adapter(found):
            raise ValueError(f"{found} holds an adapter, too: give the base beside {adapter}")
        return Weights(found, adapter)
    return Weights(base_of(found), found) if is_adapter(found) else Weights(found)


_TO_DO = "give the base itself, and this folder with --adapter"


def base_of(adapter: Path, to_do: str = _TO_DO) -> Path:
    """The folder of the base that an adapter names.

    Args:
        to_do: advice to a user whose base is gone.
    Raises:
        ValueError: it names none, or it is not there.
    """
    note = read_note(adapter)
    named = note.base if note is not None else _read_config(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{adapter} holds an adapter that does not name its base: {to_do}")
    if not (Path(named) / "config.json").exists():
        raise ValueError(f"{adapter} holds an adapter for {named}, which is not there: {to_do}")
    return Path(named)


def read_note(adapter: Path) -> Note | None:
    """What a folder of ours notes of its base; None: another program wrote it.

    Raises:
        ValueError: the file is damaged.
    """
    path = adapter / BASE
    try:
        values = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(values, dict) or not all(isinstance(values.get(k), str) for k in ("base", "fingerprint")):
        raise ValueError(f"{path} must name a base and its fingerprint, and holds {shown(values)}")
    targets = values.get("targets")
    named = tuple(map(str, targets)) if targets else None
    return Note(values["base"], values["fingerprint"], named, values.get("in_4bit") is True)


def told_precision(adapter: Path, in_4bit: bool) -> str:
    """A sentence about a base in another precision than the one that the adapter was trained on; empty: it is the same,
    or nobody knows.

    Args:
        in_4bit: whether the base is in 4 bits now.
    """
    note = read_note(adapter)
    if note is None or note.in_4bit == in_4bit:
        return ""
    trained, to_do = ("in 4 bits", "add") if note.in_4bit else ("as it is", "leave out")
    return f"the adapter in {adapter} was trained with its base {trained}: {to_do} --load_in_4bit to use it on the same"


def require_base(weights: Weights, fingerprint: str) -> bool:
    """See that the base is the one that the adapter was trained on. Returns whether anybody can tell.

    Args:
        fingerprint: the base's.
    Raises:
        ValueError: it is another one.
    """
    note = read_note(weights.adapter) if weights.adapter is not None else None
    if note is not None and note.fingerprint != fingerprint:
        raise ValueError(
            f"the adapter in {weights.adapter} was trained on other weights than those in {weights.base}: give its "
            f"own base, which was in {note.base}"
        )
    return note is not None


# Reading.


def read_spec(adapter: Path, model: Decoder) -> LoraSpec:
    """The adapter that a folder describes.

    Args:
        model: its base, not adapted yet; it may be without memory.
    Raises:
        ValueError: a key is not understood, or does not fit the model.
    """
    values, note = _read_config(adapter), read_note(adapter)
    with naming(adapter / CONFIG):
        return peft.from_peft(values, model, note.targets if note is not None else None)


def _read_config(adapter: Path) -> dict:
    try:
        values = read_json(adapter / CONFIG)
    except FileNotFoundError:
        raise ValueError(f"{adapter} holds no {CONFIG}: give the folder of an adapter") from None
    if not isinstance(values, dict):
        raise ValueError(f"{adapter / CONFIG} must hold a dictionary, not {shown(values)}")
    return values


def check(config: ModelConfig, adapter: Path) -> LoraSpec:
    """See that an adapter fits a model, before memory is allocated; returns the adapter.

    Args:
        config: the model's, with or without the tokens that the adapter adds.
    Raises:
        ValueError: see read_spec and read_tensors.
    """
    spec = read_spec(adapter, outline(grown(config, adapter)))
    model = outlined(grown(config, adapter), spec)
    _check_tensors(adapter, peft.shapes(model, _are_own(adapter)), peft.copies(model))
    return spec


def outlined(config: ModelConfig, spec: LoraSpec) -> Decoder:
    """A whole model with an adapter, without values."""
    model = outline(config)
    attach(model, spec, seed=0)
    return model


def grown(config: ModelConfig, adapter: Path) -> ModelConfig:
    """The configuration of a model with an adapter, which may bring rows for tokens that the base does not know.

    Args:
        config: the base's, or the result.
    Raises:
        ValueError: a file cannot be read.
        OSError: a disk or a network fails, and may be back later.
    """
    if not (adapter / TENSORS).exists():
        return config
    names = [f"{peft.PREFIX}{family_of(config).their_name(name)}" for name in (EMBEDDING, HEAD)]
    with opened(adapter / TENSORS) as tensors:
        rows = [tensors.get_slice(name).get_shape()[0] for name in names if name in tensors.keys()]
    return replace(config, vocab_size=max(config.vocab_size, peft.rows_needed(_read_config(adapter)), *rows))


def _are_own(adapter: Path) -> bool:
    note = read_note(adapter)
    return note is not None and note.targets is not None


def read_tensors(adapter: Path, model: Decoder) -> dict[str, Tensor]:
    """What an adapter consists of, by our names, in the dtype of the folder.

    Args:
        model: with the adapter attached; it may be without memory.
    Raises:
        ValueError: the file cannot be read, or a tensor is missing, unknown, of another shape or not finite; the first
            one is named.
        OSError: a disk or a network fails, and may be back later.
    """
    are_own, file = _are_own(adapter), adapter / TENSORS
    expected = peft.shapes(model, are_own)
    _check_tensors(adapter, expected, peft.copies(model))
    found: dict[str, Tensor] = {}
    with opened(file) as tensors:
        for name in expected:
            found[name] = tensors.get_tensor(name)
            check_finite(file, name, found[name])
    with naming(file):
        return peft.to_ours(model, found, are_own)


@torch.no_grad()
def load(model: Decoder, adapter: Path, whole: Decoder | None = None) -> None:
    """Copy the tensors of a folder into a model that its adapter is attached to. Raises: see read_tensors.

    Args:
        whole: an outline of the whole model with the adapter, if this process holds a part.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(adapter, model if whole is None else whole).items():
        if name in parameters:
            model.filling.put(parameters[name], tensor)


def _check_tensors(adapter: Path, expected: Mapping[str, peft.Shape], copies: Set[str]) -> None:
    """See that a folder holds these tensors, by their headers alone.

    Args:
        copies: names of others that may be there, see peft.copies.
    Raises:
        ValueError: see read_tensors.
    """
    file = adapter / TENSORS
    if not file.exists():
        raise ValueError(f"{adapter} holds no {TENSORS}{_pickled(adapter)}")
    with opened(file) as tensors:
        names = set(tensors.keys())
        if missing := sorted(expected.keys() - names):
            raise ValueError(f"{file} lacks {len(missing)} tensors of the adapter, for example {missing[0]}")
        if unknown := sorted(names - expected.keys() - copies):
            raise ValueError(f"{file} holds {unknown[0]}, which {CONFIG} does not ask for")
        for name, shape in expected.items():
            check_header(file, name, tensors.get_slice(name), torch.Size(shape))


def _pickled(adapter: Path) -> str:
    """End of a sentence: how to convert a pickle, which is never opened here."""
    if not (adapter / _PICKLE).exists():
        return ": fetch the whole folder"
    load_it = f'load({json.dumps(str(adapter / _PICKLE))}, map_location="cpu", weights_only=True)'
    script = (
        "from torch import load; from safetensors.torch import save_file; "
        f"save_file({{k: v.contiguous().clone() for k, v in {load_it}.items()}}, {json.dumps(str(adapter / TENSORS))})"
    )
    return f", only {_PICKLE}, which may run code: if you trust it, convert it with python -c {shlex.quote(script)}"


# Writing.


class Saved(NamedTuple):
    """The files of an adapter that are to be written."""

    parameters: dict[str, Tensor]
    """What trains, by our names."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """These, or copies of them -> the tensors of adapter_model.safetensors."""
    jsons: dict[str, object]
    """Name -> content of the other files."""


def saved_files(model: Decoder, spec: LoraSpec, base: Path, fingerprint: str) -> Saved:
    """The files of a model's adapter.

    Raises:
        ValueError: PEFT's format cannot hold it. (Ask before the training: otherwise the first save would fail.)
    """
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    peft.shapes(model, are_own=True)
    note: dict[str, object] = {"base": str(base), "fingerprint": fingerprint}
    if peft.is_fused(model):
        note["targets"] = peft.adapted_layers(model)
    if any(isinstance(layer, Linear4bit) for layer in model.modules()):
        note["in_4bit"] = True
    return Saved(
        trained, partial(peft.to_theirs, model), {CONFIG: peft.to_peft(model, spec, str(base)), BASE: note}
    )


# The base.


def fingerprint(directory: Path) -> str:
    """Fingerprint of a folder's weights: of the name, dtype, shape and bytes of each tensor. It does not depend on how
    they are split into files.

    Raises:
        ValueError: the folder holds no weights, or damaged ones.
        OSError: a disk or a network fails, and may be back later.
    """
    places = [place for file in weight_files(directory)[0] for place in _places(file)]
    # hashlib lets other threads work meanwhile.
    with ThreadPoolExecutor(_THREADS, "fingerprint") as pool:
        digests = dict(zip((place.name for place in places), pool.map(_digest, places)))
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


class _Place(NamedTuple):
    """A tensor in a file of safetensors."""

    file: Path
    name: str
    kind: str
    """dtype and shape."""
    begin: int
    end: int


def _places(file: Path) -> Iterable[_Place]:
    """The tensors of a file. Its layout: 8 bytes with the length of a JSON header, that header, then the data."""
    with opened(file):
        # So its header is sound.
        pass
    with file.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield _Place(file, name, json.dumps([entry["dtype"], entry["shape"]]), begin, end)


def _digest(place: _Place) -> str:
    digest = hashlib.sha256(place.kind.encode())
    with place.file.open("rb", buffering=0) as raw:
        for at in range(place.begin, place.end, _PIECE):
            digest.update(os.pread(raw.fileno(), min(_PIECE, place.end - at), at))
    return digest.hexdigest()
