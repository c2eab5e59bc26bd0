"""Writing checkpoints while the training goes on.

    main thread    step | forward, backward | optimizer | step | step | step ...
    copy thread         | copy ............ |
    save thread                             | write, flush, checksum, done-record | manifest, rename |

The state is copied into host memory, which is used again at each save, under the next forward and backward pass: these
only read it. A save holds the training up for what is left of the copy then. One save is in flight at a time. The save
thread issues no collectives: ranks that share a file system meet through files in `.tmp-step-N-ID/`, and the main
threads agree, with what they exchange at every step anyway, on what became of it. Until then older checkpoints stay.
Weights that are not finite are no checkpoint: the save thread looks at them before it writes.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.folder import MANIFEST, REPLACED, Retention, prune_or_warn, sealed
from checkpoint.named import NamedState, keyed
from checkpoint.stores import Place
from utils.files import atomic_write, atomic_write_json, fsync_dir, sha256_of_file
from utils.threads import background_threads

logger = logging.getLogger(__name__)

_MODEL = "model.safetensors"
_POLL_SECONDS = 0.005
_CLOSING_SECONDS = 2.0
"""How long a process that is about to end still waits for the parts of other ranks."""


class NonFiniteWeights(ValueError):
    """A checkpoint of such weights would be of no use, and push out one that is."""


class HostCopies:
    """Copies of tensors in host memory, made while the training goes on: on CUDA by a stream of their own into pinned
    memory, on a CPU by a thread of their own. The memory is kept for the next time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = background_threads(1, "checkpoint-copy") if self._stream is None else None
        self._buffers: dict[str, Tensor] = {}
        # With the tensors themselves: memory that was freed could come back as another one's.
        self._taken: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._copied: torch.cuda.Event | Future | None = None

    def begin(self) -> None:
        """Forget what the last save copied: its memory is written over from here on."""
        self.wait()
        self._taken.clear()

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """Where the copy of a contiguous tensor will be; of memory that was named since `begin`, the same copy again.

        Args:
            key: names the buffer; the same at every save.
        """
        # Weights in float32 are their own main parameters.
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if same not in self._taken:
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() != tensor.numel() or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=self._stream is not None)
                self._buffers[key] = buffer
            self._taken[same] = (tensor, buffer)
        return self._taken[same][1].view(tensor.shape)

    def end(self) -> None:
        """All is named: copy it, in the background. Nothing of it may change before `before_update`."""
        if self._stream is None:
            self._copied = self._thread.submit(self._copy_all, False)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy_all(True)
        self._copied = self._stream.record_event()

    def _copy_all(self, non_blocking: bool) -> None:
        for tensor, buffer in self._taken.values():
            buffer.copy_(tensor.reshape(-1), non_blocking=non_blocking)

    def before_update(self) -> None:
        """The tensors are about to change. On CUDA the main stream waits for the copies, on the device; on a CPU the
        caller waits."""
        if isinstance(self._copied, Future):
            self._copied.result()
        elif self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        """Block until the copies are there."""
        if isinstance(self._copied, Future):
            self._copied.result()
        elif self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()


