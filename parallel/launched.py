"""What a launcher tells its processes by their environment, known before torch is imported. Only this and context.py
read the environment."""

import os
from pathlib import Path


def launched_rank() -> int:
    """The rank that torchrun gave to this process, 0 without it; known before any group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_node() -> int:
    """The number that torchrun gave to this node, 0 without it."""
    return int(os.environ.get("GROUP_RANK", "0"))


def launch_token() -> str:
    """What the monitor calls this launch on this node; empty without it."""
    return os.environ.get("ZERO2ALL_LAUNCH", "")


def exit_record_dir() -> Path | None:
    """Where the launcher wants exit records, if it says so."""
    directory = os.environ.get("ZERO2ALL_EXIT_DIR")
    return Path(directory) if directory else None
