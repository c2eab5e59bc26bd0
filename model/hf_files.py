"""The files of a Hugging Face folder that hold the weights, and what to do with weights in another format."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PADDING = "vocabulary_padding.safetensors"
"""File beside the weights in a checkpoint of ours: rows of the vocabulary that only the training has. Its name does not
begin like those of weights, so other programs do not read it."""
_PART = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_ADAPTERS = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")

_POINTER = b"version https://git-lfs.github.com/spec/"
MISTAKES = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of the system that another try would meet again. Those of a disk or a network may pass."""


def shown(value: object) -> str:
    """A value as JSON, cut to what fits into a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_json(path: Path) -> object:
    """Content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or gives a key twice.
        OSError: a disk or a network fails, and may be back later.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except MISTAKES as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return json.loads(content, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return values


def is_pointer(path: Path) -> bool:
    """Whether a file holds only the few lines that a clone without Git LFS leaves in place of a large one."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold a model's weights, and their index: name of a weight -> name of its file.

    The choice is transformers': `model.safetensors` alone, or exactly the files that `model.safetensors.index.json`
    names. If there are two sets of weights, transformers takes one in silence; here they are refused. Parts without
    their index are read if none of them is missing.

    Raises:
        ValueError: no weights, weights in another format, or two sets of them.
    """
    single, index = directory / SINGLE, directory / INDEX
    mapping = _read_index(index)
    named = [directory / name for name in sorted(set(mapping.values()))]
    parts = sorted(path for path in directory.glob("model-*.safetensors") if _PART.fullmatch(path.name))
    others = [path for path in named or parts if path != single and path.exists()]
    if single.exists() and others:
        raise ValueError(f"{single} and {others[0]} are two sets of weights: delete the one that is not meant")
    files = [single] if single.exists() else named or _all_parts(parts)
    if not files:
        raise ValueError(f"{directory} holds no {SINGLE}{_other_weights(directory)}")
    missing = next((path for path in files if not path.exists()), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing: {index} names it")
    if _is_adapter(directory):
        raise ValueError(
            f"{directory} holds an adapter beside the weights: give it a folder of its own and name that with "
            f"--adapter, or merge it into them with python -m model.adapters.merge"
        )
    return files, mapping if files == named else {}


def split_into_files(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Name of each file -> names of its weights, in their order. A weight that is larger than a file may be is alone in
    its own. The names of the files are transformers'.

    Args:
        sizes: name of a weight -> its bytes.
        max_bytes: size that no file of several weights exceeds, without its header.
    """
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts, room = [*parts, []], max_bytes
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def index_of(files: Mapping[str, list[str]], total_parameters: int, total_size: int) -> dict[str, object]:
    """Content of the index of a model's files, as `split_into_files` returns them."""
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_parameters": total_parameters, "total_size": total_size}, "weight_map": weight_map}


def _read_index(path: Path) -> dict[str, str]:
    """Index of the parts: name of a weight -> name of its file; empty if there is no index."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{path} must hold a weight_map, a dictionary from weights to files")
    for name, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            said = f"{path} says that {shown(name)} is in {shown(file)}"
            raise ValueError(f"{said}: that is not a safetensors file beside it")
    return mapping


def _all_parts(parts: list[Path]) -> list[Path]:
    """The parts of a model, if all that their names promise are there.

    Raises:
        ValueError: one is missing, or belongs to another set.
    """
    if not parts:
        return []
    last = parts[0].stem.rpartition("-of-")[2]
    width, count = len(last), int(last)
    wanted = [f"model-{number:0{width}d}-of-{count:0{width}d}.safetensors" for number in range(1, count + 1)]
    names = [path.name for path in parts]
    if wrong := sorted(set(wanted) ^ set(names)):
        what = "is missing" if wrong[0] in wanted else f"is not one of the {count} parts of {names[0]}"
        raise ValueError(f"{parts[0].with_name(wrong[0])} {what}, and no {INDEX} tells: fetch the whole folder anew")
    return parts


def _is_adapter(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in _ADAPTERS)


def without_config(directory: Path) -> str:
    """End of a sentence: what to do with a folder that has no config.json."""
    if _is_adapter(directory) or _first(directory, "*.gguf", "consolidated*.pth"):
        return _other_weights(directory)
    weights = _first(directory, "model*.safetensors", "pytorch_model*.bin")
    return f": fetch the one that belongs to its {weights}" if weights else ": give the folder of a model"


_TRAINERS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state")
"""Beginnings of names of a trainer's own files, which hold no weights."""


def _first(directory: Path, *patterns: str) -> str | None:
    """Name of the first file that the first successful pattern finds."""
    for pattern in patterns:
        names = (path.name for path in directory.glob(pattern) if not path.name.startswith(_TRAINERS))
        if (name := min(names, default=None)) is not None:
            return name
    return None


def _python(script: str) -> str:
    """A shell command that runs a script, whose strings are in double quotes."""
    return f"python -c {shlex.quote(script)}"


def _has_own_class(directory: Path) -> bool:
    """Whether transformers would need Python code that comes with the folder."""
    path = directory / "config.json"
    config = read_json(path) if path.exists() else None
    return isinstance(config, dict) and bool(config.get("auto_map"))


def _file_by_file(here: str) -> str:
    """A script that copies the tensors of each file into our format, without a class for the model.

    Args:
        here: the folder as a string of Python.
    """
    name = 'f.with_name(f.name.replace("pytorch_model", "model")).with_suffix(".safetensors")'
    tensors = '{k: v.contiguous().clone() for k, v in load(f, map_location="cpu", weights_only=True).items()}'
    return (
        "from pathlib import Path; from safetensors.torch import save_file; from torch import load; "
        f'[save_file({tensors}, {name}) for f in Path({here}).glob("pytorch_model*.bin")]'
    )


def _other_weights(directory: Path) -> str:
    """End of a sentence: what a folder holds instead of our format, and the command that converts it."""
    here, there = json.dumps(str(directory)), json.dumps(f"{directory}-safetensors")
    auto = "from transformers import AutoModelForCausalLM as M"
    if _is_adapter(directory):
        merge = f"python -m model.adapters.merge --adapter {shlex.quote(str(directory))} --base BASE --output FOLDER"
        return f", only an adapter: give its base, and this folder with --adapter, or merge both with {merge}"
    if name := _first(directory, "pytorch_model*.bin"):
        command = _python(f'{auto}; M.from_pretrained({here}, dtype="auto").save_pretrained({here})')
        if _has_own_class(directory):
            command = _python(_file_by_file(here))
        return f", only {name}: convert it with {command}"
    if name := _first(directory, "*.gguf"):
        how = f"from_pretrained({here}, gguf_file={json.dumps(name)}).save_pretrained({there})"
        command = _python(f"{auto}, AutoTokenizer as T; M.{how}; T.{how}")
        return f", only {name}: convert it with {command} where transformers 4.57, gguf and accelerate are"
    if name := _first(directory, "consolidated*.pth"):
        count = len(list(directory.glob("consolidated*.pth")))
        folders = f"--input_dir {shlex.quote(str(directory))} --output_dir {shlex.quote(f'{directory}-safetensors')}"
        return (
            f", only Meta's {name}: convert it with python -m transformers.models.llama.convert_llama_weights_to_hf "
            f"{folders} --num_shards {count} --llama_version THE_MODELS_OWN where transformers 4.46 is"
        )
    if name := _first(directory, "flax_model*.msgpack"):
        command = _python(f"{auto}; M.from_pretrained({here}, from_flax=True).save_pretrained({here})")
        return f", only {name}: convert it with {command} where transformers 4.46 and flax are"
    if name := _first(directory, "tf_model*.h5", "consolidated*.safetensors", "*.pth", "*.pt", "*.ckpt", "*.bin"):
        return f", only {name}, which is not read: take the same model in safetensors under Hugging Face's names"
    if name := _first(directory, "*.safetensors"):
        return f", only {name}: if that is the model, rename it to {SINGLE}"
    return ""
