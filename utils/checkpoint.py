"""Checkpoints: directories `ckpt/step-N/` that are whole or not there.

    python -m utils.checkpoint ls RUN        what there is
    python -m utils.checkpoint verify RUN    read every file and compare its checksum
    python -m utils.checkpoint prune RUN     delete all but those to keep

    .tmp-step-N-ID/       while it is written (utils/saving.py)
      rank-R.done.json    each rank's record of its files: sizes and sha256
    step-N/               after the store's first rank checked the records, wrote the manifest and renamed
      model.safetensors, config.json, tokenizer ...   a Hugging Face folder
      optim-R.safetensors     flat float32 pieces, keyed "parameter name@offset/state"
      comm_hook-R.safetensors what rank R's comm hook remembers, if it does
      trainer_state.json      where the run stands
      manifest.json           every file's size and sha256, written last

They are written by utils/saving.py, and their tensors are read by utils/flat_state.py. What it takes to resume where
nodes share no file system is in `agree_on_checkpoint` and utils/stores.py.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from utils.files import lock_file, sha256_of_file
from utils.stores import SEEN_MARK, Gather, Part, Place, missing_ranks

logger = logging.getLogger(__name__)

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"
RUN_MARK = ".zero2all-run"
"""An empty file in a run directory, by which ranks find out whether they see the same one."""
REPLACED = ".replaced-"
"""Begins the name of a checkpoint whose step is saved again, until that is done."""
_ABANDONED, _ABANDONED_KEPT = "abandoned-", 2
_STEP_DIR = re.compile(r"step-(\d+)")


STOP_FILE = "stop"
"""A file of this name in a run directory asks the run to save and stop."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, not yet verified."""

    path: Path
    part: Part
    saved_at: float = 0.0
    """Seconds since 1970; 0 if unknown."""
    has_manifest: bool = True
    """Whether its manifest can be read: else it is of no use."""

    @property
    def step(self) -> int:
        return self.part.step

    @property
    def valid_loss(self) -> float | None:
        return self.part.valid_loss


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep_last: int = 2
    """The newest ones."""
    keep_best: int = 2
    """Those with the lowest validation loss."""
    keep_every: int = 0
    """Those of steps that are a multiple of this; 0: none."""


