"""The tensors of a checkpoint: weights by name, optimizer state in flat pieces keyed "parameter name@offset/state"."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: the file is not there, or holds no tensors.
        OSError: it cannot be read now.
    """
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def flat_key(name: str, offset: int, state: str) -> str:
    return f"{name}@{offset}/{state}"


FlatState = Iterable[tuple[str, int, dict[str, Tensor]]]
"""(parameter name, offset of the tensors in the parameter, state name -> 1-D tensor)."""


def holds_flat_state(directories: Sequence[Path], wanted: FlatState) -> bool:
    """Whether `load_flat_state` would find all elements there."""
    try:
        load_flat_state(directories, wanted, look_only=True)
    except ValueError:
        return False
    return True


def load_flat_state(directories: Sequence[Path], wanted: FlatState, look_only: bool = False) -> None:
    """Fill flat tensors from all `optim-*.safetensors` of a checkpoint, however those were cut.

    Args:
        directories: where its files lie.
        look_only: fill nothing, only see that all is there.
    Raises:
        ValueError: some elements are in no file, or a file cannot be read.
    """
    pieces: dict[tuple[str, str], list[tuple[int, int, str, Path]]] = {}
    handles = {}
    try:
        for file in sorted(file for directory in directories for file in directory.glob("optim-*.safetensors")):
            handles[file] = safe_open(file, framework="pt")
            for key in handles[file].keys():
                name, _, rest = key.rpartition("@")
                offset, _, state = rest.partition("/")
                length = handles[file].get_slice(key).get_shape()[0]
                pieces.setdefault((name, state), []).append((int(offset), int(offset) + length, key, file))
    except SafetensorError as error:
        raise ValueError(f"the optimizer state in {directories[0]} cannot be read: {error}") from None
    for name, offset, states in wanted:
        for state, target in states.items():
            filled = 0
            for start, end, key, file in pieces.get((name, state), ()):
                first, last = max(start, offset), min(end, offset + len(target))
                if first < last:
                    if not look_only:
                        piece = handles[file].get_slice(key)[first - start : last - start]
                        target[first - offset : last - offset] = piece
                    filled += last - first
            if filled != len(target):
                raise ValueError(f"{directories[0]} holds {filled} of {len(target)} elements of {name} ({state})")
