"""The small corpus of the tests, outside pytest."""

import inspect
from pathlib import Path

from tests import conftest


class _Factory:
    """The part of pytest's tmp_path_factory that the fixture needs."""

    def __init__(self, home: Path):
        self._home = home

    def mktemp(self, name: str) -> Path:
        directory = self._home / name
        directory.mkdir(parents=True)
        return directory


def make_data(home: Path) -> Path:
    """The fixture's pretokenized directory, found below `home` or made there."""
    made = home / "data" / "tokens"
    return made if made.exists() else inspect.unwrap(conftest.data_dir)(_Factory(home))
