"""Checkpoints: directories `ckpt/step-N/` that are whole or not there. Sees named tensors only.

    .tmp-step-N/          while it is written
      rank-R.done.json    each rank's record of its files: sizes and sha256
    step-N/               after rank 0 checked the records, wrote the manifest and renamed
      model.safetensors, config.json, tokenizer ...   a Hugging Face folder
      optim-R.safetensors     flat float32 pieces, keyed "parameter name@offset/state"
      comm_hook-R.safetensors what rank R's comm hook remembers, if it does
      trainer_state.json      where the run stands
      manifest.json           every file's size and sha256, written last

Nothing here issues collectives. Ranks meet through files in a common directory.
"""

import fcntl
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.files import atomic_write_json, fsync_dir, sha256_of_file

logger = logging.getLogger(__name__)

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"
RUN_MARK = ".zero2all-run"
"""An empty file in a run directory, by which ranks find out whether they see the same one."""
_STEP_DIR = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, not yet verified."""

    path: Path
    step: int
    valid_loss: float | None


class CheckpointWriter:
    """One rank's part in writing `ckpt/step-N`.

    Every rank: `prepare` (all ranks wait for rank 0's), write files, `finish`; then rank 0 calls `commit`.
    """

    def __init__(self, ckpt_dir: Path, step: int, rank: int, world_size: int):
        self.step, self.rank, self.world_size = step, rank, world_size
        self.directory = ckpt_dir / f".tmp-step-{step}"
        self._final = ckpt_dir / f"step-{step}"
        self._files: list[str] = []

    def prepare(self) -> None:
        """Rank 0: make an empty directory, whatever a killed save left there."""
        if self.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.directory / name, metadata)
        # safetensors keeps its files to the owner; the rest of the folder is for everybody to read.
        os.chmod(self.directory / name, 0o644)
        self._files.append(name)

    def write_flat_state(self, state: Iterable[tuple[str, int, dict[str, Tensor]]], sharded: bool) -> None:
        """Write this rank's pieces of the optimizer state.

        Args:
            state: (parameter name, offset, state name -> flat tensor).
            sharded: the ranks hold different pieces, so each writes all of its own; False: all hold the same list, and
                each writes the pieces that begin in its even part of it.
        """
        state = list(state)
        if sharded:
            own = {flat_key(name, offset, key): t for name, offset, tensors in state for key, t in tensors.items()}
            self.write_tensors(f"optim-{self.rank}.safetensors", own)
            return
        sizes = [len(next(iter(tensors.values()))) for _, _, tensors in state]
        total, seen, mine = sum(sizes), 0, {}
        for (name, offset, tensors), size in zip(state, sizes):
            if seen * self.world_size // total == self.rank:
                mine |= {flat_key(name, offset, key): tensor for key, tensor in tensors.items()}
            seen += size
        self.write_tensors(f"optim-{self.rank}.safetensors", mine)

    def write_hook_state(self, tensors: dict[str, Tensor]) -> None:
        """Write what this rank's comm hook remembers."""
        self.write_tensors(f"comm_hook-{self.rank}.safetensors", tensors)

    def write_json(self, name: str, value: object) -> None:
        atomic_write_json(self.directory / name, value)
        self._files.append(name)

    def write_folder(self, write: Callable[[Path], None]) -> None:
        """Let `write` put files of its own into the directory (a tokenizer saving itself)."""
        # By way of a folder of this rank's own: the other ranks' files come and go in the common one.
        scratch = self.directory / f".scratch-{self.rank}"
        scratch.mkdir()
        write(scratch)
        for path in sorted(scratch.iterdir()):
            os.replace(path, self.directory / path.name)
            self._files.append(path.name)
        scratch.rmdir()

    def finish(self) -> None:
        """Flush this rank's files and record them."""
        record = {}
        for name in self._files:
            path = self.directory / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            record[name] = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
        atomic_write_json(self.directory / f"rank-{self.rank}.done.json", record)

    def commit(self, valid_loss: float | None, timeout_s: float = 600.0) -> Path:
        """Rank 0: wait for all ranks' records, write the manifest, rename.

        Args:
            valid_loss: of these weights, if it was measured.
            timeout_s: how long to wait for the other ranks.
        Raises:
            TimeoutError: a rank did not finish in time.
        """
        deadline = time.monotonic() + timeout_s
        files: dict[str, dict] = {}
        for rank in range(self.world_size):
            path = self.directory / f"rank-{rank}.done.json"
            while not path.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} did not write its part of {self.directory} in {timeout_s:.0f} s")
                time.sleep(0.01)
            files |= json.loads(path.read_text())
            path.unlink()
        atomic_write_json(self.directory / MANIFEST, {"step": self.step, "valid_loss": valid_loss, "files": files})
        if self._final.exists():
            os.replace(self._final, self._final.with_name(f".old-{self._final.name}"))
        os.replace(self.directory, self._final)
        fsync_dir(self._final.parent)
        return self._final