def sealed(manifest: dict) -> dict:
    """A manifest with a checksum of its own."""
    return manifest | {"sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _read_manifest(path: Path) -> dict:
    """
    Raises:
        OSError, ValueError: it cannot be read, or is not what was written.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    # Manifests of earlier versions have neither.
    if not isinstance(manifest, dict) or ("save_id" in manifest and "sha256" not in manifest):
        raise ValueError("not a manifest")
    if "sha256" in manifest and sealed({k: v for k, v in manifest.items() if k != "sha256"}) != manifest:
        raise ValueError("not what was written")
    return manifest


def find_problem(path: Path, weights_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, compared with its manifest; None if nothing is.

    Args:
        weights_only: leave out the files of the optimizer and the comm hook, which are most of the bytes.
    """
    try:
        files = _read_manifest(path)["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    for name, (expected_size, expected_sha256) in files.items():
        if weights_only and is_state_of_ranks(name):
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
            found.append(_read_checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _read_checkpoint(path: Path, step: int) -> Checkpoint:
    """What its manifest says; of one that cannot be read, the step alone."""
    try:
        manifest = _read_manifest(path)
        # Checkpoints of earlier versions lack all but the loss.
        part = Part(
            step, manifest["valid_loss"], manifest.get("save_id", f"unknown-{step}"), manifest.get("world_size", 1),
            tuple(manifest.get("ranks", [0])), manifest.get("sharded", False),
        )  # fmt: skip
        return Checkpoint(path, part, manifest.get("saved_at", 0.0))
    except (OSError, ValueError, KeyError, TypeError):
        return Checkpoint(path, Part(step, None, f"unknown-{step}", 1, (0,), False), has_manifest=False)


_Scored = TypeVar("_Scored", Checkpoint, Part)


def best_first(found: Iterable[_Scored]) -> list[_Scored]:
    """Those that have a validation loss, the lowest in front; of equals the newest."""
    scored = [one for one in found if one.valid_loss is not None and math.isfinite(one.valid_loss)]
    return sorted(scored, key=lambda one: (one.valid_loss, -one.step))


def choose_checkpoint(
    ckpt_dir: Path, which: str = "last", weights_only: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The best valid checkpoint of one store, and a sentence about each broken one that was passed over.

    Args:
        which: "last" (greatest step) or "best" (lowest recorded validation loss).
    """
    checkpoints = {c.part.save_id: c for c in list_checkpoints(ckpt_dir)}
    complaints = []
    for part in _in_order([c.part for c in checkpoints.values()], which):
        candidate = checkpoints[part.save_id]
        problem = find_problem(candidate.path, weights_only)
        if problem is None:
            return candidate, complaints
        complaints.append(f"checkpoint {candidate.path} is broken and skipped: {problem}")
    return None, complaints


def _in_order(parts: Iterable[Part], which: str) -> list[Part]:
    """Those that may be resumed from, the one to try first in front."""
    if which == "best":
        return best_first(parts)
    return sorted(parts, key=lambda p: -p.step)


@dataclass(frozen=True)
class Chosen:
    """A checkpoint to resume from, on all stores together."""

    step: int
    holders: tuple[int, ...]
    """First ranks of the stores that hold a valid part of it."""
    world_size: int
    """Of the launch that wrote it."""
    sharded: bool
    """Whether its parts make up the whole only together."""

    @property
    def name(self) -> str:
        return f"step-{self.step}"


def agree_on_checkpoint(ckpt_dir: Path, which: str, place: Place, gather: Gather) -> tuple[Chosen | None, list[str]]:
    """The checkpoint from which all ranks can resume, and a sentence about each that was passed over. Collective.

    A checkpoint counts where the parts that its stores hold, and whose checksums are right, are the whole.

    Raises:
        ValueError: there are checkpoints, but none to resume from.
    """
    own = {c.part.save_id: c for c in list_checkpoints(ckpt_dir)} if place.is_first_of_store else {}
    stores = [[Part(**{**part, "ranks": tuple(part["ranks"])}) for part in parts]
              for parts in gather([asdict(c.part) for c in own.values()])]  # fmt: skip
    saves = {part.save_id: part for parts in stores for part in parts}
    complaints = []
    for save in _in_order(saves.values(), which):
        parts = {rank: part for rank, found in enumerate(stores) for part in found if part.save_id == save.save_id}
        own_problem = find_problem(own[save.save_id].path) if save.save_id in own else None
        for rank, problem in enumerate(gather(own_problem)):
            if problem is not None:
                del parts[rank]
                complaints.append(f"checkpoint {ckpt_dir / f'step-{save.step}'} is broken and skipped: {problem}"
                                  + ("" if place.shared_by_all else f" (on the node of rank {rank})"))  # fmt: skip
        missing = missing_ranks(parts.values())
        if not missing:
            return Chosen(save.step, tuple(parts), save.world_size, save.sharded), complaints
        if parts and not place.shared_by_all:
            complaints.append(
                f"checkpoint step-{save.step} is skipped: no node holds the optimizer state of ranks "
                f"{', '.join(map(str, missing))}"
            )
    if complaints:
        raise ValueError(f"{'; '.join(complaints)}; none is left to resume from: choose another --out_dir")
    if saves:
        raise ValueError(f"no checkpoint in {ckpt_dir} has a validation loss: use --resume_from=last")
    return None, []


def lock_run(out_dir: Path) -> BinaryIO:
    """Claim a run directory for this process, until the returned file is closed or the process ends.

    Raises:
        ValueError: another process, still alive, trains there.
    """
    taken = f"another process trains in {out_dir}: stop it first, or choose another --out_dir"
    return lock_file(out_dir / ".lock", taken)


_NOT_OF_A_RUN_YET = ("exit", "monitor", SEEN_MARK)
"""How names begin that a refused launch, the monitor, or ranks that look for each other leave in a directory."""


def prepare_run(out_dir: Path) -> None:
    """Create or reopen a run directory; one process of each store does this.

    Raises:
        ValueError: it cannot be written, or holds something else.
    """
    if out_dir.is_dir() and not (out_dir / RUN_MARK).exists():
        if not all(path.name.startswith(_NOT_OF_A_RUN_YET) for path in out_dir.iterdir()):
            raise ValueError(f"--out_dir {out_dir} holds other things than a run: choose a new or empty directory")
    try:
        (out_dir / "ckpt").mkdir(parents=True, exist_ok=True)
        (out_dir / RUN_MARK).write_text("")
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir} cannot be written: {error.strerror}") from None


def open_run(
    out_dir: Path, resume: bool, which: str, place: Place, gather: Gather
) -> tuple[Chosen | None, list[str]]:
    """Find the checkpoint to resume from, in a run directory that is prepared and locked. Collective.

    Returns:
        the checkpoint (None: start fresh), and remarks for the user.
    Raises:
        ValueError: it holds checkpoints and `resume` is off; none of them is whole. On all ranks.
    """
    ckpt_dir = out_dir / "ckpt"
    if not resume:
        if any(gather(bool(list_checkpoints(ckpt_dir)))):
            raise ValueError(f"{out_dir} already holds a run: add --resume to go on, or choose another --out_dir")
        return None, []
    chosen, remarks = agree_on_checkpoint(ckpt_dir, which, place, gather)
    if chosen is None:
        remarks = [f"no checkpoint in {out_dir}: starting fresh"]
    return chosen, remarks


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
            target = ckpt_dir / f"{_ABANDONED}{checkpoint.path.name}-{int(time.time())}"
            os.replace(checkpoint.path, target)
            renamed.append(target)
    return renamed


def doomed_by(retention: Retention, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those of `checkpoints` (by rising step) that need not stay, broken ones among them."""
    everything, checkpoints = checkpoints, [c for c in checkpoints if c.has_manifest]
    newest = checkpoints[::-1][: retention.keep_last]
    kept = {c.path for c in [*newest, *best_first(checkpoints)[: retention.keep_best]]}
    if retention.keep_every:
        kept |= {c.path for c in checkpoints if c.step % retention.keep_every == 0}
    return [c for c in everything if c.path not in kept]


def prune(ckpt_dir: Path, retention: Retention) -> None:
    """Delete the checkpoints that need not stay, and all but the newest of those that were set aside."""
    for checkpoint in doomed_by(retention, list_checkpoints(ckpt_dir)):
        # Out of sight first: a deletion that is cut short must not leave half a checkpoint under its name.
        os.replace(checkpoint.path, checkpoint.path.with_name(f".old-{checkpoint.path.name}"))
    for path in sorted(ckpt_dir.glob(f"{_ABANDONED}*"), key=lambda path: path.stat().st_ctime)[:-_ABANDONED_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    _delete(ckpt_dir, ".old-*", f"{REPLACED}*")


def delete_leftovers(ckpt_dir: Path) -> None:
    """Delete what killed saves, deletions and launches left; nobody may be writing here. A checkpoint whose successor
    of the same step did not come to its place goes back there."""
    for path in ckpt_dir.glob(f"{REPLACED}*"):
        match = _STEP_DIR.match(path.name.removeprefix(REPLACED))
        if match and not (ckpt_dir / match[0]).exists():
            os.replace(path, ckpt_dir / match[0])
    _delete(ckpt_dir, ".old-*", f"{REPLACED}*", ".tmp-step-*", ".fetched-*")


def _delete(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def is_state_of_ranks(name: str) -> bool:
    """Whether a checkpoint's file is one of those that each rank writes for itself."""
    return name.startswith(("optim-", "comm_hook-"))


def is_hook_state(name: str) -> bool:
    return name.startswith("comm_hook-")


def hook_state_rank(name: str) -> int:
    """Whose memory a `comm_hook-R.safetensors` is."""
    return int(name.removeprefix("comm_hook-").removesuffix(".safetensors"))


def _age(seconds: float) -> str:
    """5 s, 3 min, 2.5 h or 4.0 days."""
    for unit, length in (("days", 86400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(seconds, 0):.0f} s"


def _line(checkpoint: Checkpoint) -> str:
    size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
    loss = f"{checkpoint.valid_loss:.4f}" if checkpoint.valid_loss is not None else "-"
    age = f"{_age(time.time() - checkpoint.saved_at)} ago" if checkpoint.saved_at else "-"
    part = checkpoint.part
    ranks = f"{len(part.ranks)} of {part.world_size} ranks" if len(part.ranks) < part.world_size else (
        f"{part.world_size} rank{'s' if part.world_size > 1 else ''}")  # fmt: skip
    return f"{checkpoint.path.name:<14} {size / 1e6:>10,.1f} MB  valid loss {loss:>8}  {age:>12}  {ranks}"


def _list_command(checkpoints: list[Checkpoint]) -> int:
    for checkpoint in checkpoints:
        print(_line(checkpoint))
    return 0


def _verify_command(checkpoints: list[Checkpoint]) -> int:
    broken = 0
    for checkpoint in checkpoints:
        problem = find_problem(checkpoint.path)
        broken += problem is not None
        print(f"{_line(checkpoint)}  {'ok' if problem is None else f'BROKEN: {problem}'}", flush=True)
    return 1 if broken else 0


def _prune_command(run: Path, checkpoints: list[Checkpoint], retention: Retention, dry_run: bool) -> int:
    lock = None if dry_run else lock_run(run)
    doomed = doomed_by(retention, checkpoints)
    for checkpoint in doomed:
        print(f"{'would delete' if dry_run else 'deleting'} {_line(checkpoint)}")
    if lock is not None:
        prune(run / "ckpt", retention)
        delete_leftovers(run / "ckpt")
        lock.close()
    print(f"{len(checkpoints) - len(doomed)} of {len(checkpoints)} checkpoints stay")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m utils.checkpoint", description="Look after the checkpoints of a run."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = Retention()
    for name, text in (
        ("ls", "list them"),
        ("verify", "compare every file with its checksum; exit code 1 if one is broken"),
        ("prune", "delete all but those to keep"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", help="run directory (--out_dir of the training)")
        if name == "prune":
            command.add_argument("--keep_last", type=int, default=defaults.keep_last, help="newest ones to keep")
            command.add_argument("--keep_best", type=int, default=defaults.keep_best,
                                 help="ones with the lowest validation loss to keep")  # fmt: skip
            command.add_argument("--keep_every", type=int, default=defaults.keep_every,
                                 help="keep those of steps that are a multiple of this")  # fmt: skip
            command.add_argument("--dry_run", action="store_true", help="only say what would be deleted")
    args = parser.parse_args(argv)
    run = Path(args.run)
    checkpoints = list_checkpoints(run / "ckpt")
    try:
        if not (run / "ckpt").is_dir():
            raise ValueError(f"{run} is no run directory: it has no ckpt folder")
        if args.command == "prune":
            if min(args.keep_last, args.keep_best, args.keep_every) < 0 or not args.keep_last:
                raise ValueError("--keep_last must be at least 1, the others at least 0")
            retention = Retention(args.keep_last, args.keep_best, args.keep_every)
            return _prune_command(run, checkpoints, retention, args.dry_run)
        if not checkpoints:
            raise ValueError(f"{run} holds no checkpoint yet")
        return (_list_command if args.command == "ls" else _verify_command)(checkpoints)
    except (ValueError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
