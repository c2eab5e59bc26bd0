"""One rank's part in writing a checkpoint: its files, their record, and on the first rank the commit.

The ranks that share a file system meet through files in `.tmp-step-N-ID/`, not through collectives: each leaves a
record of its files there, and the first one waits for all records, writes the manifest and renames the folder.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.folder import MANIFEST, REPLACED, hook_file, optimizer_file, sealed, step_dir
from checkpoint.host_copies import HostCopies
from checkpoint.named import NamedState, Piece, keyed
from checkpoint.stores import StorePlace
from utils.files import atomic_write, atomic_write_json, fsync_dir, sha256_of_file

POLL_SECONDS = 0.005
"""Pause between two looks at whether other ranks are done."""


Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class _TensorFile:
    """A file of tensors; see `CheckpointWriter.add_tensors`."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None
    convert: Convert | None
    are_weights: bool


class NonFiniteWeights(ValueError):
    """A checkpoint of such weights would be useless, and would push out one that is not."""


class CheckpointWriter:
    """One rank's part in writing `ckpt/step-N`. First `add_*` in the main thread, then the rest in any thread:
    `make_directory`, `write_files`, `finish`, and on the store's first rank `commit`.

    Args:
        save_id: the same on all ranks, and different from every other save's.
        copies: takes a copy of each tensor when it is added; None: tensors are written straight from their own memory.
    """

    def __init__(self, ckpt_dir: Path, step: int, place: StorePlace, save_id: str, copies: HostCopies | None = None):
        self.step, self.place, self.save_id = step, place, save_id
        self.directory = ckpt_dir / f".tmp-{step_dir(step)}-{save_id}"
        self._final, self._copies = ckpt_dir / step_dir(step), copies
        self._tensors: list[_TensorFile] = []
        self._contents: list[tuple[str, bytes]] = []
        self._folders: list[Callable[[Path], None]] = []
        self._files: list[str] = []
        self._holders: tuple[int, ...] = (place.rank,)

    def add_tensors(
        self,
        name: str,
        tensors: dict[str, Tensor],
        metadata: dict[str, str] | None = None,
        convert: Convert | None = None,
        are_weights: bool = False,
        are_copies: bool = False,
    ) -> None:
        """Add a file of tensors.

        Args:
            convert: the tensors as they will be -> those that the file holds, called when it is written. So what is
                joined from several takes no memory before, and that of one file at a time.
            are_weights: they must be finite.
            are_copies: `copy_now` has made them, so nothing else will change them.
        """
        tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        if self._copies is not None and not are_copies:
            tensors = {key: self._copies.copy(f"{name}:{key}", tensor) for key, tensor in tensors.items()}
        self._tensors.append(_TensorFile(name, tensors, metadata, convert, are_weights))

    def copy_now(self, key: str, tensor: Tensor) -> Tensor:
        """A copy in host memory of a tensor that is given up after this call, for `add_tensors`.

        Args:
            key: the same at every save.
        """
        return self._copies.copy_now(key, tensor) if self._copies is not None else tensor.cpu()

    def add_named_state(
        self, state: NamedState, holders: Sequence[int], holders_of: Callable[[Piece], Sequence[int]] | None = None
    ) -> None:
        """Add this rank's pieces of the optimizer state.

        Args:
            state: pieces of parameters with their tensors.
            holders: the ranks that hold the same list, this one among them.
            holders_of: the ranks that hold the same of a piece; None: those of the list. Those of them in this store
                share the work: each writes the pieces that begin in its even part.
        """
        self._holders = tuple(holders)
        lists: dict[tuple[int, ...], list[tuple[Piece, dict[str, Tensor]]]] = {}
        for piece, tensors in state:
            its = set(holders if holders_of is None else holders_of(piece))
            lists.setdefault(tuple(rank for rank in self.place.store if rank in its), []).append((piece, tensors))
        mine: dict[str, Tensor] = {}
        for ranks, pieces in lists.items():
            if not set(holders).issuperset(ranks):
                # Others may have them in another order.
                pieces.sort(key=lambda its: (its[0].name, [box.start for box in its[0].boxes]))
            total, seen = max(sum(piece.numel for piece, _ in pieces), 1), 0
            for piece, tensors in pieces:
                if ranks[min(seen * len(ranks) // total, len(ranks) - 1)] == self.place.rank:
                    mine |= keyed(piece, tensors)
                seen += piece.numel
        self.add_tensors(optimizer_file(self.place.rank), mine)

    def add_hook_state(self, tensors: dict[str, Tensor]) -> None:
        """Add the memory of this rank's comm hook."""
        self.add_tensors(hook_file(self.place.rank), tensors)

    def add_json(self, name: str, value: object) -> None:
        self._contents.append((name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))

    def add_folder(self, write: Callable[[Path], None]) -> None:
        """Let `write` put files of its own into the directory, later (a tokenizer saving itself)."""
        self._folders.append(write)

    def make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def write_files(self) -> None:
        """
        Raises:
            NonFiniteWeights: a weight, or a float32 main parameter, of this rank's share is not finite.
            OSError: a file cannot be written.
        """
        for name, content in self._contents:
            atomic_write(self.directory / name, content)
            self._files.append(name)
        for write in self._folders:
            self._write_folder(write)
        if self._copies is not None:
            self._copies.wait()
        self._require_finite_weights()
        for file in self._tensors:
            tensors = file.tensors
            if file.convert is not None:
                tensors = {key: tensor.contiguous() for key, tensor in file.convert(tensors).items()}
            self.write_tensors(file.name, tensors, file.metadata)

    def _require_finite_weights(self) -> None:
        for file in self._tensors:
            for key, tensor in file.tensors.items():
                is_weight = file.are_weights or key.endswith("/main")
                # One pass without a mask: NaN goes through to both.
                if is_weight and tensor.numel() and not all(math.isfinite(x) for x in torch.aminmax(tensor)):
                    raise NonFiniteWeights(f"{key.partition('@')[0]} is not finite")

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
        save_file(tensors, self.directory / name, metadata)
        # safetensors makes its files readable for the owner only; the rest of the folder is readable for everybody.
        os.chmod(self.directory / name, 0o644)
        self._files.append(name)

    def _write_folder(self, write: Callable[[Path], None]) -> None:
        # By way of a folder of this rank's own: the other ranks' files come and go in the common one.
        scratch = self.directory / f".scratch-{self.place.rank}"
        scratch.mkdir()
        write(scratch)
        for path in sorted(scratch.iterdir()):
            os.replace(path, self.directory / path.name)
            self._files.append(path.name)
        scratch.rmdir()

    def finish(self) -> None:
        """Flush this rank's files and record them."""
        files = {}
        for name in self._files:
            path = self.directory / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
        # Nothing after it: the first rank may already be moving the directory to its place. It flushes the directory.
        record = {"files": files, "covers": self._holders}
        atomic_write_json(self._record_of(self.place.rank), record, durable=False)

    def _record_of(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.done.json"

    def commit(self, valid_loss: float | None, give_up: Callable[[], bool]) -> Path | None:
        """The store's first rank: wait for the records of all its ranks, write the manifest, rename.

        Args:
            valid_loss: of these weights, if it was measured.
            give_up: asked while a record is missing.
        Returns:
            the checkpoint, or None after `give_up` said True.
        """
        files: dict[str, dict] = {}
        covers: set[int] = set()
        for rank in self.place.store:
            path = self._record_of(rank)
            while not path.exists():
                if give_up():
                    return None
                time.sleep(POLL_SECONDS)
            record = json.loads(path.read_text())
            files |= record["files"]
            covers.update(record["covers"])
            path.unlink()
        manifest = sealed({
            "step": self.step, "valid_loss": valid_loss, "saved_at": time.time(), "save_id": self.save_id,
            "world_size": self.place.world_size, "ranks": list(self.place.store), "covers": sorted(covers),
            "files": files,
        })  # fmt: skip
        atomic_write_json(self.directory / MANIFEST, manifest)
        if self._final.exists():
            os.replace(self._final, self._replaced)
        os.replace(self.directory, self._final)
        fsync_dir(self._final.parent)
        return self._final

    @property
    def _replaced(self) -> Path:
        """The temporary path of an older checkpoint of the same step, until this one is whole everywhere."""
        return self._final.with_name(f"{REPLACED}{self._final.name}-{self.save_id}")

    def revert(self) -> None:
        """The store's first rank: remove every trace of this save, even if it is whole here but failed elsewhere."""
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            is_mine = json.loads((self._final / MANIFEST).read_text())["save_id"] == self.save_id
        except (OSError, ValueError, KeyError, TypeError):
            is_mine = False
        if is_mine:
            shutil.rmtree(self._final, ignore_errors=True)
        if self._replaced.exists() and not self._final.exists():
            os.replace(self._replaced, self._final)
