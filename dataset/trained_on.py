"""Which data a run was trained on, from the configuration that it left behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.layout import CONFIG_NAME, RunPaths
from utils.small_files import parse_yaml


@dataclass(frozen=True)
class TrainedOn:
    """Paths are as they were given to the run, relative to where it was started."""

    dirs: dict[str, Path]
    """Set -> its directory."""
    max_seq_len: int
    tokenizer_dir: Path
    seed: int
    task: str
    packing: bool


def is_run(path: Path) -> bool:
    return RunPaths(path).config.exists()


def read_trained_on(run_dir: Path) -> TrainedOn:
    """
    Raises:
        ValueError: no run directory.
    """
    try:
        # Whatever is wrong with it shows when it is read, and is caught below.
        config: Any = parse_yaml(RunPaths(run_dir).config.read_bytes())
        # Not those that were given: of raw records, where their tokens are.
        dirs = {split: Path(config["derived"][f"{split}_data"]) for split in ("train", "valid")}
        return TrainedOn(
            dirs, config["max_seq_len"], Path(config["tokenizer_dir"] or dirs["train"] / "tokenizer"), config["seed"],
            config["task_type"], config["packing"],
        )  # fmt: skip
    except (FileNotFoundError, NotADirectoryError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{run_dir} is no run directory: {CONFIG_NAME} cannot be read ({error})") from None
