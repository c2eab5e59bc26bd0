"""Environment variables that a launcher sets for its processes, readable before torch is imported. Only this module and
context.py read the environment."""

import os
from pathlib import Path


def launched_rank() -> int:
    """Rank that torchrun gave this process; 0 without torchrun. Known before any group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_node() -> int:
    """Number that torchrun gave this node; 0 without torchrun."""
    return int(os.environ.get("GROUP_RANK", "0"))


def launch_token() -> str:
    """The monitor's name for this launch on this node; empty without a monitor."""
    return os.environ.get("ZERO2ALL_LAUNCH", "")


def exit_record_dir() -> Path | None:
    """Directory that the launcher has chosen for exit records; None if it has not."""
    directory = os.environ.get("ZERO2ALL_EXIT_DIR")
    return Path(directory) if directory else None
