"""Checks after a disturbed run: it is the same as an undisturbed one, to the bit, and nothing is left over."""

import fnmatch
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoint.folder import find_problem, list_checkpoints, read_trainer_state
from dataset.audit import audit_run
from runs.reslog import read_reslog
from tests.chaos.run import Broken, Run
from tests.runs import same_bits


def tensors(out_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """File and key -> tensor, of weights, optimizer state and the hooks' memories."""
    files = sorted((out_dir / "ckpt" / f"step-{step}").glob("*.safetensors"))
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}


def same_state(run: Run, reference: Path) -> None:
    ours, theirs = tensors(run.out_dir, run.steps), tensors(reference, run.steps)
    names = {name.partition(" ")[0] for name in theirs}
    weights = fnmatch.filter(names, run.setup.weights_files[0]) or [run.setup.weights_files[0]]
    needed = {*weights} | {f"optim-{rank}.safetensors" for rank in range(run.setup.world_size)}
    if run.setup.hook_remembers:
        needed |= {f"comm_hook-{rank}.safetensors" for rank in range(run.setup.world_size)}
    if names != needed:
        raise Broken(f"the reference holds {', '.join(sorted(names))} instead of {', '.join(sorted(needed))}")
    if not same_bits(ours, theirs):
        other = [k for k in sorted(ours.keys() | theirs.keys()) if k not in ours or k not in theirs
                 or not torch.equal(ours[k], theirs[k])]  # fmt: skip
        raise Broken(f"{len(other)} of {len(theirs)} tensors differ from the reference, {other[0]} first")
    states = [read_trainer_state(path / "ckpt" / f"step-{run.steps}") for path in (run.out_dir, reference)]
    if states[0] != states[1]:
        raise Broken(f"trainer_state.json differs: {states[0]} instead of {states[1]}")


def same_records(run: Run, reference: Path) -> None:
    """Loss, gradient norm, learning rate, samples and digest of every step, and every validation, in order."""
    keys = {"train": ("step", "loss", "grad_norm", "lr", "samples", "digest", "tokens"), "valid": ("step", "loss")}
    ours, theirs = (
        [(r["name"], *(r[key] for key in keys[r["name"]])) for r in read_reslog(path / "reslog.jsonl")
         if r["name"] in keys] for path in (run.out_dir, reference)
    )  # fmt: skip
    if [r[1] for r in theirs if r[0] == "train"] != list(range(1, run.steps + 1)):
        raise Broken("the reference did not record every step")
    if ours != theirs:
        pairs = [(a, b) for a, b in zip(ours, theirs) if a != b]
        raise Broken(f"{len(ours)} records instead of {len(theirs)}; the first that differs: {pairs[:1]}")


def audited(run: Run, reference: Path) -> None:
    audit = audit_run(run.out_dir, [])
    if audit.findings or audit.steps != run.steps:
        raise Broken(f"the audit reached step {audit.steps} of {run.steps} and found: {audit.findings[:3]}")


def checkpoints_whole(run: Run, reference: Path) -> None:
    checkpoints = list_checkpoints(run.ckpt_dir)
    broken = {c.path.name: problem for c in checkpoints if (problem := find_problem(c.path))}
    if broken or not checkpoints:
        raise Broken(f"of {len(checkpoints)} checkpoints are broken: {broken}")


def nothing_left_over(run: Run, reference: Path) -> None:
    patterns = (".tmp-*", ".old-*", ".fetched-*", ".replaced-*")
    left = [path.name for pattern in patterns for path in run.out_dir.rglob(pattern)]
    if left:
        raise Broken(f"left behind: {', '.join(left)}")


def nobody_alive(run: Run, reference: Path) -> None:
    if processes := run.processes():
        raise Broken(f"{len(processes)} processes of the run live on: {processes}")


CHECKS: dict[str, Callable[[Run, Path], None]] = {
    "the same weights, optimizer and hook state": same_state,
    "the same records": same_records,
    "dataset.audit": audited,
    "every checkpoint left verifies": checkpoints_whole,
    "nothing left behind": nothing_left_over,
    "no process left": nobody_alive,
}


def remarks(run: Run) -> list[str]:
    """Remarks on things that break no promise: small files that a kill left and nobody removes, and hangs that were
    noticed without any stopped process (a loaded machine)."""
    found = [p for p in run.out_dir.rglob("*") if ".tmp-" in p.name or p.name.startswith(".seen-")]
    false = run.seen.hangs - len(run.seen.delays)
    lines = [f"{false} hangs noticed where nothing was stopped"] if false > 0 else []
    return lines + [f"left behind: {path.relative_to(run.out_dir)}" for path in found]
