"""The data that a run was trained on, by the configuration that it left behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.mixture_spec import directories_of
from runs.layout import CONFIG_NAME, RunPaths
from utils.small_files import parse_yaml


@dataclass(frozen=True)
class TrainedOn:
    """Data and order of a run. Paths are as they were given, relative to the directory in which the run was started."""

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
    """Data of a run.

    Raises:
        ValueError: it is not a run directory.
    """
    try:
        # Untyped: anything wrong with it raises an exception that is caught below.
        config: Any = parse_yaml(RunPaths(run_dir).config.read_bytes())
        # These are the directories of the tokens, which lie elsewhere if raw records were given.
        dirs = {split: Path(config["derived"][f"{split}_data"]) for split in ("train", "valid")}
        tokenizer_dir = Path(config["tokenizer_dir"] or directories_of(dirs["train"])[0] / "tokenizer")
        return TrainedOn(
            dirs, config["max_seq_len"], tokenizer_dir, config["seed"], config["task_type"], config["packing"]
        )  # fmt: skip
    except (FileNotFoundError, NotADirectoryError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{run_dir} is not a run directory: {CONFIG_NAME} cannot be read ({error})") from None
