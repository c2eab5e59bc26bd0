"""train_my_ddp.py as it is, except that a phase of a save kills or slows this process when the campaign asks for it.

The request is `armed.json` in the directory that CHAOS_DIR names: {"phase", "rank", "step", "seconds"}; it is taken by
the first save of at least that step, and then renamed `fired.json`. Half a second or more means: sleep; 0: die.
"""

import json
import os
import runpy
import signal
import time
from pathlib import Path

from utils import checkpoint, saving
from utils.checkpoint import MANIFEST
from utils.saving import CheckpointWriter

HOME = Path(os.environ["CHAOS_DIR"])
RANK = int(os.environ.get("RANK", "0"))
_step = 0


def claim(phase: str) -> dict | None:
    """The request, if it is for this phase, rank and step; nobody else gets it."""
    armed = HOME / "armed.json"
    if not armed.exists():
        return None
    request = json.loads(armed.read_text())
    if request["phase"] != phase or request["rank"] != RANK or _step < request["step"]:
        return None
    (HOME / "fired.tmp").write_text(json.dumps(request | {"step": _step, "pid": os.getpid()}))
    armed.unlink()
    os.replace(HOME / "fired.tmp", HOME / "fired.json")
    return request


def strike(phase: str) -> None:
    request = claim(phase)
    if request is None:
        return
    if not request["seconds"]:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(request["seconds"])


def around(name: str, before: str = "", after: str = "") -> None:
    """Let a method of CheckpointWriter strike before or after it."""
    original = getattr(CheckpointWriter, name)

    def disturbed(self: CheckpointWriter, *arguments: object) -> object:
        global _step
        _step = self.step
        strike(before)
        result = original(self, *arguments)
        strike(after)
        return result

    setattr(CheckpointWriter, name, disturbed)


def leave_half_a_file() -> None:
    original = CheckpointWriter.write_tensors

    def write_tensors(self: CheckpointWriter, name: str, *arguments: object) -> None:
        original(self, name, *arguments)
        request = claim("write_tensors")
        if request is not None and not request["seconds"]:
            os.truncate(self.directory / name, (self.directory / name).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        elif request is not None:
            time.sleep(request["seconds"])

    CheckpointWriter.write_tensors = write_tensors


def around_manifest() -> None:
    original = saving.atomic_write_json

    def atomic_write_json(path: Path, value: object, **options: bool) -> None:
        if path.name == MANIFEST:
            strike("before_manifest")
        original(path, value, **options)
        if path.name == MANIFEST:
            strike("before_rename")

    saving.atomic_write_json = atomic_write_json


def inside_prune() -> None:
    original = checkpoint._delete

    def _delete(directory: Path, *patterns: str) -> None:
        # At the start of a launch more than that is deleted.
        if ".old-*" in patterns and ".tmp-step-*" not in patterns:
            strike("in_prune")
        original(directory, *patterns)

    checkpoint._delete = _delete


if __name__ == "__main__":
    around("make_directory", after="make_directory")
    leave_half_a_file()
    around("finish", before="finish", after="after_finish")
    around_manifest()
    around("commit", after="before_prune")
    inside_prune()
    runpy.run_path("train_my_ddp.py", run_name="__main__")
