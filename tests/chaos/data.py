"""The tests' small corpus, outside pytest."""

import inspect
from pathlib import Path

from tests import conftest


class _Factory:
    """What the fixture needs of pytest's tmp_path_factory."""

    def __init__(self, home: Path):
        self._home = home

    def mktemp(self, name: str) -> Path:
        directory = self._home / name
        directory.mkdir(parents=True)
        return directory


def make_data(home: Path) -> Path:
    """The fixture's pretokenized directory, made below `home` or found there."""
    made = home / "data" / "tokens"
    return made if made.exists() else inspect.unwrap(conftest.data_dir)(_Factory(home))
