"""A checkpoint's folder: its files, its manifest, and whether it is whole.

    ckpt/
      .tmp-step-N-ID/       a save in progress (checkpoint/saving.py)
        rank-R.done.json    each rank's record of its files (sizes and sha256), and which ranks hold the same state
      step-N/               the finished checkpoint: records checked, manifest written, folder renamed
        model.safetensors, config.json, tokenizer ...   a Hugging Face folder, whose weights may be in several parts
        vocabulary_padding.safetensors  rows of the vocabulary that only the training has (model/hf_saved.py)
        optim-R.safetensors     optimizer state that rank R wrote (checkpoint/named.py)
        comm_hook-R.safetensors what rank R's comm hook remembers, if it has a memory
        trainer_state.json      the run's position
        adapter_config.json, adapter_model.safetensors, adapter_base.json   in place of the first two, where an adapter
                                is trained: it, and the weights that it is for (model/adapters/folder.py)
        manifest.json           size and sha256 of every file, written last
      abandoned-step-N-TIME/    a later checkpoint that a resumed run left behind (checkpoint/retention.py)
      .replaced-step-N-ID/      an older checkpoint of a step that is being saved again

A checkpoint is *broken* if its files can be read and differ from what was written: it is named and passed over. It is
*unreadable* if the system refused to read them (EIO, ESTALE, EACCES: a disk, a network file system, a mount). That may
pass: nothing unreadable is ever deleted, and a run that finds nothing else does not start fresh. It ends as a crash,
which is tried again.
"""

import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from checkpoint.stores import Part
from runs.layout import RunPaths
from utils.files import sha256_of_file
from utils.small_files import parse_json

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"
MODEL_FILES = ("config.json", "adapter_config.json")
"""Files of which a folder with weights holds one: of a whole model, or of an adapter."""
OPTIMIZER_FILES = "optim-*.safetensors"
"""Pattern of the files that hold optimizer state."""
UNKNOWN_SAVE = "unknown-"
"""Begins the `save_id` of a checkpoint whose manifest does not tell it."""
REPLACED = ".replaced-"
"""Begins the name of a checkpoint whose step is being saved again."""
REPLACED_STEP = re.compile(rf"{re.escape(REPLACED)}step-(\d+)")
_STEP_DIR = re.compile(r"step-(\d+)")
_PAUSES = (0.5, 2.0)
"""Seconds between attempts to read what the system refuses: a momentary error should cost nothing."""

_Read = TypeVar("_Read")