def find_problem(path: Path, weights_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, compared with its manifest; None if nothing is.

    Args:
        weights_only: leave out the files of the optimizer and the comm hook, which are most of the bytes.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    for name, (expected_size, expected_sha256) in files.items():
        if weights_only and name.startswith(("optim-", "comm_hook-")):
            continue
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != expected_size:
            return f"{name} holds {size} bytes instead of {expected_size}"
        if sha256_of_file(file) != expected_sha256:
            return f"{name} does not match its checksum"
    return None


def list_checkpoints(ckpt_dir: Path) -> list[Checkpoint]:
    """Committed checkpoints by rising step, unverified; abandoned and unfinished ones are left out."""
    found = []
    for path in ckpt_dir.glob("step-*") if ckpt_dir.is_dir() else ():
        match = _STEP_DIR.fullmatch(path.name)
        if match and path.is_dir():
            try:
                valid_loss = json.loads((path / MANIFEST).read_text())["valid_loss"]
            except (OSError, ValueError, KeyError, TypeError):
                valid_loss = None
            found.append(Checkpoint(path, int(match[1]), valid_loss))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _by_valid_loss(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those with a finite validation loss, the lowest first."""
    scored = [c for c in checkpoints if c.valid_loss is not None and math.isfinite(c.valid_loss)]
    return sorted(scored, key=lambda c: c.valid_loss)


def choose_checkpoint(
    ckpt_dir: Path, which: str = "last", weights_only: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The best valid checkpoint to resume from, and a sentence about each broken one that was passed over.

    Args:
        which: "last" (greatest step) or "best" (lowest recorded validation loss).
    """
    candidates = list_checkpoints(ckpt_dir)[::-1]
    if which == "best":
        candidates = _by_valid_loss(candidates)
    complaints = []
    for candidate in candidates:
        problem = find_problem(candidate.path, weights_only)
        if problem is None:
            return candidate, complaints
        complaints.append(f"checkpoint {candidate.path} is broken and skipped: {problem}")
    return None, complaints


def lock_run(out_dir: Path) -> BinaryIO:
    """Claim a run directory for this process, until the returned file is closed or the process ends.

    Raises:
        ValueError: another process, still alive, trains there.
    """
    file = open(out_dir / ".lock", "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process trains in {out_dir}: stop it first, or choose another --out_dir") from None
    return file


def open_run(out_dir: Path, resume: bool, which: str) -> tuple[Path | None, list[str]]:
    """Create or reopen a run directory; one process does this for all.

    Returns:
        the checkpoint to resume from (None: start fresh), and remarks for the user.
    Raises:
        ValueError: it cannot be written; it holds checkpoints and `resume` is off; none of them is whole.
    """
    ckpt_dir = out_dir / "ckpt"
    if out_dir.is_dir() and not (out_dir / RUN_MARK).exists():
        # A refused launch may have left its exit records, nothing else.
        if any(path.name != "exit" for path in out_dir.iterdir()):
            raise ValueError(f"--out_dir {out_dir} holds other things than a run: choose a new or empty directory")
    try:
        ckpt_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / RUN_MARK).write_text("")
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir} cannot be written: {error.strerror}") from None
    if not resume:
        if list_checkpoints(ckpt_dir):
            raise ValueError(f"{out_dir} already holds a run: add --resume to go on, or choose another --out_dir")
        return None, []
    chosen, complaints = choose_checkpoint(ckpt_dir, which)
    if chosen is not None:
        return chosen.path, complaints
    if complaints:
        raise ValueError(f"{'; '.join(complaints)}; none is left to resume from: choose another --out_dir")
    if list_checkpoints(ckpt_dir):
        raise ValueError(f"no checkpoint of {out_dir} has a validation loss: use --resume_from=last")
    return None, [f"no checkpoint in {out_dir}: starting fresh"]


