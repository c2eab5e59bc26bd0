"""Which data a run was trained on, from the configuration that it left behind."""

from dataclasses import dataclass
from pathlib import Path

import yaml

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class RunData:
    """Paths are as they were given to the run, relative to where it was started."""

    dirs: dict[str, Path]
    """Set -> its directory."""
    max_seq_len: int
    tokenizer_dir: Path
    seed: int


def is_run(path: Path) -> bool:
    return (path / CONFIG_NAME).exists()


def read_run_data(run_dir: Path) -> RunData:
    """
    Raises:
        ValueError: no run directory of pretraining.
    """
    try:
        config = yaml.safe_load((run_dir / CONFIG_NAME).read_text())
        train_dir = Path(config["train_data_dir"] or config["data_dir"])
        valid_dir = Path(config["valid_data_dir"] or config["data_dir"])
        tokenizer_dir = Path(config["tokenizer_dir"] or train_dir / "tokenizer")
        return RunData({"train": train_dir, "valid": valid_dir}, config["max_seq_len"], tokenizer_dir, config["seed"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{run_dir} is no run directory: {CONFIG_NAME} cannot be read ({error})") from None