class CheckpointWriter:
    """One rank's part in writing `ckpt/step-N`. First `add_*` in the main thread, then the rest in any thread:
    `make_directory`, `write_files`, `finish`, and on the store's first rank `commit`.

    Args:
        save_id: the same on all ranks, and of no other save.
        copies: where tensors are copied to when they are added; None: they are written from where they are.
    """

    def __init__(self, ckpt_dir: Path, step: int, place: Place, save_id: str, copies: HostCopies | None = None):
        self.step, self.place, self.save_id = step, place, save_id
        self.directory = ckpt_dir / f".tmp-step-{step}-{save_id}"
        self._final, self._copies = ckpt_dir / f"step-{step}", copies
        self._tensors: list[tuple[str, dict[str, Tensor], dict[str, str] | None]] = []
        self._contents: list[tuple[str, bytes]] = []
        self._folders: list[Callable[[Path], None]] = []
        self._files: list[str] = []
        self._sharded = False

    def add_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        if self._copies is not None:
            tensors = {key: self._copies.copy(f"{name}:{key}", tensor) for key, tensor in tensors.items()}
        self._tensors.append((name, tensors, metadata))

    def add_named_state(self, state: NamedState, sharded: bool) -> None:
        """Add this rank's pieces of the optimizer state.

        Args:
            state: pieces of parameters with their tensors.
            sharded: the ranks hold different pieces, so each writes all of its own; False: all hold the same list, and
                each writes the pieces that begin in its even part of it. Then each store holds the whole.
        """
        state, self._sharded = list(state), sharded
        name = f"optim-{self.place.rank}.safetensors"
        if sharded:
            self.add_tensors(name, {key: t for piece, tensors in state for key, t in keyed(piece, tensors).items()})
            return
        ranks = self.place.store
        total, seen, mine = max(sum(piece.numel for piece, _ in state), 1), 0, {}
        for piece, tensors in state:
            if ranks[min(seen * len(ranks) // total, len(ranks) - 1)] == self.place.rank:
                mine |= keyed(piece, tensors)
            seen += piece.numel
        self.add_tensors(name, mine)

    def add_hook_state(self, tensors: dict[str, Tensor]) -> None:
        """Add what this rank's comm hook remembers."""
        self.add_tensors(f"comm_hook-{self.place.rank}.safetensors", tensors)

    def add_json(self, name: str, value: object) -> None:
        self._contents.append((name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))

    def add_folder(self, write: Callable[[Path], None]) -> None:
        """Let `write` put files of its own into the directory, later (a tokenizer saving itself)."""
        self._folders.append(write)

    def make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def write_files(self) -> None:
        for name, content in self._contents:
            atomic_write(self.directory / name, content)
            self._files.append(name)
        for write in self._folders:
            self._write_folder(write)
        if self._copies is not None:
            self._copies.wait()
        self._require_finite_weights()
        for name, tensors, metadata in self._tensors:
            self.write_tensors(name, tensors, metadata)

    def _require_finite_weights(self) -> None:
        """
        Raises:
            NonFiniteWeights: a weight, or a float32 main parameter of this rank's share, is not finite.
        """
        for name, tensors, _ in self._tensors:
            for key, tensor in tensors.items():
                is_weight = name == _MODEL or key.endswith("/main")
                # One pass without a mask: NaN goes through to both.
                if is_weight and tensor.numel() and not all(math.isfinite(x) for x in torch.aminmax(tensor)):
                    raise NonFiniteWeights(f"{key.partition('@')[0]} is not finite")

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
        save_file(tensors, self.directory / name, metadata)
        # safetensors keeps its files to the owner; the rest of the folder is for everybody to read.
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
        record = {}
        for name in self._files:
            path = self.directory / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            record[name] = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
        # Nothing after it: the first rank may already be moving the directory to its place. It flushes the directory.
        atomic_write_json(self.directory / f"rank-{self.place.rank}.done.json", record, durable=False)

    def commit(self, valid_loss: float | None, give_up: Callable[[], bool]) -> Path | None:
        """The store's first rank: wait for the records of all its ranks, write the manifest, rename.

        Args:
            valid_loss: of these weights, if it was measured.
            give_up: asked while a record is missing.
        Returns:
            the checkpoint, or None after `give_up` said True.
        """
        files: dict[str, dict] = {}
        for rank in self.place.store:
            path = self.directory / f"rank-{rank}.done.json"
            while not path.exists():
                if give_up():
                    return None
                time.sleep(_POLL_SECONDS)
            files |= json.loads(path.read_text())
            path.unlink()
        manifest = sealed({
            "step": self.step, "valid_loss": valid_loss, "saved_at": time.time(), "save_id": self.save_id,
            "world_size": self.place.world_size, "ranks": list(self.place.store), "sharded": self._sharded,
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
        """Where an older checkpoint of the same step is until this one is whole everywhere."""
        return self._final.with_name(f"{REPLACED}{self._final.name}-{self.save_id}")

    def revert(self) -> None:
        """The store's first rank: leave nothing of this save, also of one that is whole here but failed elsewhere."""
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            is_mine = json.loads((self._final / MANIFEST).read_text())["save_id"] == self.save_id
        except (OSError, ValueError, KeyError, TypeError):
            is_mine = False
        if is_mine:
            shutil.rmtree(self._final, ignore_errors=True)
        if self._replaced.exists() and not self._final.exists():
            os.replace(self._replaced, self._final)


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save, as all ranks agreed."""

    step: int
    name: str
    """Of the checkpoint's directory."""
    seconds: float
    """From its beginning until it was whole on disk here."""
    held_up: float
    """Seconds of them that the training waited."""
    problem: str | None
    """Why it failed: nothing of it is left; earlier checkpoints are."""
    poisoned: bool = False
    """It failed because weights are not finite."""


class CheckpointSaver:
    """Saves one checkpoint after the other, each in the background. All ranks call all methods in the same order.

    Args:
        launch: a name that all ranks of this launch share, and no other launch.
        background: False: write from where the tensors are, and wait; needs no memory for copies.
        gather: every rank's (JSON-like) value on every rank.
    """

    def __init__(
        self,
        ckpt_dir: Path,
        place: Place,
        launch: str,
        device: torch.device,
        retention: Retention,
        background: bool,
        gather: Callable[[object], list],
    ):
        self._ckpt_dir, self._place, self._launch, self._gather = ckpt_dir, place, launch, gather
        self.retention, self.background = retention, background
        self._copies = HostCopies(device) if background else None
        self._thread = background_threads(1, "checkpoint-save")
        self._count = 0
        self._prune_after, self._spared = True, set()
        self._writer: CheckpointWriter | None = None
        self._future: Future | None = None
        self._give_up, self._closing_since = Event(), None
        self._began = self._held_up = 0.0

    @property
    def in_flight(self) -> bool:
        return self._future is not None

    def begin(self, step: int) -> CheckpointWriter:
        """A writer to add this rank's share to; then `start`. No other save may be in flight: `settle` first."""
        assert self._future is None
        self._began = time.perf_counter()
        self._count += 1
        if self._copies is not None:
            self._copies.begin()
        return CheckpointWriter(self._ckpt_dir, step, self._place, f"{self._launch}-{self._count}", self._copies)

    def start(self, writer: CheckpointWriter, valid_loss: float | None, prune: bool = True) -> None:
        """All is added: write it, then delete what need not stay. Without `background`, the caller has to `settle`
        before anything changes."""
        self._prune_after = prune
        if self._copies is not None:
            self._copies.end()
        self._writer = writer
        self._give_up.clear()
        self._held_up = time.perf_counter() - self._began
        self._future = self._thread.submit(self._write, writer, valid_loss)

    def prune(self, just_saved: int) -> None:
        """Delete in the background what need not stay; checkpoints that were set aside are read for that."""
        if self._place.is_first_of_store:
            self._thread.submit(prune_or_warn, self._ckpt_dir, self.retention, just_saved, self._spared)

    def wait_for_prune(self) -> None:
        """Until what need not stay is deleted."""
        self._thread.submit(lambda: None).result()

    def reserve(self, add_share: Callable[[CheckpointWriter], None]) -> None:
        """Take the memory for the copies now, so that the first save is as short as the others."""
        if self._copies is not None:
            self._copies.begin()
            add_share(CheckpointWriter(self._ckpt_dir, 0, self._place, "", self._copies))
            self._copies.end()

    def before_update(self) -> None:
        """What was added to a save that is in flight is about to change."""
        if self._copies is not None:
            started = time.perf_counter()
            self._copies.before_update()
            self._held_up += time.perf_counter() - started

    def _write(self, writer: CheckpointWriter, valid_loss: float | None) -> float:
        """In the save thread; returns when it was done (time.perf_counter)."""
        writer.make_directory()
        writer.write_files()
        writer.finish()
        if self._place.is_first_of_store:
            writer.commit(valid_loss, self._may_give_up)
        return time.perf_counter()

    def _may_give_up(self) -> bool:
        closing = self._closing_since
        return self._give_up.is_set() or (closing is not None and time.monotonic() > closing + _CLOSING_SECONDS)

    def signs(self) -> tuple[bool, bool]:
        """(failed here, done here) of the save in flight: what the ranks exchange, to `conclude` together once one has
        failed or all are done."""
        if self._future is None or not self._future.done():
            return False, False
        failed = self._future.exception() is not None
        return failed, not failed

    def settle(self) -> SaveOutcome | None:
        """Wait for the save in flight, if there is one; what became of it. Issues collectives."""
        if self._future is None:
            return None
        started = time.perf_counter()
        while True:
            signs = self._gather(self.signs())
            if any(failed for failed, _ in signs) or all(done for _, done in signs):
                break
            time.sleep(_POLL_SECONDS)
        self._held_up += time.perf_counter() - started
        return self.conclude()

    def conclude(self) -> SaveOutcome:
        """All ranks know that a rank has failed, or that all are done: agree on the outcome, and clean up. Issues
        collectives.

        Raises:
            Exception: whatever went wrong in this rank's save thread, if it was not the disk.
        """
        self._give_up.set()
        error = self._future.exception()
        problem = f"rank {self._place.rank}: {error}" if error is not None else None
        answers = self._gather([problem, isinstance(error, NonFiniteWeights)])
        problems, poisoned = [p for p, _ in answers if p is not None], any(poisoned for _, poisoned in answers)
        writer, seconds = self._writer, 0.0 if error is not None else self._future.result() - self._began
        self._future = self._writer = None
        if problems and self._place.is_first_of_store:
            writer.revert()
        if error is not None and not isinstance(error, (OSError, SafetensorError, NonFiniteWeights)):
            raise error
        if not problems and self._prune_after:
            self.prune(writer.step)
        problem = "; ".join(problems) or None
        return SaveOutcome(writer.step, f"step-{writer.step}", seconds, self._held_up, problem, poisoned)

    def close(self) -> None:
        """Let a save that is in flight finish, unless parts of other ranks are missing and do not come."""
        self._closing_since = time.monotonic()
        self._thread.shutdown()
        if self._copies is not None:
            self._copies.close()