def step_dir(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step-{step}"


def optimizer_file(rank: int) -> str:
    return f"optim-{rank}.safetensors"


def hook_file(rank: int) -> str:
    return f"comm_hook-{rank}.safetensors"


def is_optimizer_file(name: str) -> bool:
    return name.startswith("optim-")


def is_hook_file(name: str) -> bool:
    return name.startswith("comm_hook-")


def is_file_of_rank(name: str) -> bool:
    """Whether each rank writes a file of this kind for itself."""
    return is_optimizer_file(name) or is_hook_file(name)


def rank_of_hook_file(name: str) -> int:
    return int(name.removeprefix("comm_hook-").removesuffix(".safetensors"))


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, not yet verified."""

    path: Path
    part: Part
    saved_at: float = 0.0
    """Seconds since 1970; 0 if unknown."""
    has_manifest: bool = True
    """Whether its manifest is whole; a checkpoint without one cannot be used."""
    unreadable: str | None = None
    """The system's words when it refused to read the manifest: the checkpoint may be good or bad."""

    @property
    def step(self) -> int:
        return self.part.step

    @property
    def valid_loss(self) -> float | None:
        return self.part.valid_loss


class Unreadable(OSError):
    """The system refused to read a checkpoint. Another try may succeed; its contents must not be given up."""

    def __str__(self) -> str:
        return str(self.strerror)


def read_patiently(read: Callable[[], _Read]) -> _Read:
    """The result of `read`, which is called again after a moment if the system refuses.

    Raises:
        FileNotFoundError, NotADirectoryError: it does not exist; at once.
        OSError: the system still refuses.
    """
    for pause in _PAUSES:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return read()


def entries_of(directory: Path) -> list[str]:
    """Names in a directory; none if there is no such directory. (Path.glob and is_dir take a directory that cannot be
    read for an empty one.)

    Raises:
        OSError: it cannot be read.
    """
    try:
        return read_patiently(lambda: os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sealed(manifest: dict) -> dict:
    """A manifest with a checksum of its own."""
    return manifest | {"sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _read_manifest(path: Path) -> dict:
    """
    Raises:
        OSError, ValueError: it cannot be read, or differs from what was written.
    """
    manifest = parse_json((path / MANIFEST).read_bytes())
    # Manifests of earlier versions have neither.
    if not isinstance(manifest, dict) or ("save_id" in manifest and "sha256" not in manifest):
        raise ValueError("not a manifest")
    if "sha256" in manifest and sealed({k: v for k, v in manifest.items() if k != "sha256"}) != manifest:
        raise ValueError("not what was written")
    return manifest


def find_problem(path: Path, weights_only: bool = False, only: str | None = None) -> str | None:
    """The first problem of a checkpoint's files, compared with its manifest; None if there is none.

    Args:
        weights_only: leave out the files of the optimizer and the comm hook, which are most of the bytes.
        only: look at this file alone; its absence from the manifest is a problem.
    Raises:
        Unreadable: the system refused to read a file, several times.
    """
    file = path / MANIFEST
    try:
        entries = read_patiently(lambda: _read_manifest(path))["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
        if only is not None:
            files = {only: files[only]} if only in files else {}
            if not files:
                return f"{only} is none of its files"
        for name, (expected_size, expected_sha256) in files.items():
            file = path / name
            if weights_only and is_file_of_rank(name):
                continue
            size = read_patiently(file.stat).st_size
            if size != expected_size:
                return f"{name} holds {size} bytes instead of {expected_size}"
            if _checksum(file) != expected_sha256:
                return f"{name} does not match its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return "it has no manifest" if file.name == MANIFEST else f"{file.name} is missing"
    except OSError as error:
        raise Unreadable(error.errno, f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    return None


def _checksum(file: Path) -> str:
    return read_patiently(lambda: sha256_of_file(file))


def list_checkpoints(ckpt_dir: Path) -> list[Checkpoint]:
    """Committed checkpoints by rising step, unverified; abandoned and unfinished ones are left out.

    A checkpoint that is being replaced by another save of the same step counts until the new one is in its place.

    Raises:
        OSError: the directory cannot be read.
    """
    names = entries_of(ckpt_dir)
    found = {int(match[1]): name for name in names if (match := _STEP_DIR.fullmatch(name))}
    for name in names:
        if match := REPLACED_STEP.match(name):
            found.setdefault(int(match[1]), name)
    read = (read_checkpoint(ckpt_dir / name, step) for step, name in sorted(found.items()))
    return [checkpoint for checkpoint in read if checkpoint is not None]


def read_checkpoint(path: Path, step: int) -> Checkpoint | None:
    """A checkpoint as its manifest describes it; if that is broken or unreadable, only the step is known. None: it is
    not a directory, or was renamed just now."""
    nothing = Part(step, None, f"{UNKNOWN_SAVE}{step}", 1, (0,), (0,))
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        return Checkpoint(path, nothing, has_manifest=False, unreadable=error.strerror)
    try:
        manifest = _read_manifest(path)
        # Checkpoints of earlier versions lack everything but the loss.
        world_size, ranks = manifest.get("world_size", 1), tuple(manifest.get("ranks", [0]))
        part = Part(
            step, manifest["valid_loss"], manifest.get("save_id", f"{UNKNOWN_SAVE}{step}"), world_size, ranks,
            tuple(manifest["covers"] if "covers" in manifest else
                  ranks if manifest.get("sharded", False) else range(world_size)),
        )  # fmt: skip
        return Checkpoint(path, part, manifest.get("saved_at", 0.0))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Checkpoint(path, nothing, has_manifest=False)
    except OSError as error:
        return Checkpoint(path, nothing, has_manifest=False, unreadable=error.strerror)


def holds_weights(directory: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((directory / name).exists() for name in MODEL_FILES)


def has_checkpoints(run: Path) -> bool:
    """Whether a run directory holds a folder with a checkpoint's name; False if it cannot be read."""
    try:
        return any(map(_STEP_DIR.fullmatch, os.listdir(RunPaths(run).ckpt_dir)))
    except OSError:
        return False


_Scored = TypeVar("_Scored", Checkpoint, Part)


def best_first(found: Iterable[_Scored]) -> list[_Scored]:
    """Those with a validation loss, the lowest first; among equals the newest."""
    scored = [(one.valid_loss, -one.step, one) for one in found if one.valid_loss is not None]
    ordered = sorted((s for s in scored if math.isfinite(s[0])), key=lambda s: s[:2])
    return [one for _, _, one in ordered]


def read_trainer_state(path: Path) -> dict:
    return json.loads((path / TRAINER_STATE).read_text())