def resolve_checkpoint_dir(path: Path) -> Path:
    """A directory with weights, from a run (its newest checkpoint), a checkpoint or a Hugging Face folder.

    Raises:
        ValueError: nothing usable there.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if (path / "config.json").exists():
        if (path / MANIFEST).exists() and (problem := find_problem(path, weights_only=True)):
            raise ValueError(f"checkpoint {path} is broken: {problem}")
        return path
    if (path / "ckpt").is_dir():
        chosen, complaints = choose_checkpoint(path / "ckpt", weights_only=True)
        for complaint in complaints:
            logger.warning(complaint)
        if chosen is not None:
            return chosen.path
        raise ValueError("; ".join(complaints) or f"the run {path} has no checkpoint to take")
    raise ValueError(f"{path} is neither a run, nor a checkpoint, nor a Hugging Face folder")


def read_trainer_state(path: Path) -> dict:
    return json.loads((path / TRAINER_STATE).read_text())


def abandon_later(ckpt_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step`, which a resumed run leaves behind, to `abandoned-*`."""
    renamed = []
    for checkpoint in list_checkpoints(ckpt_dir):
        if checkpoint.step > step:
            target = ckpt_dir / f"abandoned-{checkpoint.path.name}-{int(time.time())}"
            os.replace(checkpoint.path, target)
            renamed.append(target)
    return renamed


def prune(ckpt_dir: Path, keep_last: int = 2, keep_best: int = 2) -> None:
    """Delete all but the newest and the best checkpoints, and what killed saves left."""
    checkpoints = list_checkpoints(ckpt_dir)
    kept = {c.path for c in [*checkpoints[-keep_last:], *_by_valid_loss(checkpoints)[:keep_best]]}
    doomed = [c.path for c in checkpoints if c.path not in kept]
    for path in [*doomed, *ckpt_dir.glob(".tmp-step-*"), *ckpt_dir.glob(".old-*")]:
        # Out of sight first: a deletion that is cut short must not leave half a checkpoint under its name.
        if path.name.startswith("step-"):
            hidden = path.with_name(f".old-{path.name}")
            os.replace(path, hidden)
            path = hidden
        shutil.rmtree(path, ignore_errors=True)


def hook_state_files(directory: Path) -> list[Path]:
    """What each rank's comm hook remembered, by rank; empty if there is none."""
    files = directory.glob("comm_hook-*.safetensors")
    return sorted(files, key=lambda path: int(path.stem.removeprefix("comm_hook-")))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def flat_key(name: str, offset: int, state: str) -> str:
    return f"{name}@{offset}/{state}"


def load_flat_state(directory: Path, wanted: Iterable[tuple[str, int, dict[str, Tensor]]]) -> None:
    """Fill flat tensors from all `optim-*.safetensors` of a checkpoint, however those were cut.

    Args:
        wanted: (parameter name, offset of the tensors in the parameter, state -> 1-D tensor to fill).
    Raises:
        ValueError: some elements are in no file, or a file cannot be read.
    """
    pieces: dict[tuple[str, str], list[tuple[int, int, str, Path]]] = {}
    handles = {}
    try:
        for file in sorted(directory.glob("optim-*.safetensors")):
            handles[file] = safe_open(file, framework="pt")
            for key in handles[file].keys():
                name, _, rest = key.rpartition("@")
                offset, _, state = rest.partition("/")
                length = handles[file].get_slice(key).get_shape()[0]
                pieces.setdefault((name, state), []).append((int(offset), int(offset) + length, key, file))
    except SafetensorError as error:
        raise ValueError(f"the optimizer state in {directory} cannot be read: {error}") from None
    for name, offset, states in wanted:
        for state, target in states.items():
            filled = 0
            for start, end, key, file in pieces.get((name, state), ()):
                first, last = max(start, offset), min(end, offset + len(target))
                if first < last:
                    target[first - offset : last - offset] = handles[file].get_slice(key)[first - start : last - start]
                    filled += last - first
            if filled != len(target):
                raise ValueError(f"{directory} holds {filled} of {len(target)} elements of {name} ({state})")
