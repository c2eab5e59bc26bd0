"""What tests read from a run directory, given the run's flags."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from runs.reslog import read_reslog


def out_dir(flags: list[str]) -> Path:
    return Path(next(flag.partition("=")[2] for flag in flags if flag.startswith("--out_dir=")))


def elsewhere(flags: list[str], directory: Path) -> list[str]:
    return [flag for flag in flags if not flag.startswith("--out_dir=")] + [f"--out_dir={directory}"]


def records(flags: list[str], name: str) -> list[dict]:
    return [r for r in read_reslog(out_dir(flags) / "reslog.jsonl") if r["name"] == name]


def losses(flags: list[str]) -> list[float]:
    return [record["loss"] for record in records(flags, "train")]


def final_state(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    path = out_dir(flags) / "ckpt" / f"step-{step}"
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the weights' difference, relative to the weights."""
    weights = [name for name in a if name.startswith("model.")]
    difference = math.fsum((a[n].double() - b[n].double()).square().sum().item() for n in weights)
    return math.sqrt(difference / math.fsum(b[n].double().square().sum().item() for n in weights))
